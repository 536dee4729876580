"""The file of access tokens: read by servers, written by `pipeline tokens`."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.core.grants import AccessToken, decode_tokens, encode_tokens
from pipeline.errors import Invalid
from pipeline.ports import Clock

_BYTES_MAX = 2 * 2**20
_SETTLED_MS = 2_000
"""Age from which on a file is known by its times: a younger one may be changed again within one tick of its clock."""

Mark = tuple[int, ...]


class TokensFile:
    """The file at a path. A symbolic link is followed: Kubernetes mounts secrets as links."""

    def __init__(self, path: str, clock: Clock) -> None:
        self._path = Path(path)
        self._clock = clock
        self._mark: Mark | None = None
        """State of the file when it was read; None: it may be another one by now."""

    def changed(self) -> bool:
        """Return whether the file may have changed since it was read; True if it can't be looked at."""
        try:
            return self._mark is None or _mark_of(os.stat(self._path)) != self._mark
        except OSError:
            return True

    def read(self) -> list[AccessToken]:
        """Return the entries; `Invalid` if there is no file, or not one of tokens, or others may write to it."""
        self._mark = None
        try:
            handle = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hold up a server
            with open(handle, "rb") as file:
                status = os.fstat(handle)
                self._check(status)
                content = file.read(_BYTES_MAX + 1)
        except OSError as error:
            raise Invalid(f"{self._path}: {error.strerror or error}") from None
        if len(content) > _BYTES_MAX:
            raise Invalid(f"{self._path}: over {_BYTES_MAX} bytes")
        try:
            tokens = decode_tokens(content)
        except Invalid as error:
            raise Invalid(f"{self._path}: {error}") from None
        if self._clock.now_ms() - status.st_mtime_ns // 1_000_000 > _SETTLED_MS:
            self._mark = _mark_of(status)
        return tokens

    def _check(self, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise Invalid(f"{self._path}: not a regular file")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise Invalid(f"{self._path}: others can write to it, and could let themselves in: chmod 600")

    def change(self, edit: Callable[[list[AccessToken]], Sequence[AccessToken]]) -> None:
        """Replace the file by one with the entries that `edit` returns, given those of now: none without a file.

        Readers see the old file or the new one, and programs that change it do so one after the other.
        """
        folder = self._path.parent
        temporary = folder / f".{self._path.name}.{self._clock.new_id()}"
        try:
            locked = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(locked, fcntl.LOCK_EX)
                content = encode_tokens(edit(self.read() if os.path.lexists(self._path) else []))
                decode_tokens(content)  # raises for two of one name
                handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                with open(handle, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(handle)
                os.replace(temporary, self._path)
                os.fsync(locked)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary)
                os.close(locked)
        except OSError as error:
            raise Invalid(f"{self._path}: {error.strerror or error}") from None


def _mark_of(status: os.stat_result) -> Mark:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
