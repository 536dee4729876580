"""The life of a process: its publishers drain when it ends, and start clean in its forks.

Python calls hooks for forks that it makes itself. Forks made by C code are noticed by `check_fork`, which compares process
ids where that costs nothing: before a series comes in, at `flush`, at `close` and at reads. In such a child the native table
makes every series a new one, so that its next delta is noticed; the plain table does not for series that the parent had.

uWSGI forks in C, after it has loaded the app, and then calls a hook. A thread that has the interpreter's lock at that moment
has it for ever in the child, which then hangs: so until uWSGI has forked, publishers have threads within `flush` only. Its
master does not run Python any more afterwards, so the deltas that wait in it go to the first worker that asks for them.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from pipeline.errors import PipelineError
from pipeline.threads import fork_gate

_log = logging.getLogger(__name__)


class ForkAware(Protocol):
    """A publisher, as far as the end and the forks of its process concern it; see `BasePublisher`."""

    def close(self) -> object: ...
    def hold(self) -> None: ...
    def release(self) -> None: ...
    def start_clean(self) -> None: ...
    def keep(self) -> bool: ...
    def wake(self) -> None: ...
    @property
    def notices_forks(self) -> bool: ...


_members: dict[int, weakref.ref[ForkAware]] = {}  # a dict, because one call copies it: no lock that a fork could catch held
_finalizer_pid = 0
_pid = os.getpid()
"""The process in which the publishers were started."""
_beginning: dict[int, threading.RLock] = {}
"""By process, the lock of the thread that starts the publishers there. The parent's lock could be held for ever."""


def join(member: ForkAware) -> None:
    """Call `member` when the process ends or forks, as long as it lives."""
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
    """Close all publishers, without the signal by which a child of Celery's prefork pool dies with its parent.

    Linux sends it also when the thread ends that has forked the child: with brokers that Celery reads in threads, such as
    files, that is at the begin of a warm shutdown, while children that took another's place still close their publishers.
    """
    if billiard := sys.modules.get("billiard.util"):
        with suppress(Exception):  # no Linux, or another Celery
            billiard.set_pdeathsig(0)
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
"""The publishers that each forking thread holds: several threads may fork at once."""


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
    """Start the publishers anew, if this process was forked by code that calls no hook."""
    if _pid != os.getpid() and not all(member.notices_forks for member in _begin_in_child()):
        _log.warning(
            "this process was forked by C code that Python does not see: what it has recorded until now, to series that its "
            "parent had, is lost"
        )


def _begin_in_child() -> list[ForkAware]:
    """Have every publisher start clean, or take over its parent's deltas; return the publishers, or none if that is done."""
    global _pid, _prefork  # noqa: PLW0603
    pid = os.getpid()
    with _beginning.setdefault(pid, threading.RLock()):
        if _pid == pid:
            return []
        fork_gate._at_fork_reinit()  # type: ignore[attr-defined]  # not in typeshed; first, because new threads may need it
        held = _held.pop(threading.get_ident(), [])
        _held.clear()
        prefork, _prefork = _prefork, None
        heir = prefork is not None and prefork.take()
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


class _Prefork:
    """A process of uWSGI that has not forked yet. One process, the one that takes the token, sends what it recorded."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()  # the token is one byte in a pipe, which one process can read
        os.set_blocking(self._read, False)
        self.give()

    def give(self) -> None:
        """Let another process take over the deltas."""
        os.write(self._write, b"1")

    def take(self) -> bool:
        """Return whether this process takes over the deltas."""
        try:
            return bool(os.read(self._read, 1))
        except BlockingIOError:
            return False


_prefork: _Prefork | None = None
"""Set while threads may run within `awake` only."""


def _listen_to_uwsgi() -> None:
    """Add hooks to uWSGI, beside those of others, that it calls once it has forked and when it ends."""
    global _prefork  # noqa: PLW0603
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
    if not _heard and _prefork is None and _is_unforked(uwsgi):
        _prefork = _Prefork()


def _hook(uwsgi: Any, name: str, ours: Callable[[], object]) -> None:
    """Have uWSGI call `ours` after the hook that is set now."""
    other = getattr(uwsgi, name, None)
    if other is not None and other is _hooks.get(name):
        return

    def both() -> None:
        try:
            if other is not None:
                other()
        finally:
            ours()

    _hooks[name] = both
    setattr(uwsgi, name, both)


_hooks: dict[str, Callable[[], object]] = {}
"""The hooks that this module has set, by name."""
_heard = False
"""True once uWSGI has called the hook after its fork: this process serves requests."""


def _is_unforked(uwsgi: Any) -> bool:
    return _pid == os.getpid() and not uwsgi.worker_id() and not uwsgi.mule_id() and not uwsgi.i_am_the_spooler()


def _uwsgi_has_forked() -> None:
    global _prefork, _heard  # noqa: PLW0603
    _heard = True
    _begin_in_child()
    prefork, _prefork = _prefork, None
    if prefork is not None:  # a worker without a master is the process that loaded the app, which was not forked
        _end_prefork(prefork)


def _end_prefork(prefork: _Prefork) -> None:
    mine = prefork.take()
    for member in _all():
        if mine:
            member.wake()
        else:  # another process had what was recorded before
            member.start_clean()


def is_prefork() -> bool:
    """Return whether no thread of ours may run yet, because uWSGI is about to fork this process."""
    return _prefork is not None


@contextmanager
def awake(rest: Callable[[], bool]) -> Iterator[None]:
    """Let threads run within the block, also before uWSGI has forked; then have `rest` end them again.

    If `rest` returns False, they could not be ended, and go on.
    """
    global _prefork  # noqa: PLW0603
    prefork = _prefork
    if prefork is None:
        yield
        return
    _prefork = None  # a fork in between is an ordinary one
    if not prefork.take():  # another process has the deltas: this is a master that runs Python after all
        for member in _all():
            member.start_clean()
        yield
        return
    try:
        yield
    finally:
        if rest():
            prefork.give()
            _prefork = prefork


atexit.register(close_all)
if hasattr(os, "register_at_fork"):
    # Hooks before a fork run in the reverse order: publishers are held while the gate is open, which metrics may need.
    os.register_at_fork(before=fork_gate.acquire, after_in_parent=fork_gate.release)
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_begin_in_child)
