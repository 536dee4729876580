"""`pipeline get`: prints answers of a server as tables, or as the JSON that it sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.read_parameters import view_path
from pipeline.cli import console
from pipeline.cli.table import TextTable, fetched
from pipeline.cli.views import counted
from pipeline.core.answer import Answer, Views
from pipeline.core.tables import number_of, sparkline
from pipeline.core.times import length_ms, length_text, time_text
from pipeline.errors import Invalid
from pipeline.query.media import CSV, to_csv
from pipeline.roles.readers import Reader

_BARS_MAX = 60
_PAGE_SIZE = 10_000
_ITEMS_MAX = 5
"""Items of a topk that a table shows."""


def run_get(
    url: str,
    view: str,
    *,
    where: Sequence[str],
    labels: Sequence[str],
    total: bool,
    last: str | None,
    form: str,
    every: bool = False,
    **options: Any,
) -> int:
    """Print the view; return the exit code.

    `labels` and `total` are as `labels_to_keep` takes them. `last` is
    the length of a range up to now. `form` is `json`, `csv`, or empty for a table. `options` are
    parameters of the read (`view_path`). `every`: all series, in pages of `limit`.
    """
    by = labels_to_keep(labels, total=total)
    if last is not None:
        if any(options[name] is not None for name in ("start", "end", "at")):
            raise Invalid("--last ends now; --start, --end and --at are for other ranges")
        options["start"] = max(0, SystemClock().now_ms() - length_ms("--last", last))
    if every:
        return _show(_whole(url, view, where=where, by=by, **options), form)
    path = view_path(view, where=where, by=by, **options)
    timeout_s = None if options["timeout_ms"] is None else options["timeout_ms"] / 1000 + 5
    if form == "csv":
        with Reader(url) as reader:
            console.write_csv(reader.fetch(path, timeout_s=timeout_s, accept=CSV))
        return console.OK
    answer = fetched(url, path, Answer, as_json=form == "json", timeout_s=timeout_s)
    return console.OK if answer is None else _show(answer, "")


def labels_to_keep(labels: Sequence[str], *, total: bool) -> list[str] | None:
    """Return the labels of --by, of which an item can name several, with commas between; None: each series by itself."""
    if total and labels:
        raise Invalid("--total is one number; --by keeps labels: one of them")
    return [name.strip() for part in labels for name in part.split(",")] or ([] if total else None)


def _whole(url: str, view: str, *, limit: int | None, **options: Any) -> Answer:
    """Return all series in one answer, fetched page by page."""
    with Reader(url) as reader:
        pages = [*reader.pages(view, page_size=limit or _PAGE_SIZE, **options)]
    return replace(pages[-1], series=[series for page in pages for series in page], series_total=None)


def _show(answer: Answer, form: str) -> int:
    if form:
        console.write_csv(to_csv(answer)) if form == "csv" else console.print_json(answer)
        return console.OK
    (_values(answer) if answer.step_ms is None else _points(answer)).print()
    said = f"{len(answer.series):,} series"
    if answer.truncated:
        said = f"{len(answer.series):,} of {answer.series_total or 0:,} series (--limit, --top, --bottom)"
    stale = answer.as_of.staleness_ms
    if answer.also:
        others = ", ".join(f"--kind {it.kind}" + f" --window-s {it.window_s}" * bool(it.window_s) for it in answer.also)
        said = f"{said} of kind {answer.kind} (this view also has {others})"
    if answer.step_ms is not None:
        said += f", {time_text(answer.start_ms or 0)} to {time_text(answer.end_ms or 0)} in steps of "
        said += f"{length_text(answer.step_ms)}, final before {time_text(answer.final_before_ms or 0)}"
    console.show(f"{said}, {'staleness unknown' if stale is None else f'at most {stale:,} ms stale'}")
    if missing := answer.as_of.missing_partitions:
        console.show(f"not all of it: partitions {', '.join(map(str, missing))} are missing")
    return console.OK


def _values(answer: Answer) -> TextTable:
    table = TextTable(
        *label_names(answer), right=[*cells_of(answer, answer.series[0].value)] if answer.series else (answer.kind,)
    )
    for series in answer:
        cells = cells_of(answer, series.value).values()
        table.add_row(*map(console.printable, series.labels.values()), *map(cell_text, cells))
    return table


def cells_of(answer: Answer, value: Any) -> dict[str, Any]:
    """Return the parts of a value, by the names of their columns."""
    match answer.kind:
        case "histogram":
            return {**{name: value[name] for name in ("count", "min", "mean")}, **value["quantiles"], "max": value["max"]}
        case "distinct":
            return {name: value[name] for name in ("estimate", "lower", "upper")}
        case "topk":
            most = [f"{it['item']} {it['count']:,}" for it in value["items"][:_ITEMS_MAX]]
            return {"total": value["total"], "most frequent": ", ".join(most)}
    return {answer.kind: value}


def _points(answer: Answer) -> TextTable:
    """Return on a terminal a row for each series, with bars; elsewhere a row for each point."""
    what = answer.fn or answer.kind
    compared = answer.compare_ms is not None
    earlier = [f"{length_text(answer.compare_ms)} before"] if answer.compare_ms is not None else []
    if not console.out.is_terminal:
        table = TextTable(*label_names(answer), "start", right=(what, *earlier))
        for series in answer:
            cells = [*map(console.printable, series.labels.values())]
            for i, (start_ms, value) in enumerate(series.points):
                before = [cell_text(series.compare[i][1])] if compared else []
                table.add_row(*cells, time_text(start_ms), cell_text(value), *before)
        return table
    table = TextTable(*label_names(answer), "points", right=("least", "most", "newest", *earlier))
    starts = range(answer.start_ms or 0, answer.end_ms or 0, answer.step_ms or 1)
    for series in answer:
        by_end = {start_ms + (answer.over_ms or 0) - (answer.step_ms or 0): value for start_ms, value in series.points}
        drawn = {end_ms: number_of(answer, value) for end_ms, value in by_end.items()}
        numbers = [value for value in drawn.values() if isinstance(value, int | float)]
        extremes = (cell_text(min(numbers)), cell_text(max(numbers))) if numbers else ("", "")
        newest = cell_text(series.points[-1][1]) if series.points else ""
        bars = sparkline([drawn.get(start_ms) for start_ms in starts], _BARS_MAX)
        before = [cell_text(series.compare[-1][1]) if series.compare else ""] if compared else []
        table.add_row(*map(console.printable, series.labels.values()), bars, *extremes, newest, *before)
    return table


def label_names(answer: Answer) -> Sequence[str]:
    """Return the names of the labels of an answer's series."""
    return [*answer.series[0].labels] if answer.series else answer.by or []


def run_views(url: str, *, as_json: bool) -> int:
    """Print the definitions of all views; return the exit code."""
    answer = fetched(url, "/v1/views", Views, as_json=as_json)
    if answer is None:
        return console.OK
    views = answer.views
    table = TextTable("view", "kind", "labels", right=("series",))
    for view in views:
        table.add_row(view.name, "monotone " * view.monotone + view.kind, ", ".join(view.labels), counted(view))
    table.print()
    console.show(f"{len(views):,} view{'' if len(views) == 1 else 's'}")
    return console.OK


def cell_text(value: Any) -> str:
    """Return a value as a cell: a text as it is, everything else as JSON; control characters are spelled out."""
    return console.printable(value if isinstance(value, str) else msgspec.json.encode(value).decode())
