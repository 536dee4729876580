"""Threads that log and count every unexpected exception, and then go on or end the process (DESIGN section 9).

`PeriodicThread` is the base of threads that repeat a step; `guarded` wraps a function that a thread calls once.
Exceptions are counted in `pipeline_thread_errors_total`.
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
from pipeline.errors import Fenced, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock

P = ParamSpec("P")
T = TypeVar("T")
fork_gate = threading.RLock()
"""Lock that is held while this process forks, and by code that must not be interrupted by a fork: locks of that code would
stay taken in the child, where the thread that took them does not exist."""
POLL_INTERVAL_S = 0.1
"""Time between checks of a state whose change cannot wake the waiting thread."""
GREEN_INTERVAL_S = 0.005
"""Time between checks by a green thread of an event that a real thread sets: the real one cannot wake it."""
_PREFIX = "pipeline-"
_BACKOFF_S = 0.1
_BACKOFF_S_MAX = 5.0
_UNAVAILABLE_PAUSE_S = 0.2
_WARNING_INTERVAL_S = 10.0


class ReentrantCondition(threading.Condition):
    """A condition of an `RLock` that stays usable when a signal handler or finaliser interrupts one of its calls."""

    def wait(self, timeout: float | None = None) -> bool:
        """Wait as `Condition.wait` does.

        If a signal handler raises meanwhile, the lock is held again when the exception leaves this method: the caller's
        `with` block could not release it otherwise, and would raise an error that hides the handler's.
        """
        try:
            return super().wait(timeout)
        except BaseException:
            if not self._is_owned():  # type: ignore[attr-defined]  # typeshed does not declare it
                self.acquire()
            raise

    def notify_all(self) -> None:
        """Wake all threads that wait."""
        with suppress(IndexError):  # a handler that interrupted this call has woken some of them already
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
    """Return the result of `call`, which blocks in C. Green threads let a real thread call it, so that others go on."""
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
    """Return whether the caller runs in the hub of green threads, where waiting is not possible.

    Callbacks and signal handlers can run there.
    """
    library = _green_library()
    if not library:
        return False
    hub = sys.modules["gevent"].get_hub() if library == "gevent" else sys.modules["eventlet.hubs"].get_hub().greenlet
    return sys.modules["greenlet"].getcurrent() is hub


class OutageLogger:
    """Pauses a thread while the log is unavailable, and logs a warning at most every ten seconds.

    `consequence` begins the warning. Setting `stop` ends a pause. An instance belongs to one thread.
    """

    def __init__(self, log: logging.Logger, clock: Clock, stop: threading.Event, consequence: str) -> None:
        self._log = log
        self._clock = clock
        self._stop = stop
        self._consequence = consequence
        self._warned_s = -_WARNING_INTERVAL_S
        self.last_s = -_WARNING_INTERVAL_S
        """Time on `clock` at which the log was last found unavailable."""

    def wait(self, error: Unavailable) -> None:
        """Pause after `error`, before the next attempt."""
        now_s = self.last_s = self._clock.monotonic_s()
        if now_s - self._warned_s >= _WARNING_INTERVAL_S:
            self._warned_s = now_s
            self._log.warning("%s: %s", self._consequence, error)
        self._stop.wait(_UNAVAILABLE_PAUSE_S)


class Failures:
    """Counts the unexpected exceptions of one thread, and logs each new one with its traceback.

    An exception that is raised again at the same place, without a success in between, is counted but not logged. `Fenced` is
    logged but not counted: it says that a newer owner has taken over.
    """

    def __init__(self, log: logging.Logger, thread: str, metrics: Metrics = NO_METRICS) -> None:
        self._log = log
        self._thread = thread.removeprefix(_PREFIX)
        self._metrics = metrics
        self._last: tuple[type[BaseException], object] | None = None
        metrics.inc(m.THREAD_ERRORS, 0, self._thread)  # from the start: PromQL's `increase` needs a first value

    def note(self, error: BaseException, *, level: int = logging.ERROR, consequence: str = "it goes on") -> None:
        """Count `error`, and log it unless it repeats the previous one."""
        if not isinstance(error, Fenced):
            self._metrics.inc(m.THREAD_ERRORS, 1, self._thread)
        frames = traceback.extract_tb(error.__traceback__)
        place = (type(error), (frames[-1].filename, frames[-1].lineno) if frames else None)
        if place == self._last:
            return
        self._last = place
        ours = isinstance(error, PipelineError)
        text = error if ours else repr(error)
        self._log.log(level, "thread %s: %s; %s", self._thread, text, consequence, exc_info=None if ours else error)

    def forget(self) -> None:
        """Note a success: the next exception is logged, even if it is the same again."""
        if self._last is not None:
            self._last = None
            self._log.info("thread %s works again", self._thread)


def guarded(log: logging.Logger, thread: str, call: Callable[P, object], metrics: Metrics = NO_METRICS) -> Callable[P, None]:
    """Return `call` wrapped so that an exception is logged and counted, for threads and for futures that are not awaited."""
    failures = Failures(log, thread, metrics)

    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except BaseException as error:
            failures.note(error, consequence="it ends")

    return run


class PeriodicThread:
    """A thread that calls `step` every `interval_s` until it is stopped. With `waits_first` the first call waits, too.

    If a step raises `Unavailable`, `on_unavailable` is called with it and must pause; by default `OutageLogger` does, with
    the warning `outage_message`. Any other exception is unexpected. With `on_fatal` it ends the thread: `fatal_message` is
    logged, and `on_fatal` is called once, from the thread, and must end the process. Without `on_fatal` the thread goes on
    after a pause that doubles. `on_end` is called when the thread ends, for whatever reason.
    `failures` is passed on from an earlier thread of the same name by a forked child, which must touch no metric: another
    thread of the parent may have held the metric's lock at the fork.
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
        outage_message: str = "the log is away",
        on_unavailable: Callable[[Unavailable], None] | None = None,
        on_fatal: Callable[[BaseException], None] | None = None,
        fatal_message: str = "it ends",
        on_end: Callable[[], None] = lambda: None,
        failures: Failures | None = None,
    ) -> None:
        self.stopping = threading.Event()
        """Set when the thread must end. A step that pauses waits for this event."""
        self.outage = OutageLogger(log, clock, self.stopping, outage_message)
        self.failed = False
        """True once an exception has ended the thread."""
        self.beat_s = clock.monotonic_s()
        """Time on `clock` of the last step that succeeded or found the log unavailable, or of the last call of `beat`."""
        self._name = name.removeprefix(_PREFIX)
        self._step = step
        self._log = log
        self._clock = clock
        self._interval_s = interval_s
        self._waits_first = waits_first
        self._on_unavailable = on_unavailable or self.outage.wait
        self._on_fatal = on_fatal
        self._fatal_message = fatal_message
        self._on_end = on_end
        self._failures = failures or Failures(log, name, metrics)
        self._thread = threading.Thread(target=self._run, name=_PREFIX + self._name, daemon=True)

    @property
    def name(self) -> str:
        """The thread's name in metrics and log lines."""
        return self._name

    @property
    def started(self) -> bool:
        """True once `start` was called."""
        return self._thread.ident is not None

    @property
    def alive(self) -> bool:
        """True while the thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        self.beat_s = self._clock.monotonic_s()
        self._thread.start()

    def stop(self, timeout_s: float | None = 0.0) -> bool:
        """Stop the thread and wait for its end, without limit if `timeout_s` is None; return whether it has ended."""
        self.stopping.set()
        if self.started and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def beat(self) -> None:
        """Record a sign of life from within a long step."""
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
                    self._on_unavailable(error)
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
        """Log and count `error`, which ends the thread, and call `on_fatal`. Called from the thread."""
        self.failed = True
        self._failures.note(error, level=logging.CRITICAL, consequence=self._fatal_message)
        if self._on_fatal is not None:
            self._end("on_fatal", self._on_fatal, error)

    def _end(self, what: str, call: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            call(*args, **kwargs)
        except BaseException as error:
            self.failed = True
            self._failures.note(error, level=logging.CRITICAL, consequence=f"its end, {what}, is not complete")
