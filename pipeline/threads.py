"""The threads of this program: an exception that nobody expected never ends one without a word (DESIGN section 9).

`LoopThread` is the base of every thread that does something again and again; `guarded` wraps what a thread does once.
Both log such an exception with its traceback, count it in `pipeline_thread_errors_total`, and then go on or end the process.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec, TypeVar

import pipeline.metrics as m
from pipeline.errors import PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock

P = ParamSpec("P")
T = TypeVar("T")
fork_gate = threading.RLock()
"""Held while this process forks (`producer.process`), and by whoever must not be caught by a fork in what it does just now:
a child would find the locks taken that a thread had which is not there any more."""
GREEN_LOOK_S = 0.005
"""How often a green thread looks for what a real one sets, which can't wake it."""
_PREFIX = "pipeline-"
_BACKOFF_S = 0.1
_BACKOFF_S_MAX = 5.0
_AWAY_S = 0.2
_COMPLAIN_S = 10.0


class ReentrantCondition(threading.Condition):
    """A condition of an `RLock`, made for signal handlers and finalisers that raise, or call it, in the midst of a call."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as `Condition.wait` does, with the lock held once.

        What a handler raises leaves it with the lock held, so that the caller's `with` hands on that exception, and not one
        of its own about a lock that it does not have.
        """
        try:
            return super().wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined]
                self.acquire()
            raise

    def notify_all(self) -> None:
        """Wake all threads that wait."""
        with suppress(IndexError):  # those that it was about to wake were woken from inside it
            super().notify_all()


def _green_library() -> str:
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None and gevent.is_module_patched("threading"):
        return "gevent"
    return "eventlet" if eventlet is not None and eventlet.is_monkey_patched("thread") else ""


def are_green() -> bool:
    """Return whether gevent or eventlet has replaced threads: a wait in C then stops all of them."""
    return bool(_green_library())


def wait_in_c(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `call` does, which waits in C. Where threads are green, a real one calls, so that the others go on."""
    library = _green_library()
    if not library:
        return call(*args, **kwargs)
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call(*args, **kwargs))
        except BaseException as error:  # gevent's thread would print it
            errors.append(error)

    if library == "gevent":
        sys.modules["gevent"].get_hub().threadpool.apply(run)
    else:
        import eventlet.tpool

        eventlet.tpool.execute(run)
    if errors:
        raise errors[0]
    return results[0]


def in_hub() -> bool:
    """Return whether the caller runs in the hub of green threads, as callbacks and signal handlers can: it must not wait."""
    library = _green_library()
    if not library:
        return False
    hub = sys.modules["gevent"].get_hub() if library == "gevent" else sys.modules["eventlet.hubs"].get_hub().greenlet
    return sys.modules["greenlet"].getcurrent() is hub


class OutageLogger:
    """The pause of a thread while the log is away. A warning that says `what_follows` is logged at most every ten seconds.

    `stop` ends a pause. Owned by one thread.
    """

    def __init__(self, log: logging.Logger, clock: Clock, stop: threading.Event, what_follows: str) -> None:
        self._log = log
        self._clock = clock
        self._stop = stop
        self._what_follows = what_follows
        self._warned_s = -_COMPLAIN_S
        self.last_s = -_COMPLAIN_S
        """When the log was last found away, on `clock`."""

    def wait(self, error: Unavailable) -> None:
        """Wait until it is time to try again what failed with `error`."""
        now_s = self.last_s = self._clock.monotonic_s()
        if now_s - self._warned_s >= _COMPLAIN_S:
            self._warned_s = now_s
            self._log.warning("%s: %s", self._what_follows, error)
        self._stop.wait(_AWAY_S)


class Failures:
    """The unexpected exceptions of one thread: each is counted, and each new one is logged with its traceback.

    One that is raised again at the same place, with no success between, is counted only.
    """

    def __init__(self, log: logging.Logger, thread: str, metrics: Metrics = NO_METRICS) -> None:
        self._log = log
        self._thread = thread.removeprefix(_PREFIX)
        self._metrics = metrics
        self._last: tuple[type[BaseException], object] | None = None
        metrics.inc(m.THREAD_ERRORS, 0, self._thread)  # there from the start: a rise shows only from a value

    def note(self, error: BaseException, *, level: int = logging.ERROR, what_follows: str = "it goes on") -> None:
        """Count `error`, and log it unless it was the last one too."""
        self._metrics.inc(m.THREAD_ERRORS, 1, self._thread)
        frames = traceback.extract_tb(error.__traceback__)
        place = (type(error), (frames[-1].filename, frames[-1].lineno) if frames else None)
        if place == self._last:
            return
        self._last = place
        ours = isinstance(error, PipelineError)
        said = error if ours else repr(error)
        self._log.log(level, "thread %s: %s; %s", self._thread, said, what_follows, exc_info=None if ours else error)

    def forget(self) -> None:
        """Note a success: an exception after it is news again."""
        if self._last is not None:
            self._last = None
            self._log.info("thread %s works again", self._thread)


def guarded(log: logging.Logger, thread: str, call: Callable[P, object], metrics: Metrics = NO_METRICS) -> Callable[P, None]:
    """Return `call` for a thread, or for a future at which nobody looks: what it raises is logged and counted."""
    failures = Failures(log, thread, metrics)

    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except BaseException as error:
            failures.note(error, what_follows="it ends")

    return run


class LoopThread:
    """A thread that calls `step`, and waits `interval_s`, again and again until it is stopped; or waits first.

    `Unavailable` from a step means that the log is away: `put_off` is called with it, and waits; by default the pause is
    that of `OutageLogger`, and its warning is `while_away`. Any other exception is one that nobody expected. With `on_fatal`
    the thread then ends: `at_end` is logged and `on_fatal` called, once, from the thread, so that the process ends. Without
    it the thread goes on after a pause that doubles. `on_end` is called at the thread's end, whatever ended it.
    `failures` are those of an earlier thread of the same name: a forked child must touch no metric, whose lock may be held.
    """

    def __init__(
        self,
        name: str,
        step: Callable[[], object],
        *,
        log: logging.Logger,
        clock: Clock,
        metrics: Metrics = NO_METRICS,
        interval_s: float = 0.0,
        waits_first: bool = False,
        while_away: str = "the log is away",
        put_off: Callable[[Unavailable], None] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        at_end: str = "it ends",
        on_end: Callable[[], None] = lambda: None,
        failures: Failures | None = None,
    ) -> None:
        self.stopping = threading.Event()
        """Set once the thread is to end; a step may wait for it."""
        self.away = OutageLogger(log, clock, self.stopping, while_away)
        self.failed = False
        """Whether the thread has ended by itself."""
        self.beat_s = clock.monotonic_s()
        """When a step last ended as it should, or found the log away, or `beat` was called; on `clock`."""
        self._name = name.removeprefix(_PREFIX)
        self._step = step
        self._log = log
        self._clock = clock
        self._interval_s = interval_s
        self._waits_first = waits_first
        self._put_off = put_off or self.away.wait
        self._on_fatal = on_fatal
        self._at_end = at_end
        self._on_end = on_end
        self._failures = failures or Failures(log, name, metrics)
        self._thread = threading.Thread(target=self._run, name=_PREFIX + self._name, daemon=True)

    @property
    def name(self) -> str:
        """The thread's name in metrics and log lines."""
        return self._name

    @property
    def started(self) -> bool:
        """Whether `start` was called."""
        return self._thread.ident is not None

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin."""
        self.beat_s = self._clock.monotonic_s()
        self._thread.start()

    def stop(self, timeout_s: float | None = 0.0) -> bool:
        """End, and wait so long for it, or as long as it takes; return whether the thread has ended. Twice is fine."""
        self.stopping.set()
        if self.started and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def beat(self) -> None:
        """Say, from within a long step, that it gets on."""
        self.beat_s = self._clock.monotonic_s()

    def _run(self) -> None:
        backoff_s = _BACKOFF_S
        if self._waits_first:
            self.stopping.wait(self._interval_s)
        try:
            while not self.stopping.is_set():
                try:
                    self._step()
                except Unavailable as error:
                    self.beat()
                    self._put_off(error)
                except BaseException as error:
                    if self._on_fatal is not None:
                        raise
                    self._failures.note(error)
                    self.stopping.wait(backoff_s)
                    backoff_s = min(2 * backoff_s, _BACKOFF_S_MAX)
                else:
                    self.beat()
                    self._failures.forget()
                    backoff_s = _BACKOFF_S
                    if self._interval_s:
                        self.stopping.wait(self._interval_s)
        except BaseException as error:
            self.fail(error)
        finally:
            self._end("on_end", self._on_end)

    def fail(self, error: BaseException) -> None:
        """Say, from the thread, that it can't go on, and end the process by `on_fatal`."""
        self.failed = True
        self._failures.note(error, level=logging.CRITICAL, what_follows=self._at_end)
        if self._on_fatal is not None:
            self._end("on_fatal", self._on_fatal, error)

    def _end(self, what: str, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except BaseException as error:
            self.failed = True
            self._failures.note(error, level=logging.CRITICAL, what_follows=f"its end, {what}, is not complete")
