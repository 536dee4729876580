"""No unexpected exception ends a thread of ours without a word (DESIGN section 9): it is logged, counted, and reported.

Pollers go on, and work again once their log does; a loop that must not go on ends the process by `on_fatal`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
from prometheus_client import CollectorRegistry

import pipeline.metrics as m
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.adapters.static_membership import StaticMembership
from pipeline.errors import Fenced, Stalled, Unavailable
from pipeline.ingest.statsd_server import StatsdServer
from pipeline.query.ends import EndsPolled
from pipeline.settings import IngestSettings, WorkerSettings
from pipeline.threads import Failures, PeriodicThread, guarded
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.changes import ChangeFeed
from pipeline.worker.lag import DeltasEnds, LagReporter
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.replicas import ReplicaLoop
from pipeline.worker.watchdog import Watchdog
from tests.support import HandClock, wait_until
from tests.worker.support import DAY_MS, Recorder, new_partition

ERRORS = [RuntimeError("no such luck"), TypeError("NoneType"), SystemExit(1), MemoryError()]


class BrokenLog(MemoryLog):
    """A log that answers every question with an error that no log should raise, as long as `error` is set."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), 1), SystemClock().now_ms)
        self.error: BaseException | None = None
        self.asked = 0

    def fail(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        self.fail()
        return super().end_offsets(topic)

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        self.fail()
        return super().high_watermarks(topic)

    def topic_id(self, topic: str) -> str:
        self.fail()
        return super().topic_id(topic)

    def partition_count(self, topic: str) -> int:
        if hasattr(self, "asked"):
            self.fail()
        return super().partition_count(topic)


class Lab(NamedTuple):
    """Something with a thread, and its observable state."""

    name: str
    start: Callable[[], object]
    stop: Callable[[], object]
    alive: Callable[[], bool]
    works: Callable[[], object]
    """Return whether the thread's work is done."""


class World:
    def __init__(self) -> None:
        self.log = BrokenLog()
        self.clock = SystemClock()
        self.metrics = Recorder()
        self.fatal: list[BaseException] = []

    @property
    def counted(self) -> dict[str, float]:
        return {str(key[1]): value for key, value in self.metrics.values.items() if key[0] == m.THREAD_ERRORS.name}

    # What goes on

    def ends(self) -> Lab:
        ends = EndsPolled(
            lambda: self.log.high_watermarks(DELTAS), lambda: {0: 0}, self.clock, interval_ms=1, metrics=self.metrics
        )
        return Lab("ends", ends.start, lambda: ends.thread.stop(60), lambda: ends.thread.alive, lambda: ends().end_offsets)

    def mirror(self) -> Lab:
        mirror = LagReporter(
            lambda: {0: 0},
            ends=lambda: DeltasEnds(self.log.high_watermarks(DELTAS), self.log.end_offsets(DELTAS)),
            start_offsets=lambda: {0: 0},
            commit=lambda _: None,
            clock=self.clock,
            interval_ms=1,
            poll_interval_s=0.001,
            metrics=self.metrics,
        )
        return Lab(
            "mirror", mirror.start, lambda: mirror.thread.stop(60), lambda: mirror.thread.alive, lambda: mirror.end_offsets
        )

    def membership(self) -> Lab:
        assigned: list[frozenset[int]] = []

        class Listener:
            def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
                assigned.append(actives)

            def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None: ...

            on_failed = self.fatal.append

        static = StaticMembership(lambda: self.log.partition_count(DELTAS), metrics=self.metrics)
        return Lab(
            "membership",
            lambda: static.start(Listener()),
            lambda: static.stop(leave=True, timeout_s=60),
            lambda: static.thread.alive,
            lambda: assigned,
        )

    def watchdog(self) -> Lab:
        looks: list[int] = []

        def told() -> tuple[float, Mapping[int, int]]:
            self.log.fail()
            looks.append(1)
            return -1.0, {}

        watchdog = Watchdog(
            told,
            lambda _: {},
            clock=self.clock,
            stall_timeout_ms=1_000,
            commit_timeout_ms=1_000,
            on_fatal=self.fatal.append,
            interval_s=0.001,
            metrics=self.metrics,
        )
        thread = watchdog.thread
        return Lab("watchdog", watchdog.start, lambda: thread.stop(60), lambda: thread.alive, lambda: looks)

    # What ends the process

    def replica(self) -> Lab:
        loop = ReplicaLoop(
            log=self.log,
            stores=MemoryStores(),
            clock=self.clock,
            settings=WorkerSettings(),
            delete_retention_ms=DAY_MS,
            on_fatal=self.fatal.append,
            metrics=self.metrics,
        )
        return Lab("replica", loop.start, loop.stop, lambda: loop._thread.alive, lambda: loop.ready)

    def changes(self) -> Lab:
        class Progresses:
            def read(self) -> Mapping[int, int]:
                return {}

            def write(self, next_offsets: Mapping[int, int]) -> None: ...

        feed = ChangeFeed(
            "v",
            log=self.log,
            stores=MemoryStores(),
            clock=self.clock,
            progresses=Progresses(),
            definitions_of=lambda _: [],
            deliver=lambda changes, _: len(changes),
            on_fatal=self.fatal.append,
            metrics=self.metrics,
        )
        feed.follow(frozenset([0]))
        return Lab("changes-v", feed.start, feed.stop, lambda: feed._thread.alive, lambda: feed._followed)

    def worker(self) -> Lab:
        stores = MemoryStores()

        def make(number: int) -> Any:
            self.log.fail()
            return new_partition(number, self.log, stores, HandClock())

        loop = WorkerLoop(
            make,
            log=self.log,
            clock=self.clock,
            settings=WorkerSettings(),
            on_fatal=self.fatal.append,
            metrics=self.metrics,
        )
        loop.assign([0])
        return Lab("worker", loop.start, loop.stop, lambda: loop._thread.alive, lambda: loop.ready)


GO_ON = ["ends", "mirror", "membership", "watchdog"]
END = ["replica", "changes", "worker"]


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def lab(world: World, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr("pipeline.threads._BACKOFF_S_MAX", 0.1)
    it: Lab = getattr(world, request.param)()
    yield it
    it.stop()
    assert not it.alive()


@pytest.mark.parametrize("error", ERRORS, ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("lab", GO_ON, indirect=True)
def test_pollers_go_on(lab: Lab, world: World, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """An error is logged once with its traceback, counted each time; the thread asks again, and then all is as before."""
    lab.start()
    wait_until(lab.works, "work")
    assert world.counted == {lab.name: 0}
    world.log.error = error
    wait_until(lambda: world.counted[lab.name] >= 3, "three errors")
    assert lab.alive()
    asked = world.log.asked
    world.log.error = None
    wait_until(lambda: world.log.asked > asked + 3, "more questions")
    told = [it for it in caplog.records if it.exc_info and it.exc_info[1] is error]
    assert len(told) == 1, caplog.text
    assert f"thread {lab.name}" in told[0].getMessage()
    assert not world.fatal


@pytest.mark.parametrize("lab", GO_ON, indirect=True)
def test_an_error_from_the_start_is_no_end(lab: Lab, world: World) -> None:
    """A thread that fails from its start works as soon as it can."""
    world.log.error = RuntimeError("not yet")
    lab.start()
    wait_until(lambda: world.counted[lab.name] >= 2, "two errors")
    world.log.error = None
    wait_until(lab.works, "work")


@pytest.mark.parametrize("error", ERRORS, ids=lambda it: type(it).__name__)
@pytest.mark.parametrize("lab", END, indirect=True)
def test_loops_that_must_not_go_on_end_the_process(
    lab: Lab, world: World, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    """An error is logged with its traceback, counted, and fatal: once each."""
    world.log.error = error
    lab.start()
    wait_until(lambda: not lab.alive(), "the end")
    assert world.fatal == [error]
    assert world.counted[lab.name] == 1
    (told,) = [it for it in caplog.records if it.levelno == logging.CRITICAL]
    assert told.exc_info is not None
    assert told.exc_info[1] is error


@pytest.mark.parametrize("lab", END, indirect=True)
def test_what_works_ends_without_a_word(lab: Lab, world: World, caplog: pytest.LogCaptureFixture) -> None:
    """A thread that is stopped ends without an error."""
    lab.start()
    wait_until(lambda: lab.works() or not lab.alive(), "work")
    lab.stop()
    assert not world.fatal
    assert not [it for it in caplog.records if it.levelno >= logging.WARNING]


def test_a_statsd_server_says_that_it_has_ended(caplog: pytest.LogCaptureFixture) -> None:
    """The server's `failed` ends its role: further lines would be lost without notice."""
    metrics = Recorder()

    class Sink:
        def take(self, lines: object, protocol: str) -> None: ...

        def refuse(self, reason: str, protocol: str) -> None: ...

        def tick(self) -> None:
            raise TypeError("a bug")

    server = StatsdServer("127.0.0.1", 0, IngestSettings(), Sink(), SystemClock(), metrics)
    server.start()
    wait_until(lambda: server.failed, "the end")
    assert server.stop()
    assert metrics.of(m.THREAD_ERRORS, "statsd") == 1
    assert "a bug" in caplog.text


def test_a_bridge_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """A bridge takes its next look, whatever the publisher raises."""
    from pipeline.adapters.bridge import Bridge

    metrics, looks, made = Recorder(), threading.Semaphore(0), threading.Event()

    class Broken(CollectorRegistry):
        @property
        def _collector_to_names(self) -> dict[Any, Any]:
            if not made.is_set():
                return {}
            looks.release()
            raise RuntimeError("not a registry")

        @_collector_to_names.setter
        def _collector_to_names(self, value: object) -> None: ...

    publisher: Any = object()
    bridge = Bridge(publisher, Broken(auto_describe=False), clock=SystemClock(), interval_ms=1, metrics=metrics)
    made.set()
    try:
        for _ in range(3):
            assert looks.acquire(timeout=30)
        assert metrics.of(m.THREAD_ERRORS, "bridge") >= 2
    finally:
        bridge._thread.stop(60)


# The base


def loop(step: Callable[[], object], metrics: Recorder, **options: Any) -> PeriodicThread:
    return PeriodicThread("pipeline-x", step, log=logging.getLogger("x"), clock=SystemClock(), metrics=metrics, **options)


def test_the_log_being_away_is_no_error() -> None:
    """An absent log is not counted as an error, and the thread counts as alive."""
    metrics, away = Recorder(), threading.Semaphore(0)

    def step() -> None:
        away.release()
        raise Unavailable("away")

    thread = loop(step, metrics, on_fatal=lambda error: pytest.fail(str(error)))
    thread.start()
    began_s = thread.beat_s
    for _ in range(2):
        assert away.acquire(timeout=30)
    assert thread.alive
    assert thread.beat_s > began_s
    assert thread.stop(30)
    assert metrics.of(m.THREAD_ERRORS, "x") == 0


def test_a_newer_owner_is_no_unexpected_error(caplog: pytest.LogCaptureFixture) -> None:
    """A fence ends the thread and is logged, but not counted among the errors that nobody expected."""
    metrics, fatal = Recorder(), threading.Event()

    def step() -> None:
        raise Fenced("a newer owner")

    thread = loop(step, metrics, on_fatal=lambda _: fatal.set())
    thread.start()
    assert fatal.wait(30)
    assert thread.stop(30)
    assert metrics.of(m.THREAD_ERRORS, "x") == 0
    assert "a newer owner" in caplog.text


def test_an_end_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """An error of `on_end` is logged and counted, and `failed` is set."""
    metrics = Recorder()
    thread = loop(lambda: None, metrics, interval_s=0.001, on_end=lambda: 1 / 0)
    thread.start()
    assert thread.stop(30)
    assert thread.failed
    assert metrics.of(m.THREAD_ERRORS, "x") == 1
    assert "ZeroDivisionError" in caplog.text


def test_a_report_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The end of a thread is carried out although its report fails."""
    metrics, ended = Recorder(), threading.Event()

    def fail(_: BaseException) -> None:
        raise KeyError("nobody there")

    thread = loop(lambda: 1 / 0, metrics, on_fatal=fail, on_end=ended.set)
    thread.start()
    assert ended.wait(30)
    assert thread.stop(30)
    assert metrics.of(m.THREAD_ERRORS, "x") == 2
    assert "nobody there" in caplog.text


def test_an_error_is_news_again_after_a_success(caplog: pytest.LogCaptureFixture) -> None:
    """A repeated error is logged again after a success, and at once if it is raised elsewhere."""
    failures = Failures(logging.getLogger("x"), "pipeline-x", Recorder())

    def raised(text: str, elsewhere: bool = False) -> BaseException:
        try:
            if elsewhere:
                raise RuntimeError(text)
            raise RuntimeError(text)
        except RuntimeError as error:
            return error

    for text, elsewhere in (("first", False), ("same", False), ("other", True)):
        failures.note(raised(text, elsewhere))
    failures.forget()
    failures.note(raised("again", True))
    told = [it.getMessage() for it in caplog.records if it.levelno == logging.ERROR]
    assert [text for text in ("first", "same", "other", "again") if any(text in it for it in told)] == [
        "first",
        "other",
        "again",
    ]


def test_what_a_thread_does_once_is_guarded(caplog: pytest.LogCaptureFixture) -> None:
    """`guarded` logs and counts an error, and does not raise it."""
    metrics = Recorder()

    def fail(what: str) -> None:
        raise ValueError(what)

    guarded(logging.getLogger("x"), "pipeline-x", fail, metrics)("broken")
    assert metrics.of(m.THREAD_ERRORS, "x") == 1
    assert "broken" in caplog.text


# The watchdog and threads


class Watched:
    """A watchdog of one thread, both driven by hand."""

    def __init__(self) -> None:
        self.clock = HandClock()
        self.errors: list[BaseException] = []
        self.thread = PeriodicThread("pipeline-ends", lambda: None, log=logging.getLogger("x"), clock=self.clock)
        self.watchdog = Watchdog(
            lambda: (-1.0, {}),
            lambda _: {},
            clock=self.clock,
            stall_timeout_ms=15_000,
            commit_timeout_ms=30_000,
            on_fatal=self.errors.append,
            threads=[self.thread],
            silent_s=120.0,
        )

    def wait(self, seconds: int, *, beating: bool = False) -> None:
        for _ in range(seconds):
            self.clock.s += 1
            if beating:
                self.thread.beat()
            self.watchdog.step()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    monkeypatch.setattr(PeriodicThread, "started", True)
    return Watched()


def test_the_watchdog_notices_a_poller_that_stands_still(watched: Watched, caplog: pytest.LogCaptureFixture) -> None:
    """A poller without a step for two minutes ends the process, with all stacks in the log."""
    watched.wait(300, beating=True)
    watched.wait(119)
    assert not watched.errors
    watched.wait(2)
    assert [type(error) for error in watched.errors] == [Stalled]
    assert "ends" in str(watched.errors[0])
    assert "MainThread" in caplog.text
    watched.wait(300)
    assert len(watched.errors) == 1


def test_a_process_that_stood_still_as_a_whole_is_no_stall(watched: Watched) -> None:
    """After a pause of the whole process all threads get the full time again."""
    watched.wait(60, beating=True)
    watched.clock.s += 3_600
    watched.wait(119)
    assert not watched.errors
    watched.wait(2)
    assert watched.errors


def test_a_thread_that_was_stopped_is_no_stall(watched: Watched) -> None:
    """A stopped thread need not take steps."""
    watched.thread.stopping.set()
    watched.wait(300)
    assert not watched.errors


def test_errors_that_nobody_expects_are_no_sign_of_life() -> None:
    """A poller that fails at each step counts as one that stands still."""
    clock = HandClock()
    failed = threading.Semaphore(0)

    def step() -> None:
        failed.release()
        clock.s += 1
        raise RuntimeError("each time")

    thread = PeriodicThread("pipeline-x", step, log=logging.getLogger("x"), clock=clock)
    thread.start()
    beat_s = thread.beat_s
    for _ in range(3):
        assert failed.acquire(timeout=30)
    assert thread.beat_s == beat_s
    assert thread.stop(30)
