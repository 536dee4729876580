"""Histograms as an app records them: in every way, in a process of many threads, and through a spool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.kinds import KINDS
from pipeline.errors import Invalid
from tests.publisher.support import fold, in_threads, memory_log, publisher

HISTOGRAM = KINDS["histogram"]


def answer(values: list[Any]) -> Any:
    return HISTOGRAM.answer(HISTOGRAM.collect(values))


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_every_way_to_record_ends_in_one_histogram(durability: str, tmp_path: Path) -> None:
    """Deltas of calls, bound series, many values, columns, and a timer are all in the folded histogram, and in `local`."""
    log = memory_log()
    more: dict[str, Any] = {"spool_dir": str(tmp_path)} if durability == "process" else {}
    with publisher(log, durability=durability, **more) as pub:
        view = pub.histogram("latency", labels=("route",))
        cart = view.labels("/cart")
        view.observe(1, route="/cart")
        cart.observe(2.5)
        assert cart.observe_many([4, 8.0]) == 2
        assert view.observe_many([-3], route="/cart") == 1
        assert pub.record_batch(view, {"route": ["/cart", "/pay"], "value": [0, 16]}) == 2
        pub.flush()
        cart.observe(2**70)
        with view.time(route="/timed"):
            pass

        @view.labels("/timed").time()
        def work() -> None:
            pass

        work()
    expected = {("/cart",): answer([1, 2.5, 4, 8.0, -3, 0, 2**70]), ("/pay",): answer([16])}
    for found in (dict(view.local()), fold(log).of("latency")):
        timed = found.pop(("/timed",))
        assert timed["count"] == 2
        assert 0 <= timed["min"] <= timed["max"] < 60
        assert found == expected


def test_threads_lose_nothing() -> None:
    """All deltas of threads that record to the same series, with drains in between, are in the histogram."""
    log = memory_log()
    each = 3_000
    with publisher(log, flush_interval_ms=5) as pub:
        series = pub.histogram("work").labels()

        def record(thread: int) -> None:
            for n in range(each):
                series.observe(thread * each + n)

        in_threads(4, record)
    assert fold(log).of("work") == {(): answer([*range(4 * each)])}


def test_what_a_histogram_does_not_take() -> None:
    """An int beyond all floats, and a value that is no number, is `Invalid` at once, and not recorded."""
    with publisher(memory_log()) as pub:
        view = pub.histogram("latency")
        for value in (2**1_024, "1", None, float("nan")):
            with pytest.raises(Invalid):
                view.observe(value)  # type: ignore[arg-type]
            with pytest.raises(Invalid, match="row 1"):
                view.observe_many([1, value])
        with pytest.raises(Invalid, match=r"histogram\(\) here; not mean"):
            pub.mean("latency")
        pub.flush()
        assert dict(view.local()) == {}
