"""A terminal in which a program runs, and what it shows there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import termios
from collections.abc import Callable, Sequence

Size = tuple[int, int]
"""Columns and lines."""


def _never(_: bytes) -> bool:
    return False


def record(command: Sequence[str], *sizes: Size, enough: Callable[[bytes], bool] = _never) -> tuple[list[str], int]:
    """Return what a command writes to a terminal of each size, and its exit code.

    Once `enough` was written to a terminal of one size, it gets the next size; after the last one, Ctrl-C is pressed.
    """
    later = [*sizes[1:]]
    ready, go = os.pipe()
    pid, terminal = pty.fork()
    if not pid:
        os.read(ready, 1)
        # Not the variables that readline has set behind Python's back: sizes are to be the terminal's.
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        os.execvpe(command[0], command, environment | {"TERM": "xterm-256color"})
    _resize(terminal, sizes[0])
    os.write(go, b".")
    os.close(ready)
    os.close(go)
    written = [b""]
    try:
        while True:
            written[-1] += os.read(terminal, 65536)
            if not enough(written[-1]) or select.select([terminal], [], [], 0.05)[0]:  # in the midst of a frame
                continue
            if later:
                _resize(terminal, later.pop(0))
                written.append(b"")
            else:
                os.write(terminal, b"\x03")
                enough = _never
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return [it.decode(errors="replace").replace("\r\n", "\n") for it in written], os.waitstatus_to_exitcode(status)


def _resize(terminal: int, size: Size) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size[1], size[0], 0, 0))


def frames(written: str) -> list[str]:
    """Return the frames of a live display: what stands between its erasures."""
    return re.split(r"(?:\x1b\[1A|\x1b\[2K|\r)+", written)


def plain(text: str) -> str:
    """Return a text without colours and other commands to the terminal."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
