"""States of groups, which a server with stores gives to one that merges several, so that every answer is exact.

A mean of means, or the largest of the largest ten of each part, would be wrong. So a part of an answer is not an answer: it
has the merged state of each group, in the encoding of the changelog's entries, and merging goes on where the part left off.
Requests and parts are msgpack. Both sides are of one version; another one is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Annotated, Any

import msgspec

from pipeline.core import codec
from pipeline.core.kinds import KIND_NAMES, Kind, State
from pipeline.core.query import Labels, Matcher, MergedDefinition, merge_definitions
from pipeline.core.record import Definition, Offset, check_definition
from pipeline.core.span import Span
from pipeline.errors import BadRecord, Invalid

PARTS_VERSION = 1
STATES_PATH = "/v1/states"
STATES_TYPE = "application/vnd.pipeline.states"
"""Media type of requests and answers."""
READS_MAX = 10_000
DIGEST_BYTES = 16
_Number = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class StatesRead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which series of which definitions to merge to which groups."""

    definitions: list[Definition]
    """Definitions to merge, of one view, kind and window."""
    where: tuple[Matcher, ...] = ()
    by: Labels | None = None
    keep: _Number | None = None
    """Number of groups, in the order of their labels, whose states are needed; of others only a digest. None: all groups."""
    span: Span | None = None
    """Range of definitions with windows; None: `window_start_ms` is the only window."""
    window_start_ms: Offset = 0
    hidden_before_ms: list[Offset] = []
    """For each definition, the start of the oldest window that every partition keeps, as far as the caller knows."""

    @property
    def merged(self) -> MergedDefinition:
        """The definitions as one."""
        return merge_definitions(self.definitions)


class StatesAsked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request for the states of some partitions, all of one moment of each."""

    version: int
    partitions: list[_Number] | None
    """Partitions to read; None: no states are asked for, only which partitions the server follows."""
    reads: list[StatesRead] = []
    views: list[str] | None = []
    """Views whose definitions are asked for; None: all."""
    after: str = ""
    """Token of these partitions to wait for."""
    max_staleness_ms: Offset | None = None
    timeout_ms: _Number = 10_000


class PartitionFound(msgspec.Struct, frozen=True, array_like=True):
    """Position of a partition."""

    number: _Number
    next_offset: Offset
    topic_id: str
    """Id of the topic that the position is of; empty before a first commit."""
    staleness_ms: Offset | None
    folded_ms: Offset | None
    """Time of the last folded record, 0 without one; None: all is folded that the log had when its ends were asked for."""
    committed_at_ms: Offset = 0


class GroupStates(msgspec.Struct, frozen=True, array_like=True):
    """Merged states of groups."""

    labels: list[Labels]
    buckets: list[int]
    """Bucket of each state in the range that was asked for; empty without a range."""
    states: list[bytes]
    rest: bytes = b""
    """Digests of the labels of groups beyond `keep`."""


class StatesFound(msgspec.Struct, frozen=True):
    """Answer to `StatesAsked`."""

    version: int
    topic_id: str
    """Id of the topic of deltas; empty while the log has not told it."""
    partition_count: _Number
    partitions: list[PartitionFound]
    after_ms: Offset
    """Time between the arrival of the request and the moment that staleness is of, rounded down."""
    ends_age_ms: Offset
    """Time by which the log's ends were older than that moment, rounded up."""
    newest_ms: Offset
    """Newest time of a folded record."""
    entries: list[bytes] = []
    """Entries of the definitions that were asked for, of each partition."""
    reads: list[GroupStates] = []


_encode = msgspec.msgpack.Encoder().encode
_decode_asked = msgspec.msgpack.Decoder(StatesAsked).decode
_decode_found = msgspec.msgpack.Decoder(StatesFound).decode


class _Versioned(msgspec.Struct):
    version: int


_decode_version = msgspec.msgpack.Decoder(_Versioned).decode
_MALFORMED = (msgspec.MsgspecError, UnicodeDecodeError, ValueError, RecursionError)


def encode_part(part: StatesAsked | StatesFound) -> bytes:
    """Return a request or its answer as bytes."""
    return _encode(part)


def _check_version(value: bytes) -> None:
    try:
        version = _decode_version(value).version
    except _MALFORMED as error:
        raise Invalid(f"states: not a request or an answer for states: {error}") from None
    if version != PARTS_VERSION:
        raise Invalid(f"states: version {version}; this server has {PARTS_VERSION}: let all servers be of one version")


def decode_asked(value: bytes) -> StatesAsked:
    """Return a request for states. Raises `Invalid` for anything else, or if its definitions can't be merged."""
    _check_version(value)
    try:
        asked = _decode_asked(value)
    except _MALFORMED as error:
        raise Invalid(f"states: {error}") from None
    if len(asked.reads) > READS_MAX:
        raise Invalid(f"states: {len(asked.reads)} reads; at most {READS_MAX}")
    for read in asked.reads:
        for definition in read.definitions:
            check_definition(definition, KIND_NAMES)
        if len({(it.view, it.kind, it.window_s) for it in read.definitions}) != 1:
            raise Invalid("states: the definitions of a read are of one view, kind and window")
        if len(read.hidden_before_ms) not in (0, len(read.definitions)):
            raise Invalid("states: hidden_before_ms has a time for each definition, or none")
        if read.span is not None:
            _check_span(read.span, read.definitions[0].window_s * 1_000)
    return asked


def _check_span(span: Span, window_ms: int) -> None:
    whole = window_ms and not any(ms % window_ms for ms in (span.start_ms, span.end_ms, span.step_ms, span.over_ms))
    if not whole or not (0 < span.step_ms <= span.over_ms and 0 <= span.start_ms < span.end_ms):
        raise Invalid("states: a range of whole windows and steps is needed")
    if (span.end_ms - span.start_ms) % span.step_ms:
        raise Invalid("states: a range of whole windows and steps is needed")


def decode_found(value: bytes) -> StatesFound:
    """Return the answer to a request for states. Raises `BadRecord` for anything else."""
    try:
        _check_version(value)
        found = _decode_found(value)
    except Invalid as error:
        raise BadRecord(str(error)) from None
    except _MALFORMED as error:
        raise BadRecord(f"states: {error}") from None
    for it in found.reads:
        if len(it.labels) != len(it.states) or (it.buckets and len(it.buckets) != len(it.states)):
            raise BadRecord("states: columns of different lengths")
        if len(it.rest) % DIGEST_BYTES:
            raise BadRecord("states: digests of a wrong length")
    return found


def digest(labels: Labels) -> bytes:
    """Return what stands for the labels of a group, so that a group that several parts have is counted once."""
    return blake2b(_encode(labels), digest_size=DIGEST_BYTES).digest()


def group_count(parts: Sequence[GroupStates], merged: Mapping[Any, State]) -> int:
    """Return the number of groups of all parts together, of which these are merged."""
    if not any(part.rest for part in parts):
        return len(merged)
    seen = {digest(labels) for part in parts for labels in part.labels}
    for part in parts:
        seen.update(part.rest[i : i + DIGEST_BYTES] for i in range(0, len(part.rest), DIGEST_BYTES))
    return len(seen)


def states_of(kind: Kind, part: GroupStates, width: int) -> list[State]:
    """Return the states of a part whose groups have so many labels. Raises `BadRecord` if they are not of this kind."""
    if any(len(labels) != width for labels in part.labels):
        raise BadRecord(f"states: groups of other labels than {width}")
    return codec.decode_states(kind, part.states)


def packed(
    kind: Kind, groups: Iterable[tuple[Labels, State]], buckets: Iterable[int] = (), rest: bytes = b""
) -> GroupStates:
    """Return groups as they travel."""
    rows = [*groups]
    states = codec.encode_states(kind, [state for _, state in rows]) if rows else []
    return GroupStates([labels for labels, _ in rows], [*buckets], states, rest)
