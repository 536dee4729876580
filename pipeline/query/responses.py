"""Bodies that the HTTP API answers, apart from those that clients decode too (`core.answer`)."""

from __future__ import annotations

import msgspec

from pipeline.query.dead_letters import Outcome


class Accepted(msgspec.Struct):
    """Answer of `POST /v1/deltas`."""

    accepted: int
    """Deltas in the request."""
    token: str
    """`after=<token>` of a read waits for them."""


class BatchesAccepted(msgspec.Struct):
    """Answer of `POST /v1/batches`."""

    next_offsets: list[int]
    """The position that covers each batch."""
    token: str


class LeftOutLine(msgspec.Struct):
    """A line of `POST /v1/openmetrics` that was not taken."""

    line: int
    """Number of the line, from 1."""
    reason: str
    detail: str


class MetricsAccepted(msgspec.Struct):
    """Answer of `POST /v1/openmetrics`."""

    accepted: int
    """Samples that were taken."""
    refused: int
    """Lines that were not taken."""
    reasons: dict[str, int]
    """Count of refused lines, by reason."""
    first_refused: list[LeftOutLine]
    token: str


class LettersReplayed(msgspec.Struct):
    """Answer of `POST /v1/dead-letters/replay`."""

    outcomes: list[Outcome]
    after: str | None
    """The `after` of the next request; null if there are no more letters or the time was over."""
