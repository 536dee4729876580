"""Tables in the docs, made from the code: settings, metrics, errors, states. `python -m tests.docs.tables` writes them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path

import pipeline
from pipeline.core import task
from pipeline.errors import PipelineError, exit_code
from pipeline.ingest.statsd_mapping import LINE_VIEWS
from pipeline.metrics import CATALOGUE
from pipeline.settings import (
    GROUPS,
    ClientSettings,
    IngestSettings,
    KafkaSettings,
    LogSettings,
    PublisherSettings,
    QuerySettings,
    WorkerSettings,
    default_of,
)
from pipeline.worker import active, partition

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "pipeline" / "docs").glob("*.md"))]
"""Pages that a user reads: the README first."""
TITLES = {
    PublisherSettings: "publisher",
    ClientSettings: "publisher and reader",
    KafkaSettings: "Kafka",
    LogSettings: "log and stores",
    WorkerSettings: "worker",
    QuerySettings: "HTTP server",
    IngestSettings: "ingest",
}


def settings_table() -> str:
    """Return a row for each setting."""
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
    """Return a row for each metric."""
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    rows += [f"| `{metric.name}` | {metric.type} | {', '.join(metric.labels)} | {metric.help} |" for metric in CATALOGUE]
    return "\n".join(rows)


def errors_table() -> str:
    """Return a row for each error, with its subclasses below it."""
    rows = ["| error | what to do | exit code of a command | of a process that served |", "|---|---|---|---|"]
    for depth, error in _kinds(PipelineError, 0):
        name = f"`{error.__name__}`" + ("" if hasattr(pipeline, error.__name__) else " (`pipeline.errors`)")
        doc = " ".join((inspect.getdoc(error) or "").split())
        one = error.__new__(error)
        codes = exit_code(one), exit_code(one, started=True, ready=True)
        rows.append(f"| {'&nbsp;&nbsp;' * depth}{name} | {doc} | {' | '.join(str(int(code)) for code in codes)} |")
    return "\n".join(rows)


def _kinds(error: type[PipelineError], depth: int) -> Iterator[tuple[int, type[PipelineError]]]:
    yield depth, error
    for kind in error.__subclasses__():
        if kind.__module__ == error.__module__:
            yield from _kinds(kind, depth + 1)


def states_table() -> str:
    """Return a row for each state of a partition's three machines, with its events."""
    machines: dict[str, Mapping[tuple[Enum, Enum], Enum]] = {
        "active partition": active.TRANSITIONS,
        "its store": partition.TRANSITIONS,
        "its task": task.TRANSITIONS,
    }
    rows = ["| machine | state | event: next state |", "|---|---|---|"]
    for name, transitions in machines.items():
        for state in type(next(iter(transitions))[0]):
            events = [f"{event.value}: {after.value}" for (before, event), after in transitions.items() if before is state]
            rows.append(f"| {name} | {state.value} | {'; '.join(events) or 'the end'} |")
    return "\n".join(rows)


def statsd_table() -> str:
    """Return a row for each view, or three, that StatsD lines become."""
    rows = ["| StatsD | views | with the setting |", "|---|---|---|"]
    for it in LINE_VIEWS:
        views = ", ".join(f"`name{suffix}` {kind}" for suffix, kind in it.views.items())
        example = it.example.replace("|", "\\|")
        rows.append(f"| `{example}` {it.type} | {views}; {it.meaning} | {it.setting and f'`{it.setting}`'} |")
    return "\n".join(rows)


def with_tables(text: str) -> str:
    """Return the text of a page with its tables made anew."""
    tables = {
        "settings": settings_table,
        "metrics": metrics_table,
        "errors": errors_table,
        "states": states_table,
        "statsd": statsd_table,
    }
    for name, make in tables.items():
        table = make()
        text = re.sub(rf"(<!-- {name}:[^\n]*\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
