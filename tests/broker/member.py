"""A member of a group in this process, or in one of its own that can be killed and stopped; it notes calls with times."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from typing import Any, NamedTuple, Self

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.faust.membership import FaustMembership
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.errors import PipelineError
from pipeline.settings import KafkaSettings
from tests.broker.kafka import App
from tests.support import environment, wait_until

SESSION_MS = 6_000
"""Shortest session that brokers allow."""


class Heard(NamedTuple):
    """One call of the listener."""

    call: str
    at_s: float
    """Time on the system's monotonic clock, which is the same for all processes."""
    actives: frozenset[int]
    standbys: frozenset[int] = frozenset()
    generation: int = -1
    error: str = ""


def _membership(app: App, name: str, **settings: Any) -> FaustMembership:
    settings = {"session_timeout_ms": SESSION_MS, **settings}
    log = KafkaLog(parse_url(app.url), KafkaSettings(), SystemClock(), request_timeout_ms=5_000)
    settings["taken"] = partial(log.static_members, app.app)
    topics = {"deltas": app.topic("deltas"), "changelog": app.topic("changelog")}
    return FaustMembership(app.bootstrap, app.app, name=name, **{**topics, **settings})


class _Listener:
    """The calls that a member of either kind has heard, and questions about them. Its standbys are warm at once."""

    membership: FaustMembership | None = None

    def __init__(self) -> None:
        self.heard: list[Heard] = []

    def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
        self.heard.append(Heard("revoked", time.monotonic(), partitions))

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        self.heard.append(Heard("assigned", time.monotonic(), actives, standbys, generation))
        if self.membership is not None:
            self.membership.set_warm(actives | standbys)

    def on_failed(self, error: PipelineError) -> None:
        self.heard.append(Heard("failed", time.monotonic(), frozenset(), error=f"{type(error).__name__}: {error}"))

    @property
    def last(self) -> Heard | None:
        """Return the present assignment; None if there is none, or it is being made anew."""
        heard = self.heard[-1] if self.heard else None
        return heard if heard is not None and heard.call == "assigned" else None

    @property
    def actives(self) -> frozenset[int]:
        return self.last.actives if self.last else frozenset()

    @property
    def standbys(self) -> frozenset[int]:
        return self.last.standbys if self.last else frozenset()

    @property
    def failure(self) -> str:
        return next((it.error for it in self.heard if it.call == "failed"), "")


class Inside(_Listener):
    """A member in this process."""

    def __init__(self, app: App, name: str, **settings: Any) -> None:
        super().__init__()
        self.membership = _membership(app, name, **settings)

    def stop(self, *, leave: bool = True) -> bool:
        return self.membership.stop(leave=leave, timeout_s=20)

    def __enter__(self) -> Self:
        self.membership.start(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Outside(_Listener):
    """A member in a process of its own."""

    def __init__(self, app: App, name: str, **settings: Any) -> None:
        super().__init__()
        given = json.dumps([app.bootstrap, app.app, name, settings])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.broker.member", given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            call, at_s, actives, standbys, generation, error = json.loads(line)
            self.heard.append(Heard(call, at_s, frozenset(actives), frozenset(standbys), generation, error))

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """Kill the member with kill -9. May be called twice."""
        self.process.kill()
        self.process.wait(20)

    def leave(self) -> None:
        """Leave in order, and wait."""
        self.process.communicate("leave\n", timeout=30)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._reading.join(5)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()


def settled(*members: _Listener, partitions: int, timeout_s: float = 60.0) -> None:
    """Wait until each partition is active in exactly one of the members, and all have the same generation."""

    def done() -> bool:
        last = [it.last for it in members]
        held = [number for it in last if it is not None for number in it.actives]
        loads = [len(it.actives) for it in last if it is not None]
        level = max(loads, default=0) <= min(loads, default=0) + 1
        same = level and len({it.generation if it is not None else -1 for it in last}) == 1
        return same and sorted(held) == list(range(partitions))

    wait_until(done, f"{partitions} partitions to be shared by {len(members)} members", timeout_s)


class _Printing(_Listener):
    def tell(self) -> None:
        it = self.heard[-1]
        fields = [it.call, it.at_s, sorted(it.actives), sorted(it.standbys), it.generation, it.error]
        sys.stdout.write(json.dumps(fields) + "\n")
        sys.stdout.flush()

    def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
        super().on_revoked(partitions, timeout_s)
        self.tell()

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        super().on_assigned(actives, standbys, generation)
        self.tell()

    def on_failed(self, error: PipelineError) -> None:
        super().on_failed(error)
        self.tell()


def _main() -> None:
    bootstrap, name, member, settings = json.loads(sys.argv[1])
    membership = _membership(App(bootstrap, name), member, **settings)
    listener = _Printing()
    listener.membership = membership
    membership.start(listener)
    line = sys.stdin.readline()  # the end of the pipe is the end of the test
    if line:
        membership.stop(leave=True, timeout_s=20)
    sys.stdout.flush()
    if not line:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    _main()
