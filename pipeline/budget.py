"""Limits of the work that threads do for one request: its CPU time, and whether anybody still waits for it.

Long work calls `check_budget` between its slices. Its time has a bound of its own, where that is known: a read's deadline.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import local
from typing import TypeVar

from pipeline.ports import Clock

CHECK_EVERY = 256
"""Deltas, lines or series of work between two checks: a fraction of a millisecond."""
T = TypeVar("T")


class ClientGone(Exception):
    """The client has closed its connection: nothing is answered."""


class _Working(local):
    budget: Budget | None = None


_working = _Working()
"""Work that each thread does now."""


class Spent:
    """CPU time that was used for one request."""

    cpu_s = 0.0


class Budget:
    """Limits of a piece of the work for one request."""

    def __init__(self, clock: Clock, cpu_ms_max: int, used_up: Callable[[], Exception], spent: Spent) -> None:
        """`used_up` returns the error that ends a request for which `cpu_ms_max` of CPU were used."""
        self._clock = clock
        self._cpu_s_max = cpu_ms_max / 1000
        self._used_up = used_up
        self._spent = spent
        self._begun_s = 0.0
        self._abandoned = False

    def abandon(self) -> None:
        """End the work at its next check: nobody waits for it any more. Safe from any thread."""
        self._abandoned = True

    def work(self, work: Callable[[], T]) -> T:
        """Return what `work` returns; the CPU time of this thread counts meanwhile. To be called once."""
        self._begun_s = self._clock.thread_cpu_s()
        _working.budget = self
        try:
            self.check()
            return work()
        finally:
            _working.budget = None
            self._spent.cpu_s += self._clock.thread_cpu_s() - self._begun_s

    def check(self) -> None:
        """Raise `ClientGone` if the work is abandoned, or the error for work that has used its CPU time.

        Only a thread that is within `work` may call this.
        """
        if self._abandoned:
            raise ClientGone
        if self._spent.cpu_s + self._clock.thread_cpu_s() - self._begun_s > self._cpu_s_max:
            raise self._used_up()


def check_budget() -> None:
    """Raise if the work that this thread does for a request must end; see `Budget.check`."""
    if _working.budget is not None:
        _working.budget.check()


def checked(slices: Iterable[T]) -> Iterator[T]:
    """Yield the slices of some work, each after a check."""
    for it in slices:
        check_budget()
        yield it


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let the work within go on to its end: it can't be taken back, or others wait for it. Its CPU time counts all the same.

    Raises before it begins, as `check_budget` does.
    """
    check_budget()
    budget, _working.budget = _working.budget, None
    try:
        yield
    finally:
        _working.budget = budget
