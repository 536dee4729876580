"""Answers to reads, as values: servers encode them, and clients decode the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from pipeline.core import tables
from pipeline.core.grants import Bounds
from pipeline.core.query import Alternative, Labels, Listed
from pipeline.core.record import Definition
from pipeline.core.span import Point
from pipeline.errors import Invalid


class AsOf(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Part of the log that an answer reflects."""

    staleness_ms: int | None
    """Upper bound on the age of anything that the log had accepted and the answer lacks; None: unknown."""
    next_offsets: dict[str, int]
    """By partition, the offset of the first record of the deltas topic that is not in the answer."""
    missing_partitions: list[int] = []
    """Partitions of which nothing is in the answer, because no server that was asked follows them."""


class Series(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """One row of an answer: a value, or points where the view has windows."""

    labels: dict[str, str]
    value: Any = UNSET
    """Left out where there are points."""
    points: list[Point] = []
    """Start of what each point covers, in ms since 1970, and its value; in the order of time."""
    compare: list[Point] = []
    """Points of the earlier range, if one was asked for: as many as `points`, each `compare_ms` before its neighbour."""


class Answer(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A merged view, in the shape of the HTTP API."""

    view: str
    kind: str
    by: Labels | None
    series: list[Series]
    as_of: AsOf
    truncated: bool = False
    """True if there are more series than these."""
    series_total: int | None = None
    """The number of all series, if the answer is truncated, or a page of several."""
    also: tuple[Alternative, ...] = ()
    """Other kinds and windows of the view, which `kind` and `window_s` choose."""
    start_ms: int | None = None
    """Start of the range; this field and those below are only in answers with points."""
    end_ms: int | None = None
    """End of the range, where the last point ends."""
    step_ms: int | None = None
    """Distance of points."""
    over_ms: int | None = None
    """Length of what each point covers."""
    compare_ms: int | None = None
    """Distance to the earlier range that `compare` of each series is of."""
    fn: str | None = None
    """Function that made the points of the view's values."""
    final_before_ms: int | None = None
    """Time that every partition has passed: points that end by then are final, but for deltas that come late."""
    expired_before_ms: int | None = None
    """Start of the oldest window that is kept; points that begin before it lack what has expired."""
    next_cursor: str | None = None
    """Cursor of the next page; only in pages, but for the last."""

    def __iter__(self) -> Iterator[Series]:
        """Return an iterator of the series."""
        return iter(self.series)

    def is_final(self, point: Point) -> bool:
        """Return whether every partition's time has passed the end of a point of this answer."""
        return point[0] + (self.over_ms or 0) <= (self.final_before_ms or 0)

    def to_arrow(self) -> Any:
        """Return the rows as a `pyarrow.Table`; see `core.tables`."""
        return tables.to_arrow(self)

    def to_pandas(self) -> Any:
        """Return the rows as a `pandas.DataFrame`; see `core.tables`."""
        return tables.to_pandas(self)

    def to_polars(self) -> Any:
        """Return the rows as a `polars.DataFrame`; see `core.tables`."""
        return tables.to_polars(self)

    def _repr_html_(self) -> str:
        """Return a table for notebooks."""
        return tables.to_html(self)

    def value(self) -> Any:
        """Return the value of the only series, or of its only point; None if there is none. Raises `Invalid` for several."""
        if len(self.series) > 1:
            raise Invalid(f"view {self.view}: {len(self.series)} series; ask with by=() for their total")
        if self.step_ms is not None:
            points = self.series[0].points if self.series else []
            if len(points) > 1:
                raise Invalid(f"view {self.view}: {len(points)} points; ask with at= for a single one")
            return points[0][1] if points else None
        return self.series[0].value if self.series else None


class Answers(msgspec.Struct, frozen=True):
    """Answers to several queries, all of one moment of each partition."""

    answers: list[Answer]
    """One for each query, in their order."""
    as_of: AsOf
    """Part of the log that all of them reflect."""


class View(msgspec.Struct, frozen=True):
    """A definition of a view, and how many series of it there are, summed over partitions."""

    name: str
    kind: str
    labels: Labels
    window_s: int | None
    series_count: int | UnsetType = UNSET
    """Left out for an access token that is bound to labels, because series of others are counted, too."""
    monotone: bool = False
    """True for a sum that never falls."""
    defined_at_ms: int = 0
    """When the log accepted the first batch of it."""
    answers: bool = True
    """True if a read that chooses no kind and no window merges it."""
    retention_s: int | None = None
    """Seconds for which a window is kept after its end, or a series without windows after its last delta; null: for ever."""
    series_count_max: int | UnsetType = 0
    """Largest number of its series in one partition, where the worker's setting `series_max` limits them."""

    @property
    def definition(self) -> Definition:
        """The definition."""
        return Definition(self.name, self.kind, self.labels, self.window_s or 0, self.monotone, self.retention_s or 0)

    @classmethod
    def of(cls, it: Listed, bounds: Bounds | None = None) -> View:
        """Return a definition as it is listed for a token with these bounds."""
        d = it.definition
        counted = bounds is None or not bounds.labels
        return cls(
            d.view,
            d.kind,
            d.labels,
            d.window_s or None,
            it.series_count if counted else UNSET,
            d.monotone,
            it.defined_at_ms,
            it.answers,
            d.retention_s or None,
            it.series_count_max if counted else UNSET,
        )


class Views(msgspec.Struct, frozen=True):
    """All views, each once for every definition that it has."""

    views: list[View]
    as_of: AsOf


class Changed(msgspec.Struct, frozen=True):
    """Definitions that an order drops or resets."""

    action: str
    view: str
    definitions: list[View]
    """Definitions as they were known when the order was given."""
    token: str
    """`after=<token>` of a read waits until the order is carried out."""


class PartitionState(msgspec.Struct, frozen=True):
    """Progress of one partition."""

    partition: int
    next_offset: int
    end_offset: int | None
    """None: the log is away."""
    lag: int | None
    staleness_ms: int | None
    committed_at_ms: int
    topic_id: str
    """The id of the topic that `next_offset` is of; empty before a first commit."""
    owner: str = ""
    """Name of the worker that wrote the last commit; empty if that has none."""


class RestoreStatus(msgspec.Struct, frozen=True, omit_defaults=True):
    """Progress of the restore of a store."""

    entries: int
    """Changelog records that are applied."""
    remaining: int
    """Upper bound on the records still to read: offsets, of which compaction has emptied some."""
    entries_per_s: float
    seconds_left: float
    waiting: str = ""
    """Reason why the restore does not go on."""


class PartitionStatus(msgspec.Struct, kw_only=True):
    """A partition in `GET /v1/status`: offsets of deltas where it is folded or read, of the changelog where it is copied."""

    partition: int
    phase: str
    next_offset: int | UnsetType = UNSET
    end_offset: int | UnsetType | None = UNSET
    """Null: the log is away."""
    lag: int | UnsetType | None = UNSET
    committed_at_ms: int | UnsetType = UNSET
    staleness_ms: int | UnsetType | None = UNSET
    """Only from servers that answer reads; null: unknown."""
    topic_id: str | UnsetType = UNSET
    """The id of the topic that `next_offset` is of; empty before a first commit."""
    owner: str | UnsetType = UNSET
    """Name of the worker that wrote the last commit; left out by workers, and where the worker has no name."""
    changelog_next_offset: int | UnsetType = UNSET
    changelog_remaining: int | UnsetType = UNSET
    restore: RestoreStatus | UnsetType = UNSET
    """Only while the store is restored."""


class MemberStatus(msgspec.Struct, frozen=True):
    """A member of a worker's group, as that worker knows it."""

    name: str
    url: str
    partitions: list[int]
    standbys: list[int] = []


class LeftOutStatus(msgspec.Struct):
    """Count of what ingest left out for one reason."""

    protocol: str
    reason: str
    count: int
    first: str
    """First example of it."""
    first_at_ms: int


class Status(msgspec.Struct, kw_only=True):
    """The body of `GET /v1/status`. What does not apply to a role is left out."""

    ready: bool
    partition_count: int
    partitions: list[PartitionStatus]
    role: str | UnsetType = UNSET
    """`worker`, `server` or `ingest`; left out in the embedded mode."""
    app: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    at_ms: int | UnsetType = UNSET
    """Time of the status."""
    series_max: int | UnsetType = UNSET
    """The setting `series_max` of this process' workers, or of a server: series of a definition in one partition."""
    topic_id: str | UnsetType = UNSET
    """The id of the topic of deltas, as tokens name it; empty while the log has not told it."""
    fenced_count: int | UnsetType = UNSET
    standbys: list[PartitionStatus] | UnsetType = UNSET
    """The copies that a worker keeps warm."""
    members: list[MemberStatus] | UnsetType = UNSET
    ingest_left_out: list[LeftOutStatus] | UnsetType = UNSET
    """Content of lines, samples and data points that this process has left out, since its start."""


class IngestStatus(Status, kw_only=True):
    """The status of a StatsD gateway, with the counts of its publisher (`Publisher.stats`)."""

    lines: int
    """Lines that have arrived."""
    left_out: dict[str, int]
    """Lines that were left out, by reason."""
    deltas: int
    batches: int
    entries: int
    rejected: int
    waiting: int
    series: int
    buffer_bytes: int


T = TypeVar("T")


def known(value: T | UnsetType | None) -> T | None:
    """Return a field of a status; None if it was left out."""
    return None if isinstance(value, UnsetType) else value
