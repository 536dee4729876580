"""The life of a process: its publishers drain when it ends, and start clean in its forks.

Python tells of forks that it makes itself. Of those that C code makes `check_fork` finds out, by the process id, where that
costs nothing: before a series comes in, at `flush`, `close` and whatever reads. The native table sees to it that in such a
child every series is a new one; of the plain table's, those that the parent had are not.

uWSGI forks in C, after it has loaded the app, and says so to a hook. A thread that has the interpreter's lock at that moment
has it for ever in the child, which then hangs: so while uWSGI has not forked, publishers have no threads but within `flush`.
Its master does not run Python any more afterwards, so what waits there is given to the first process that asks.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.threads import fork_gate

_log = logging.getLogger(__name__)


class ForkAware(Protocol):
    """What happens to a publisher when its process ends or forks."""

    def close(self) -> object:
        """Flush, and let go."""
        ...

    def hold(self) -> None:
        """Let nothing be in the midst of a change until `release` or, in a child, `start_clean`: the process forks."""
        ...

    def release(self) -> None:
        """Undo `hold`."""
        ...

    def start_clean(self) -> None:
        """Forget what is the parent's to send. No other thread runs in the child yet."""
        ...

    def keep(self) -> bool:
        """Go on with what the parent had, which gives it away; False if that can't be done: call `start_clean`."""
        ...

    def wake(self) -> None:
        """Have threads run: the process is none any more in which they must not."""
        ...

    @property
    def notices_forks(self) -> bool:
        """True if the first delta of a forked child always comes to `check_fork`, however the child was forked."""
        ...


_members: dict[int, weakref.ref[ForkAware]] = {}  # a dict, because one call copies it: no lock that a fork could catch held
_finalizer_pid = 0
_pid = os.getpid()
"""The process in which the publishers began."""
_beginning: dict[int, threading.RLock] = {}
"""By process: held by the thread that has them begin there. A lock of the parent's could be held for ever."""


def join(member: ForkAware) -> None:
    """From now on `member` is told when the process ends or forks, as long as it lives."""
    key = id(member)
    _members[key] = weakref.ref(member, lambda _: _members.pop(key, None))
    _listen_to_uwsgi()


def leave(member: ForkAware) -> None:
    """Undo `join`."""
    _members.pop(id(member), None)


def _all() -> list[ForkAware]:
    return [member for member in [ref() for ref in [*_members.values()]] if member is not None]


def drain_when_child_ends() -> None:
    """See to it that a child of `multiprocessing` drains too: it ends with `os._exit`, without `atexit`.

    To be called once there is something to drain, because such a child clears the list of finalizers when it starts.
    """
    global _finalizer_pid  # noqa: PLW0603
    if celery := sys.modules.get("celery.signals"):  # its pool's children run no finalizers either
        celery.worker_process_shutdown.connect(_celery_child_ends)
    _listen_to_uwsgi()
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


_held: dict[int, list[ForkAware]] = {}
"""What each thread that forks keeps still: several may fork at once."""


def _before_fork() -> None:
    held = _held.setdefault(threading.get_ident(), [])
    for member in _all():
        member.hold()
        held.append(member)


def _after_fork_in_parent() -> None:
    held = _held.pop(threading.get_ident(), [])
    while held:
        held.pop().release()


def check_fork() -> None:
    """Have the publishers begin here, if this process was forked by code that told nobody."""
    if _pid != os.getpid() and not all(member.notices_forks for member in _begin_in_child()):
        _log.warning(
            "this process was forked by C code that Python does not see: what it has recorded until now, to series that its "
            "parent had, is lost"
        )


def _begin_in_child() -> list[ForkAware]:
    """Have every publisher start clean, or go on in its parent's place, unless that is done; return those."""
    global _pid, _nest  # noqa: PLW0603
    pid = os.getpid()
    with _beginning.setdefault(pid, threading.RLock()):
        if _pid == pid:
            return []
        fork_gate._at_fork_reinit()  # type: ignore[attr-defined]  # first: what starts clean may start threads that need it
        held = _held.pop(threading.get_ident(), [])
        _held.clear()
        nest, _nest = _nest, None
        heir = nest is not None and nest.take()
        members = _all()
        for member in members:
            if not heir or not member.keep():
                member.start_clean()
            elif member in held:
                member.release()
        _pid = pid
    _beginning.clear()
    return members


# uWSGI


class _Nest:
    """A process of uWSGI that has not forked yet. What was recorded in it is for one process: for who takes the token."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()  # one byte in a pipe: whoever reads it, no other process does
        os.set_blocking(self._read, False)
        self.give()

    def give(self) -> None:
        """Let another process go on with what was recorded."""
        os.write(self._write, b"1")

    def take(self) -> bool:
        """Return whether this process may go on with it."""
        try:
            return bool(os.read(self._read, 1))
        except BlockingIOError:
            return False


_nest: _Nest | None = None
"""Set while no thread may run but within `awake`."""


def _listen_to_uwsgi() -> None:
    """Have uWSGI tell when it has forked, beside what others have it do then."""
    global _nest  # noqa: PLW0603
    uwsgi: Any = sys.modules.get("uwsgi")  # which is there within its processes only
    if uwsgi is None:
        return
    decorators = sys.modules.get("uwsgidecorators")  # to import it would replace hooks of others
    if decorators is None or uwsgi.post_fork_hook is not decorators.postfork_chain_hook:
        _hook(uwsgi, "post_fork_hook", _uwsgi_has_forked)
    elif not any(entry.f is _uwsgi_has_forked for entry in decorators.postfork_chain):
        decorators.postfork(_uwsgi_has_forked)
    if "skip-atexit-teardown" in uwsgi.opt:  # then it calls nothing else
        _hook(uwsgi, "atexit", close_all)
    if not _heard and _nest is None and _is_unforked(uwsgi):
        _nest = _Nest()


def _hook(uwsgi: Any, name: str, ours: Callable[[], object]) -> None:
    """Have uWSGI call `ours`, after what it was told to call there."""
    other = getattr(uwsgi, name, None)
    if getattr(other, "ours", None) is ours:
        return

    def both() -> None:
        try:
            if other is not None:
                other()
        finally:
            ours()

    both.ours = ours  # type: ignore[attr-defined]
    setattr(uwsgi, name, both)


_heard = False
"""True once uWSGI has said that it has forked: this process is one that serves."""


def _is_unforked(uwsgi: Any) -> bool:
    return _pid == os.getpid() and not uwsgi.worker_id() and not uwsgi.mule_id() and not uwsgi.i_am_the_spooler()


def _uwsgi_has_forked() -> None:
    global _nest, _heard  # noqa: PLW0603
    _heard = True
    _begin_in_child()
    nest, _nest = _nest, None
    if nest is not None:  # a worker without a master is the process that has loaded the app
        _leave(nest)


def _leave(nest: _Nest) -> None:
    mine = nest.take()
    for member in _all():
        if mine:
            member.wake()
        else:  # another process had what was recorded before
            member.start_clean()


def is_nest() -> bool:
    """Return whether no thread of ours may run yet, because uWSGI is about to fork this process."""
    return _nest is not None


@contextmanager
def awake(rest: Callable[[], bool]) -> Iterator[None]:
    """Let threads run in the block, and have `rest` end them behind it, if this is no process in which they go on running.

    If `rest` returns that they run still, they do so from now on.
    """
    global _nest  # noqa: PLW0603
    nest = _nest
    if nest is None:
        yield
        return
    _nest = None  # a fork in between is an ordinary one
    if not nest.take():  # it was given away: this is a master that runs Python after all
        for member in _all():
            member.start_clean()
        yield
        return
    try:
        yield
    finally:
        if rest():
            nest.give()
            _nest = nest


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    # Hooks before a fork run in the reverse order: publishers are held while the gate is open, which metrics may need.
    os.register_at_fork(before=fork_gate.acquire, after_in_parent=fork_gate.release)
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_begin_in_child)
