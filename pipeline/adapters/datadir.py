"""The state folder of one process: its layout, its version, and a lock against a second process."""

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
from pipeline.folders import make_private, open_file, read_small, replace_small, tighten

_VERSION = "2"
_NEW_VERSION = "VERSION.new"
_APP = "APP"


class DataDir:
    """A locked state folder. The lock is held from `__init__` to `close`, or to the death of the process.

    Without `with_log` the folder holds only stores of `app`, whose log is on a broker. With `read_only` it must be there,
    nothing in it is changed, and others may hold it so, too. Raises `Unavailable` if another process holds the lock or the
    disk is full, `Invalid` if the folder can't be a state folder or belongs to another app.
    """

    def __init__(self, path: str | Path, *, with_log: bool = True, app: str = "", read_only: bool = False) -> None:
        self.path = Path(path).expanduser().absolute()
        self._with_log = with_log
        self._lock = -1
        try:
            if read_only and not os.path.lexists(self.path / "VERSION"):
                raise Invalid(f"{self.path} is not a data directory")
            if not read_only:
                make_private(self.path)
            flags = os.O_RDONLY if read_only else os.O_RDWR | os.O_CREAT
            self._lock = open_file(self.path / "LOCK", flags)
            _open.add(self)
            self._take(fcntl.LOCK_SH if read_only else fcntl.LOCK_EX)
            self._check_version()
            if read_only:
                return
            if app:
                self.check_app(app)
                if not os.path.lexists(self.path / _APP):
                    self._write(_APP, app)
            for folder in (self.log, self.stores):
                tighten(folder)
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        except OSError as error:
            self.close()
            raise _translate(f"data directory {self.path}", error) from None
        except BaseException:
            self.close()
            raise

    def _take(self, how: int) -> None:
        try:
            fcntl.flock(self._lock, how | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(self._lock, 32).decode("ascii", "replace").strip()
            raise Unavailable(f"data directory {self.path} is in use by process {owner or '(unknown)'}") from None

    def _check_version(self) -> None:
        try:
            found = read_small(self.path / "VERSION").strip().decode("ascii", "replace")
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
        """Raise `Invalid` if the stores belong to another app: they would look damaged, and be rebuilt."""
        try:
            found = read_small(self.path / _APP).strip().decode("utf-8", "replace")
        except FileNotFoundError:
            return
        if found != app:
            raise Invalid(f"data directory {self.path} is that of app {found[:100]!r}, not of {app!r}: give each its own")

    def _write_version(self) -> None:
        self._write("VERSION", _VERSION)

    def _write(self, name: str, text: str) -> None:
        replace_small(self.path / name, f"{text}\n".encode(), new=self.path / f"{name}.new")

    @property
    def log(self) -> Path:
        """Folder of the embedded log."""
        return self.path / "log"

    @property
    def stores(self) -> Path:
        """Folder of the stores; the log can restore everything in it."""
        return self.path / "stores"

    @property
    def totals(self) -> Path:
        """File with the totals that are published; see `TotalsFile`."""
        return self.path / "totals.db"

    def close(self) -> None:
        """Release the lock. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> DataDir:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


@contextmanager
def translate_os(what: str) -> Iterator[None]:
    """Translate `OSError` into an error of `pipeline.errors` whose text begins with `what`."""
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
    """Return an unused path beside `path`, with the UTC time in its name, to keep a copy of `path` under."""
    stem = f"{path.name}.lost-{datetime.fromtimestamp(now_ms / 1000, UTC):%Y%m%dT%H%M%S}"
    names = (path.with_name(stem if not number else f"{stem}-{number}") for number in count())
    return next(name for name in names if not name.exists())


_open: weakref.WeakSet[DataDir] = weakref.WeakSet()


def _close_in_child() -> None:
    """Release the lock in a forked child, which may live longer than its parent."""
    for data in _open:
        data.close()


os.register_at_fork(after_in_child=_close_in_child)
