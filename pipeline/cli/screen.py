"""The display of `pipeline demo` while it runs, read from the query API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from rich.console import RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.adapters.http import HttpReader
from pipeline.cli import console
from pipeline.core.answer import Status, known
from pipeline.core.record import Definition
from pipeline.core.tables import sparkline
from pipeline.errors import NotFound, PipelineError

_TOP = {"cpu_ms": 4}
_TOP_DEFAULT = 2
_FACTS = 6
_LINE_EVERY_S = 2.0
_ROWS_MIN = 4
_SPARKS_MAX = 40
_FRAME_LINES = 5
_RATE_OVER_S = 2.0
"""Seconds between the two values of a rate: longer than the demo's slowest samples."""


class ShownSeries(NamedTuple):
    """One series on the screen."""

    view: str
    kind: str
    labels: str
    value: Any
    per_s: float | None


class Shown(NamedTuple):
    """Content of the screen at one time."""

    rows: list[ShownSeries]
    series_total: int
    staleness_ms: int | None
    lag: int
    problem: str


class _Rate(msgspec.Struct):
    """Rate of a sum on the screen, and the value that the next one is worked out from."""

    since_s: float
    value: Any
    per_s: float | None = None


class Screen:
    """A live table on a terminal, a line now and then elsewhere, nothing when `quiet`. Used from one thread."""

    def __init__(self, reader: HttpReader, definitions: Sequence[Definition], url: str, *, quiet: bool) -> None:
        self._reader = reader
        self._definitions = definitions
        self._url = url
        self._quiet = quiet
        self._rates: dict[tuple[str, str], _Rate] = {}
        self._line_s = 0.0
        self._live = Live(console=console.out, auto_refresh=False, transient=True, vertical_overflow="crop")
        self._is_live = not quiet and console.out.is_terminal

    def __enter__(self) -> Screen:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_live:
            self._live.stop()

    def update(self, elapsed_s: float, recorded: int, stats: Mapping[str, int], notes: Sequence[str]) -> None:
        """Read all views and show them."""
        if self._quiet or (not self._is_live and elapsed_s - self._line_s < _LINE_EVERY_S):
            return
        self._line_s = elapsed_s
        shown = self._read(elapsed_s)
        head = (
            f"{elapsed_s:.0f} s: {recorded:,} deltas recorded, {stats['batches']:,} batches, {shown.series_total:,} series,"
            f" staleness {'?' if shown.staleness_ms is None else shown.staleness_ms} ms, lag {shown.lag}"
        )
        if self._is_live:
            self._live.update(self._table(head, shown, notes), refresh=True)
            return
        best = {row.view: f"{row.view}{{{row.labels}}} {_number(row.value)}" for row in reversed(shown.rows)}
        top = ", ".join(best[view] for view in ("cpu_ms", "network_bytes", "switches") if view in best)
        console.show(f"{head}; {shown.problem or top}")

    def _read(self, now_s: float) -> Shown:
        rows: list[ShownSeries] = []
        total, staleness, lag, problem = 0, [], 0, ""
        for definition in self._definitions:
            view = definition.view
            facts = definition.kind == "last"  # texts have no order
            try:
                top = None if facts or definition.window_s else _TOP.get(view, _TOP_DEFAULT)
                answer = self._reader.get(view, top=top, limit=_FACTS if facts else None)
            except NotFound:
                continue  # nothing was recorded yet
            except PipelineError as error:
                problem = str(error)
                break
            staleness.append(answer.as_of.staleness_ms)
            total += answer.series_total or len(answer.series)
            for series in answer.series:
                labels = console.printable(", ".join(series.labels.values()))
                per_s = self._per_s(definition, labels, now_s, series.value)
                value = sparkline([point for _, point in series.points], _SPARKS_MAX) if series.points else series.value
                rows.append(ShownSeries(view, definition.kind, labels, value, per_s))
        try:
            lag = sum(known(it.lag) or 0 for it in msgspec.convert(self._reader.status(), Status).partitions)
        except PipelineError as error:
            problem = str(error)
        worst = max((ms for ms in staleness if ms is not None), default=0) if None not in staleness else None
        return Shown(rows, total, worst, lag, problem)

    def _per_s(self, definition: Definition, labels: str, now_s: float, value: Any) -> float | None:
        if definition.kind != "sum" or definition.window_s:
            return None
        rate = self._rates.setdefault((definition.view, labels), _Rate(now_s, value))
        if now_s - rate.since_s >= _RATE_OVER_S:
            rate.per_s = (value - rate.value) / (now_s - rate.since_s)
            rate.since_s, rate.value = now_s, value
        return rate.per_s

    def _table(self, head: str, shown: Shown, notes: Sequence[str]) -> RenderableType:
        title = [line for line in (f"{self._url}   {self._url}/docs   Ctrl-C stops", head, *notes, shown.problem) if line]
        table = Table(title=Text("\n".join(title)))
        table.add_column("view")
        table.add_column("kind")
        table.add_column("series", no_wrap=True, max_width=36)
        table.add_column("value", justify="right", no_wrap=True, max_width=44)
        table.add_column("per second", justify="right")
        view = ""
        for row in shown.rows[: max(_ROWS_MIN, console.out.height - len(title) - _FRAME_LINES)]:
            first = row.view != view
            view = row.view
            table.add_row(
                Text(view if first else ""),
                row.kind if first else "",
                Text(row.labels),
                Text(_number(row.value)),
                "" if row.per_s is None else f"{row.per_s:,.0f}",
            )
        return table


def _number(value: Any) -> str:
    if isinstance(value, dict):  # of a histogram
        return ", ".join(f"p{float(q) * 100:g} {number:,.0f}" for q, number in value["quantiles"].items())
    if isinstance(value, bool) or not isinstance(value, int | float):
        return console.printable(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
