"""Answers as reads find them: with the positions at which the stores were read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from msgspec.structs import replace

from pipeline.budget import checked
from pipeline.core.answer import Answer, Answers, AsOf, Series
from pipeline.core.query import Labels, MergedDefinition, Query, Selected, freed_in_slices
from pipeline.core.record import Position
from pipeline.core.span import Span
from pipeline.query.ranges import Points

SERIES_RUN = 5_000
"""Series of a large answer that are made, or encoded, at once."""


class Asked(NamedTuple):
    """A query when it is asked, with what the clock and the stores make of it."""

    query: Query
    now_ms: int
    span: Span | None
    """Range of a view with windows."""
    positions: Mapping[int, Position]
    """Commit of each partition that its store reflects. Equal queries with equal spans at equal positions have equal
    series."""


class SeriesRows(Sequence[Series]):
    """Series that are made when they are asked for, so that a large answer is not in memory twice."""

    def __init__(self, names: Labels, selected: Selected) -> None:
        self._names = names
        self._labels, self._values = selected.labels, selected.values

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> Series: ...

    @overload
    def __getitem__(self, index: slice) -> list[Series]: ...

    def __getitem__(self, index: int | slice) -> Series | list[Series]:
        names = self._names
        if isinstance(index, int):
            return Series(dict(zip(names, self._labels[index], strict=True)), self._values[index])
        rows = zip(self._labels[index], self._values[index], strict=True)
        return [Series(dict(zip(names, labels)), value) for labels, value in rows]  # noqa: B905  # as many, and quicker

    def release(self) -> None:
        """Forget all rows: an answer that is encoded does not need them."""
        for rows in (self._labels, self._values):
            for _ in freed_in_slices(rows):
                pass

    def __iter__(self) -> Iterator[Series]:
        for i in checked(range(0, len(self), SERIES_RUN)):
            yield from self[i : i + SERIES_RUN]


class FoundAnswer(NamedTuple):
    """An answer, and the position of each store at which it was read. Its series are `SeriesRows` if they are many."""

    answer: Answer
    positions: Mapping[int, Position]


def release(answer: Answer) -> None:
    """Forget the rows of a large answer that is encoded, bit by bit: the interpreter's lock is held while they are freed."""
    rows: Any = answer.series
    if isinstance(rows, SeriesRows):
        rows.release()


def span_of(answer: Answer) -> Span | None:
    """Return the range of an answer; None if it has no points."""
    if answer.step_ms is None:
        return None
    return Span(answer.start_ms or 0, answer.end_ms or 0, answer.step_ms, answer.over_ms or 0)


def unchanged_head(asked: Asked) -> Answer:
    """Return an answer that says only how stale it is, for a client that has the rest."""
    step_ms = None if asked.span is None else asked.span.step_ms
    return Answer(asked.query.view, "", None, [], AsOf(None, {}), step_ms=step_ms)


def answer_of(query: Query, merged: MergedDefinition, selected: Selected, as_of: AsOf) -> Answer:
    """Return the answer with these rows."""
    rows = SeriesRows(_names(query, merged), selected)
    series: Any = rows if len(rows) > SERIES_RUN else rows[:]
    return _answer(query, merged, series, selected.series_total, as_of)


def answers_together(answers: Sequence[Answer]) -> Answers:
    """Return answers of one moment, all as stale as the last one, whose staleness was stated when all were made."""
    as_of = answers[-1].as_of
    return Answers([replace(it, as_of=as_of) for it in answers], as_of)


def points_answer(
    query: Query,
    merged: MergedDefinition,
    points: Points,
    as_of: Callable[[], AsOf],
    final_before_ms: int,
    check: Callable[[], None],
) -> Answer:
    """Return the answer with these points; `check` may raise while they are made."""
    series, total = points.series(_names(query, merged), check)
    of_range = {**points.answer_fields(), "final_before_ms": final_before_ms}
    return _answer(query, merged, series, total, as_of(), **of_range)


def _answer(
    query: Query, merged: MergedDefinition, series: list[Series], total: int, as_of: AsOf, **of_range: Any
) -> Answer:
    cut = total > len(series)
    return Answer(
        view=query.view,
        kind=merged.definition.kind,
        by=query.by,
        series=series,
        as_of=as_of,
        truncated=cut,
        series_total=total if cut else None,
        also=merged.also,
        **of_range,
    )


def _names(query: Query, merged: MergedDefinition) -> Labels:
    return merged.definition.labels if query.by is None else query.by
