"""Observations of which a client tells the buckets, as the exponential histograms of OpenTelemetry have them.

Their buckets are those of the kind `histogram`: bucket `i` has the numbers above base**i, up to base**(i + 1), where the
base is 2**(2**-scale). What a client has put into its zero bucket, numbers up to its zero threshold, counts as 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import inf, isfinite, nextafter
from sys import float_info
from typing import NamedTuple

import msgspec

from pipeline.core.kinds.base import State
from pipeline.core.kinds.histogram import (
    BUCKETS_MAX,
    LEAST,
    SCHEMA_MAX,
    SCHEMA_MIN,
    Buckets,
    bound_of,
    coarser,
    middle_of,
    pack,
    places,
    unpack,
)
from pipeline.errors import Invalid

HISTOGRAM = "histogram"
"""Kind of the views that distributions belong to."""
_COUNT_MAX = 2**40
"""Most observations of a point, so that those of a whole request stay far below what a batch can hold."""
_ROUNDING = 1e-9
"""Part of a number by which a client's logarithm may be wrong: then a number is in the bucket beside its own."""

Run = tuple[int, Sequence[int]]
"""Index of a bucket, and the counts from it on."""
NO_RUN: Run = 0, ()


_End = tuple[int, int]
"""Sign and index of an outermost bucket; the sign of the zero bucket is 0."""


class ExponentialBuckets(NamedTuple):
    """Parts of a point of an exponential histogram beside its count and sum, not validated in any way."""

    scale: int = 0
    zeros: int = 0
    positive: Run = NO_RUN
    negative: Run = NO_RUN
    least: float | None = None
    most: float | None = None
    zero_threshold: float = 0.0


class Distribution(msgspec.Struct, frozen=True, gc=False):
    """Observations since a client's last point, or since its start. The sum of a view can be made of them."""

    count: int
    total: int | float
    least: float | None
    """Least observation; None if it is not known."""
    most: float | None
    packed: bytes
    """Schema, zeros and buckets, as a state of the kind `histogram` has them."""

    def since(self, earlier: Distribution) -> Distribution | None:
        """Return what was observed since an earlier total; None if a count of it has fallen.

        A minimum that is below the earlier one is among that. If it is not, the total's own only bounds what can be.
        """
        schema, zeros, *mine = unpack(self.packed)
        schema_then, zeros_then, *then = unpack(earlier.packed)
        coarse = min(schema, schema_then)
        zeros -= zeros_then
        positive, negative = (
            _less(coarser(now, schema - coarse), coarser(was, schema_then - coarse))
            for now, was in zip(mine, then, strict=True)
        )
        total = self.total - earlier.total
        if zeros < 0 or min((*positive.values(), *negative.values()), default=0) < 0 or not isfinite(total):
            return None
        least, most = self.least, self.most
        if zeros or positive or negative:
            low, high = self._estimates(_ends(zeros, positive, negative), coarse)
            least = least if least is not None and earlier.least is not None and least < earlier.least else low
            most = most if most is not None and earlier.most is not None and most > earlier.most else high
        packed = pack(coarse, zeros, positive, negative)
        return Distribution(self.count - earlier.count, total, least, most, packed)

    def state(self) -> State:
        """Return the state of the kind `histogram`; there must be an observation.

        A minimum or maximum that is not known is taken to be in the middle of its bucket.
        """
        schema, zeros, positive, negative = unpack(self.packed)
        ends = _ends(zeros, positive, negative)
        low, high = self._estimates(ends, schema)
        least = _within(low if self.least is None else self.least, ends[0], schema)
        most = _within(high if self.most is None else self.most, ends[1], schema)
        return self.total, least, most, schema, zeros, positive, negative

    def _estimates(self, ends: tuple[_End, _End], schema: int) -> Iterator[float]:
        """Yield a number in each of the outermost buckets, between the known minimum and maximum."""
        for sign, index in ends:
            middle = sign * middle_of(index, schema)
            yield min(max(middle, -inf if self.least is None else self.least), inf if self.most is None else self.most)


def distribution_of(count: int, total: float | None, it: ExponentialBuckets) -> Distribution:
    """Return what the parts of a point mean. Raises `Invalid` if they do not fit together."""
    if total is None or not isfinite(total):
        raise Invalid("no sum, or one that is not finite")
    if it.scale < SCHEMA_MIN:
        raise Invalid(f"scale {it.scale}: buckets that are too wide; at least {SCHEMA_MIN}")
    schema = min(it.scale, SCHEMA_MAX)
    positive, negative = (_buckets(run, it.scale - schema, places(schema)) for run in (it.positive, it.negative))
    if count > _COUNT_MAX or it.zeros + sum(positive.values()) + sum(negative.values()) != count:
        raise Invalid(f"its buckets do not make up its count, or over {_COUNT_MAX} observations")
    while len(positive) + len(negative) > BUCKETS_MAX:
        schema, positive, negative = schema - 1, coarser(positive, 1), coarser(negative, 1)
    least, most = (None if end is None or not isfinite(end) else end for end in (it.least, it.most))
    if count:
        if least is not None and most is not None and least > most:
            raise Invalid("its minimum is above its maximum")
        for end, bucket in zip((least, most), _ends(it.zeros, positive, negative), strict=True):
            if end is not None and not _fits(end, _within(end, bucket, schema), it.zero_threshold):
                raise Invalid(f"its minimum or maximum, {end}, is not in the outermost bucket")
    packed = pack(schema, it.zeros, positive, negative)
    return Distribution(count, int(total) if total.is_integer() else total, least, most, packed)


def _buckets(run: Run, by: int, between: tuple[int, int]) -> Buckets:
    offset, counts = run
    found = coarser({offset + i: count for i, count in enumerate(counts) if count}, by)
    if found and not between[0] <= min(found) <= max(found) <= between[1]:
        raise Invalid("buckets of numbers that no float can be")
    if min(found.values(), default=1) < 0:
        raise Invalid("a bucket with a count below 0")
    return found


def _less(mine: Buckets, then: Buckets) -> Buckets:
    found = {index: mine.get(index, 0) - then.get(index, 0) for index in (*mine, *then)}
    return {index: count for index, count in found.items() if count}


def _ends(zeros: int, positive: Buckets, negative: Buckets) -> tuple[_End, _End]:
    """Return the buckets of the least and of the largest number."""
    zero = 0, 0
    least = (-1, max(negative)) if negative else zero if zeros else (1, min(positive))
    most = (1, max(positive)) if positive else zero if zeros else (-1, min(negative))
    return least, most


def _within(value: float, bucket: _End, schema: int) -> float:
    """Return the number in a bucket that is nearest to a value."""
    sign, index = bucket
    if not sign:
        return value if abs(value) < LEAST else 0.0
    low, high = nextafter(bound_of(index, schema), inf), min(bound_of(index + 1, schema), float_info.max)
    return sign * min(max(sign * value, low, LEAST), high)


def _fits(value: float, nearest: float, zero_threshold: float) -> bool:
    return abs(value - nearest) <= max(abs(nearest) * _ROUNDING, zero_threshold if not nearest else LEAST)
