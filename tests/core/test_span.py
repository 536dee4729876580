"""Ranges of windows: their bounds, and the windows in each point."""

from itertools import accumulate, pairwise
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.derive import FUNCTIONS, check_function, derived, totals
from pipeline.core.span import FILLS, STEPS_DEFAULT, AskedRange, Span, filled, merge_points, span_of
from pipeline.core.times import TIME_MS_MAX
from pipeline.errors import Invalid

W = 10_000
"""Length of a window in ms."""


def span(now_ms: int = 10**12, points_max: int = 11_000, **asked: Any) -> Span:
    return span_of(AskedRange(**asked), window_ms=W, now_ms=now_ms, points_max=points_max)


times = st.integers(0, 200 * W)
steps = st.integers(1, 12).map(lambda n: n * W)
spans = st.builds(
    lambda start, count, step, more: Span(start * W, start * W + count * step, step, step + more * W),
    st.integers(0, 30),
    st.integers(1, 20),
    steps,
    st.integers(0, 30),
)


@given(times, times, steps, st.integers(0, 20))
def test_a_range_has_whole_windows_and_steps(a: int, b: int, step: int, more: int) -> None:
    """The start is rounded down to a window, the end up to a whole step, by less than a window and a step."""
    start, end = min(a, b), max(a, b) + 1
    found = span(start_ms=start, end_ms=end, step_ms=step, over_ms=step + more * W)
    assert found.start_ms % W == 0
    assert start - W < found.start_ms <= start
    assert found.end_ms == found.start_ms + found.point_count * step
    assert end <= found.end_ms < end + step + (start - found.start_ms)
    assert found.covered_ms == found.start_ms + step - found.over_ms


@given(st.integers(0, TIME_MS_MAX), steps)
def test_without_a_start_there_are_the_last_steps(now: int, step: int) -> None:
    """Without a start, 60 steps end with the present window, or as many as there are since 1970."""
    found = span(now_ms=now, step_ms=step)
    assert found.point_count == max(1, min(STEPS_DEFAULT, max(W, ceil(now / W) * W) // step))
    assert found.start_ms >= 0
    assert now <= found.end_ms <= now + max(step, W)
    assert span(now_ms=5, end_ms=now, step_ms=step) == found


@given(st.integers(0, TIME_MS_MAX), steps)
def test_a_single_moment_is_one_step(at: int, step: int) -> None:
    """`at` is the end of one step, or of one point over a length; with a start it is the end of the range."""
    assert span(at_ms=at, step_ms=step).point_count == 1
    assert span(at_ms=at, over_ms=step) == span(at_ms=at, step_ms=step)
    assert span(start_ms=max(0, at - 99), at_ms=at + 1) == span(start_ms=max(0, at - 99), end_ms=at + 1)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"step_ms": 25_000}, "step: 25s is no multiple of the view's window of 10s; the nearest is 30s"),
        ({"step_ms": 24_000}, "the nearest is 20s"),
        ({"step_ms": 1_000}, "step: 1s is no multiple of the view's window of 10s; the nearest is 10s"),
        ({"step_ms": 1}, "step: 1ms is no multiple .* the nearest is 10s"),
        ({"over_ms": 61_000}, "over: 61s is no multiple of the view's window of 10s; the nearest is 1m"),
        ({"step_ms": 20_000, "over_ms": 10_000}, "over: 10s is shorter than the step of 20s"),
        ({"start_ms": 2 * W, "end_ms": W}, "start: 1970-01-01T00:00:20Z is not before end 1970-01-01T00:00:10Z"),
        ({"start_ms": W, "end_ms": W}, "is not before end"),
        ({"start_ms": W, "at_ms": W}, "is not before at"),
        ({"start_ms": 10**12}, "is not before end, which is now"),
        ({"end_ms": W, "at_ms": W}, "only one of them"),
        ({"start_ms": 0}, r"100000000 points in the range; at most 11000 \(setting points_max\).* of 90910s or more"),
        ({"start_ms": 0, "end_ms": TIME_MS_MAX}, "points in the range; at most 11000"),
    ],
)
def test_a_range_that_can_not_be_is_refused(asked: dict[str, int], said: str) -> None:
    """The error of an impossible range says what is wrong and what would be right."""
    with pytest.raises(Invalid, match=said):
        span(**asked)


def test_the_step_that_an_error_names_fits() -> None:
    """A range of too many points fits with the step of the error."""
    with pytest.raises(Invalid, match="or for a step of 90910s or more"):
        span(start_ms=0)
    assert span(start_ms=0, step_ms=90_910_000).point_count <= 11_000


@given(spans, st.data())
def test_points_are_the_merge_of_what_they_cover(it: Span, data: st.DataObject) -> None:
    """Each point is the merge of exactly its buckets, however points overlap, and no state is merged often."""
    count = (it.end_ms - it.covered_ms) // it.bucket_ms
    there = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    merges = 0

    def merge(a: frozenset[int], b: frozenset[int]) -> frozenset[int]:
        nonlocal merges
        assert not a & b
        merges += 1
        return a | b

    found = dict(merge_points(it, [(bucket, frozenset([bucket])) for bucket in there], merge))
    expected = {}
    for point in range(it.point_count):
        end = it.start_ms + (point + 1) * it.step_ms
        covered = frozenset(b for b in there if end - it.over_ms <= it.bucket_start_ms(b) < end)
        if covered:
            expected[point] = covered
    assert found == expected
    assert [*found] == sorted(found)
    assert merges <= 2 * len(there) + it.point_count


@given(spans, st.integers(0, 1_000))
def test_each_window_is_in_one_bucket(it: Span, window: int) -> None:
    """A bucket holds whole windows, and begins at a multiple of the window."""
    start = it.covered_ms + window * W
    bucket = it.bucket(start)
    assert it.bucket_start_ms(bucket) <= start
    assert start + W <= it.bucket_start_ms(bucket + 1)
    assert it.bucket_start_ms(bucket) % W == 0


@given(spans, st.data(), st.sampled_from([None, *FILLS]))
def test_points_without_data_are_filled(it: Span, data: st.DataObject, fill: str | None) -> None:
    """Null and zero stand at every start, zero not where something has expired; previous goes on from the first point."""
    values = data.draw(st.dictionaries(st.integers(0, it.point_count - 1), st.integers()))
    values = dict(sorted(values.items()))
    zero_from = data.draw(st.sampled_from([0, it.starts()[it.point_count // 2]]))
    found = filled(it, values, fill, zero_from_ms=zero_from)
    starts = [*it.starts()]
    assert [start for start, _ in found] == sorted({start for start, _ in found})
    by_start = dict(found)
    for i, start in enumerate(starts):
        earlier = [values[j] for j in values if j <= i]
        if i in values:
            assert by_start[start] == values[i]
        elif fill is None or (fill == "previous" and not earlier):
            assert start not in by_start
        elif fill == "previous":
            assert by_start[start] == earlier[-1]
        else:
            assert by_start[start] == (0 if fill == "zero" and start >= zero_from else None)


@given(spans, st.data(), st.sampled_from(FUNCTIONS))
def test_functions_are_what_their_names_say(it: Span, data: st.DataObject, name: str) -> None:
    """Each function equals a plain recomputation; a point without data counts as 0, one that lacks windows is not known."""
    numbers = st.dictionaries(st.integers(0, it.point_count - 1), st.integers(-9, 9), max_size=8)
    series = [dict(sorted(values.items())) for values in data.draw(st.lists(numbers, min_size=1, max_size=3))]
    if name == "cumulative" and it.over_ms != it.step_ms:
        with pytest.raises(Invalid, match="overlap"):
            check_function(name, "sum", it)
        return
    check_function(name, "sum", it)
    values, total = series[0], totals(series)
    assert total == {i: sum(s.get(i, 0) for s in series) for i in {i for s in series for i in s}}
    dense = [values.get(i, 0) for i in range(it.point_count)]
    whole = [total.get(i, 0) for i in range(it.point_count)]
    kept = data.draw(st.integers(-1, it.point_count))
    lacking = [None] * max(0, kept)
    expected: list[Any] = {
        "rate": [*lacking, *(value / (it.over_ms / 1_000) for value in dense[len(lacking) :])],
        "delta": [None, *(b - a if i >= kept else None for i, (a, b) in enumerate(pairwise(dense)))],
        "avg": [*lacking, *(value / (it.over_ms / W) for value in dense[len(lacking) :])],
        "cumulative": [*lacking, *accumulate(dense[len(lacking) :])],
        "share": [value / all_ if all_ else None for value, all_ in zip(dense, whole, strict=True)],
    }[name]
    found = derived(name, values, it, window_ms=W, total=total, kept=kept)
    assert [*found] == sorted(found)
    for i, value in enumerate(expected):
        if i in found:
            assert found[i] == (value if value is None else pytest.approx(value))
        elif value is not None:
            assert value == 0
        else:
            assert name == "delta" or i < kept


@pytest.mark.parametrize(("name", "kind", "said"), [("median", "sum", "fn: one of rate"), ("rate", "max", "of kind max")])
def test_a_function_that_can_not_be_is_refused(name: str, kind: str, said: str) -> None:
    """An unknown function, or one of a view that is no sum, is refused."""
    with pytest.raises(Invalid, match=said):
        check_function(name, kind, Span(0, W, W, W))


def test_functions_of_numbers_beyond_all_floats() -> None:
    """A quotient that no float can hold is rounded down to an int."""
    it = Span(0, W, W, W)
    assert derived("avg", {0: 10**400}, it, window_ms=W, total={}) == {0: 10**400}
    assert derived("rate", {0: 10**400}, it, window_ms=W, total={}) == {0: 10**399}
    assert derived("share", {0: 10**400}, it, window_ms=W, total={0: 2 * 10**400}) == {0: 0.5}


def test_no_difference_to_what_has_expired() -> None:
    """A point behind one that lacks expired windows has no difference; the next one has."""
    it = Span(0, 10 * W, W, W)
    assert derived("delta", {5: 1, 6: 4}, it, window_ms=W, total={}, kept=5) == {6: 3, 7: -4}
    assert derived("delta", {0: 1, 1: 4}, it, window_ms=W, total={}) == {1: 3, 2: -4}
