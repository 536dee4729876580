"""Plots as SVG files that load nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import pygal
from pygal.style import CleanStyle

_POINTS = 400


def _save(chart: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(chart.render(is_unicode=True), encoding="utf-8")


def _options(title: str, values: Iterable[float], **more: Any) -> dict[str, Any]:
    """Return the options of all plots: a logarithmic scale of whole decades around `values`."""
    low, high = min(values := [value for value in values if value > 0]), max(values)
    decades = [10.0**n for n in range(floor(log10(low)), ceil(log10(high)) + 1)]
    scale = {"logarithmic": True, "range": (decades[0], decades[-1]), "zero": decades[0], "y_labels": decades}
    look = {"style": CleanStyle, "legend_at_bottom": True, "legend_at_bottom_columns": 1, "width": 1_000}
    plain = {"js": [], "pretty_print": True}
    return {"title": title, **scale, **look, **plain, **more}


def bars(path: Path, title: str, values: Mapping[str, float], unit: str) -> None:
    """Draw one bar for each name."""
    names = [f"{name}: {value:,.0f} {unit}" for name, value in reversed(values.items())]
    look = {"x_title": unit, "show_legend": False, "value_formatter": lambda v: f"{v:,.0f}"}
    chart = pygal.HorizontalBar(**_options(title, values.values(), **look))
    chart.x_labels = names
    chart.add(unit, [*reversed(values.values())])
    _save(chart, path)


def lines(path: Path, title: str, values: Mapping[str, Mapping[int, float]], x: str, y: str) -> None:
    """Draw one line for each name over whole numbers, which are steps of equal width."""
    every = [value for by in values.values() for value in by.values()]
    chart = pygal.Line(**_options(title, every, x_title=x, y_title=y, value_formatter=lambda v: f"{v:,.0f}"))
    chart.x_labels = [str(number) for number in next(iter(values.values()))]
    for name, by in values.items():
        chart.add(name, [*by.values()])
    _save(chart, path)


def columns(path: Path, title: str, names: Sequence[str], values: Mapping[str, Sequence[float | None]], unit: str) -> None:
    """Draw a group of columns for each of `names`, with one column of each key of `values`; None: it is missing."""
    every = [value for by in values.values() for value in by if value is not None]
    chart = pygal.Bar(**_options(title, every, y_title=unit, value_formatter=lambda v: f"{v:g}"))
    chart.x_labels = names
    for name, by in values.items():
        chart.add(name, by)
    _save(chart, path)


def _time(log_ns: float) -> str:
    unit = min(3, int(log_ns // 3))
    return f"{10 ** (log_ns - 3 * unit):g} {('ns', 'us', 'ms', 's')[unit]}"


def exceedance(path: Path, title: str, sorted_ns: Mapping[str, Sequence[int]]) -> None:
    """Draw, for each name, which part of its samples takes longer than x, on a logarithmic scale too."""
    parts = [1 / max(map(len, sorted_ns.values())), 1.0]
    chart = pygal.XY(
        **_options(title, parts, x_title="time", y_title="part of the samples that takes longer", show_dots=False),
        x_value_formatter=_time,
        value_formatter=lambda v: f"{v:g}",
    )
    longest = max(samples[-1] for samples in sorted_ns.values())
    chart.x_labels = range(1, ceil(log10(longest)) + 1)
    for name, samples in sorted_ns.items():
        count = len(samples)
        left = sorted({max(1, round(count ** (i / _POINTS))) for i in range(_POINTS + 1)}, reverse=True)
        chart.add(name, [(log10(max(1, samples[count - n])), n / count) for n in left])
    _save(chart, path)
