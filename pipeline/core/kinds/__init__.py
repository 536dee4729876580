"""One algebra for tables, batches, overlays, stores and answers.

Every kind is a commutative monoid over its *states*: `merge` is associative and commutative, and merging nothing is the
identity (a series without deltas has no entry). So deltas can be merged wherever they meet, in any grouping and order,
and the answer is the same; sums of floats can differ in the last bit of the answer.

| kind | state |
|---|---|
| sum | int, exact at any size; or a finite float; or (float, error term); of a monotone one never below 0 |
| min, max | int or finite float |
| mean | (sum as above, count) |
| last | (ts_ms, recorded_ns, value) |
| histogram | (sum as above, least, most, schema, zeros, positive buckets, negative buckets) |

A family of kinds is a module of this package, and stands in `KINDS` below.
"""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core.kinds.base import (
    BATCH_INT_BYTES_MAX,
    INT_BITS_MAX,
    STATE_INT_BYTES_MAX,
    Kind,
    State,
    number,
    numbers,
    to_wire,
)
from pipeline.core.kinds.histogram import Histogram
from pipeline.core.kinds.last import RECORDED_NS_MAX, TEXT_BYTES_MAX, TS_MS_MAX, Last, check_ahead
from pipeline.core.kinds.numeric import Max, Mean, Min, MonotoneSum, Sum, add
from pipeline.core.record import Definition

__all__ = [
    "BATCH_INT_BYTES_MAX",
    "INT_BITS_MAX",
    "KINDS",
    "KIND_NAMES",
    "RECORDED_NS_MAX",
    "STATE_INT_BYTES_MAX",
    "TEXT_BYTES_MAX",
    "TS_MS_MAX",
    "Kind",
    "State",
    "add",
    "check_ahead",
    "kind_of",
    "number",
    "numbers",
    "to_wire",
]

KINDS: Mapping[str, Kind] = {kind.name: kind for kind in (Sum(), Min(), Max(), Mean(), Last(), Histogram())}
"""Every kind by name."""

KIND_NAMES: tuple[str, ...] = tuple(KINDS)
_MONOTONE_SUM = MonotoneSum()


def kind_of(definition: Definition) -> Kind:
    """Return the kind that checks deltas of a definition, and states from outside. To merge and store, `KINDS` is enough."""
    return _MONOTONE_SUM if definition.monotone else KINDS[definition.kind]
