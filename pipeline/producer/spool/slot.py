"""The folder of a spool and the slots in it: made, locked, claimed and removed, each in one step."""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.errors import BufferFull, Fenced, Invalid, Unavailable
from pipeline.producer.spool.ring import FULL_ERRNOS

FORMAT = 1
"""What this program writes into a spool folder, and the only one that it reads."""
_NEW, _GONE, CORRUPT = ".new-", ".gone-", ".corrupt"
_VERSION = ".VERSION-"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Errors of the disk as errors that say what to do."""
    try:
        yield
    except OSError as error:
        kind = BufferFull if error.errno in FULL_ERRNOS else Unavailable
        raise kind(f"spool: {what}: {error}") from error


def open_folder(folder: Path, *, make: bool) -> None:
    """See to it that `folder` is a spool of this format; `Invalid` if it is of another, or is something else."""
    version = folder / "VERSION"
    wanted = f"pipeline spool {FORMAT}\n"
    with explained(f"opening {folder}"):
        if make:
            folder.mkdir(parents=True, exist_ok=True)
        try:
            found = version.read_text("utf-8", "replace")
        except FileNotFoundError:
            if not make:
                raise Invalid(f"{folder} is no spool: it has no file VERSION") from None
            foreign = [path for path in folder.iterdir() if not path.name.startswith(_VERSION)]
            if foreign and not version.exists():
                raise Invalid(f"{folder} is not empty and no spool: it has no file VERSION") from None
            new = folder / f"{_VERSION}{os.getpid()}-{threading.get_ident()}"
            new.write_text(wanted)
            new.replace(version)
            return
    if found != wanted:
        raise Invalid(f"{folder} says {found.strip()[:100]!r}; this program reads and writes {wanted.strip()!r}")


def make_slot(folder: Path, producer_id: str) -> tuple[Path, int]:
    """A new slot, locked by this process: its temporary path, and the lock. `publish_slot` gives it its name."""
    check_name(producer_id)
    with explained("making a slot"):
        if (folder / producer_id).exists():
            raise Invalid(f"the spool has a slot of producer {producer_id} already; each process needs an id of its own")
        path = folder / f"{_NEW}{producer_id}"
        while True:
            path.mkdir(mode=0o700)
            fd = _own_lock(path)
            if fd is not None:
                return path, fd


def _own_lock(path: Path) -> int | None:
    """The lock of a slot that was just made; None if somebody who sweeps was quicker, and removed it."""
    try:
        fd = os.open(path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
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


def publish_slot(path: Path) -> Path:
    """Give a slot that is complete its name."""
    final = path.with_name(path.name.removeprefix(_NEW))
    with explained("naming a slot"):
        path.rename(final)
        sync_folder(final.parent)
    return final


def check_name(producer_id: str) -> None:
    """Raise `Invalid` unless a folder can have this name."""
    if not producer_id or producer_id.startswith(".") or producer_id.endswith(CORRUPT) or not producer_id.isprintable():
        raise Invalid(f"producer id {producer_id!r:.100} can't name a slot of a spool")
    if "/" in producer_id or len(producer_id.encode()) > 100 or producer_id == "VERSION":
        raise Invalid(f"producer id {producer_id!r:.100} can't name a slot of a spool")


def lock_slot(path: Path) -> int | None:
    """Lock a slot: a file descriptor, or None if its owner lives, or it is gone.

    Raises `Fenced` for a copy of a slot: whoever has the other one sends the same batches.
    """
    with explained(f"locking {path}"):
        try:
            fd = os.open(path / "LOCK", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(fd, path / "LOCK"):  # removed, or named anew, before it was locked
                os.close(fd)
                return None
            found = os.pread(fd, 64, 0)
            if found != b"%d" % os.fstat(fd).st_ino:
                raise Fenced(
                    f"{path} is a copy of a spool's slot; only the original can be sent, or deltas would count twice"
                )
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
    return fd


def is_live(path: Path) -> bool:
    """Whether a process holds the slot's lock. Looking takes a shared lock for a moment, of a slot that nobody holds."""
    try:
        fd = os.open(path / "LOCK", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
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
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(fd)
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def remove_slot(path: Path, *, aside: bool = False) -> None:
    """Remove a slot that is ours; `aside`: keep it for a human, under a name that nobody claims."""
    with explained(f"removing {path}"):
        if aside:
            path.rename(path.with_name(path.name + CORRUPT))
            return
        gone = path.with_name(_GONE + path.name)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def slots(folder: Path) -> list[Path]:
    """All slots, locked or not, by name."""
    with explained(f"listing {folder}"):
        return sorted(
            path for path in folder.iterdir() if path.name[0] != "." and not path.name.endswith(CORRUPT) and path.is_dir()
        )


def sweep(folder: Path) -> None:
    """Remove what processes that died left half made or half removed. Nothing in there was ever anybody's delta."""
    for path in folder.iterdir():
        if not path.name.startswith((_NEW, _GONE)):
            continue
        with suppress(Fenced, BufferFull, Unavailable):
            fd = lock_slot(path)
            if fd is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(fd)
            elif path.name.startswith(_GONE) and not (path / "LOCK").exists():
                shutil.rmtree(path, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
