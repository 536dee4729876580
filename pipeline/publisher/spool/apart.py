"""Work that nothing may interrupt, for threads in which signal handlers and finalisers run."""

from __future__ import annotations

import os
from _thread import allocate_lock, start_new_thread
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import Unavailable

T = TypeVar("T")
_WAIT_S, _WAITS = 1.0, 60


def apart(work: Callable[[], T]) -> T:
    """Do `work` in a thread of its own, and wait for it: return what it returns, or raise what it raises.

    So a signal handler that comes in while this thread waits may need the same work, and finds nothing half done.
    """
    done, pid = allocate_lock(), os.getpid()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    done.acquire()
    try:
        start_new_thread(run, ())
    except RuntimeError:  # the interpreter is ending, or the system has no more
        return work()
    for _ in range(_WAITS):
        if done.acquire(timeout=_WAIT_S):
            break
        if os.getpid() != pid:  # a handler has forked
            raise Unavailable("this process was forked while it waited for its parent's spool")
    else:
        raise Unavailable(f"the disk does not answer for {_WAITS * _WAIT_S:.0f} s")
    if errors:
        raise errors[0]
    return results[0]
