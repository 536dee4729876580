"""kill -9 of publishers that share a spool folder, again and again; then each delta must count once.

The publishers report each call before and after they make it (`publisher_child`). So each call was surely recorded, surely
not, or interrupted: one call of each thread that was killed at most.
"""

from __future__ import annotations

import json
import multiprocessing
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from functools import reduce
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

from pipeline import NotFound, Reader
from pipeline.publisher.spool.orphan import inspect
from tests.broker.kafka import Port
from tests.process.load import ANSWER, MERGE
from tests.process.network import SlowNetwork
from tests.process.publisher_child import Told, run
from tests.process.publisher_stream import (
    FIRST_MS,
    SLOTS,
    VIEWS,
    WINDOW_S,
    WINDOWS,
    Series,
    in_window,
    is_windowed,
    stream,
)
from tests.support import UpProcess, everything, pipeline, wait_until

THREADS_MAX = 4
CHILDREN_MAX = 3
_DOUBTS_MAX = 16
"""Interrupted calls of one series, for which all possible answers are tried."""
_HOW = (*["load"] * 5, *["start"] * 2, *["rescue"] * 2, *["close"] * 4, *["end of itself"] * 3)
_RANGE: Mapping[str, Any] = {"start": FIRST_MS, "end": FIRST_MS + WINDOWS * WINDOW_S * 1_000, "step": WINDOW_S}
_NURSERY = multiprocessing.get_context("forkserver")
_NURSERY.set_forkserver_preload(["pytest", "tests.process.publisher_child"])  # so that each start costs no imports
_QUICK = {
    "retry_backoff_ms": 5,
    "retry_backoff_max_ms": 50,
    "request_timeout_ms": 2_000,
    "series_idle_ms": 20,
    "snapshot_interval_ms": 20,
    "close_timeout_ms": 60_000,
    "block_timeout_ms": 60_000,
}


class Child(NamedTuple):
    """A publisher that runs, and the file in which it reports."""

    process: BaseProcess
    job: Mapping[str, Any]
    file: Path

    def has_told(self, what: Told) -> bool:
        """Return whether the publisher has reported this."""
        return self.file.exists() and what in self.file.read_bytes()[::2]


class Count:
    """States of series from the reports: certain ones, and ones that may be there or not."""

    def __init__(self) -> None:
        self.sure: dict[Series, Any] = {}
        self.doubts: dict[Series, list[Any]] = {}
        self.call_count = self.doubt_count = 0

    def add(self, child: Child) -> None:
        """Add all calls of a publisher that is gone."""
        told = child.file.read_bytes() if child.file.exists() else b""
        calls = Counter(zip(told[::2], told[1::2], strict=True))
        for thread in range(child.job["threads"]):
            begun, ended = calls[Told.BEGIN, thread], calls[Told.END, thread]
            assert ended <= begun <= ended + 1
            self.call_count += ended
            self.doubt_count += begun - ended
            name = f"{child.job['name']}-{thread}"
            for number, op in enumerate(islice(stream(name, child.job["slot"] + thread), begun)):
                for label, values in op.parts:
                    series, state = (op.view, label), _merged(op.view, [_state(op.view, value) for value in values])
                    if number >= ended:
                        self.doubts.setdefault(series, []).append(state)
                    else:
                        self.sure[series] = _merged(op.view, [self.sure[series], state] if series in self.sure else [state])

    def wrong(self, found: Mapping[Series, Any]) -> list[str]:
        """Return the differences from the states that must be there."""
        out = []
        for series in {*self.sure, *self.doubts, *found}:
            possible, answer = self._answers(series), found.get(series)
            if not any(answer == it and type(answer) is type(it) for it in possible):
                out.append(f"{series}: {answer!r:.80}, and not {[f'{it!r:.80}' for it in possible[:4]]}")
        return out

    def _answers(self, series: Series) -> list[Any]:
        states = [self.sure.get(series)]
        doubts = self.doubts.get(series, [])
        assert len(doubts) <= _DOUBTS_MAX, "too many interrupted calls of one series to decide each"
        for doubt in doubts:
            states += [doubt if state is None else _merged(series[0], [state, doubt]) for state in states]
        answer = ANSWER.get(VIEWS[series[0]], lambda state: state)
        return [None if state is None else answer(state) for state in states]


def _state(view: str, value: Any) -> Any:
    if VIEWS[view] == "histogram":
        return 1, value, value, value
    return (value, 1) if VIEWS[view] == "mean" else value


def _merged(view: str, states: list[Any]) -> Any:
    if VIEWS[view] == "histogram":
        counts, sums, lows, highs = zip(*states, strict=True)
        return sum(counts), sum(sums), min(lows), max(highs)
    return reduce(MERGE[VIEWS[view]], states)


class Killing(NamedTuple):
    """Numbers of killed processes and of interrupted calls."""

    kills: int
    doubts: int


class Killer:
    """Starts and kills publishers on `url` that share a spool folder."""

    def __init__(self, url: str, folder: Path, seed: int, **settings: Any) -> None:
        self.spool = folder / "spool"
        self.count = Count()
        self._kills = 0
        self._url = url
        self._settings = settings
        self._name = f"s{seed}"
        self._rng = random.Random(seed)
        self._folder = folder
        self._live: list[Child] = []
        self._started = 0

    def run(self, rounds: int, disturb: Callable[[int], None]) -> None:
        """Kill so many publishers; `disturb(n)` is called before the n-th."""
        number = 0
        try:
            while self._kills < rounds:
                disturb(number)
                self._round()
                number += 1
        finally:
            while self._live:
                self._end(self._live[-1])

    def _round(self) -> None:
        rng = self._rng
        how = rng.choice(_HOW)
        while len(self._live) < rng.randrange(CHILDREN_MAX):
            self._start()
        left = self._left()
        last = self._start(rng.randrange(1, 200) if how in ("close", "end of itself") else -1)
        if how == "start":
            time.sleep(rng.random() * 0.05)
        elif how == "rescue":  # of what was left by those before it
            self._wait(last, Told.OPEN)
            time.sleep(rng.random() * 0.1)
        elif how == "close":
            self._wait(last, Told.CLOSE)
            time.sleep(rng.random() ** 2 * 0.05)
        elif how == "load":
            self._wait(last, Told.OPEN)
            time.sleep(rng.random() * 0.5)
            last = rng.choice(self._live)
        else:
            self._wait(last, Told.CLOSED)
            # what another one sends just now is live
            assert not left & self._left(), f"{last.job['name']} has closed before it has sent what others left"
        self._kills += how != "end of itself"
        self._end(last)

    def _left(self) -> set[str]:
        return {slot.slot for slot in inspect(self.spool) if not slot.live} if self.spool.exists() else set()

    def _wait(self, child: Child, told: Told) -> None:
        wait_until(lambda: child.has_told(told), f"{child.job['name']} {told!r}", 90)

    def _start(self, count: int = -1) -> Child:
        rng = self._rng
        settings = {
            **_QUICK,
            "durability": rng.choice(("process", "process", "process", "disk")),
            "fsync_interval_ms": 20,
            "spool_dir": str(self.spool),
            "flush_interval_ms": rng.choice((2, 10, 30)),
            "flush_interval_min_ms": 2,
            "batch_bytes_max": rng.choice((1_024, 4_096, 524_288)),
            "buffer_bytes_max": rng.choice((2**18, 2**26)),
            "spool_bytes_max": rng.choice((2**23, 2**30)),
            **self._settings,
        }
        slot, name = self._started * THREADS_MAX, f"{self._name}-{self._started}"
        assert slot < SLOTS
        file = self._folder / f"{name}.told"
        job = {
            "url": self._url, "settings": settings, "name": name, "slot": slot, "count": count, "told": str(file),
            "threads": rng.randrange(1, THREADS_MAX + 1), "burst": rng.choice((10, 50, 200)),
            "pause_s": rng.choice((0.005, 0.03)), "switch_s": rng.choice((5e-3, 1e-5)),
        }  # fmt: skip
        process = _NURSERY.Process(target=run, args=(job,))
        process.start()
        self._started += 1
        self._live.append(child := Child(process, job, file))
        return child

    def _end(self, child: Child) -> None:
        """Kill the publisher with kill -9, unless it has ended, and read all its reports."""
        self._live.remove(child)
        child.process.kill()
        child.process.join(60)
        assert child.process.exitcode in (0, -signal.SIGKILL), "it has failed, and said why on standard error"
        self.count.add(child)

    def drain(self) -> None:
        """Send the remaining batches, with the program, until the spools are empty."""
        done = pipeline("spool", "drain", str(self.spool), "--to", self._url, "--timeout", "60", timeout_s=120)
        assert done.returncode == 0, done.stdout + done.stderr
        listed = pipeline("spool", "ls", str(self.spool), "--json")
        assert json.loads(listed.stdout)["slots"] == [], listed.stdout

    def check(self, url: str) -> Killing:
        """Compare all series of a server with the count."""
        found = answers(url)
        wrong = self.count.wrong(found)
        assert not wrong, f"{len(wrong)} of {len(found)} wrong, such as {wrong[:5]}"
        assert self.count.call_count > 1_000
        return Killing(self._kills, self.count.doubt_count)


def answers(url: str) -> dict[Series, Any]:
    """Return every series, with everything in the log."""
    with Reader(url) as reader:
        token = everything(reader)
        found: dict[Series, Any] = {}
        for view in VIEWS:
            with suppress(NotFound):
                during = _RANGE if is_windowed(view) else {}
                for series in reader.get(view, after=token, timeout_ms=60_000, limit=1_000_000, **during).series:
                    found.update(_states(view, series))
        return found


def _states(view: str, series: Any) -> Iterator[tuple[Series, Any]]:
    """Yield the state of a series, one for each of its windows."""
    label = series.labels["name"]
    if not is_windowed(view):
        yield (view, label), series.value
    for start_ms, point in series.points or ():
        state = tuple(point[name] for name in ("count", "sum", "min", "max")) if VIEWS[view] == "histogram" else point
        yield (view, in_window(label, start_ms)), state


def on_embedded(folder: Path, seed: int, rounds: int) -> Killing:
    """Run on a server that is killed now and then, behind a network that loses its last answers."""
    with ExitStack() as stack:
        port = Port()  # nobody else takes it while the server is dead
        stack.callback(port.close)
        up = UpProcess(folder / "data", "--set", "commit_interval_ms=20", port=port.number)
        stack.callback(up.kill)
        up.start()
        network = stack.enter_context(SlowNetwork(up.port))
        killer = Killer(network.url, folder, seed)

        def disturb(number: int) -> None:
            if number % 10 == 5:
                up.kill()
                up.start()

        killer.run(rounds, disturb)
        killer.drain()
        return killer.check(up.url)
