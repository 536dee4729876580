"""The folder of a spool of any format, and the slots in it: made, locked, claimed and removed, each in one step."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path

import msgspec

from pipeline.errors import BufferFull, Fenced, Invalid, PipelineError, Unavailable
from pipeline.folders import check_private, make_private, open_file, read_small, replace_small

_NEW, _GONE, CORRUPT = ".new-", ".gone-", ".corrupt"
_VERSION = ".VERSION-"
FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SlotInfo(msgspec.Struct, frozen=True):
    """A summary of one slot."""

    slot: str
    """The name of its folder."""
    producer: str
    """The fingerprint of its producer's id, as messages have it."""
    live: bool
    """True if a process holds its lock: the one that records to it, or one that drains it."""
    epoch: int
    bytes_total: int
    batch_count: int
    """Number of batches that are not acknowledged."""
    entry_count: int
    """Number of entries in these batches."""
    series_count: int
    delta_count: int
    """Number of deltas that are in no batch yet."""
    oldest_ms: int | None
    """The time at which the oldest of these batches was sealed; None without one."""
    torn_bytes: int
    corrupt: str
    """Damages and files that were set aside, in words; empty if there are none."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise errors of the disk and of SQLite as errors that say what to do."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        code = error.errno if isinstance(error, OSError) else getattr(error, "sqlite_errorcode", 0)
        is_full = code in (FULL_ERRNOS if isinstance(error, OSError) else (sqlite3.SQLITE_FULL,))
        raise (BufferFull if is_full else Unavailable)(f"spool: {what}: {error}") from error


def open_folder(folder: Path, format: int, *, make: bool) -> None:
    """Check that `folder` is a spool of this format, or make it one. Raises `Invalid` if it is something else."""
    version = folder / "VERSION"
    wanted = f"pipeline spool {format}\n"
    with explained(f"opening {folder}"):
        if make:
            make_private(folder)
        else:
            check_private(folder)
        try:
            found = read_small(version).decode("utf-8", "replace")
        except FileNotFoundError:
            if not make:
                raise Invalid(f"{folder} is no spool: it has no file VERSION") from None
            foreign = [path for path in folder.iterdir() if not path.name.startswith(_VERSION)]
            if foreign and not version.exists():
                raise Invalid(f"{folder} is not empty and no spool: it has no file VERSION") from None
            new = folder / f"{_VERSION}{os.getpid()}-{threading.get_ident()}"
            replace_small(version, wanted.encode(), new=new)
            return
    if found != wanted:
        raise Invalid(f"{folder} says {found.strip()[:100]!r}; this program reads and writes {wanted.strip()!r}")


def make_slot(folder: Path, name: str) -> tuple[Path, int]:
    """Make a slot that this process has locked. Return its path until `publish_slot` gives it its name, and the lock."""
    check_name(name)
    with explained("making a slot"):
        if (folder / name).exists():
            raise Invalid(f"the spool has a slot {name} already; each process needs one of its own")
        path = folder / f"{_NEW}{name}"
        while True:
            path.mkdir(mode=0o700)
            fd = _own_lock(path)
            if fd is not None:
                return path, fd


def _own_lock(path: Path) -> int | None:
    """Return the lock of a slot that was just made; None if another process has swept it away meanwhile."""
    try:
        fd = open_file(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if _is_at(fd, path / "LOCK"):
            os.write(fd, b"%d" % os.fstat(fd).st_ino)
            return fd
    except BaseException:
        os.close(fd)
        shutil.rmtree(path, ignore_errors=True)
        raise
    os.close(fd)
    return None


def publish_slot(path: Path, *, fsync: bool) -> Path:
    """Give a slot that is complete its name."""
    final = path.with_name(path.name.removeprefix(_NEW))
    with explained("naming a slot"):
        path.rename(final)
        if fsync:
            sync(final.parent)
    return final


def slot_name(producer_id: str) -> str:
    """Return the name of a producer's slot, a hash that does not disclose the id."""
    return sha256(b"slot\x00" + producer_id.encode()).hexdigest()[:24]


def check_name(name: str) -> None:
    """Raise `Invalid` unless a folder can have this name."""
    if not name or name.startswith(".") or name.endswith(CORRUPT) or not name.isprintable():
        raise Invalid(f"{name!r:.100} can't name a slot of a spool")
    if "/" in name or len(name.encode()) > 100 or name == "VERSION":
        raise Invalid(f"{name!r:.100} can't name a slot of a spool")


def lock_slot(path: Path) -> int | None:
    """Lock a slot. Return a file descriptor, or None if its owner lives, or it is gone.

    Raises `Fenced` for a copy of a slot, because the original has the same batches.
    """
    with explained(f"locking {path}"):
        try:
            fd = open_file(path / "LOCK", os.O_RDWR)
        except (FileNotFoundError, NotADirectoryError):
            return None
        kept = False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            kept = _is_at(fd, path / "LOCK")  # or it was removed, or named anew, before it was locked
            if kept and os.pread(fd, 64, 0) != b"%d" % os.fstat(fd).st_ino:
                kept = False
                raise Fenced(
                    f"{path} is a copy of a spool's slot; only the original can be sent, or deltas would count twice"
                )
        except BlockingIOError:
            pass
        finally:
            if not kept:
                os.close(fd)
    return fd if kept else None


def is_live(path: Path) -> bool:
    """Return whether a process holds the slot's lock. If none does, this takes a shared lock for a moment."""
    try:
        fd = open_file(path / "LOCK", os.O_RDONLY)
    except (OSError, Invalid):
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def remove_slot(path: Path, *, aside: bool = False) -> None:
    """Remove a slot that this process has locked. With `aside`, keep it for a human, under a name that no process claims."""
    with explained(f"removing {path}"):
        gone = path.with_name(path.name + CORRUPT if aside else _GONE + path.name)
        path.rename(gone)
        if not aside:
            shutil.rmtree(gone, ignore_errors=True)


def slots(folder: Path) -> list[Path]:
    """Return all slots, locked or not, by name."""
    with explained(f"listing {folder}"):
        named = [path for path in folder.iterdir() if path.name[0] != "." and not path.name.endswith(CORRUPT)]
        return sorted([path for path in named if path.is_dir()])


def sweep(folder: Path) -> None:
    """Remove slots that processes left half made or half removed when they died: these hold no delta."""
    for path in folder.iterdir():
        if path.name.startswith((_NEW, _GONE)):
            with suppress(PipelineError):
                fd = lock_slot(path)
                if fd is not None or (path.name.startswith(_GONE) and not (path / "LOCK").exists()):
                    shutil.rmtree(path, ignore_errors=True)
                if fd is not None:
                    os.close(fd)


def sync(path: Path) -> None:
    """Make a file durable, also what was written to it through a mapping, or the names in a folder. Raises `OSError`."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # unlike `mmap.flush`, it lets other threads run
    finally:
        os.close(fd)
