"""Prometheus families of views: their names, and which views can be exposed side by side.

An adapter writes the text. A family takes up the names that OpenMetrics gives to its samples; the older text format has
fewer, so a scrape shows the same views in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf
from typing import Any

import msgspec

from pipeline.core.query import Labels
from pipeline.core.record import Definition

OMITTED = "pipeline_view_omitted"
STALENESS = "pipeline_view_staleness_seconds"

RESERVED_LABEL = "reserved_label"
NAME_COLLISION = "name_collision"
SERIES_MAX = "series_max"
UNREADABLE = "unreadable"


class Exposed(msgspec.Struct, frozen=True):
    """All series of one view: `values[i]` is the answer of the series with the label values `labels[i]`."""

    definition: Definition
    labels: Sequence[Labels]
    values: Sequence[Any]


class Exposition(msgspec.Struct, frozen=True):
    """Content of a scrape."""

    views: Sequence[Exposed]
    omitted: Mapping[str, str]
    """By name of a view, the reason why it is left out."""
    staleness_ms: int | None
    """Upper bound on the age of anything that the log had accepted and this lacks; None: unknown."""


def exposed_as(definition: Definition) -> Definition:
    """Return the definition as it is shown: a sum in windows is a gauge, because it is that of one window."""
    return msgspec.structs.replace(definition, monotone=False) if definition.window_s else definition


def newest_final_ms(definition: Definition, final_before_ms: int) -> int:
    """Return the start of the newest window that is final, -1 if there is none; 0 for a definition without windows."""
    if not definition.window_s:
        return 0
    window_ms = definition.window_s * 1_000
    return (final_before_ms // window_ms - 1) * window_ms if final_before_ms >= window_ms else -1


def family_name(definition: Definition) -> str:
    """Return the view's name; for a counter without `_total`, which only the samples have."""
    name = definition.view
    return name.removesuffix("_total") or name if definition.monotone else name


def family_names(definition: Definition) -> set[str]:
    """Return every name that no other family may have."""
    name = family_name(definition)
    return {name, f"{name}_total", f"{name}_created"} if definition.monotone else {name}


def sample_value(answer: Any) -> int | float | None:
    """Return an answer as a sample's value; None for text and null. An int beyond all floats becomes infinite."""
    if not isinstance(answer, int | float):
        return None
    try:
        float(answer)
    except OverflowError:
        return inf if answer > 0 else -inf
    return answer


def choose(definitions: Mapping[str, Definition]) -> tuple[list[Definition], dict[str, str]]:
    """Return the merged definitions that can be exposed, and by name of each other view why it can't be.

    Of two views that collide, the first by name stays. The choice depends on definitions only, so it does not flicker.
    """
    chosen: list[Definition] = []
    omitted: dict[str, str] = {}
    taken = {OMITTED, STALENESS}
    for view, definition in sorted(definitions.items()):
        names = family_names(definition)
        if any(label.startswith("__") for label in definition.labels):
            omitted[view] = RESERVED_LABEL
        elif taken & names:
            omitted[view] = NAME_COLLISION
        else:
            taken |= names
            chosen.append(definition)
    return chosen, omitted
