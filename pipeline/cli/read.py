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


def run_get(
    url: str, view: str, *, where: Sequence[str], labels: Sequence[str], total: bool, as_json: bool, **options: Any
) -> int:
    """Print the view; return the exit code.

    An item of `labels` can name several, with commas between; without any, each series stands by itself, unless `total`.
    `options` are parameters of the read (`view_path`).
    """
    if total and labels:
        raise Invalid("--total is one number; --by keeps labels: one of them")
    by: list[str] | None = [name.strip() for part in labels for name in part.split(",")]
    if not by:
        by = [] if total else None
    path = view_path(view, where, by, **options)
    timeout_s = None if options["timeout_ms"] is None else options["timeout_ms"] / 1000 + 5
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
