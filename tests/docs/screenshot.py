"""The picture of `pipeline demo` in the README. `python -m tests.docs.screenshot` runs the demo, and writes it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from tests.terminal import frames, record

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


def main() -> None:
    """Write the picture."""
    (written,), _ = record([str(Path(sys.executable).with_name("pipeline")), "demo", "--for", "12s"], (WIDTH, HEIGHT))
    frame = [it for it in frames(written) if "per second" in it][-1]
    console = Console(record=True, width=WIDTH, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(frame.strip("\n")), soft_wrap=True)
    SVG.write_text(console.export_svg(title="pipeline demo", code_format=FORMAT, unique_id="demo"))


if __name__ == "__main__":
    main()
