"""`pipeline watch`: a view on a terminal as it changes, or its changes line by line."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

from pipeline.adapters.clock import SystemClock
from pipeline.cli import console
from pipeline.cli.live_table import LiveTable
from pipeline.cli.read import cell_text, cells_of, labels_to_keep
from pipeline.core.answer import Answer, Series
from pipeline.core.query import Labels
from pipeline.core.times import time_text
from pipeline.errors import PipelineError
from pipeline.roles.readers import Reader
from pipeline.roles.signals import stopping_on_signals


def run_watch(
    url: str,
    view: str,
    *,
    where: Sequence[str],
    labels: Sequence[str],
    total: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Show the view until SIGINT or SIGTERM; return the exit code. `options` are those of `Reader.watch`."""
    by = labels_to_keep(labels, total=total)
    with Reader(url) as reader, closing(reader.watch(view, where, by, **options)) as watch, stopping_on_signals(watch.close):
        if not as_json and console.out.is_terminal:
            with LiveTable(url, SystemClock()) as table:
                for answer in watch:
                    table.take(answer, watch.problem)
            return console.OK
        take: Callable[[Answer], None] = _print_json if as_json else ChangedLines().take
        lost = False
        for answer in watch:
            take(answer)
            lost = _note(watch.problem, lost)
    return console.OK


def _note(problem: PipelineError | None, lost: bool) -> bool:
    """Say on standard error when answers cease to come, and when they come again."""
    if problem is not None and not lost:
        console.note(f"pipeline: {problem}; trying again, what was printed grows older")
    elif problem is None and lost:
        console.note("pipeline: answers come again")
    return problem is not None


def _print_json(answer: Answer) -> None:
    console.print_json(answer)


class ChangedLines:
    """Prints what has changed since the last answer: a line with tabs for each series or point, below a line of titles."""

    def __init__(self) -> None:
        self._titles: tuple[str, ...] = ()
        self._known: dict[Labels, Mapping[int | None, Any]] = {}
        """Values by the start of their points, or by None, of each series."""

    def take(self, answer: Answer) -> None:
        """Print the difference between an answer and the last one."""
        stale = answer.as_of.staleness_ms
        end = "unknown" if stale is None else str(stale)
        lines: list[tuple[str, ...]] = []
        known, self._known = self._known, {}
        for series in answer:
            labels = tuple(series.labels.values())
            values = self._known[labels] = _values_of(answer, series)
            before = known.pop(labels, {})
            for start_ms, value in values.items():
                if start_ms not in before or not _same(before[start_ms], value):
                    lines += self._titled(answer, series, value)
                    cells = (*labels, *_start(start_ms), *map(cell_text, _cells(answer, value).values()))
                    lines.append((*cells, *([""] * (len(self._titles) - len(cells) - 1)), end))
        for labels in known:  # gone
            lines.append((*labels, *([""] * (len(self._titles) - len(labels) - 1)), end))
        console.write("".join("\t".join(map(console.printable, line)) + "\n" for line in lines).encode())

    def _titled(self, answer: Answer, series: Series, value: Any) -> list[tuple[str, ...]]:
        if value is None and not self._titles:
            found = (it for other in answer for it in _values_of(answer, other).values() if it is not None)
            value = next(found, None)
        elif value is None:
            return []
        start = () if answer.step_ms is None else ("start",)
        titles = (*series.labels, *start, *_cells(answer, value), "staleness_ms")
        if titles == self._titles:
            return []
        self._titles = titles
        return [titles]


def _values_of(answer: Answer, series: Series) -> Mapping[int | None, Any]:
    return {None: series.value} if answer.step_ms is None else dict(series.points)


def _cells(answer: Answer, value: Any) -> dict[str, Any]:
    return {answer.fn or answer.kind: value} if answer.fn or value is None else cells_of(answer, value)


def _start(start_ms: int | None) -> tuple[str, ...]:
    return () if start_ms is None else (time_text(start_ms),)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)  # True is no 1
