"""A watched view as a table on a terminal of any width: series, bars, numbers that are never cut."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.cli import console
from pipeline.cli.read import cells_of, label_names
from pipeline.core.answer import Answer, Series
from pipeline.core.query import Labels
from pipeline.core.tables import number_of, sparkline
from pipeline.core.times import time_text
from pipeline.errors import PipelineError
from pipeline.ports import Clock

_REFRESHES_PER_S = 4
_SAMPLE_S = 1.0
_SAMPLES = 40
_ROWS_MAX = 500
_HEAD_LINES = 4
_GAP = 2
_SERIES_MIN, _BARS_MIN, _BARS_MAX = 8, 8, 40
_LATE_MS, _BAD_MS = 2_000, 10_000
_COUNTS = {"sum": None, "histogram": "count", "topk": "total"}
"""Part of a value, by kind, whose change per second is shown; None: the value itself."""
_DISPENSABLE = {"histogram": ("min", "max", "mean", "count"), "distinct": ("upper", "lower")}
"""Parts of values, by kind, that are left out rather than the bars."""
_ITEMS_WIDTH = 32


class Numbers(NamedTuple):
    """Column of numbers."""

    title: str
    cells: list[str]

    @property
    def width(self) -> int:
        return max(map(cell_len, (self.title, *self.cells)))


class _Samples:
    """Values of one series while it was watched, second by second."""

    def __init__(self) -> None:
        self.drawn: deque[Any] = deque(maxlen=_SAMPLES)
        self.per_s: float | None = None
        self._count: Any = None
        self._at_s = 0.0

    def add(self, count: Any, number: Any, now_s: float) -> None:
        """Take a value: its count, if it has one that rises, and the number that stands for it."""
        if isinstance(count, int | float):
            if self._count is not None:
                try:
                    self.per_s = (count - self._count) / (now_s - self._at_s)
                except OverflowError:
                    self.per_s = None
            self._count, self._at_s = count, now_s
        self.drawn.append(number)


class LiveTable:
    """Shows the newest answer, as stale as it is by now, until the end of the context; then its last state stays."""

    def __init__(self, url: str, clock: Clock) -> None:
        self._url = url
        self._clock = clock
        self._newest: tuple[Answer, PipelineError | None, float] | None = None
        self._samples: dict[Labels, _Samples] = {}
        self._sampled_s = -_SAMPLE_S
        self._live = Live(console=console.out, screen=True, get_renderable=self.render, refresh_per_second=_REFRESHES_PER_S)

    def __enter__(self) -> LiveTable:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()
            console.out.print(self.render())

    def take(self, answer: Answer, problem: PipelineError | None) -> None:
        """Show an answer; `problem` is the reason why it is no newer."""
        self._newest = answer, problem, self._clock.monotonic_s()
        if not self._live.is_started:  # an error before the first answer is alone on the screen
            self._live.start(refresh=True)

    def render(self) -> RenderableType:
        """Return what the terminal shows, as it is by now and in its present size."""
        if self._newest is None:
            return Text()
        answer, problem, taken_s = self._newest
        now_s = self._clock.monotonic_s()
        if problem is None and now_s - self._sampled_s >= _SAMPLE_S:
            self._sample(answer, now_s)
        size = console.out.size
        rows = answer.series[: max(1, min(_ROWS_MAX, size.height - _HEAD_LINES))]
        body = self._body(answer, rows, size.width)
        head = self._head(answer, problem, now_s - taken_s, len(rows), size.width)
        return Group(*head, body)

    def _sample(self, answer: Answer, now_s: float) -> None:
        self._sampled_s = now_s
        known, self._samples = self._samples, {}
        if answer.step_ms is not None:
            return
        part = _COUNTS.get(answer.kind)
        for series in islice(answer, _ROWS_MAX):
            key = tuple(series.labels.values())
            samples = self._samples[key] = known.get(key) or _Samples()
            count = None if answer.kind not in _COUNTS else series.value if part is None else series.value[part]
            samples.add(count, number_of(answer, series.value), now_s)
            if answer.kind in ("sum", "topk"):
                samples.drawn[-1] = samples.per_s

    def _head(self, answer: Answer, problem: PipelineError | None, since_s: float, row_count: int, width: int) -> list[Text]:
        staleness_ms = answer.as_of.staleness_ms
        if staleness_ms is None:
            text, style = "staleness unknown", "red"
        else:
            staleness_ms += int(since_s * 1000)
            text = f"at most {ceil(staleness_ms / 1000) or 1:,} s stale"
            style = "green" if staleness_ms < _LATE_MS else "yellow" if staleness_ms < _BAD_MS else "red"
        count = answer.series_total or len(answer.series)
        said = f", {count:,} series" if row_count == count else f", {row_count:,} of {count:,} series"
        if answer.step_ms is not None:
            said += f", up to {time_text(answer.end_ms or 0)}"
        title = Text(f"{console.printable(answer.view)} ({answer.fn or answer.kind})   {self._url}   Ctrl-C ends", "bold")
        lines = [title, Text.assemble((text, style), said)]
        if problem is not None:
            lines.append(Text(f"trying again: {console.printable(str(problem))}", "red"))
        for line in lines:
            line.truncate(width, overflow="ellipsis")
        return lines

    def _body(self, answer: Answer, rows: Sequence[Series], width: int) -> Table:
        """Return the table, with the columns that have room in it."""
        names = [console.printable(", ".join(it.labels.values())) for it in rows]
        title = console.printable(", ".join(label_names(answer))) or "series"
        natural = max(map(cell_len, (title, *names)))
        numbers = self._numbers(answer, rows, width - min(natural, _SERIES_MIN) - _GAP)
        name_width, bars_width = fit(natural, numbers, width, dispensable=_DISPENSABLE.get(answer.kind, ()))
        table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
        table.add_column(title, no_wrap=True, overflow="ellipsis", width=name_width)
        if bars_width:
            table.add_column("", no_wrap=True, width=bars_width)
        for column in numbers:
            table.add_column(column.title, justify="right", no_wrap=True, width=column.width)
        for i, (name, series) in enumerate(zip(names, rows, strict=True)):
            drawn = [self._drawn(answer, series, bars_width)] if bars_width else []
            table.add_row(*map(Text, [name, *drawn, *(it.cells[i] for it in numbers)]))
        return table

    def _drawn(self, answer: Answer, series: Series, width: int) -> str:
        if answer.step_ms is None:
            samples = self._samples.get(tuple(series.labels.values()))
            return sparkline([*(samples.drawn if samples else ())][-width:], width).rjust(width)
        by_end = {at + (answer.over_ms or 0) - (answer.step_ms or 0): value for at, value in series.points}
        starts = range(answer.start_ms or 0, answer.end_ms or 0, answer.step_ms or 1)
        return sparkline([number_of(answer, by_end.get(at)) for at in starts], width)

    def _numbers(self, answer: Answer, rows: Sequence[Series], width: int) -> list[Numbers]:
        """Return the columns of numbers, none of them wider than `width`."""
        newest = [_newest(answer, it) for it in rows]
        parts = [_parts(answer, value) for _, value in newest]
        titles = [*dict.fromkeys(title for it in parts for title in it)] or [answer.fn or answer.kind]
        found = [Numbers(title, [_number(it.get(title, ""), width) for it in parts]) for title in titles]
        if answer.step_ms is not None:
            found.append(Numbers("start", ["" if at is None else time_text(at)[11:] for at, _ in newest]))
        elif answer.kind in _COUNTS:
            rates = [self._samples.get(tuple(it.labels.values())) for it in rows]
            cells = ["" if it is None or it.per_s is None else _rate(it.per_s, width) for it in rates]
            found.append(Numbers("per second", cells))
        return found


def fit(natural: int, numbers: list[Numbers], width: int, *, dispensable: Sequence[str] = ()) -> tuple[int, int]:
    """Leave out the columns of `numbers` that have no room; return the widths of names, `natural` at most, and of bars.

    Bars are worth more than the columns `dispensable`, the first of which goes first, and less than the others.
    """
    least = min(natural, _SERIES_MIN)

    def left() -> int:
        return width - least - sum(it.width + _GAP for it in numbers)

    for title in dispensable:
        if left() < _BARS_MIN + _GAP:
            numbers[:] = [it for it in numbers if it.title != title]
    while left() < 0 and len(numbers) > 1:
        numbers.pop()
    spare = left() - _BARS_MIN - _GAP
    if spare < 0:
        return min(natural, least + max(0, left())), 0
    name_width = min(natural, least + spare)
    return name_width, min(_BARS_MAX, _BARS_MIN + spare - (name_width - least))


def _newest(answer: Answer, series: Series) -> tuple[int | None, Any]:
    """Return the start and value of the newest point, or None and the value where there are no points."""
    if answer.step_ms is None:
        return None, series.value
    return series.points[-1] if series.points else (None, None)


def _parts(answer: Answer, value: Any) -> Mapping[str, Any]:
    if value is None and answer.kind != "last":
        return {}
    if answer.fn is not None:
        return {answer.fn: value}
    cells = cells_of(answer, value)
    if answer.kind == "topk":
        cells["most frequent"] = _items(value["items"])
    return cells


def _items(items: Sequence[Mapping[str, Any]]) -> str:
    """Return the first items that fit with their counts; names are cut, counts are not."""
    text = ""
    for it in items:
        count = f" {it['count']:,}"
        name = console.printable(it["item"])
        if not text and cell_len(name + count) > _ITEMS_WIDTH:
            return name[: _ITEMS_WIDTH // 2] + "…" + count
        longer = f"{text}, {name}{count}" if text else name + count
        if cell_len(longer) > _ITEMS_WIDTH:
            break
        text = longer
    return text


def _number(value: Any, width: int) -> str:
    """Return a cell of at most `width`: a number whole or, if it is longer, with an exponent; a text is cut."""
    if isinstance(value, str):
        text = console.printable(value)
        return text if cell_len(text) <= width else text[: max(1, width - 1)] + "…"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        text = f"{value:,}"
        if len(text) <= width:
            return text
        digits = str(abs(value))
        return f"{'-' * (value < 0)}{digits[0]}.{digits[1:4]}e+{len(digits) - 1}"
    if not 1e-3 <= abs(value) < 1e15 and value:
        return f"{value:.4g}"
    text = f"{value:,.2f}" if abs(value) >= 100 else f"{value:.4g}"
    return text if len(text) <= width else f"{value:.4g}"


def _rate(per_s: float, width: int) -> str:
    text = f"{per_s:,.0f}" if abs(per_s) >= 100 else f"{per_s:.1f}"
    return text if len(text) <= width else f"{per_s:.4g}"
