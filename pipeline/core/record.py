"""Definitions, batches, log records and positions; and the layout of keys.

Keys order entries so that all series of a view, all series of a definition, and a range of a definition's windows are each
one range:

    position    0x00
    definition  0x01 view-name NUL definition-id(8)
    series      0x02 view-name NUL definition-id(8) window-start(8, big endian) msgpack([label value, ...])
    producer    0x03 producer-id

What stands behind the definition id is the *suffix* of a series: a batch carries the definition once, and then suffixes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, lru_cache
from hashlib import sha256
from itertools import islice
from typing import Annotated, TypeVar

import msgspec

from pipeline.core.limits import SPREAD_MAX
from pipeline.errors import BadRecord, Invalid

NAME = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*\Z")
"""View and label names that Prometheus accepts, so that every view can be scraped."""

LABEL_COUNT_MAX = 32
NAME_BYTES_MAX = 200
LABEL_VALUE_BYTES_MAX = 4_096
"""Longest label value: every process holds the label values of each of its series in memory."""
SUFFIX_BYTES_MAX = 32_768
WINDOW_S_MAX = 10**9
RETENTION_S_MAX = 10**10
WINDOW_START_MS_MAX = 2**53
"""Latest start of a window: later times can't be told apart as JSON numbers."""

TAG_POSITION = b"\x00"
TAG_DEFINITION = b"\x01"
TAG_SERIES = b"\x02"
TAG_PRODUCER = b"\x03"
TAG_FENCE = b"\x04"

POSITION_KEY = TAG_POSITION
FENCE_KEY = TAG_FENCE
STORE_META_KEY = b"\xff"
"""Key under which a store keeps how much of the changelog it reflects; never in the changelog itself."""
WINDOW_NONE = bytes(8)
"""Window start of a view without windows."""
DEFINITION_ID_BYTES = 8
OVERFLOW = "__overflow__"
"""Value of every label of the series that takes in what is beyond `series_max`."""

RUN_ENTRIES_MAX = 100_000
"""Upper limit of the entries that a worker passes to one call of C. The call keeps all other threads waiting, among them
those that keep the worker in its group."""

EPOCH_NONE = -1
Offset = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""An offset, or a time in ms, of at most 63 bits."""

_GAP = b"\xc0\xc0"
T = TypeVar("T")
_encode_labels = msgspec.msgpack.Encoder().encode
_decode_labels = msgspec.msgpack.Decoder(tuple[str, ...]).decode


class Definition(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A view as a publisher declares it. A view can have several definitions; their series lie side by side."""

    view: str
    kind: str
    labels: tuple[str, ...] = ()
    """Label names, in order wherever a definition travels; see `canonical`."""
    window_s: int = 0
    """Length of a tumbling window in seconds; 0: the view has no windows."""
    monotone: bool = False
    """True for a sum that takes no negative delta, and so never falls: a counter."""
    retention_s: int = 0
    """Seconds for which a window is kept after its end, or a series without windows after its last delta; 0: for ever."""
    parameters: tuple[tuple[str, int | float | str], ...] = ()
    """Parameters of the kind, by name, in the order of their names."""


class Group(msgspec.Struct, frozen=True):
    """The series of one definition in a batch, column by column: `states[i]` belongs to `suffixes[i]`."""

    definition: Definition
    suffixes: list[bytes]
    states: list  # type: ignore[type-arg]  # states of `definition.kind`; see core.kinds


_DEFAULTS = (None, None, None, *Definition.__struct_defaults__[1:])
"""Value of each field of a definition that is left out; the first three never are."""


class Control(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """An order to a partition. It comes from the log as deltas do, so it takes effect exactly once, between two batches."""

    action: str
    """`drop`: the definitions and their series go. `reset`: only the series go."""
    view: str
    kind: str = ""
    """Kind of the definitions; empty: every kind."""
    labels: tuple[str, ...] | None = None
    """Exact labels of the definitions, in the order of their names; None: any labels."""

    def concerns(self, definition: Definition) -> bool:
        """Return whether the order is about a definition."""
        return (
            definition.view == self.view and self.kind in ("", definition.kind) and self.labels in (None, definition.labels)
        )


CONTROL_ACTIONS = ("drop", "reset")


class Origin(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The batch that a replayed one stands for: a task that has folded the one leaves the other out."""

    producer_id: str
    sequence: int


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
    closing: bool = False
    """True if the producer sends nothing after this batch."""
    controls: list[Control] = []
    """Orders, carried out before the groups are folded."""
    origin: Origin | None = None

    @property
    def producer_ids(self) -> list[str]:
        """Return the producer of the batch, and that of its origin."""
        return [self.producer_id] if self.origin is None else [self.producer_id, self.origin.producer_id]


class Records(msgspec.Struct, frozen=True):
    """A run of log records of one partition, column by column, in the order of their offsets.

    `next_offset` is where reading goes on; it can be beyond `offsets[-1] + 1`, because compaction and transaction
    markers leave holes.
    """

    partition: int
    offsets: Sequence[int]
    at_ms: Sequence[int]
    """Time at which the log accepted each record; it never falls within a partition."""
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]
    next_offset: int
    leader_epoch: int = EPOCH_NONE
    """Epoch of the leader that took the last record of the run, if the log has such epochs (KIP-101)."""


class Position(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """The last record of every commit: how far the state reflects `deltas`, and where in the changelog the commit is.

    Later formats begin with these fields, so that a program can tell the position of a newer one from noise.
    """

    next_offset: Offset
    committed_at_ms: Offset
    source_at_ms: Offset
    """Time at which the log accepted the last folded record; 0 before the first."""
    source_id: str = ""
    """Id of the topic of the folded records; see `ports.Log.topic_id`."""
    definitions_version: Offset = 0
    """Number that rises with every commit that adds or drops a definition: while it stays, the definitions stay."""
    leader_epoch: Annotated[int, msgspec.Meta(ge=EPOCH_NONE, le=2**31 - 1)] = EPOCH_NONE
    """Epoch of the leader that took the last folded record; `EPOCH_NONE` if the log has no epochs."""
    records_end_offset: Offset = 0
    """Offset behind the last folded record. From there to `next_offset` the log held no record."""
    begin_offset: Offset = 0
    """Offset of the commit's first record in the changelog. All records from there to the position are the commit's."""
    previous_end_offset: Offset = 0
    """Offset behind the position record of the commit before. Records between it and `begin_offset`, fence records apart,
    were not written by an owner of the partition."""
    owner_id: str = ""
    """Id of the owner that committed, as in its fence record, with the offset of this record; see `owners.with_offset`."""


class Fence(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Record that a new owner of a partition commits before it restores, and reads last when it restores."""

    owner_id: str
    at_ms: Offset


NO_POSITION = Position(0, 0, 0)


def runs(items: Iterable[T]) -> Iterator[list[T]]:
    """Yield the items in their order, in lists of up to `RUN_ENTRIES_MAX`."""
    rest = iter(items)
    while run := [*islice(rest, RUN_ENTRIES_MAX)]:
        yield run


def travelling(definition: Definition) -> tuple[object, ...]:
    """Return the fields of a definition as they travel: without those at the end that have their default values."""
    fields = msgspec.structs.astuple(definition)
    while fields[-1] == _DEFAULTS[len(fields) - 1]:
        fields = fields[:-1]
    return fields


@lru_cache(maxsize=65_536)
def definition_id(definition: Definition) -> bytes:
    """Return the 8 bytes that stand for a definition in keys: the first of the SHA-256 of its encoding."""
    return sha256(_encode_labels(travelling(canonical(definition)))).digest()[:DEFINITION_ID_BYTES]


def definitions_prefix(view: str) -> bytes:
    """Return the prefix of the keys of all definition entries of `view`, and of no other keys."""
    return TAG_DEFINITION + view.encode() + b"\x00"


def definition_key(definition: Definition) -> bytes:
    """Return the key of a definition's entry."""
    return definitions_prefix(definition.view) + definition_id(definition)


def producer_key(producer_id: str) -> bytes:
    """Return the key of a producer's entry."""
    return TAG_PRODUCER + producer_id.encode()


def fingerprint(producer_id: str) -> str:
    """Return the name of a producer in messages and listings, with which nobody can send in that producer's name."""
    return sha256(producer_id.encode()).hexdigest()[:8]


def producer_id_of(secret: str) -> str:
    """Return the producer id of the holder of a secret. The id does not reveal the secret, so nobody else can claim it."""
    return sha256(b"producer\x00" + secret.encode()).hexdigest()[:32]


def view_prefix(view: str) -> bytes:
    """Return the prefix of the keys of all series of `view`, of any definition, and of no other keys."""
    return TAG_SERIES + view.encode() + b"\x00"


@lru_cache(maxsize=65_536)
def series_prefix(definition: Definition) -> bytes:
    """Return the prefix of the keys of all series of a definition, and of no other keys."""
    return view_prefix(definition.view) + definition_id(definition)


def split_key(key: bytes) -> tuple[str, bytes, bytes]:
    """Return view name, definition id and suffix of a series' or definition's key. Raises `BadRecord` for any other key.

    A definition's key has an empty suffix. The content of a series' suffix is not checked: see `parse_suffix`.
    """
    view, nul, rest = key[1:].partition(b"\x00")
    of_series = key[:1] == TAG_SERIES and len(rest) > DEFINITION_ID_BYTES + len(WINDOW_NONE)
    if not nul or not (of_series or (key[:1] == TAG_DEFINITION and len(rest) == DEFINITION_ID_BYTES)):
        raise BadRecord("key: of no series and no definition")
    try:
        return view.decode("ascii"), rest[:DEFINITION_ID_BYTES], rest[DEFINITION_ID_BYTES:]
    except UnicodeDecodeError:
        raise BadRecord("key: a view name that is not ASCII") from None


def prefix_end(prefix: bytes) -> bytes:
    """Return the first key behind every key that starts with `prefix`, which has a byte below 0xff."""
    short = prefix.rstrip(b"\xff")
    return short[:-1] + bytes((short[-1] + 1,))


def window_bytes(start_ms: int) -> bytes:
    """Return the start of a window as it stands in keys, where windows are in the order of time."""
    return start_ms.to_bytes(len(WINDOW_NONE), "big")


def series_suffix(labels: Sequence[str], window_start_ms: int = 0) -> bytes:
    """Return the part of a series' key behind its definition: window start and label values, in the definition's order."""
    return window_bytes(window_start_ms) + _encode_labels(labels)


def overflow_suffix(definition: Definition, window_start: bytes = WINDOW_NONE) -> bytes:
    """Return the suffix of the series that takes in what is beyond `series_max` in a window."""
    return window_start + _encode_labels((OVERFLOW,) * len(definition.labels))


def parse_suffix(suffix: bytes) -> tuple[int, tuple[str, ...]]:
    """Return window start in ms and label values of a suffix. Raises `BadRecord` for any but its only valid encoding."""
    if len(suffix) > SUFFIX_BYTES_MAX:
        raise BadRecord(f"series key has {len(suffix)} bytes; at most {SUFFIX_BYTES_MAX}")
    try:
        labels = _decode_labels(suffix[8:])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise BadRecord(f"series key: {error}") from None
    if _encode_labels(labels) != suffix[8:]:
        raise BadRecord("series key: not the canonical encoding")
    return int.from_bytes(suffix[:8], "big"), labels


def start_of_window_ms(definition: Definition, ts_ms: int) -> int:
    """Return the start of the window in which a time lies; 0 for a definition without windows."""
    return ts_ms - ts_ms % (definition.window_s * 1_000) if definition.window_s else 0


def expired_before_ms(definition: Definition, time_ms: int) -> int:
    """Return the watermark of a definition at a time; 0: nothing has expired.

    The watermark of windows is the start of the oldest one that is kept. Without windows it is the time up to which silent
    series have expired; it moves in steps of a twentieth of the retention, so that few commits have to record it.
    """
    if not definition.retention_s:
        return 0
    if definition.window_s:
        return max(0, start_of_window_ms(definition, time_ms - definition.retention_s * 1_000))
    return time_ms - time_ms % (max(1, definition.retention_s // 20) * 1_000)


def expires_silent(definition: Definition) -> bool:
    """Return whether a series of a definition expires when it is silent: then its entries have an `expires_at_ms`."""
    return bool(definition.retention_s) and not definition.window_s


def check_spread(definition: Definition, spread: object) -> int:
    """Return the number of partitions over which a view is to be spread. Raises `Invalid` if it can't be.

    The entries of a silent series expire in each partition by itself. So a series without windows that expires must have one
    partition: in several, a part of it could expire while another is recorded to.
    """
    if type(spread) is not int or not 1 <= spread <= SPREAD_MAX:
        raise Invalid(f"view {definition.view:.200}: spread is a whole number from 1 to {SPREAD_MAX}, got {spread!r:.50}")
    if spread > 1 and expires_silent(definition):
        raise Invalid(
            f"view {definition.view}: spread needs windows where there is retention_s: parts of a series would expire"
        )
    return spread


def spread_of(definition: Definition, spread: object, default: int) -> int:
    """Return the checked number of partitions over which a view is spread; None: as many as the default, if it can be."""
    if spread is None:
        return 1 if expires_silent(definition) else default
    return check_spread(definition, spread)


def check_ahead_windows(definition: Definition, suffixes: Sequence[bytes], latest_ms: int) -> None:
    """Raise `BadRecord` if one of some valid suffixes is of a window that starts later than `latest_ms`."""
    if definition.window_s and (start_ms := int.from_bytes(max(suffixes)[:8], "big")) > latest_ms:
        raise BadRecord(f"view {definition.view}: a window that starts at {start_ms}; at most {latest_ms} (ts_ahead_max_ms)")


def check_suffix(definition: Definition, suffix: bytes) -> None:
    """Raise `BadRecord` unless `suffix` is a series of `definition`."""
    _, labels = parse_suffix(suffix)
    if len(labels) != len(definition.labels):
        raise BadRecord(f"view {definition.view}: {len(labels)} label values for labels {list(definition.labels)}")
    for value in labels:
        if len(value) > LABEL_VALUE_BYTES_MAX or len(value.encode()) > LABEL_VALUE_BYTES_MAX:
            raise BadRecord(f"view {definition.view}: a label value is over {LABEL_VALUE_BYTES_MAX} bytes")
    _check_window_start(definition, suffix[: len(WINDOW_NONE)])


def _check_window_start(definition: Definition, window_start: bytes) -> None:
    if not definition.window_s:
        if window_start != WINDOW_NONE:
            raise BadRecord(f"view {definition.view} has no windows, but a series has a window start")
        return
    start_ms = int.from_bytes(window_start, "big")
    if start_ms > WINDOW_START_MS_MAX or start_ms % (definition.window_s * 1_000):
        raise BadRecord(f"view {definition.view}: {start_ms} ms is no start of a window of {definition.window_s} s")


@cache
def _decode_label_rows(width: int) -> Callable[[bytes], list[tuple[str, ...] | None]]:
    return msgspec.msgpack.Decoder(list[tuple[(str,) * width] | None]).decode  # type: ignore[misc]  # made at run time


def _array_head(count: int) -> bytes:
    """Return the first bytes of an encoded array of so many items."""
    return _encode_labels([None] * count)[:-count]


def check_suffixes(definition: Definition, suffixes: Sequence[bytes]) -> None:
    """Check each suffix as `check_suffix` does, at a third of the cost: one call decodes all suffixes of the usual form."""
    if suffixes and not _are_plain(definition, suffixes):
        for suffix in sorted(suffixes):
            check_suffix(definition, suffix)


def _are_plain(definition: Definition, suffixes: Sequence[bytes]) -> bool:
    """Return True if all suffixes are surely series of `definition`; False leaves that open."""
    if max(map(len, suffixes)) > LABEL_VALUE_BYTES_MAX:
        return False
    rows = [suffix[8:] for suffix in suffixes]
    if not definition.window_s:
        if WINDOW_NONE + (_GAP + WINDOW_NONE).join(rows) != _GAP.join(suffixes):
            return False
    else:
        for window_start in {suffix[:8] for suffix in suffixes}:
            _check_window_start(definition, window_start)
    # Two nils in a row are in no text and no length that is this short. So no suffix can borrow bytes from its neighbour,
    # and what stands between the gaps is one item each, if every third is a row.
    table = _array_head(3 * len(rows)) + _GAP.join(rows) + _GAP
    try:
        items = _decode_label_rows(len(definition.labels))(table)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return False
    return None not in items[::3] and _encode_labels(items) == table


def canonical(definition: Definition) -> Definition:
    """Return the definition with labels and parameters in the order of their names, as all publishers send it."""
    labels, parameters = tuple(sorted(definition.labels)), tuple(sorted(definition.parameters))
    if (labels, parameters) == (definition.labels, definition.parameters):
        return definition
    return msgspec.structs.replace(definition, labels=labels, parameters=parameters)


def check_label_values(definition: Definition, values: Sequence[object]) -> tuple[str, ...]:
    """Return `values` as a series' label values. Raises `Invalid` if they are too many, too few, too long or not text."""
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
    """Raise `Invalid`, naming what is wrong, unless this version supports `definition`."""
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
    if not 0 <= definition.window_s <= WINDOW_S_MAX:
        raise Invalid(f"view {definition.view}: window_s is 1 to {WINDOW_S_MAX}, or 0 for no windows")
    if not 0 <= definition.retention_s <= RETENTION_S_MAX:
        raise Invalid(f"view {definition.view}: retention_s is 0 (for ever) to {RETENTION_S_MAX}")
    if definition.parameters:
        raise Invalid(f"view {definition.view}: kind {definition.kind} has no parameters")
