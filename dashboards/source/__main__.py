"""Writes the dashboards as JSON: `python -m dashboards.source`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as models

from dashboards.source.health import health
from dashboards.source.kafka import kafka
from dashboards.source.publishers import publishers
from dashboards.source.views import views
from dashboards.source.worker import worker

FOLDER = Path(__file__).parent.parent
BUILDERS: dict[str, Callable[[], models.Dashboard]] = {
    "health": health,
    "worker": worker,
    "publishers": publishers,
    "kafka": kafka,
    "views": views,
}


def rendered(name: str) -> str:
    """Return the JSON of a dashboard, of one line for each panel, so that a change shows where it is."""
    content = json.loads(json.dumps(BUILDERS[name](), cls=JSONEncoder))
    panels = ",\n".join(json.dumps(panel, ensure_ascii=False) for panel in content.pop("panels"))
    return f'{json.dumps(content, ensure_ascii=False)[:-1]}, "panels": [\n{panels}\n]}}\n'


if __name__ == "__main__":
    for name in BUILDERS:
        (FOLDER / f"{name}.json").write_text(rendered(name), encoding="utf-8")
