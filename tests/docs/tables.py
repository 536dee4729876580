"""Tables in the docs, made from the code: settings, metrics, errors, states. `python -m tests.docs.tables` writes them."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import pipeline
from pipeline.core import task
from pipeline.errors import PipelineError, exit_code
from pipeline.ingest.openmetrics import parse_pushed
from pipeline.ingest.otlp import JSON, parse_export
from pipeline.ingest.statsd_mapping import LINE_VIEWS
from pipeline.metrics import CATALOGUE
from pipeline.pushed import Pushed
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


TEXTS = {
    "counter": "# TYPE rows counter\nrows_total 5",
    "counter, by its own name": "# TYPE rows counter\nrows 5",
    "gauge, info, stateset, unknown": "# TYPE rows gauge\nrows 5",
    "histogram": '# TYPE took histogram\ntook_bucket{le="1"} 2\ntook_count 2\ntook_sum 1.5',
    "gaugehistogram": '# TYPE took gaugehistogram\ntook_bucket{le="1"} 2\ntook_gcount 2\ntook_gsum 1.5',
    "summary": '# TYPE took summary\ntook_count 2\ntook_sum 1.5\ntook{quantile="0.5"} 1',
    "a sample without a type": "rows 5",
    "`_created`, exemplar": '# TYPE rows counter\nrows_created 1\nrows_total 5 # {trace="a"} 1',
}
"""Texts, of which the table says what they become."""
_POINT = {"timeUnixNano": "1", "startTimeUnixNano": "1"}
_NUMBER = {**_POINT, "asInt": "5"}
_BUCKETS = {**_POINT, "count": "2", "sum": 1.5, "bucketCounts": ["2", "0"], "explicitBounds": [1]}
_RUN = {**_POINT, "count": "2", "sum": 2.5, "positive": {"bucketCounts": ["2"]}}
POINTS: Mapping[str, Any] = {
    "sum, monotonic, delta": {"sum": {"dataPoints": [_NUMBER], "aggregationTemporality": 1, "isMonotonic": True}},
    "sum, monotonic, cumulative": {"sum": {"dataPoints": [_NUMBER], "aggregationTemporality": 2, "isMonotonic": True}},
    "sum, not monotonic, delta": {"sum": {"dataPoints": [_NUMBER], "aggregationTemporality": 1}},
    "sum, not monotonic, cumulative": {"sum": {"dataPoints": [_NUMBER], "aggregationTemporality": 2}},
    "gauge": {"gauge": {"dataPoints": [_NUMBER]}},
    "histogram, delta": {"histogram": {"dataPoints": [_BUCKETS], "aggregationTemporality": 1}},
    "histogram, cumulative": {"histogram": {"dataPoints": [_BUCKETS], "aggregationTemporality": 2}},
    "exponential histogram, delta": {"exponentialHistogram": {"dataPoints": [_RUN], "aggregationTemporality": 1}},
    "exponential histogram, cumulative": {"exponentialHistogram": {"dataPoints": [_RUN], "aggregationTemporality": 2}},
    "summary": {"summary": {"dataPoints": [_POINT]}},
}
"""Metrics of OTLP, of which the table says what they become."""


def openmetrics_table() -> str:
    """Return a row for each type of a family, with the views that the parser makes of an example."""
    rows = ["| type | example | views |", "|---|---|---|"]
    for name, text in TEXTS.items():
        lines = [f"`{line}`" for line in text.splitlines() if not line.startswith("# TYPE")]
        rows.append(f"| {name} | {'<br>'.join(lines)} | {_becomes(parse_pushed(text.encode(), '', 10, 200))} |")
    return "\n".join(rows)


def otlp_table() -> str:
    """Return a row for each type of a metric, with the views that the parser makes of an example."""
    rows = ["| metric `name` | views |", "|---|---|"]
    for name, metric in POINTS.items():
        request = {"resourceMetrics": [{"scopeMetrics": [{"metrics": [{"name": "name", **metric}]}]}]}
        rows.append(f"| {name} | {_becomes(parse_export(json.dumps(request).encode(), JSON, 10, []))} |")
    return "\n".join(rows)


def _becomes(pushed: Pushed) -> str:
    """Return the views of what was parsed, and what was left out of it."""
    found: dict[str, None] = {}
    for deltas, how in ((pushed.deltas, ""), *[(it.deltas, ", by its increase") for it in pushed.totals]):
        for it in deltas:
            labels = "".join(f"{{{name}}}" for name in it.labels)
            found[f"`{it.view}{labels}` {it.kind}{', monotone' * bool(it.monotone)}{how}"] = None
    return "; ".join([*found, *[f"refused: `{it.reason}`" for it in pushed.refused]])


def with_tables(text: str) -> str:
    """Return the text of a page with its tables made anew."""
    tables = {
        "settings": settings_table,
        "metrics": metrics_table,
        "errors": errors_table,
        "states": states_table,
        "statsd": statsd_table,
        "openmetrics": openmetrics_table,
        "otlp": otlp_table,
    }
    for name, make in tables.items():
        table = make()
        text = re.sub(rf"(<!-- {name}:[^\n]*\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))
