"""Groups of a batch as they travel. Counts are compared before columns are decoded, so that few bytes stay little memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec

from pipeline.core.kinds import BATCH_INT_BYTES_MAX, kind_of
from pipeline.core.record import Definition, Group
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
WireGroup = tuple[Definition, list[bytes], Annotated[list[msgspec.Raw], msgspec.Meta(max_length=COLUMNS_MAX)]]
"""A group whose columns are not decoded yet."""
_decode_column = msgspec.msgpack.Decoder(list[Scalar]).decode


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
