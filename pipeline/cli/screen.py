"""The display of `pipeline demo` while it runs, read from the query API."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
from rich.console import Group, RenderableType
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
_HEAD_LINES = 1
_WIDE = 100
"""Columns of a terminal that has room for the kinds, and for longer labels."""
_NARROW = 70
"""Columns of a terminal that has room for rates."""
_LABELS_MAX, _LABELS_WIDE_MAX = 16, 36
_VALUE_MIN, _VALUE_MAX = 4, 44
_RATE_WIDTH = 11
_RATE_OVER_S = 2.0
"""Seconds between the two values of a rate: longer than the demo's slowest samples."""


class ShownSeries(NamedTuple):
    """One series on the screen."""

    view: str
    kind: str
    labels: str
    value: Any
    """A value of an answer; a list of them for a view with windows."""
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
            self._live.update(Text())  # in the end a live display shows all lines, and those beyond the screen would stay
            self._live.stop()

    def update(self, elapsed_s: float, recorded: int, stats: Mapping[str, int], notes: Sequence[str]) -> None:
        """Read all views and show them."""
        if self._quiet or (not self._is_live and elapsed_s - self._line_s < _LINE_EVERY_S):
            return
        self._line_s = elapsed_s
        shown = self._read(elapsed_s)
        head = (
            f"{elapsed_s:.0f} s: {recorded:,} deltas, {stats['batches']:,} batches, {shown.series_total:,} series,"
            f" staleness {'?' if shown.staleness_ms is None else shown.staleness_ms} ms, lag {shown.lag}"
        )
        if self._is_live:
            self._live.update(self._table(head, shown, notes), refresh=True)
            return
        best = {row.view: f"{row.view}{{{row.labels}}} {value_text(row.value)}" for row in reversed(shown.rows)}
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
                value = [point for _, point in series.points] if series.points else series.value
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
        lines = [f"page {self._url}/   API {self._url}/docs   Ctrl-C stops", head, *notes, shown.problem]
        width, height = console.out.size
        title = Text("\n".join(filter(None, lines))).wrap(console.out, width)
        rows = fitting(shown.rows, height - len(title) - _HEAD_LINES)

        def column(name: str, texts: Iterable[str], most: int = _VALUE_MAX) -> int:
            """Add a column as wide as its texts, and return how much of the line it takes."""
            wide = max(len(name), min(most, max(map(len, texts), default=0)))
            table.add_column(name, no_wrap=True, width=wide)
            return wide + 1

        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        left = width - column("view", (row.view for row in rows))
        if width >= _WIDE:
            left -= column("kind", (row.kind for row in rows))
        left -= column("series", (row.labels for row in rows), _LABELS_WIDE_MAX if width >= _WIDE else _LABELS_MAX)
        rates = width >= _NARROW
        room = max(_VALUE_MIN, min(_VALUE_MAX, left - rates * (_RATE_WIDTH + 1)))
        table.add_column("value", justify="right", no_wrap=True, width=room)
        if rates:
            table.add_column("per second", justify="right", no_wrap=True, width=_RATE_WIDTH)
        view = ""
        for row in rows:
            names = (row.view, row.kind) if width >= _WIDE else (row.view,)
            cells = [*(name if row.view != view else "" for name in names), row.labels, value_text(row.value, room)]
            view = row.view
            if rates:
                cells.append("" if row.per_s is None else f"{row.per_s:,.0f}")
            table.add_row(*map(Text, cells))
        return Group(title, table)


def fitting(rows: Sequence[ShownSeries], count: int) -> list[ShownSeries]:
    """Return at most `count` rows in their order: the first series of each view, then the second of each, and so on."""
    places: dict[str, int] = {}
    ranked = []
    for index, row in enumerate(rows):
        places[row.view] = place = places.get(row.view, -1) + 1
        ranked.append((place, index))
    return [rows[index] for _, index in sorted(sorted(ranked)[: max(0, count)], key=lambda it: it[1])]


def value_text(value: Any, room: int = _VALUE_MAX) -> str:
    """Return a value as text. Of one that has several parts or points, as many are shown as there is room for."""
    if isinstance(value, list):
        return sparkline(value, room)
    if not isinstance(value, dict):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return console.printable(str(value))
        return f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
    if "estimate" in value:
        return f"{value['estimate']:,}" + (
            f" ({value['lower']:,} to {value['upper']:,})" if value["lower"] < value["upper"] else ""
        )
    if "items" in value:
        parts = [f"{console.printable(it['item'])} {it['count']:,}" for it in value["items"]]
    else:  # of a histogram
        parts = [f"p{float(q) * 100:g} {number:,.0f}" for q, number in value["quantiles"].items()]
    text = ", ".join(parts[:1])
    for part in parts[1:]:
        if len(text) + 2 + len(part) > room:
            break
        text += f", {part}"
    return text
