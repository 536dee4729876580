"""`pipeline get`: prints answers of a server as tables, or as the JSON that it sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.adapters.http import view_path
from pipeline.cli import console
from pipeline.cli.table import TextTable, fetched
from pipeline.core.answer import Answer, Views
from pipeline.errors import Invalid


class Read(msgspec.Struct, frozen=True):
    """A read of one view, as the command line asks for it."""

    view: str
    where: Sequence[str]
    by: Sequence[str]
    """Labels, several of them separated by commas; empty: each series by itself, unless `total`."""
    total: bool
    kind: str | None
    window_s: int | None
    top: int | None
    limit: int | None
    after: str | None
    max_staleness_ms: int | None
    timeout_ms: int | None


def run_get(url: str, read: Read, *, as_json: bool) -> int:
    """Print the view; return the exit code."""
    if read.total and read.by:
        raise Invalid("--total is one number; --by keeps labels: one of them")
    by: list[str] | None = [name.strip() for part in read.by for name in part.split(",")]
    if not by:
        by = [] if read.total else None
    path = view_path(
        read.view,
        read.where,
        by,
        kind=read.kind,
        window_s=read.window_s,
        top=read.top,
        limit=read.limit,
        after=read.after,
        max_staleness_ms=read.max_staleness_ms,
        timeout_ms=read.timeout_ms,
    )
    timeout_s = None if read.timeout_ms is None else read.timeout_ms / 1000 + 5
    answer = fetched(url, path, Answer, as_json=as_json, timeout_s=timeout_s)
    if answer is None:
        return console.OK
    names = [*answer.series[0].labels] if answer.series else answer.by or []
    table = TextTable(*names, right=(answer.kind,))
    for series in answer.series:
        table.add_row(*map(console.printable, series.labels.values()), _shown(series.value))
    table.print()
    shown = f"{len(answer.series):,} series"
    if answer.truncated:
        shown = f"{len(answer.series):,} of {answer.series_total or 0:,} series (--limit, --top)"
    stale = answer.as_of.staleness_ms
    if answer.also:
        others = ", ".join(f"--kind {it.kind}" + f" --window-s {it.window_s}" * bool(it.window_s) for it in answer.also)
        shown = f"{shown} of kind {answer.kind} (this view also has {others})"
    print(f"{shown}, {'staleness unknown' if stale is None else f'at most {stale:,} ms stale'}")
    return console.OK


def run_views(url: str, *, as_json: bool) -> int:
    """Print the definitions of all views; return the exit code."""
    answer = fetched(url, "/v1/views", Views, as_json=as_json)
    if answer is None:
        return console.OK
    views = answer.views
    table = TextTable("view", "kind", "labels", right=("series",))
    for view in views:
        table.add_row(view.name, "monotone " * view.monotone + view.kind, ", ".join(view.labels), f"{view.series_count:,}")
    table.print()
    print(f"{len(views):,} view{'' if len(views) == 1 else 's'}")
    return console.OK


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return console.printable(value)
    return msgspec.json.encode(value).decode()
