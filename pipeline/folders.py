"""Private folders and the files in them. A reader of a spool or a store learns the ids of producers; a writer could send in
their names.

Files that are opened under a fixed name are opened here: never through a symbolic link, which could name a file of somebody
else, and never a pipe or a device, which could hold a start up for ever.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

from pipeline.errors import Invalid

_log = logging.getLogger(__name__)
_warned: set[Path] = set()
"""Folders that were warned about already."""
_OTHERS = stat.S_IRWXG | stat.S_IRWXO
_SMALL_BYTES_MAX = 65_536


def make_private(folder: Path) -> None:
    """Create a folder for this user only, if it does not exist. Raises what `check_private` does, and `OSError`."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raise `Invalid` if a folder is world-writable; warn, once, if group or others have any access.

    The folder may be an administrator's, or the mount of a volume, so its mode is left as it is.
    """
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except FileNotFoundError:
        return
    if mode & stat.S_IWOTH:
        raise Invalid(f"{folder}: everybody can write to it (mode {mode:o}); chmod 700, or name a folder in it")
    if mode & _OTHERS and folder not in _warned:
        _warned.add(folder)
        _log.warning("%s: others can look into it (mode %o); it is for one user: chmod 700", folder, mode)


def tighten(folder: Path) -> None:
    """Take the access of group and others from a folder that this program has made. RocksDB's files in it have none then."""
    try:
        info = folder.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISDIR(info.st_mode) and stat.S_IMODE(info.st_mode) & _OTHERS and info.st_uid == os.geteuid():
        folder.chmod(0o700)


def open_file(path: Path, flags: int) -> int:
    """Open a file of ours, made with mode 0600 if `flags` say so. Raises `Invalid` for what is no file, and `OSError`."""
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise _refused(path) from None
        raise
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise _refused(path)


def check_file(path: Path) -> None:
    """Raise `Invalid` if there is something at `path` that is no regular file: for libraries that open files themselves."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise _refused(path)


def check_entries(folder: Path) -> None:
    """Raise `Invalid` if a folder has an entry that is neither a regular file nor a folder, as RocksDB would open it."""
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False) and not entry.is_dir(follow_symlinks=False):
            raise _refused(Path(entry.path))


def read_file(path: Path, bytes_max: int) -> tuple[bytes, int]:
    """Return the first `bytes_max` bytes of a file of ours, and its size. Raises as `open_file` does."""
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as file:
        return file.read(bytes_max), os.fstat(file.fileno()).st_size


def read_small(path: Path) -> bytes:
    """Return the content of a small file of ours. Raises `Invalid` if it is large, and as `open_file` does."""
    data, size = read_file(path, _SMALL_BYTES_MAX)
    if size > _SMALL_BYTES_MAX:
        raise Invalid(f"{path} has {size} bytes: it is not what this program wrote")
    return data


def replace_small(path: Path, data: bytes, *, new: Path) -> None:
    """Write a small file durably and in one step, by way of a file `new` beside it. Raises `OSError` and `Invalid`."""
    with os.fdopen(open_file(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def _refused(path: Path) -> Invalid:
    return Invalid(f"{path} is no regular file but a link, a pipe, a folder or a device: this program did not make it")
