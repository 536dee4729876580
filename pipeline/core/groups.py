"""Groups of a batch as they travel. Counts are compared before columns are decoded, so that few bytes stay little memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Annotated, Any

import msgspec

from pipeline.core.kinds import BATCH_INT_BYTES_MAX, KINDS, State, kind_of
from pipeline.core.kinds.base import encode_list
from pipeline.core.record import Definition, Group, check_ahead_windows, check_suffixes, runs
from pipeline.errors import BadRecord

COLUMNS_MAX = 16
"""Most columns of a group in a batch whose other groups are looked at; no kind has so many."""
DENSE_FACTOR = 24
"""Upper bound of the memory that decoding the series of a batch takes for each of its bytes: counts are compared with each
other and with lengths before anything is built, so that each series takes 12 bytes of the batch at least."""
_SUFFIX_BYTES_MIN = 9
"""Fewest bytes of a suffix: the start of a window, and an empty array of label values."""
_FEW = 1_000
"""Number of suffixes up to which their lengths are not looked at before the columns are decoded."""

# A pair of floats is a sum with its error term. Nothing else nests: a byte must not become a dict.
Scalar = int | float | str | bool | tuple[float, float] | msgspec.msgpack.Ext | None
WireGroup = tuple[Definition, msgspec.Raw, Annotated[list[msgspec.Raw], msgspec.Meta(max_length=COLUMNS_MAX)]]
"""A group whose suffixes and columns are not decoded yet."""
_decode_column = msgspec.msgpack.Decoder(list[Scalar]).decode
_decode_suffixes = msgspec.msgpack.Decoder(list[bytes]).decode


class PackedGroup:
    """A group whose rows the native core has read and checked. It reads as a `Group`, which is decoded when needed."""

    __slots__ = ("_columns", "_plain", "_suffixes", "definition", "rows")

    def __init__(self, definition: Definition, suffixes: msgspec.Raw, columns: Sequence[msgspec.Raw], rows: Any) -> None:
        self.definition = definition
        self.rows = rows
        self._suffixes = suffixes
        self._columns = columns
        self._plain: Group | None = None

    @property
    def count(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def suffixes(self) -> list[bytes]:
        """Suffixes of the series, as in a `Group`."""
        return self.plain().suffixes

    @property
    def states(self) -> list[State]:
        """States of the series, as in a `Group`."""
        return self.plain().states

    def plain(self) -> Group:
        """Return the same as a `Group`."""
        if self._plain is None:
            self._plain = decode_group(self.definition, decode_suffixes(self._suffixes), self._columns)
        return self._plain


def packed(native: Any, definition: Definition, suffixes: msgspec.Raw, columns: Sequence[msgspec.Raw]) -> PackedGroup | None:
    """Return a group with rows that the native core has read and checked: also their suffixes, and whether they fit to a
    monotone sum. None: they are of a kind that it does not know, unusual or wrong.
    """
    rows = _rows(native, definition, bytes(suffixes), [*map(bytes, columns)])
    return None if rows is None else PackedGroup(definition, suffixes, columns, rows)


def rows_of(native: Any, group: Group | PackedGroup) -> Any:
    """Return the rows of a checked group as the native core has them; None if it can't."""
    if isinstance(group, PackedGroup):
        return group.rows
    columns = [encode_list(column) for column in KINDS[group.definition.kind].to_columns(group.states)]
    return _rows(native, group.definition, encode_list(group.suffixes), columns)


def _rows(native: Any, definition: Definition, suffixes: bytes, columns: list[bytes]) -> Any:
    window_ms = definition.window_s * 1_000
    return native.Rows.of(definition.kind, definition.monotone, window_ms, len(definition.labels), suffixes, columns)


def check_rows(group: Group | PackedGroup, latest_ms: int, known: Iterable[Collection[bytes]] = ()) -> None:
    """Raise `BadRecord` unless all suffixes of a group are series of its definition, and none of its own times is later than
    `latest_ms`. `known` are suffixes that were checked before.
    """
    definition = group.definition
    if isinstance(group, PackedGroup):
        if group.rows.latest_ms <= latest_ms:
            return
    else:
        for suffixes in runs(group.suffixes):
            unknown = set(suffixes)
            for some in known:
                unknown = unknown.difference(some)
            check_suffixes(definition, [*unknown])
    check_ahead_windows(definition, group.suffixes, latest_ms)
    kind_of(definition).check_times(group.states, latest_ms)


def decode_suffixes(raw: msgspec.Raw) -> list[bytes]:
    """Decode the suffixes of a group. Raises `BadRecord` if they are no list of bytes."""
    try:
        return _decode_suffixes(raw)
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"batch: suffixes: {error}") from None


def decode_group(definition: Definition, suffixes: list[bytes], columns: Sequence[msgspec.Raw]) -> Group:
    """Decode the columns of a group. Raises `BadRecord` unless they are states of its kind, one for each suffix."""
    count, kind = len(suffixes), kind_of(definition)
    if not count:
        raise BadRecord("a group without series")
    if count > _FEW and sum(map(len, suffixes)) < count * _SUFFIX_BYTES_MIN:
        raise BadRecord(f"{count} suffixes of under {_SUFFIX_BYTES_MIN} bytes each")
    for column in columns:
        if _item_count(column) != count:
            raise BadRecord(f"kind {kind.name}: columns of {count} values expected")
    try:
        decoded = [_decode_column(column) for column in columns]
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise BadRecord(f"kind {kind.name}: {error}") from None
    return Group(definition, suffixes, kind.from_columns(decoded, count, BATCH_INT_BYTES_MAX))


def _item_count(raw: msgspec.Raw) -> int:
    """Return the number of items that an encoded array announces; -1 if the bytes are no array."""
    view = memoryview(raw)
    first = view[0]
    if 0x90 <= first <= 0x9F:
        return first & 0x0F
    return int.from_bytes(view[1 : 3 if first == 0xDC else 5], "big") if first in (0xDC, 0xDD) else -1
