"""Distributions that clients tell by their buckets: the states of what was observed, and increases of totals."""

from __future__ import annotations

from functools import reduce
from math import inf
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics._internal.exponential_histogram.mapping.logarithm_mapping import LogarithmMapping

from pipeline.core.distribution import NO_RUN, Distribution, ExponentialBuckets, Run, distribution_of
from pipeline.core.kinds import KINDS, State
from pipeline.core.kinds.histogram import SCHEMA_MAX, SCHEMA_MIN, coarser
from pipeline.errors import Invalid
from tests.support import LONG, examples

HISTOGRAM = KINDS["histogram"]
NUMBERS = st.integers(-(2**12), 2**12).map(lambda n: n * 2.0**-6) | st.sampled_from([1e-6, 1e6, -1e6, 1e-310])
OBSERVED = st.lists(NUMBERS, min_size=1, max_size=60)
SCALES = st.integers(SCHEMA_MIN, SCHEMA_MAX)


def run_of(buckets: dict[int, int]) -> Run:
    if not buckets:
        return NO_RUN
    return min(buckets), [buckets.get(index, 0) for index in range(min(buckets), max(buckets) + 1)]


def told(values: list[float], scale: int, *, ends: bool = True) -> Distribution:
    """Return what a client tells of its observations, if its logarithms are exact."""
    _, least, most, schema, zeros, positive, negative = HISTOGRAM.collect(values)
    by = schema - min(scale, schema)
    found = [run_of({**coarser(it, by)}) for it in (positive, negative)]
    buckets = ExponentialBuckets(min(scale, schema), zeros, *found, *((least, most) if ends else ()))
    return distribution_of(len(values), float(sum(values)), buckets)


def on_the_wire(state: State) -> State:
    """Return a state that was a batch in between, of which every part is checked there."""
    return HISTOGRAM.from_columns(HISTOGRAM.to_columns([state]), 1)[0]


@settings(max_examples=examples(300), deadline=None)
@given(OBSERVED, SCALES)
def test_buckets_are_the_state_of_what_was_observed(values: list[float], scale: int) -> None:
    """Buckets, count, minimum and maximum are those of the observations themselves, at the resolution of the client."""
    state = on_the_wire(told(values, scale).state())
    exact = HISTOGRAM.collect(values)
    by = exact[3] - state[3]
    assert state[3] <= scale
    assert state[1:3] == (min(values), max(values))
    assert state[4:] == (exact[4], coarser(exact[5], by), coarser(exact[6], by))


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(OBSERVED, min_size=1, max_size=4), st.lists(SCALES, min_size=4, max_size=4), st.booleans())
def test_increases_make_up_the_total(parts: list[list[float]], scales: list[int], ends: bool) -> None:
    """Increases merge to the total, whose scale may have fallen in between. Its minimum and maximum are exact if a client
    tells them; if it does not, they are in the right bucket.
    """
    scales.sort(reverse=True)
    before, states, seen = None, [], list[float]()
    for part, scale in zip(parts, scales, strict=False):
        seen += part
        now = told(seen, scale, ends=ends)
        increase = now if before is None else now.since(before)
        assert increase is not None
        assert increase.count == len(part)
        states.append(on_the_wire(increase.state()))
        before = now
    merged = reduce(HISTOGRAM.merge, states)
    exact = HISTOGRAM.collect(seen)
    by = exact[3] - merged[3]
    assert merged[4:] == (exact[4], coarser(exact[5], by), coarser(exact[6], by))
    if ends:
        assert merged[1:3] == (min(seen), max(seen))
    on_the_wire(merged)


def test_a_total_that_falls_has_no_increase() -> None:
    """A bucket whose count is smaller than before shows another start, even if the whole count has grown."""
    assert told([1.0, 1.0], 3).since(told([1.0, 5.0], 3)) is None
    assert told([0.0, 1.0], 3).since(told([0.0, 0.0], 3)) is None
    assert told([2.0, 2.0, 2.0], 3).since(told([3.0], 3)) is None
    same = told([2.0], 3).since(told([2.0], 3))
    assert same is not None
    assert same.count == 0


def test_numbers_that_clients_round_are_taken() -> None:
    """A number that a logarithm put into the bucket beside its own, one below the zero threshold, and a client that finds
    more zeros or subnormal numbers: all of them are taken, near enough.
    """
    beside = ExponentialBuckets(0, 0, (3, [1]), NO_RUN, 8.0, 8.0)  # 8 is the last number of bucket 2
    assert on_the_wire(distribution_of(1, 8.0, beside).state())[1:3] == (8.000000000000002, 8.000000000000002)
    zeros = ExponentialBuckets(0, 2, (3, [1]), NO_RUN, 0.01, 9.0, 0.125)
    assert on_the_wire(distribution_of(3, 9.2, zeros).state())[1:3] == (0.0, 9.0)
    tiny = ExponentialBuckets(0, 0, (-1_023, [1]), NO_RUN, 1e-310, 1e-310)
    assert on_the_wire(distribution_of(1, 1e-310, tiny).state())[1] == 2.0**-1022
    unknown = ExponentialBuckets(20, 0, (7 << 20, [1]), NO_RUN, inf, -inf)  # an SDK told not to keep them
    state = on_the_wire(distribution_of(1, 129.0, unknown).state())
    assert state[1] == state[2] == pytest.approx(128.2, abs=0.2)
    half = ExponentialBuckets(0, 0, (3, [2]), NO_RUN, None, 9.0)
    assert on_the_wire(distribution_of(2, 18.0, half).state())[1:3] == (9.0, 9.0)


@pytest.mark.parametrize(
    ("count", "total", "buckets"),
    [
        (2, 1.0, ExponentialBuckets(0, 1)),
        (1, None, ExponentialBuckets(0, 1)),
        (1, inf, ExponentialBuckets(0, 1)),
        (2**40 + 1, 1.0, ExponentialBuckets(0, 2**40 + 1)),
        (1, 1.0, ExponentialBuckets(SCHEMA_MIN - 1, 0, (0, [1]))),
        (1, 1.0, ExponentialBuckets(0, 0, (1_024, [1]))),
        (1, 1.0, ExponentialBuckets(0, 0, (-1_024, [1]))),
        (1, 1.0, ExponentialBuckets(0, 0, (0, [2, -1]))),
        (1, 1.5, ExponentialBuckets(0, 0, (0, [1]), NO_RUN, 0.5, 1.5)),
        (1, 1.5, ExponentialBuckets(0, 0, (0, [1]), NO_RUN, 1.9, 1.5)),
        (2, 9.0, ExponentialBuckets(0, 1, (3, [1]), NO_RUN, 0.01, 9.0)),
        (0, 0.0, ExponentialBuckets(0, 0, (0, [1]))),
    ],
)
def test_parts_that_do_not_fit_are_refused(count: int, total: float | None, buckets: ExponentialBuckets) -> None:
    """Buckets that are not the count, ends outside of them, and numbers that no float can be are no distribution."""
    with pytest.raises(Invalid):
        distribution_of(count, total, buckets)


RUNS = st.tuples(st.integers(-(2**31), 2**31 - 1) | st.integers(-9, 9), st.lists(st.integers(0, 9), max_size=9))
ENDS = st.none() | st.floats() | st.integers(-9, 9).map(float)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=10_000 if LONG else 100, deadline=None)
@given(
    st.integers(-(2**31), 2**31 - 1) | st.integers(-6, 20),
    st.integers(0, 2),
    RUNS,
    RUNS,
    st.tuples(ENDS, ENDS, st.floats(), st.floats()),
)
def test_any_parts_are_refused_or_a_state(scale: int, zeros: int, a: Any, b: Any, numbers: Any) -> None:
    """Any parts that a client tells are `Invalid`, or a state that a task takes."""
    count = zeros + sum(a[1]) + sum(b[1])
    least, most, threshold, total = numbers
    try:
        found = distribution_of(count, total, ExponentialBuckets(scale, zeros, a, b, least, most, threshold))
    except Invalid:
        return
    if count:
        on_the_wire(found.state())


@settings(max_examples=examples(100), deadline=None)
@given(st.floats(1e-6, 1e6), st.lists(st.integers(0, 900), min_size=1, max_size=40), st.integers(1, 20))
def test_indexes_are_those_of_the_sdk(base: float, steps: list[int], scale: int) -> None:
    """Buckets that OpenTelemetry's SDK finds, at its finest scales, too, are taken; extremes are exact to a rounding."""
    mapping = LogarithmMapping(scale)
    values = [base * (1 + step * 1e-6) for step in steps]
    found: dict[int, int] = {}
    for value in values:
        index = mapping.map_to_index(value)
        found[index] = found.get(index, 0) + 1
    buckets = ExponentialBuckets(scale, 0, run_of(found), NO_RUN, min(values), max(values))
    state = on_the_wire(distribution_of(len(values), sum(values), buckets).state())
    assert state[1:3] == (pytest.approx(min(values), rel=1e-9), pytest.approx(max(values), rel=1e-9))
