"""Tables on standard output, and the answers that they show."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import TypeVar

import msgspec
from rich import table
from rich.cells import cell_len
from rich.text import Text

from pipeline.cli import console
from pipeline.errors import Unavailable
from pipeline.roles.readers import Reader

T = TypeVar("T")


class TextTable:
    """Rows of cells: folded to fit on a terminal, whole and quickly printed elsewhere."""

    def __init__(self, *left: str, right: Sequence[str]) -> None:
        self._left = tuple(map(console.printable, left))
        self._right = tuple(map(console.printable, right))
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        self._rows.append(tuple(map(console.printable, cells)))

    def print(self) -> None:
        if not console.out.is_terminal:
            console.write(self._text().encode())
            return
        made = table.Table(box=None, pad_edge=False, header_style="bold")
        for name in self._left:
            made.add_column(name, overflow="fold")
        for name in self._right:
            made.add_column(name, justify="right", overflow="fold")
        for row in self._rows:
            made.add_row(*map(Text, row))
        console.out.print(made)

    def _text(self) -> str:
        rows = [(*self._left, *self._right), *self._rows]
        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        return "".join("  ".join(map(self._padded, row, widths, count())).rstrip() + "\n" for row in rows)

    def _padded(self, cell: str, width: int, column: int) -> str:
        padding = " " * (width - cell_len(cell))
        return cell + padding if column < len(self._left) else padding + cell


def fetched(url: str, path: str, kind: type[T], *, as_json: bool, timeout_s: float | None = None) -> T | None:
    """Return the decoded answer of a server; with `as_json` print it as it came, and return None.

    Raises as `Reader.fetch`, and `Unavailable` if the answer is no `kind`.
    """
    with Reader(url) as reader:
        body = reader.fetch(path, timeout_s=timeout_s)
    if as_json:
        console.write_json(body)
        return None
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unavailable(f"{url}: not an answer of this API: {error}") from None
