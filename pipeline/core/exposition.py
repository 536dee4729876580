"""Views as Prometheus sees them: which families they make, and which of them can stand side by side.

Names, not text: an adapter writes them down. The names that a family takes up are OpenMetrics', which are more than those
of the older text format, so that a scrape has the same views in both.
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
    """One view, whole: `values[i]` is what the series with the label values `labels[i]` answers."""

    definition: Definition
    labels: Sequence[Labels]
    values: Sequence[Any]


class Exposition(msgspec.Struct, frozen=True):
    """What a scrape shows."""

    views: Sequence[Exposed]
    omitted: Mapping[str, str]
    """Why a view is left out, by its name."""
    staleness_ms: int | None
    """Upper bound on the age of anything that the log had accepted and this lacks; None: unknown."""


def family_name(definition: Definition) -> str:
    """The view's name; of a counter without `_total`, which its samples have."""
    name = definition.view
    return name.removesuffix("_total") or name if definition.monotone else name


def family_names(definition: Definition) -> set[str]:
    """Every name that no other family may have."""
    name = family_name(definition)
    return {name, f"{name}_total", f"{name}_created"} if definition.monotone else {name}


def sample_value(answer: Any) -> int | float | None:
    """An answer as a sample; None for text and null, which are none. Beyond all floats it is infinite, as it is there."""
    if not isinstance(answer, int | float):
        return None
    try:
        float(answer)
    except OverflowError:
        return inf if answer > 0 else -inf
    return answer


def choose(definitions: Mapping[str, Definition]) -> tuple[list[Definition], dict[str, str]]:
    """Of views by name, each with what its definitions are together: those that can be exposed, and why others can't.

    Of two that collide, the first by name stays. What is chosen depends on definitions only, so it does not flicker.
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
