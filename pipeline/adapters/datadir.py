"""The state folder of one process: its layout, its version, and the lock that keeps a second process out."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from types import TracebackType

from pipeline.errors import Invalid, LogCorrupt, NewerFormat, NoSpace, PipelineError, Unavailable
from pipeline.folders import make_private

_VERSION = "2"
_NEW_VERSION = "VERSION.new"
_APP = "APP"


class DataDir:
    """Holds the lock on a state folder from `__init__` to `close`. The kernel lets go of it when the process dies.

    Without `with_log` it is for stores only, of `app`, and the log is elsewhere. Raises `Unavailable` if another process has
    it or the disk is full, `Invalid` if the folder can't be one, or is another app's.
    """

    def __init__(self, path: str | Path, *, with_log: bool = True, app: str = "") -> None:
        self.path = Path(path).expanduser().absolute()
        self._with_log = with_log
        self._lock = -1
        try:
            make_private(self.path)
            self._lock = os.open(self.path / "LOCK", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            _open.add(self)
            self._take()
            self._check_version()
            if app:
                self.check_app(app)
                if not (self.path / _APP).exists():
                    self._write(_APP, app)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise _translate(f"data directory {self.path}", error) from None
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 32).decode("ascii", "replace").strip()
            raise Unavailable(f"data directory {self.path} is in use by process {owner or '(unknown)'}") from None

    def _check_version(self) -> None:
        try:
            found = (self.path / "VERSION").read_bytes().strip().decode("ascii", "replace")
        except FileNotFoundError:
            if any(entry.name not in ("LOCK", _NEW_VERSION) for entry in self.path.iterdir()):
                raise Invalid(f"{self.path} is neither empty nor a data directory (no VERSION file)") from None
            self._write_version()
            return
        if found.isdecimal() and int(found) > int(_VERSION):
            raise NewerFormat(f"data directory {self.path} has version {found[:20]}; this program reads {_VERSION}")
        if found != _VERSION:
            raise Invalid(f"data directory {self.path} has version {found[:20]!r}; this program reads {_VERSION}")
        if not self._with_log and self.log.exists():
            raise Invalid(f"data directory {self.path} holds an embedded log; stores of a broker's log need another one")
        if self._with_log and self.stores.exists() and not self.log.exists():
            if (self.path / _APP).exists():
                raise Invalid(f"data directory {self.path} has stores of a broker's log, and no log of its own")
            # The stores are all that is left.
            raise LogCorrupt(
                f"data directory {self.path} has stores, but its log is gone: bring it back, or begin anew in another"
            )

    def check_app(self, app: str) -> None:
        """Raise `Invalid` if the stores are known to be another app's: they would look wrong, and be made anew."""
        try:
            found = (self.path / _APP).read_bytes().strip().decode("utf-8", "replace")
        except FileNotFoundError:
            return
        if found != app:
            raise Invalid(f"data directory {self.path} is that of app {found[:100]!r}, not of {app!r}: give each its own")

    def _write_version(self) -> None:
        self._write("VERSION", _VERSION)

    def _write(self, name: str, text: str) -> None:
        new = self.path / f"{name}.new"
        with new.open("w") as file:
            file.write(f"{text}\n")
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.path / name)

    @property
    def log(self) -> Path:
        """Where the embedded log lives: the truth."""
        return self.path / "log"

    @property
    def stores(self) -> Path:
        """Where the stores live; everything in it can be restored from the log."""
        return self.path / "stores"

    def close(self) -> None:
        """Let go of the lock. Twice is fine."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DataDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def translate_os(what: str) -> Iterator[None]:
    """Raise our error for one of the file system; `what` leads its text."""
    try:
        yield
    except OSError as error:
        raise _translate(what, error) from None


def _translate(what: str, error: OSError) -> PipelineError:
    kind: type[PipelineError] = Invalid
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        kind = NoSpace
    elif error.errno in (errno.EIO, errno.EMFILE, errno.ENFILE):
        kind = Unavailable
    return kind(f"{what}: {error.strerror}")


def aside(path: Path, now_ms: int) -> Path:
    """Return a name for what is kept of `path` and not used any more: one that is not taken, with the time in it (UTC)."""
    stem = f"{path.name}.lost-{datetime.fromtimestamp(now_ms / 1000, UTC):%Y%m%dT%H%M%S}"
    names = (path.with_name(stem if not number else f"{stem}-{number}") for number in count())
    return next(name for name in names if not name.exists())


_open: weakref.WeakSet[DataDir] = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child that outlives its parent must not keep the folder locked."""
    for data in _open:
        data.close()


os.register_at_fork(after_in_child=_close_in_child)
