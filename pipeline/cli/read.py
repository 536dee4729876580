"""`pipeline get` and `pipeline status`: answers of a server as tables, or as the JSON that it sent."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import msgspec
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from pipeline.adapters.http import Answer, View, view_path
from pipeline.cli import console
from pipeline.connect import Reader
from pipeline.errors import Invalid, Unavailable


class Read(msgspec.Struct, frozen=True):
    """A read of one view, as the command line asks for it."""

    view: str
    where: Sequence[str]
    by: Sequence[str]
    """Labels, several of them separated by commas; empty: each series by itself, unless `total`."""
    total: bool
    top: int | None
    limit: int | None
    after: str | None
    max_staleness_ms: int | None
    timeout_ms: int | None


class _Views(msgspec.Struct):
    views: list[View]


class _Partition(msgspec.Struct):
    partition: int
    phase: str
    next_offset: int
    end_offset: int
    lag: int
    staleness_ms: int | None = None
    restore: dict[str, float] | None = None


class _Status(msgspec.Struct):
    ready: bool
    partitions: list[_Partition]


def run_get(url: str, read: Read, *, as_json: bool) -> int:
    """Print the view; the exit code."""
    if read.total and read.by:
        raise Invalid("--total is one number; --by keeps labels: one of them")
    by: list[str] | None = [name.strip() for part in read.by for name in part.split(",")]
    if not by:
        by = [] if read.total else None
    path = view_path(
        read.view,
        read.where,
        by,
        top=read.top,
        limit=read.limit,
        after=read.after,
        max_staleness_ms=read.max_staleness_ms,
        timeout_ms=read.timeout_ms,
    )
    with Reader(url) as reader:
        body = reader.fetch(path, timeout_s=None if read.timeout_ms is None else read.timeout_ms / 1000 + 5)
    if as_json:
        console.write(body + b"\n")
        return console.OK
    answer = _decode(url, body, Answer)
    names = [*answer.series[0].labels] if answer.series else answer.by or []
    table = _Table(*names, right=(answer.kind,))
    for series in answer.series:
        table.add_row(*map(console.printable, series.labels.values()), _shown(series.value))
    table.print()
    shown = f"{len(answer.series):,} series"
    if answer.truncated:
        shown = f"{len(answer.series):,} of {answer.series_total or 0:,} series (--limit, --top)"
    stale = answer.as_of.staleness_ms
    print(f"{shown}, {'staleness unknown' if stale is None else f'at most {stale:,} ms stale'}")
    return console.OK


def run_views(url: str, *, as_json: bool) -> int:
    """Print the definitions of all views; the exit code."""
    with Reader(url) as reader:
        body = reader.fetch("/v1/views")
    if as_json:
        console.write(body + b"\n")
        return console.OK
    views = _decode(url, body, _Views).views
    table = _Table("view", "kind", "labels", right=("series",))
    for view in views:
        table.add_row(view.name, "monotone " * view.monotone + view.kind, ", ".join(view.labels), f"{view.series_count:,}")
    table.print()
    print(f"{len(views):,} view{'' if len(views) == 1 else 's'}")
    return console.OK


def run_status(url: str, *, as_json: bool) -> int:
    """Print how far each partition is; the exit code."""
    with Reader(url) as reader:
        body = reader.fetch("/v1/status")
    if as_json:
        console.write(body + b"\n")
        return console.OK
    status = _decode(url, body, _Status)
    table = _Table("partition", "phase", right=("next_offset", "end_offset", "lag", "staleness", "restore"))
    for it in status.partitions:
        stale = "" if it.staleness_ms is None else f"{it.staleness_ms:,} ms"
        table.add_row(
            str(it.partition),
            it.phase,
            *(f"{number:,}" for number in (it.next_offset, it.end_offset, it.lag)),
            stale,
            _restore_shown(it.restore),
        )
    table.print()
    print(f"{'ready' if status.ready else 'not ready: restoring'}, lag {sum(it.lag for it in status.partitions):,} records")
    return console.OK


def _restore_shown(restore: dict[str, float] | None) -> str:
    if restore is None:
        return ""
    done, remaining, seconds = (restore.get(name, 0) for name in ("entries", "remaining", "seconds_left"))
    return f"{done:,.0f} entries, {remaining:,.0f} to go, {seconds:,.0f} s left"


class _Table:
    """Rows of cells: folded to fit on a terminal; anywhere else whole, and quickly, however many there are."""

    def __init__(self, *left: str, right: Sequence[str]) -> None:
        self._left = left
        self._right = right
        self._rows: list[tuple[str, ...]] = []

    def add_row(self, *cells: str) -> None:
        self._rows.append(cells)

    def print(self) -> None:
        if not console.out.is_terminal:
            console.write(self._text().encode())
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in self._left:
            table.add_column(name, overflow="fold")
        for name in self._right:
            table.add_column(name, justify="right", overflow="fold")
        for row in self._rows:
            table.add_row(*map(Text, row))
        console.out.print(table)

    def _text(self) -> str:
        rows = [(*self._left, *self._right), *self._rows]
        widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
        return "".join("  ".join(map(self._padded, row, widths, count())).rstrip() + "\n" for row in rows)

    def _padded(self, cell: str, width: int, column: int) -> str:
        padding = " " * (width - cell_len(cell))
        return cell + padding if column < len(self._left) else padding + cell


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return console.printable(value)
    return msgspec.json.encode(value).decode()


def _decode(url: str, body: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Unavailable(f"{url}: not an answer of this API: {error}") from None
