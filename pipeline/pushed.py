"""Content of pushed texts of metrics and of exports, and what is kept of the running totals among it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from pipeline.core.grants import Bounds
from pipeline.ports import Fitted, RawDelta, Refusal, RequestKey


class RunningTotal(NamedTuple):
    """Totals of a stream since its start, of which only the increase since the last ones counts."""

    line: int
    stream: bytes
    """Identifies the stream, its start included."""
    start_ns: int
    at_ns: int
    """Time of the totals; 0: unknown, then the greater ones are the newer."""
    deltas: Sequence[RawDelta]
    """The totals, in place of deltas."""


class Pushed(NamedTuple):
    """Content of a text of metrics, or of an export, whose points have numbers in place of lines."""

    deltas: Sequence[RawDelta]
    lines: Sequence[int]
    """Line number of each delta."""
    refused: Sequence[Refusal]
    whole: bool = True
    """False: the text has more samples than may be taken at once, and was not read to its end."""
    totals: Sequence[RunningTotal] = ()


class StreamTotals(NamedTuple):
    """Totals of a stream that are published."""

    start_ns: int
    at_ns: int
    values: tuple[Any, ...]


class SentIncreases(NamedTuple):
    """Increases whose outcome is not known: they are sent again, under the same key, before any others."""

    deltas: list[RawDelta]
    lines: list[int]
    key: RequestKey
    known: dict[bytes, StreamTotals]
    """Totals that are published once the increases are."""
    at_ms: int
    bounds: Bounds | None = None
    """Bounds of the access token that the totals came with."""


class SavedTotals(NamedTuple):
    """Content of a `TotalsMemory`."""

    known: dict[bytes, StreamTotals]
    """By stream, what is published of it; the one that has not come for longest is the first."""
    known_from_ns: int
    """Streams that have begun before, and are not known, may have been counted in part."""
    sent: SentIncreases | None = None


class TotalsMemory(Protocol):
    """Keeps what is published of totals beyond the end of the process. One thread at a time uses it."""

    def load(self) -> SavedTotals | None:
        """Return what was saved; None if nothing is known."""
        ...

    def save(self, changes: Mapping[bytes, StreamTotals | None], known_from_ns: int, sent: SentIncreases | None) -> None:
        """Save all of this or nothing, so that it outlives a crash. None: the stream is forgotten.

        Raises `Unavailable` if it may not be saved.
        """
        ...


class TotalsPublisher(Protocol):
    """Publishes the increases of totals. Safe from any thread."""

    def publish(self, totals: Sequence[RunningTotal], key: RequestKey, bounds: Bounds | None = None) -> Fitted:
        """Publish the increases; return what was left out. `key` identifies the request and its repeats;
        `bounds` are those of the access token.

        Raises `Unavailable` if they may be published: the request can be repeated, and counts once.
        """
        ...
