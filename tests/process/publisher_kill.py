"""kill -9 of publishers that share a spool folder, again and again; then each delta must count once.

    python -m tests.process.publisher_kill --seed 1 --rounds 30 [--kafka] [--seeds 5]

The publishers tell, before and after each call, that they make it (`publisher_child`). So of each call it is known whether
it was surely recorded, surely not, or was interrupted: one of each thread that was killed at most.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Self

from pipeline import NotFound, Reader
from pipeline.publisher.spool.look import inspect
from tests.broker.kafka import Port
from tests.process.load import ANSWER, MERGE
from tests.process.network import SlowNetwork
from tests.process.publisher_child import Told
from tests.process.publisher_stream import SLOTS, VIEWS, Series, stream
from tests.support import ROOT, UpProcess, environment, everything, pipeline, wait_until

THREADS_MAX = 4
CHILDREN_MAX = 3
_DOUBTS_MAX = 16
"""Interrupted calls of one series, for which all possible answers are tried."""
_HOW = (*["load"] * 5, *["start"] * 2, *["rescue"] * 2, *["close"] * 4, *["end of itself"] * 3)
_QUICK = {
    "retry_backoff_ms": 5,
    "retry_backoff_max_ms": 50,
    "request_timeout_ms": 2_000,
    "series_idle_ms": 20,
    "snapshot_interval_ms": 20,
    "close_timeout_ms": 60_000,
    "block_timeout_ms": 60_000,
}


class Child:
    """A publisher that runs, and what it has told."""

    def __init__(self, name: str, slot: int, threads: int, fifo: Path, launch: Callable[[], int]) -> None:
        self.name = name
        self.slot = slot
        self.begun: Counter[int] = Counter()
        self.ended: Counter[int] = Counter()
        self.told: set[Told] = set()
        self.threads = threads
        os.mkfifo(fifo)
        self._out = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        self._into = os.open(fifo, os.O_WRONLY)  # so that there is no end before it has begun
        os.set_blocking(self._out, True)
        self._pid = launch()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._fifo = fifo

    def _read(self) -> None:
        rest = b""
        while data := os.read(self._out, 65_536):
            data = rest + data
            rest = data[len(data) // 2 * 2 :]
            for what, thread in zip(data[::2], data[1::2], strict=False):
                if what == Told.BEGIN:
                    self.begun[thread] += 1
                elif what == Told.END:
                    self.ended[thread] += 1
                else:
                    self.told.add(Told(what))
        os.close(self._out)

    def kill(self) -> None:
        """kill -9; all that it told is known then."""
        os.kill(self._pid, signal.SIGKILL)  # whose child it is has not waited for it, so the number is its own
        self._end()

    def _end(self) -> None:
        os.close(self._into)
        self._reader.join(60)
        assert not self._reader.is_alive()
        self._fifo.unlink()

    def wait_closed(self) -> None:
        """Until it has closed by itself."""
        wait_until(lambda: Told.CLOSED in self.told, f"{self.name} closes", 90)
        self._end()


class Nursery:
    """Forks publishers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._errors = folder / "children.stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.process.publisher_child"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment(),
                cwd=ROOT,
                text=True,
                start_new_session=True,
            )

    def start(self, name: str, slot: int, job: Mapping[str, Any]) -> Child:
        """One more."""
        fifo = self._folder / f"{name}.pipe"
        return Child(
            name, slot, job["threads"], fifo, lambda: self._launch({**job, "name": name, "slot": slot, "pipe": str(fifo)})
        )

    def _launch(self, job: Mapping[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def errors(self) -> str:
        """What publishers have printed."""
        return self._errors.read_text(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)
        assert self._process.stdout is not None
        self._process.stdout.close()


class Count:
    """What was told, as states of series: those that are sure, and those that may be there or not."""

    def __init__(self) -> None:
        self.sure: dict[Series, Any] = {}
        self.doubts: dict[Series, list[Any]] = {}
        self.call_count = self.doubt_count = 0

    def add(self, child: Child) -> None:
        """All calls of a publisher that is gone."""
        for thread in range(child.threads):
            begun, ended = child.begun[thread], child.ended[thread]
            assert ended <= begun <= ended + 1
            self.call_count += ended
            self.doubt_count += begun - ended
            for number, op in enumerate(islice(stream(f"{child.name}-{thread}", child.slot + thread), begun)):
                for label, values in op.parts:
                    series, state = (op.view, label), _state(op.view, values)
                    if number < ended:
                        old = self.sure.get(series)
                        self.sure[series] = state if old is None else MERGE[VIEWS[op.view]](old, state)
                    else:
                        self.doubts.setdefault(series, []).append(state)

    def wrong(self, found: Mapping[Series, Any]) -> list[str]:
        """What is not as it must be."""
        out = []
        for series in {*self.sure, *self.doubts, *found}:
            possible = self._answers(series)
            answer = found.get(series)
            if not any(answer == it and type(answer) is type(it) for it in possible):
                out.append(f"{series}: {answer!r:.80}, and not {[f'{it!r:.80}' for it in possible[:4]]}")
        return out

    def _answers(self, series: Series) -> list[Any]:
        kind = VIEWS[series[0]]
        states = [self.sure.get(series)]
        doubts = self.doubts.get(series, [])
        assert len(doubts) <= _DOUBTS_MAX, "too many interrupted calls of one series to decide each"
        for doubt in doubts:
            states += [doubt if state is None else MERGE[kind](state, doubt) for state in states]
        return [None if state is None else ANSWER.get(kind, lambda state: state)(state) for state in states]


def _state(view: str, values: list[Any]) -> Any:
    kind = VIEWS[view]
    states = [(value, 1) for value in values] if kind == "mean" else values
    state = states[0]
    for other in states[1:]:
        state = MERGE[kind](state, other)
    return state


class Killing(NamedTuple):
    """What became of it."""

    kills: int
    calls: int
    doubts: int
    series: int


class Killer:
    """Starts and kills publishers on `url` that share a spool folder."""

    def __init__(self, url: str, folder: Path, seed: int, **settings: Any) -> None:
        self.spool = folder / "spool"
        self.count = Count()
        self.kills: Counter[str] = Counter()
        self._url = url
        self._settings = settings
        self._name = f"s{seed}"
        self._rng = random.Random(seed)
        self._folder = folder
        self._live: list[Child] = []
        self._started = 0

    def run(self, rounds: int, disturb: Callable[[int], None]) -> None:
        """Kill so many of them; `disturb(n)` is called before the n-th."""
        with Nursery(self._folder) as nursery:
            try:
                number = 0
                while sum(self.kills.values()) < rounds:
                    disturb(number)
                    self._round(nursery)
                    number += 1
                while self._live:
                    self._kill(self._live[-1], "at the end")
            except BaseException:
                print(nursery.errors()[-8_000:], file=sys.stderr)
                raise
            errors = nursery.errors()
            assert "Traceback" not in errors, errors[-8_000:]

    def _round(self, nursery: Nursery) -> None:
        rng = self._rng
        how = rng.choice(_HOW)
        while len(self._live) < rng.randrange(CHILDREN_MAX):
            self._start(nursery)
        left = {slot.slot for slot in inspect(self.spool) if not slot.live} if self.spool.exists() else set()
        last = self._start(nursery, count=rng.randrange(1, 200) if how in ("close", "end of itself") else -1)
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
            last.wait_closed()
            after = {slot.slot for slot in inspect(self.spool) if not slot.live}  # what another one sends just now is live
            assert not left & after, f"{last.name} has closed before it has sent what others left"
            self._live.remove(last)
            self.count.add(last)
            return
        self._kill(last, how)

    def _wait(self, child: Child, told: Told) -> None:
        wait_until(lambda: told in child.told, f"{child.name} {told!r}", 90)

    def _start(self, nursery: Nursery, count: int = -1) -> Child:
        rng = self._rng
        settings = {
            **_QUICK,
            "durability": rng.choice(("process", "process", "process", "disk")),
            "fsync_interval_ms": 20,
            "spool_dir": str(self.spool),
            "flush_interval_ms": rng.choice((2, 10, 30)),
            "linger_ms": 2,
            "batch_bytes_max": rng.choice((1_024, 4_096, 524_288)),
            "buffer_bytes_max": rng.choice((2**18, 2**26)),
            "spool_bytes_max": rng.choice((2**23, 2**30)),
            **self._settings,
        }
        job = {
            "url": self._url, "settings": settings, "count": count, "threads": rng.randrange(1, THREADS_MAX + 1),
            "burst": rng.choice((10, 50, 200)), "pause_s": rng.choice((0.005, 0.03)), "switch_s": rng.choice((5e-3, 1e-5)),
        }  # fmt: skip
        slot = self._started * THREADS_MAX
        assert slot < SLOTS
        child = nursery.start(f"{self._name}-{self._started}", slot, job)
        self._started += 1
        self._live.append(child)
        return child

    def _kill(self, child: Child, how: str) -> None:
        self.kills[how] += 1
        child.kill()
        self._live.remove(child)
        self.count.add(child)

    def drain(self) -> None:
        """Send what is left, with the program, until nothing is left."""
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
        return Killing(sum(self.kills.values()), self.count.call_count, self.count.doubt_count, len(found))


def answers(url: str) -> dict[Series, Any]:
    """Every series, with all that the log has."""
    with Reader(url) as reader:
        token = everything(reader)
        found: dict[Series, Any] = {}
        for view in VIEWS:
            try:
                result = reader.get(view, after=token, timeout_ms=60_000, limit=1_000_000)
            except NotFound:
                continue
            found.update({(view, series.labels["name"]): series.value for series in result.series})
        return found


def on_embedded(folder: Path, seed: int, rounds: int) -> Killing:
    """With a server that is killed now and then, behind a network that loses its last answers."""
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
                up.start(wait_ready=False)

        killer.run(rounds, disturb)
        wait_until(lambda: _is_ready(up.url), "a server", 60)
        killer.drain()
        return killer.check(up.url)


def _is_ready(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def main() -> None:
    """As the command says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--kafka", action="store_true")
    given = parser.parse_args()
    if given.kafka:
        from tests.broker.publisher_kill import on_kafka as run
    else:
        run = on_embedded
    for seed in range(given.seed, given.seed + given.seeds):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            done = run(Path(folder), seed, given.rounds)
        print(f"seed {seed}: {done}, {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
