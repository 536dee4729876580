"""The picture of `pipeline demo` in the README. `python -m tests.docs.screenshot` runs the demo, and writes it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

from rich.console import Console
from rich.text import Text

SVG = Path(__file__).parents[2] / "pipeline" / "docs" / "demo.svg"
WIDTH, HEIGHT = 110, 24
# As rich's own, without its fonts, which a browser would fetch from another site.
FORMAT = """<svg viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font: {char_height}px/{line_height}px ui-monospace, Menlo, Consolas, monospace; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: arial; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def record(command: list[str]) -> str:
    """Return everything that a command writes to a terminal of `WIDTH` by `HEIGHT`."""
    pid, terminal = pty.fork()
    if not pid:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(WIDTH), LINES=str(HEIGHT))
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    written = b""
    try:
        while chunk := os.read(terminal, 65536):
            written += chunk
    except OSError:  # the other end is closed
        pass
    os.waitpid(pid, 0)
    return written.decode(errors="replace").replace("\r\n", "\n")


def last_frame(written: str) -> str:
    """Return the last frame of a live display: what stands between its last two erasures that is a whole table."""
    frames = re.split(r"(?:\x1b\[1A|\x1b\[2K|\r)+", written)
    return max((frame for frame in frames[-6:] if "per second" in frame), key=len)


def main() -> None:
    """Write the picture."""
    written = record([str(Path(sys.executable).with_name("pipeline")), "demo", "--for", "12s"])
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(last_frame(written).strip("\n")), soft_wrap=True)
    SVG.write_text(console.export_svg(title="pipeline demo", code_format=FORMAT, unique_id="demo"))


if __name__ == "__main__":
    main()
