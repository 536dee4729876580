"""What the server answers to reads, as values: the other end of each is in `adapters.http`."""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.core.view import Alternative, Labels, Listed


class AsOf(msgspec.Struct, frozen=True):
    """What an answer reflects: see `adapters.http.AsOf`, its other end."""

    staleness_ms: int | None
    next_offsets: dict[str, int]


class Series(msgspec.Struct, frozen=True):
    """One row of an answer."""

    labels: dict[str, str]
    value: Any


class Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """A merged view, in the shape of the HTTP API."""

    view: str
    kind: str
    by: Labels | None
    series: list[Series]
    as_of: AsOf
    truncated: bool = False
    series_total: int | None = None
    also: tuple[Alternative, ...] = ()
    """What else the view is: kinds and windows that `kind` and `window_s` choose."""


class View(msgspec.Struct, frozen=True):
    """A definition of a view, and how many series of it there are, summed over partitions."""

    name: str
    kind: str
    labels: Labels
    window_s: int | None
    series_count: int
    monotone: bool
    defined_at_ms: int
    """When the log accepted the first batch of it."""
    answers: bool
    """Whether a read that chooses no kind and no window merges it."""

    @classmethod
    def of(cls, it: Listed) -> View:
        """A definition as it is listed."""
        d = it.definition
        return cls(d.view, d.kind, d.labels, d.window_s or None, it.series_count, d.monotone, it.defined_at_ms, it.answers)


class Views(msgspec.Struct, frozen=True):
    """All views, each once for every definition that it has."""

    views: list[View]
    as_of: AsOf


class Changed(msgspec.Struct, frozen=True):
    """What was dropped or reset."""

    action: str
    view: str
    definitions: list[View]
    """As the server knew them when it gave the order."""
    token: str
    """`after=<token>` of a read waits until it is carried out."""


class PartitionState(msgspec.Struct, frozen=True):
    """How far one partition is."""

    partition: int
    next_offset: int
    end_offset: int | None
    """None: the log is away."""
    lag: int | None
    staleness_ms: int | None
    committed_at_ms: int
    topic_id: str
    """The id of the topic that `next_offset` is of; empty before a first commit."""
