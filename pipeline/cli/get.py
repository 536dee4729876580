"""`pipeline get`: the options of a read."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.options import DEFAULT_URL, Json, ReadFrom

Where = Annotated[
    list[str] | None,
    typer.Option(metavar="LABEL=VALUE", help="Also != and, with regular expressions, =~ and !~. All must hold."),
]
By = Annotated[
    list[str] | None, typer.Option(metavar="LABEL", help="Merge series to these labels. Can be repeated: a,b or --by b.")
]
Every = Annotated[bool, typer.Option("--all", help="All series, however many, in pages of --limit, all of one moment.")]
Quantiles = Annotated[
    list[float] | None,
    typer.Option("--q", metavar="Q", help="A quantile of a histogram: 0.95. Can be repeated."),
]
Step = Annotated[
    str | None, typer.Option(metavar="LENGTH", help="Distance of points, a multiple of the window. Default: the window.")
]
Over = Annotated[
    str | None, typer.Option(metavar="LENGTH", help="What each point covers, at least the step. Default: the step.")
]
Compare = Annotated[
    str | None,
    typer.Option(metavar="LENGTH", help="The same range so much earlier beside it: 1d, a multiple of the window."),
]
Total = Annotated[bool, typer.Option("--total", help="Merge all series to one number.")]
Kind = Annotated[
    str | None, typer.Option(metavar="KIND", help="Of a view that is published in several kinds, which of them.")
]
WindowS = Annotated[
    int | None, typer.Option(metavar="S", min=0, help="The same for the length of windows; 0: without windows.")
]
Function = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of sums: rate, delta, avg, cumulative or share in place of values.")
]
After = Annotated[str | None, typer.Option(metavar="TOKEN", help="Wait until what this token covers is in.")]
Limit = Annotated[int | None, typer.Option(metavar="N", help="Most series in the answer.")]
MaxStaleness = Annotated[int | None, typer.Option(metavar="N", help="Wait for an answer at most so stale, or fail.")]
Timeout = Annotated[int | None, typer.Option(metavar="N", min=1, help="How long to wait and work.")]
Fill = Annotated[str | None, typer.Option(metavar="HOW", help="Points without data: null, zero or previous. Default: none.")]


def get(
    view: Annotated[
        str | None, typer.Argument(metavar="[VIEW]", help="Name of the view; without it, all are listed.")
    ] = None,
    url: ReadFrom = DEFAULT_URL,
    where: Where = None,
    by: By = None,
    total: Total = False,
    kind: Kind = None,
    window_s: WindowS = None,
    last: Annotated[
        str | None, typer.Option(metavar="LENGTH", help="Of a view with windows: so long up to now, such as 90s, 1h, 7d.")
    ] = None,
    start: Annotated[str | None, typer.Option(metavar="TIME", help="Start of the range: RFC 3339, or ms.")] = None,
    end: Annotated[str | None, typer.Option(metavar="TIME", help="End of the range. Default: now.")] = None,
    at: Annotated[str | None, typer.Option(metavar="TIME", help="One step that ends then.")] = None,
    step: Step = None,
    over: Over = None,
    compare: Compare = None,
    fill: Fill = None,
    fn: Function = None,
    q: Quantiles = None,
    top: Annotated[int | None, typer.Option(metavar="N", help="Only the N largest, largest first.")] = None,
    bottom: Annotated[int | None, typer.Option(metavar="N", help="Only the N smallest, smallest first.")] = None,
    limit: Limit = None,
    every: Every = False,
    after: After = None,
    max_staleness_ms: MaxStaleness = None,
    timeout_ms: Timeout = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV: a row for each series, or point.")] = False,
    json: Json = False,
) -> None:
    """Read a merged view, or list all views.

    \b
        pipeline get revenue --by region
        pipeline get revenue --where region=eu --where 'product!~t.*' --top 10
        pipeline get revenue --total --after "$token" --json
        pipeline get hits --last 1h --step 5m --by route
        pipeline get latency_seconds --by route --q 0.95 --q 0.99

    Every answer says how stale it is. --json and --csv print the answer of the HTTP API as it came.
    """
    from pipeline.cli.read import run_get, run_views

    options: dict[str, Any] = {"kind": kind, "window_s": window_s, "top": top, "bottom": bottom, "limit": limit}
    options |= {"start": start, "end": end, "after": after}
    options |= {"at": at, "step": step, "over": over, "compare": compare, "fill": fill, "fn": fn, "timeout_ms": timeout_ms}
    options |= {"max_staleness_ms": max_staleness_ms, "q": q or None}
    if json and csv:
        raise typer.BadParameter("--json or --csv: one of them")
    if view is None:
        if where or by or total or last or csv or every or any(value is not None for value in options.values()):
            raise typer.BadParameter("the other options are for a view: pipeline get VIEW")
        raise SystemExit(run_views(url, as_json=json))
    form = "json" if json else "csv" if csv else ""
    raise SystemExit(
        run_get(url, view, where=where or [], labels=by or [], total=total, last=last, form=form, every=every, **options)
    )
