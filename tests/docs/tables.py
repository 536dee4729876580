"""The tables of settings and metrics in the docs, made from the code. `python -m tests.docs.tables` writes them."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from pipeline.metrics import CATALOGUE
from pipeline.settings import (
    GROUPS,
    IngestSettings,
    KafkaSettings,
    LogSettings,
    PublisherSettings,
    QuerySettings,
    WorkerSettings,
    default_of,
)

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "pipeline" / "docs").glob("*.md"))]
"""What a user reads: the README first."""
TITLES = {
    PublisherSettings: "publisher",
    KafkaSettings: "Kafka",
    LogSettings: "log and stores",
    WorkerSettings: "worker",
    QuerySettings: "HTTP server",
    IngestSettings: "ingest",
}


def settings_table() -> str:
    """One row for each setting."""
    rows = ["| setting | default | of | meaning |", "|---|---|---|---|"]
    rows += [
        f"| `{item.name}` | {_shown(default_of(item))} | {TITLES[group]} | {item.metadata['doc']} |"
        for group in GROUPS
        for item in fields(group)
    ]
    return "\n".join(rows)


def _shown(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def metrics_table() -> str:
    """One row for each metric."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    rows += [f"| `{metric.name}` | {metric.type} | {', '.join(metric.labels)} | {metric.help} |" for metric in CATALOGUE]
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """Return the text of a page with the tables in it as they should be."""
    for name, table in (("settings", settings_table()), ("metrics", metrics_table())):
        text = re.sub(rf"(<!-- {name}:[^\n]*\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
