"""Of two values that are set, the later wins, however close they are and whichever way they took; none is far ahead."""

import threading
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.errors import Invalid
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings
from tests.producer.support import CLOCK, FileLog, Meter, fold, memory_log, publisher, run_script

PAIRS = [("running", "done"), ("done", "running"), (1, 0), (0, 1), (True, None), ("x" * 100, "y")]


class Still:
    """A clock whose wall clock stands still, so that all values are of one millisecond."""

    def __init__(self) -> None:
        self.ms = CLOCK.now_ms()

    def now_ms(self) -> int:
        return self.ms

    def rising_ns(self) -> int:
        return CLOCK.rising_ns()

    def monotonic_s(self) -> float:
        return CLOCK.monotonic_s()

    def new_id(self) -> str:
        return CLOCK.new_id()


def set_values(pub: BasePublisher, way: str, first: Any, second: Any) -> None:
    view = pub.last("v", labels=("a",))
    if way == "set":
        view.set(first, a="x")
        view.set(second, a="x")
    elif way == "flushed":
        view.set(first, a="x")
        pub.flush()
        view.set(second, a="x")
    elif way == "stamped":
        stamp = CLOCK.now_ms()
        view.set(first, stamp, a="x")
        view.set(second, stamp, a="x")
    elif way == "threads":
        for value in (first, second):
            thread = threading.Thread(target=lambda value=value: view.labels("x").set(value))  # type: ignore[misc]
            thread.start()
            thread.join()
    elif way == "rows":
        pub.record_batch(view, {"a": ["x", "y", "x"], "value": [first, 5, second]})
    else:
        for value in (first, second):
            assert pub.record_batch(view, {"a": "x", "value": [value], "ts_ms": 1}) == 1


@pytest.mark.parametrize("mode", ["memory", "process", "disk"])
@pytest.mark.parametrize("way", ["set", "flushed", "stamped", "threads", "rows", "record_batch"])
def test_the_later_wins(way: str, mode: str, tmp_path: Any) -> None:
    """Whatever the larger value is, whatever survives a kill."""
    for number, (first, second) in enumerate(PAIRS):
        spool = {} if mode == "memory" else {"durability": mode, "spool_dir": str(tmp_path / str(number))}
        log = memory_log()
        settings = PublisherSettings(flush_interval_ms=1_000, linger_ms=1_000, **spool)
        with BasePublisher(log, Still(), settings, Meter()) as pub:
            set_values(pub, way, first, second)
            pub.flush()
            assert pub.local()["v"]["x",] == second
        assert fold(log).of("v")["x",] == second


def test_a_child_that_sets_later_wins(tmp_path: Any) -> None:
    """After a fork the child's clock goes on from the parent's, although the wall clock stands still."""
    script = """
from tests.producer.support import CLOCK
stamp = CLOCK.now_ms()
pub = publisher(log)
cell = pub.last("v").labels()
cell.set("z: of the parent", stamp)
pub.flush()
child = os.fork()
if not child:
    cell.set("a: of the child", stamp)
    pub.close()
    os._exit(0)
os.waitpid(child, 0)
pub.close()
"""
    run_script(tmp_path / "log", script)
    assert fold(FileLog(tmp_path / "log").read()).of("v") == {(): "a: of the child"}


WAYS: dict[str, Callable[[Any, Any, int], object]] = {
    "set": lambda pub, view, ts_ms: view.set("x", ts_ms, a="x"),
    "cell": lambda pub, view, ts_ms: view.labels("x").set("x" * 50, ts_ms),
    "column": lambda pub, view, ts_ms: pub.record_batch(view, {"a": "x", "value": [1, 2], "ts_ms": [1, ts_ms]}),
    "texts": lambda pub, view, ts_ms: pub.record_batch(view, {"a": "x", "value": ["t", "u"], "ts_ms": [1, ts_ms]}),
}


@pytest.mark.parametrize("durability", ["memory", "process"])
@pytest.mark.parametrize("way", [*WAYS])
def test_a_time_far_ahead_is_refused(way: str, durability: str, tmp_path: Any) -> None:
    """It would silence its series for ever; up to the limit it is taken. `ts_ahead_max_ms` is the publisher's, too."""
    spool = {} if durability == "memory" else {"durability": durability, "spool_dir": str(tmp_path / "s")}
    log = memory_log()
    with publisher(log, ts_ahead_max_ms=10_000, **spool) as pub:
        view = pub.last("v", labels=("a",))
        for ts_ms in (2**53, CLOCK.now_ms() + 60_000):
            with pytest.raises(Invalid, match=r"ts_ms.* ahead of now; at most 10000 \(ts_ahead_max_ms\)"):
                WAYS[way](pub, view, ts_ms)
        pub.flush()
        assert not pub.local()["v"]
        WAYS[way](pub, view, CLOCK.now_ms() + 5_000)
    assert len(fold(log).of("v")) == 1
