"""The nouns that travel: definitions, batches, log records, positions; and the layout of keys.

Keys order entries so that "all series of a view", "all series of a window" and "expire a window" are each one range:

    tag(1) view-name NUL window-start(8, big endian) msgpack([label value, ...])

Everything behind the NUL is the *suffix* of a series: what a batch carries, once per view instead of once per entry.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from typing import TypeVar

import msgspec

from pipeline.errors import BadRecord, Invalid

NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")
"""View and label names: what Prometheus accepts, so that every view can be scraped."""

LABEL_COUNT_MAX = 32
NAME_BYTES_MAX = 200
LABEL_VALUE_BYTES_MAX = 4_096
"""A label value is an identity, not a document: it is held in memory once per series in every role."""
SUFFIX_BYTES_MAX = 32_768

TAG_POSITION = b"\x00"
TAG_DEFINITION = b"\x01"
TAG_SERIES = b"\x02"
TAG_PRODUCER = b"\x03"

POSITION_KEY = TAG_POSITION
STORE_META_KEY = b"\xff"
"""Where a store keeps which part of the changelog it reflects; never in the changelog itself."""
WINDOW_NONE = bytes(8)
"""The window start of a view without windows."""

RUN_ENTRIES_MAX = 100_000
"""What a worker does in one call of C it does to so many entries at most: the call keeps all other threads waiting, and
those that keep the worker in its group are among them."""

_GAP = b"\xc0\xc0"
T = TypeVar("T")
_encode_labels = msgspec.msgpack.Encoder().encode
_decode_labels = msgspec.msgpack.Decoder(tuple[str, ...]).decode


class Definition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What a view is. The first definition that a partition folds is the definition there."""

    view: str
    kind: str
    labels: tuple[str, ...] = ()
    window_s: int = 0
    """Length of a tumbling window in seconds; 0: the view has no windows."""
    monotone: bool = False
    """Whether this sum takes no negative delta, and so never falls: a counter."""


class Group(msgspec.Struct, frozen=True):
    """The series of one view in a batch, column by column: `states[i]` belongs to `suffixes[i]`; suffixes are unique."""

    definition: Definition
    suffixes: list[bytes]
    states: list  # type: ignore[type-arg]  # states of `definition.kind`; see core.merge


class Batch(msgspec.Struct, frozen=True):
    """Merged deltas of one producer for one partition.

    `(producer_id, partition, sequence)` is its identity. `floor` is the lowest sequence of this producer and partition
    that could still be sent when the batch was sealed: everything below is settled for ever.
    """

    producer_id: str
    epoch: int
    partition: int
    sequence: int
    floor: int
    created_at_ms: int
    groups: list[Group]


class Records(msgspec.Struct, frozen=True):
    """A run of log records of one partition, column by column, in the order of their offsets.

    `next_offset` is where reading goes on; it can be beyond `offsets[-1] + 1`, because compaction and transaction
    markers leave holes.
    """

    partition: int
    offsets: Sequence[int]
    at_ms: Sequence[int]
    """When the log accepted each record; never falls within a partition."""
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    next_offset: int


class Position(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The last record of every commit: which source records the state reflects."""

    next_offset: int
    committed_at_ms: int
    source_at_ms: int
    """When the log accepted the last record that is folded in; 0 before the first."""
    source_id: str = ""
    """Of which topic those records are; see `ports.Log.topic_id`."""


NO_POSITION = Position(0, 0, 0)


def runs(items: Iterable[T]) -> Iterator[list[T]]:
    """The items in their order, in lists of up to `RUN_ENTRIES_MAX`."""
    rest = iter(items)
    while run := [*islice(rest, RUN_ENTRIES_MAX)]:
        yield run


def definition_key(view: str) -> bytes:
    """The key of a view's definition entry."""
    return TAG_DEFINITION + view.encode()


def producer_key(producer_id: str) -> bytes:
    """The key of a producer's entry."""
    return TAG_PRODUCER + producer_id.encode()


def series_prefix(view: str) -> bytes:
    """What the keys of all series of `view`, and no other keys, start with."""
    return TAG_SERIES + view.encode() + b"\x00"


def prefix_end(prefix: bytes) -> bytes:
    """The first key behind every key that starts with `prefix` (whose last byte is not 0xff)."""
    return prefix[:-1] + bytes((prefix[-1] + 1,))


def series_suffix(labels: Sequence[str], window_start_ms: int = 0) -> bytes:
    """The part of a series' key behind its view: window start and label values, in the definition's order."""
    return window_start_ms.to_bytes(8, "big") + _encode_labels(labels)


def parse_suffix(suffix: bytes) -> tuple[int, tuple[str, ...]]:
    """Window start in ms and label values of a suffix; `BadRecord` if it is not one in its only valid encoding."""
    if len(suffix) > SUFFIX_BYTES_MAX:
        raise BadRecord(f"series key has {len(suffix)} bytes; at most {SUFFIX_BYTES_MAX}")
    try:
        labels = _decode_labels(suffix[8:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRecord(f"series key: {error}") from None
    if _encode_labels(labels) != suffix[8:]:
        raise BadRecord("series key: not the canonical encoding")
    return int.from_bytes(suffix[:8], "big"), labels


def labels_of(key: bytes, prefix: bytes) -> tuple[str, ...]:
    """The label values of a stored series key that starts with `prefix`."""
    return _decode_labels(key[len(prefix) + 8 :])


def check_suffix(definition: Definition, suffix: bytes) -> None:
    """Raise `BadRecord` unless `suffix` is a series of `definition`."""
    window_start_ms, labels = parse_suffix(suffix)
    if len(labels) != len(definition.labels):
        raise BadRecord(f"view {definition.view}: {len(labels)} label values for labels {list(definition.labels)}")
    for value in labels:
        if len(value) > LABEL_VALUE_BYTES_MAX or len(value.encode()) > LABEL_VALUE_BYTES_MAX:
            raise BadRecord(f"view {definition.view}: a label value is over {LABEL_VALUE_BYTES_MAX} bytes")
    if window_start_ms:
        raise BadRecord(f"view {definition.view} has no windows, but a series has a window start")


@cache
def _decode_label_rows(width: int) -> Callable[[bytes], list[tuple[str, ...] | None]]:
    return msgspec.msgpack.Decoder(list[tuple[(str,) * width] | None]).decode  # type: ignore[misc]


def _array_head(count: int) -> bytes:
    """What an encoded array of so many items starts with."""
    return _encode_labels([None] * count)[:-count]


def check_suffixes(definition: Definition, suffixes: Sequence[bytes]) -> None:
    """As `check_suffix` for each of them, at a third of the cost: one call decodes all that are as they should be."""
    if suffixes and not _are_plain(definition, suffixes):
        for suffix in sorted(suffixes):
            check_suffix(definition, suffix)


def _are_plain(definition: Definition, suffixes: Sequence[bytes]) -> bool:
    """Whether they are surely series of `definition`; False says nothing."""
    if max(map(len, suffixes)) > LABEL_VALUE_BYTES_MAX:
        return False
    rows = [suffix[8:] for suffix in suffixes]
    if WINDOW_NONE + (_GAP + WINDOW_NONE).join(rows) != _GAP.join(suffixes):
        return False
    # Two nils in a row are in no text and no length that is this short. So no suffix can borrow bytes from its neighbour,
    # and what stands between the gaps is one item each, if every third is a row.
    table = _array_head(3 * len(rows)) + _GAP.join(rows) + _GAP
    try:
        items = _decode_label_rows(len(definition.labels))(table)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return None not in items[::3] and _encode_labels(items) == table


def canonical(definition: Definition) -> Definition:
    """The definition with its labels in the order of their names: what publishers send, so that all of them agree."""
    return msgspec.structs.replace(definition, labels=tuple(sorted(definition.labels)))


def check_label_values(definition: Definition, values: Sequence[object]) -> tuple[str, ...]:
    """`values` as a series' label values; `Invalid` if they are too many, too few, too long or not text."""
    if len(values) != len(definition.labels):
        raise Invalid(f"view {definition.view} has labels {list(definition.labels)}; got {len(values)} values")
    for name, value in zip(definition.labels, values, strict=True):
        if not isinstance(value, str):
            raise Invalid(f"label {name} of view {definition.view}: text expected, got {type(value).__name__}")
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            raise Invalid(f"label {name} of view {definition.view}: not valid Unicode (lone surrogate)") from None
        if size > LABEL_VALUE_BYTES_MAX:
            raise Invalid(f"label {name} of view {definition.view}: {size} bytes; at most {LABEL_VALUE_BYTES_MAX}")
    plain = tuple([str.__str__(value) for value in values])  # also from a StrEnum
    suffix_size = len(series_suffix(plain))
    if suffix_size > SUFFIX_BYTES_MAX:
        raise Invalid(f"view {definition.view}: labels of {suffix_size} bytes; at most {SUFFIX_BYTES_MAX} together")
    return plain


def check_definition(definition: Definition, kinds: Sequence[str]) -> None:
    """Raise `Invalid`, naming what is wrong, unless `definition` is one that this version can hold."""
    for what, name in (("view", definition.view), *(("label", label) for label in definition.labels)):
        if not NAME.match(name) or len(name) > NAME_BYTES_MAX:
            raise Invalid(
                f"{what} name {name[:NAME_BYTES_MAX]!r} does not match [a-zA-Z_][a-zA-Z0-9_]* "
                f"with at most {NAME_BYTES_MAX} characters"
            )
    if definition.kind not in kinds:
        raise Invalid(f"view {definition.view}: unknown kind {definition.kind[:50]!r}; known: {', '.join(kinds)}")
    if definition.monotone and definition.kind != "sum":
        raise Invalid(f"view {definition.view}: a {definition.kind} cannot be monotone, only a sum")
    if len(definition.labels) > LABEL_COUNT_MAX:
        raise Invalid(f"view {definition.view}: {len(definition.labels)} labels; at most {LABEL_COUNT_MAX}")
    if len(set(definition.labels)) != len(definition.labels):
        raise Invalid(f"view {definition.view}: a label name stands twice in {list(definition.labels)}")
    if definition.window_s:
        raise Invalid(f"view {definition.view}: windowed views are not supported by this version")
