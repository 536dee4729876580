"""The later of two values that are set wins, however close they are and however they were set; none is far ahead."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Invalid
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings
from tests.publisher.modes import MODES, settings_of
from tests.publisher.support import CLOCK, FileLog, Meter, fold, in_threads, memory_log, publisher, run_script

PAIRS = [("running", "done"), ("done", "running"), (1, 0), (0, 1), (True, None), ("x" * 100, "y")]


class Still:
    """A clock whose wall clock stands still, so that all values are of one millisecond."""

    def __init__(self) -> None:
        self.ms = CLOCK.now_ms()

    def now_ms(self) -> int:
        return self.ms

    def __getattr__(self, name: str) -> Any:
        return getattr(CLOCK, name)


Set = Callable[[BasePublisher, Any, Any, int | None], object]
WAYS: dict[str, Set] = {
    "set": lambda pub, view, value, ts_ms: view.set(value, ts_ms, a="x"),
    "flushed": lambda pub, view, value, ts_ms: (view.set(value, ts_ms, a="x"), pub.flush()),
    "threads": lambda pub, view, value, ts_ms: in_threads(1, lambda _: view.labels("x").set(value, ts_ms)),
    "column": lambda pub, view, value, ts_ms: pub.record_batch(
        view, {"a": "x", "value": [value]} if ts_ms is None else {"a": "x", "value": [value], "ts_ms": [ts_ms]}
    ),
}


@pytest.mark.parametrize("durability", ["memory", "process", "disk"])
@pytest.mark.parametrize("stamped", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_later_wins(way: str, stamped: bool, durability: str, tmp_path: Path) -> None:
    """The later value wins, whichever is larger, also after a kill."""
    spool = {} if durability == "memory" else {"durability": durability, "spool_dir": str(tmp_path)}
    log, clock = memory_log(), Still()
    settings = PublisherSettings(flush_interval_ms=1_000, flush_interval_min_ms=1_000, **spool)
    with BasePublisher(log, clock, settings, Meter()) as pub:
        for number, pair in enumerate(PAIRS):
            for value in pair:
                WAYS[way](pub, pub.last(f"v{number}", labels=("a",)), value, clock.ms if stamped else None)
        rows = pub.last("rows", labels=("a",))
        pub.record_batch(rows, {"a": ["x", "y", "x"], "value": [1, 5, 0]})
        pub.flush()
        found = {name: local["x",] for name, local in pub.local().items()}
    assert found == {**{f"v{number}": second for number, (_, second) in enumerate(PAIRS)}, "rows": 0}
    assert {name: fold(log).of(name)["x",] for name in found} == found


def test_a_child_that_sets_later_wins(tmp_path: Path) -> None:
    """After a fork the child's clock goes on from the parent's, although the wall clock stands still."""
    script = """
from tests.publisher.support import CLOCK
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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("way", WAYS)
def test_a_time_far_ahead_is_refused(way: str, mode: str, tmp_path: Path) -> None:
    """A time beyond `ts_ahead_max_ms`, which would silence its series for ever, is refused where it is recorded."""
    log = memory_log()
    with publisher(log, ts_ahead_max_ms=10_000, **settings_of(mode, tmp_path)) as pub:
        view = pub.last("v", labels=("a",))
        for ts_ms in (2**53, CLOCK.now_ms() + 60_000):
            for value in ("x" * 50, 1):
                with pytest.raises(Invalid, match=r"ts_ms.* ahead of now; at most 10000 \(ts_ahead_max_ms\)"):
                    WAYS[way](pub, view, value, ts_ms)
        pub.flush()
        assert not pub.local()["v"]
        WAYS[way](pub, view, 1, CLOCK.now_ms() + 5_000)
    assert len(fold(log).of("v")) == 1
