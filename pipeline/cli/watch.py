"""`pipeline watch`: the options of a read that is watched."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.get import (
    After,
    By,
    Fill,
    Function,
    Kind,
    Limit,
    Over,
    Quantiles,
    Step,
    Timeout,
    Total,
    Where,
    WindowS,
)
from pipeline.cli.options import DEFAULT_URL, ReadFrom


def watch(
    view: Annotated[str, typer.Argument(metavar="VIEW", help="Name of the view.")],
    url: ReadFrom = DEFAULT_URL,
    where: Where = None,
    by: By = None,
    total: Total = False,
    kind: Kind = None,
    window_s: WindowS = None,
    start: Annotated[
        str | None, typer.Option(metavar="TIME", help="Start of the range, which ends now. Default: 60 steps ago.")
    ] = None,
    step: Step = None,
    over: Over = None,
    fill: Fill = None,
    fn: Function = None,
    q: Quantiles = None,
    top: Annotated[int | None, typer.Option(metavar="N", help="Only the N that are largest by now, largest first.")] = None,
    bottom: Annotated[
        int | None, typer.Option(metavar="N", help="Only the N that are smallest by now, smallest first.")
    ] = None,
    limit: Limit = None,
    after: After = None,
    max_staleness_ms: Annotated[
        int | None, typer.Option(metavar="N", help="Wait for a first answer at most so stale, or fail.")
    ] = None,
    timeout_ms: Timeout = None,
    json: Annotated[bool, typer.Option("--json", help="Print each answer as a line of JSON.")] = False,
) -> None:
    """Watch a merged view as it changes.

    \b
        pipeline watch revenue --by region
        pipeline watch hits --by route --step 5m --top 10
        pipeline watch latency_seconds --by route --q 0.95 --q 0.99
        pipeline watch revenue --by region | while read -r line; do ...

    On a terminal a table, as wide as it is. Its bars are the points of a view with windows; else what came while it was
    watched, second by second: a sum's changes, other values as they were. Numbers are never cut, floats are rounded;
    columns that find no room are left out.

    In a pipe, a line with tabs for each series, or point, that is new or has changed: labels, values, and how stale they are
    at most. A series that is gone has no values. With --json each line is a whole answer; one comes every few seconds.

    When the connection is lost, that is said, and it is opened again; what is shown grows staler meanwhile. Ctrl-C ends it.
    """
    from pipeline.cli.live import run_watch

    options: dict[str, Any] = {"kind": kind, "window_s": window_s, "top": top, "bottom": bottom, "limit": limit}
    options |= {"start": start, "step": step, "over": over, "fill": fill, "fn": fn, "q": q or None}
    options |= {"after": after, "max_staleness_ms": max_staleness_ms, "timeout_ms": timeout_ms}
    raise SystemExit(run_watch(url, view, where=where or [], labels=by or [], total=total, as_json=json, **options))
