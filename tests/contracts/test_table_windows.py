"""Windows in both tables: the window of a delta, the end of a series, and local totals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.core.record import OVERFLOW, WINDOW_NONE, Definition, parse_suffix, series_suffix
from pipeline.errors import Invalid
from pipeline.publisher.table import Table
from pipeline.publisher.view import check_value
from tests.contracts.tables import NOW_MS, Lab, every_table, extension, raw_series
from tests.contracts.test_table_forks import busy
from tests.publisher.support import in_threads

MINUTE_MS = 60_000
START_MS = NOW_MS - NOW_MS % MINUTE_MS


def by_window(drafts: list[Any]) -> dict[tuple[str, int, tuple[str, ...]], Any]:
    """Return the first column of each series in drafts, by view, window start and labels, added over drafts."""
    found: dict[tuple[str, int, tuple[str, ...]], Any] = {}
    for name, suffix, columns in raw_series(drafts):
        key = (name, *parse_suffix(suffix))
        found[key] = found.get(key, 0) + columns[0]
    return found


@every_table
def test_a_series_that_is_kept_over_an_edge_counts_in_each_window(way: str) -> None:
    """A bound series and a view follow the clock at each delta, to the millisecond, forwards and back."""
    lab = Lab(way)
    view, low = lab.define(window_s=60), lab.define("min", window_s=60)
    bound, bound_low = view.labels("eu"), low.labels("eu")
    steps = [(0, 1), (MINUTE_MS - 1, 2), (MINUTE_MS, 4), (2 * MINUTE_MS - 1, 8), (MINUTE_MS - 1, 16), (5 * MINUTE_MS, 32)]
    for number, (ms, value) in enumerate(steps):
        lab.now_ms = START_MS + ms
        for _ in range(3):
            bound.add(value)
            view.add(value * 100, region="eu")
            view.add(value, region="us")
            bound_low.observe(value)
            low.observe(value, region="eu")
        assert lab.table.waiting_count == 15 * (number % 2 + 1)
        if number % 2:
            found = by_window(lab.drain(3))
            for (_, start, _), state in found.items():
                assert (start - START_MS) % MINUTE_MS == 0
                assert state > 0
            expected = {
                1: {0: 9, MINUTE_MS: None},
                3: {MINUTE_MS: 36, 0: None},
                5: {0: 48, 5 * MINUTE_MS: 96, MINUTE_MS: None},
            }[number]
            for ms, total in expected.items():
                assert found.get(("sum", START_MS + ms, ("us",))) == total
                assert found.get(("sum", START_MS + ms, ("eu",))) == (total and total * 101)
            lowest = {1: {0: 1}, 3: {MINUTE_MS: 4}, 5: {0: 16, 5 * MINUTE_MS: 32}}[number]
            assert {key: state for key, state in found.items() if key[0] == "min"} == {
                ("min", START_MS + ms, ("eu",)): value for ms, value in lowest.items()
            }


@every_table
def test_times_that_are_given_and_not_given(way: str) -> None:
    """A given time puts one delta elsewhere; the next one without is in the present window, in every way to record."""
    lab = Lab(way)
    view = lab.define(window_s=60)
    bound = view.labels("eu")
    for i in range(10):
        bound.add(1)
        bound.add(100, ts_ms=i * MINUTE_MS)
        view.add(1, region="eu")
        view.add(100, region="eu", ts_ms=i * MINUTE_MS + 59_999)
        bound.add(1, ts_ms=NOW_MS)
        bound.add(1, ts_ms=None)
    assert view.add_many(("eu",), [1, 1]) == 2
    assert view.add_many(("eu",), [100, 1], [0, NOW_MS]) == 2
    assert view.record_columns([["eu"] * 2], [100, 1], [MINUTE_MS, NOW_MS]) == 2
    expected = {("sum", i * MINUTE_MS, ("eu",)): 200 + 100 * (i < 2) for i in range(10)}
    assert by_window(lab.drain()) == expected | {("sum", START_MS, ("eu",)): 44}


@every_table
def test_what_is_wrong_is_refused_in_a_windowed_view_too(way: str) -> None:
    """Wrong numbers, labels and times are refused and not recorded, also for a series whose window is known."""
    lab = Lab(way)
    view = lab.define(window_s=60, monotone=True)
    bound = view.labels("eu")
    for _ in range(2):
        bound.add(1)
        view.add(1, region="eu")
        wrongs: list[Callable[[], object]] = [
            lambda: bound.add(-1),
            lambda: bound.add("1"),
            lambda: bound.add(float("nan")),
            lambda: bound.add(1, ts_ms=NOW_MS + 3_600_001),
            lambda: bound.add(1, ts_ms=-1),
            lambda: view.add(-1, region="eu"),
            lambda: view.add(1, region=5),
            lambda: view.add(1, regio="eu"),
            lambda: view.add(1),
            lambda: view.add(1, region="eu", ts_ms=NOW_MS + 3_600_001),
            lambda: view.add(1, region="eu", ts_ms="now"),
        ]
        for wrong in wrongs:
            with pytest.raises(Invalid):
                wrong()
    bound.add(2**70)
    assert len(raw_series(lab.drain())) == 1


@every_table
def test_series_of_windows_that_have_ended_leave_the_table(way: str) -> None:
    """Series leave once their window has ended and they have no deltas, not before; a late delta brings a series back."""
    lab = Lab(way)
    view, newest, other = lab.define(window_s=60), lab.define("last", window_s=60), lab.define(view="other")
    bound = view.labels("eu")
    other.add(1, region="eu")
    bound.add(1)
    newest.set("x", region="eu")
    assert lab.table.evict_ended() == 0
    lab.now_ms = START_MS + MINUTE_MS
    assert lab.table.evict_ended() == 0  # they wait to be drained
    bound.add(2)
    lab.drain()
    assert (lab.table.evict_ended(), lab.table.series_count) == (2, 2)
    assert lab.table.evict_ended() == 0
    bound.add(4)
    bound.add(8, ts_ms=START_MS)
    assert lab.table.series_count == 3
    assert by_window(lab.drain()) == {("sum", START_MS + MINUTE_MS, ("eu",)): 4, ("sum", START_MS, ("eu",)): 8}
    lab.now_ms -= 1  # a clock that goes back has them come in again, no more
    bound.add(16)
    assert by_window(lab.drain()) == {("sum", START_MS, ("eu",)): 16}
    lab.now_ms += 1
    assert (lab.table.evict_ended(), lab.table.series_count) == (1, 2)
    lab.now_ms = START_MS + 10 * MINUTE_MS
    assert (lab.table.evict_ended(), lab.table.series_count) == (1, 1)


@every_table
def test_a_thousand_windows_take_no_more_room_than_one(way: str) -> None:
    """Memory and names in the journal follow the series of the present window, and local totals the label sets."""
    lab = Lab(way)
    view = lab.define(window_s=60)
    bound = [view.labels(str(i)) for i in range(5)]
    used, gone, total = set(), [], 0
    for window in range(1_000):
        lab.now_ms = START_MS + window * MINUTE_MS
        for _ in range(2):
            for series in bound:
                series.add(1)
            view.add(1, region="keyed")
            lab.drain()
        lab.table.evict_ended()
        used.add((lab.table.used_bytes, lab.table.series_count))
        if lab.journal:
            gone += lab.table.cut()[1]
        total += 2
    assert len(used) == 1
    assert used.pop()[1] == 6
    assert len(gone) == len(set(gone))
    lab.drain()
    gone += lab.table.cut()[1] if lab.journal else []
    assert not lab.journal or len(gone) == 6 * 999
    lab.table.snapshot()
    local = lab.table.local(view)
    assert {suffix: local[suffix] for suffix in local} == {
        series_suffix([label]): total for label in [*map(str, range(5)), "keyed"]
    }


@every_table
def test_local_totals_are_over_all_windows(way: str) -> None:
    """A label set has one total, drained or not, evicted or not; `local_series_max` counts label sets."""
    lab = Lab(way, local_series_max=2)
    view, newest = lab.define(window_s=60), lab.define("last", labels=(), window_s=60)
    for i in range(3):
        view.add(1, region="eu", ts_ms=i * MINUTE_MS)
    lab.drain()
    view.add(1, region="eu", ts_ms=9 * MINUTE_MS)
    newest.set("new", 5 * MINUTE_MS)
    newest.set("old", 4 * MINUTE_MS)
    lab.table.snapshot()
    assert (lab.table.local(view)[series_suffix(["eu"])], lab.table.local(view).complete) == (4, True)
    assert lab.table.local(newest)[WINDOW_NONE + b"\x90"][2] == "new"
    lab.drain()
    assert lab.table.evict_ended() == 6
    view.add(1, region="us")
    view.add(1, region="eu")
    lab.table.snapshot()
    assert (lab.table.local(view)[series_suffix(["eu"])], lab.table.local(view).complete) == (5, False)


@every_table
def test_series_max_counts_the_series_of_a_window(way: str) -> None:
    """Series of the last window, which are still in the table, take no room from those of the next."""
    lab = Lab(way)
    view = lab.define(window_s=60, series_max=2)
    for window in range(3):
        lab.now_ms = START_MS + window * MINUTE_MS
        for region in "abcd":
            view.add(1, region=region)
    assert view.overflow_count == 6
    expected = {
        ("sum", START_MS + window * MINUTE_MS, (region,)): count
        for window in range(3)
        for region, count in (("a", 1), ("b", 1), (OVERFLOW, 2))
    }
    assert by_window(lab.drain()) == expected
    assert lab.table.evict_ended() == 6
    view.add(1, region="c")
    view.add(1, region="a")
    assert view.overflow_count == 7
    lab.drain()
    assert lab.table.evict(0) == 3
    view.add(1, region="c")
    assert view.overflow_count == 7


@every_table
def test_threads_over_many_edges(way: str) -> None:
    """Each delta is in a window in which it was recorded, once, while the clock goes on and others drain and evict."""
    lab = Lab(way)
    view = lab.define(window_s=1)
    bound = view.labels("eu")
    lab.now_ms = 0
    drafts: list[Any] = []
    seen: list[tuple[int, int]] = []

    def record(number: int) -> None:
        for _ in range(2_000):
            before = lab.now_ms
            bound.add(1)
            view.add(1, region="us")
            view.add(1, region="late", ts_ms=0)
            seen.append((before, lab.now_ms))

    def go_on() -> None:
        lab.now_ms += 250
        drafts.extend(lab.drain(2))
        lab.table.evict_ended()

    with busy(go_on):
        in_threads(3, record)
    found = by_window(drafts + lab.drain(2))
    assert found.pop(("sum", 0, ("late",))) == 6_000
    for region in ("eu", "us"):
        counts = {start: count for (_, start, (label,)), count in found.items() if label == region}
        assert sum(counts.values()) == 6_000
        for start, count in counts.items():
            assert count <= sum(before < start + 1_000 and start <= after for before, after in seen)
    lab.now_ms += 1_000
    lab.table.evict_ended()
    assert (lab.table.series_count, lab.table.used_bytes) == (0, 0)


@every_table
def test_a_closed_table_asks_in_a_windowed_view_too(way: str) -> None:
    """Nothing is recorded after `close` without a question, not even by series whose window is known."""
    lab = Lab(way)
    view = lab.define(window_s=60)
    bound = view.labels("eu")
    for _ in range(2):
        bound.add(1)
        view.add(1, region="eu")
    lab.table.close()

    def closed() -> None:
        raise Invalid("this publisher is closed")

    lab.on_open = closed
    for record in (bound.add, lambda: view.add(1, region="eu"), lambda: view.add_many(["eu"], [1])):
        with pytest.raises(Invalid, match="closed"):
            record()
    assert by_window(lab.drain()) == {("sum", START_MS, ("eu",)): 4}
    lab.on_open = lambda: None
    lab.table.forget()
    bound.add(1)
    view.add(1, region="eu")
    assert by_window(lab.drain()) == {("sum", START_MS, ("eu",)): 2}


@pytest.mark.parametrize("way", ["plain", "native"])
def test_the_system_clock_is_read_exactly(way: str) -> None:
    """With `time.time_ns` as its clock, a table puts each delta into a window between the times before and after it."""
    kind: Any = Table if way == "plain" else extension().Table
    table = kind(
        bytes_max=1 << 40,
        check=check_value,
        opening=int,
        full=lambda bytes_needed, delta_count: False,
        now_ms=lambda: time.time_ns() // 1_000_000,
        now_ns=time.time_ns,
    )
    view = table.define(Definition("v", "sum", ("region",), window_s=1), 1 << 20)
    bound, stop = view.labels("eu"), threading.Event()
    spans: list[tuple[int, int]] = []
    time.sleep(0.9 - time.time() % 1 if time.time() % 1 < 0.9 else 0)
    while not stop.is_set():
        before = time.time_ns() // 1_000_000_000
        bound.add(1)
        view.add(1, region="us")
        after = time.time_ns() // 1_000_000_000
        spans.append((before, after))
        if after > spans[0][0] and time.time() % 1 > 0.1:
            stop.set()
    counts: dict[int, int] = {}
    for (_, start, (label,)), count in by_window(table.drain(1, None, 1 << 20)).items():
        if label == "eu":
            counts[start // 1_000] = count
    assert len(counts) == 2
    for start, count in counts.items():
        least = sum(before == after == start for before, after in spans)
        most = sum(before <= start <= after for before, after in spans)
        assert least <= count <= most
