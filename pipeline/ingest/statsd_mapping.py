"""The views that StatsD lines are recorded to: by type, with examples, from which the docs' table is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from pipeline.core.record import Definition
from pipeline.core.statsd import COUNTER, GAUGE, HISTOGRAM, SET, TIMER, Line
from pipeline.settings import IngestSettings

MEMBER = "member"
"""The label of the members of a set, where each is a series."""


class LineViews(NamedTuple):
    """Views of the lines of a type."""

    type: str
    views: Mapping[str, str]
    """The kind of each view, by what is put behind the name."""
    setting: str
    """The setting with which it is so; empty: always."""
    example: str
    """The example of the docs."""
    meaning: str


LINE_VIEWS = (
    LineViews(
        COUNTER,
        {"": "sum"},
        "",
        "name:1|c|@0.1",
        "a value is divided by its sample rate; the quotient is an int if it is whole",
    ),
    LineViews(GAUGE, {"": "last"}, "", "name:5|g", "where the dialect has steps, `+1` and `-1` change the newest value"),
    LineViews(
        TIMER,
        {"_ms": "mean", "_ms_max": "max", "_ms_count": "sum"},
        "ingest_timers=means",
        "name:320|ms|@0.1",
        "a value with a sample rate of 0.1 stands for ten",
    ),
    LineViews(TIMER, {"_ms": "histogram"}, "ingest_timers=histogram", "name:320|ms|@0.1", "the same, with quantiles"),
    LineViews(
        HISTOGRAM,
        {"": "mean", "_max": "max", "_count": "sum"},
        "ingest_timers=means",
        "name:320|h",
        "as a timer, also a distribution (`d`)",
    ),
    LineViews(HISTOGRAM, {"": "histogram"}, "ingest_timers=histogram", "name:320|d", "the same, with quantiles"),
    LineViews(
        SET,
        {"": "sum"},
        "ingest_sets=members",
        "name:ann|s",
        f"with a label `{MEMBER}`: as many series as there are members",
    ),
    LineViews(SET, {"": "distinct"}, "ingest_sets=distinct", "name:ann|s", "the number of different members"),
)
"""All that a line can become. Of two entries of a type the second is the one with a sketch."""

_PLAIN = {it.type: it for it in reversed(LINE_VIEWS)}
_SKETCHED = {it.type: it for it in LINE_VIEWS}


def wanted_views(line: Line, settings: IngestSettings, known: Mapping[str, Definition]) -> list[tuple[str, str]]:
    """Return the views that a line is recorded to, with their kinds; `known` views stay what they are."""
    name = line.name.removesuffix("_ms") if line.type == TIMER else line.name
    sketch = _SKETCHED[line.type]
    (suffix, kind), *_ = sketch.views.items()
    definition = known.get(name + suffix)
    if definition is not None:
        is_sketch = definition.kind == kind
    else:
        is_sketch = settings.ingest_sets == "distinct" if line.type == SET else settings.ingest_timers == "histogram"
    views = sketch.views if is_sketch else _PLAIN[line.type].views
    return [(name + suffix, kind) for suffix, kind in views.items()]
