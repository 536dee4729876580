"""The life of a process: its publishers drain when it ends, and start clean in its forks."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import weakref
from typing import Protocol

from pipeline.errors import PipelineError

_log = logging.getLogger(__name__)


class Member(Protocol):
    """What happens to a publisher when its process ends or forks."""

    def close(self) -> object:
        """Flush, and let go."""
        ...

    def start_clean(self) -> None:
        """Forget what is the parent's to send. No other thread runs in the child yet."""
        ...


_members: dict[int, weakref.ref[Member]] = {}  # a dict, because one call copies it: no lock that a fork could catch held
_finalizer_pid = 0


def join(member: Member) -> None:
    """From now on `member` is told when the process ends or forks, as long as it lives."""
    key = id(member)
    _members[key] = weakref.ref(member, lambda _: _members.pop(key, None))


def leave(member: Member) -> None:
    """Undo `join`."""
    _members.pop(id(member), None)


def _all() -> list[Member]:
    return [member for member in [ref() for ref in [*_members.values()]] if member is not None]


def drain_when_child_ends() -> None:
    """See to it that a child of `multiprocessing` drains too: it ends with `os._exit`, without `atexit`.

    To be called once there is something to drain, because such a child clears the list of finalizers when it starts.
    """
    global _finalizer_pid  # noqa: PLW0603
    if celery := sys.modules.get("celery.signals"):  # its pool's children run no finalizers either
        celery.worker_process_shutdown.connect(_celery_child_ends)
    if "multiprocessing.util" not in sys.modules or _finalizer_pid == os.getpid():
        return
    from multiprocessing import process, util

    if process.parent_process() is not None:
        _finalizer_pid = os.getpid()
        util.Finalize(None, close_all, exitpriority=1)


def _celery_child_ends(**_: object) -> None:
    close_all()


def close_all() -> None:
    """Close every publisher of this process."""
    for member in _all():
        try:
            member.close()
        except PipelineError as error:
            _log.error("at exit: %s", error)
        except Exception:
            _log.exception("at exit")


def _after_fork_in_child() -> None:
    for member in _all():
        member.start_clean()


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
