"""Prometheus families of views: their names, and which views can be exposed side by side.

An adapter writes the text. A family takes up the names that OpenMetrics gives to its samples; the older text format has
fewer, so a scrape shows the same views in both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf, isfinite, nextafter
from typing import Any

import msgspec

from pipeline.core.kinds import State
from pipeline.core.kinds.histogram import bound_of, coarser, count_of
from pipeline.core.query import Labels, MergedDefinition
from pipeline.core.record import Definition

OMITTED = "pipeline_view_omitted"
OMITTED_HELP = "Views that are left out of this scrape, and why."
STALENESS = "pipeline_view_staleness_seconds"
STALENESS_HELP = "Upper bound on the age of anything accepted but not in this scrape."

RESERVED_LABEL = "reserved_label"
RESERVED_NAME = "reserved_name"
NAME_COLLISION = "name_collision"
SERIES_MAX = "series_max"
UNREADABLE = "unreadable"

OF_PROMETHEUS = frozenset(
    {
        "ALERTS",
        "ALERTS_FOR_STATE",
        "scrape_body_size_bytes",
        "scrape_duration_seconds",
        "scrape_sample_limit",
        "scrape_samples_post_metric_relabeling",
        "scrape_samples_scraped",
        "scrape_series_added",
        "scrape_timeout_seconds",
        "up",
    }
)
"""Names of series that Prometheus makes itself, of each target that it scrapes and of its alerts."""

BOUNDS_MAX = 30
"""Most buckets of a histogram in a scrape, beside that of all observations."""
BOUNDS_LEAST = 10
"""Least upper limit of the bounds of `ClassicBuckets`: with the coarsest schema there are fewer."""


class Exposed(msgspec.Struct, frozen=True):
    """All series of one view: `values[i]` is the answer, of a histogram the state, of the series with `labels[i]`."""

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

    @property
    def staleness_s(self) -> float:
        """Staleness in seconds; infinity if it is unknown."""
        return inf if self.staleness_ms is None else self.staleness_ms / 1_000


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
    if definition.kind == "histogram":
        return {name, *(f"{name}_{suffix}" for suffix in ("bucket", "count", "sum", "created", "gcount", "gsum"))}
    return {name, f"{name}_total", f"{name}_created"} if definition.monotone else {name}


def about(definition: Definition) -> str:
    """Return the help text of a view."""
    window = f", in windows of {definition.window_s} s: the newest that is final" if definition.window_s else ""
    return f"View of kind {definition.kind}{', monotone' * definition.monotone}{window}."


def sample_value(answer: Any) -> int | float | None:
    """Return an answer as a sample's value; None for text and null. An int beyond all floats becomes infinite."""
    if not isinstance(answer, int | float):
        return None
    try:
        float(answer)
    except OverflowError:
        return inf if answer > 0 else -inf
    return answer


def state_exposed(definition: Definition) -> Callable[[State], State] | None:
    """Return what makes of a state the value of an `Exposed`; None: the answer of its kind."""
    return (lambda state: state) if definition.kind == "histogram" else None


class ClassicBuckets:
    """Bounds that are the same for all histograms of a view, and how many observations each histogram has up to them.

    A bound is a power of the base of `schema`, and one of the histograms' own, so that what is counted up to it is exact. Of
    numbers below zero it is the float below such a power, because their buckets hold the bound that is nearer to zero only
    on one side.
    """

    def __init__(self, states: Sequence[State], *, bounds_max: int = BOUNDS_MAX, schema_max: int = 0) -> None:
        """`bounds_max` is at least `BOUNDS_LEAST`; with a `schema_max` of 0, bounds are powers of two."""
        self.schema = min([schema_max, *(state[3] for state in states)])
        spans = [_span(states, place, self.schema) for place in (6, 5)]
        zeros = any(state[4] for state in states)
        while sum([last - first + 2 for first, last in spans if first <= last]) + zeros > bounds_max:
            self.schema -= 1
            spans = [(first >> 1, last >> 1) for first, last in spans]
        self._negative, self._positive = [range(first, last + 2) if first <= last else range(0) for first, last in spans]
        below = [nextafter(-bound, -inf) for bound in self._finite(self._negative)]
        self.bounds: list[float] = [*reversed(below), *[0.0] * zeros, *self._finite(self._positive)]
        """Upper bounds, in order; the last one, infinity, is left out."""
        self._zeros = zeros

    def _finite(self, powers: range) -> list[float]:
        return [bound for power in powers if isfinite(bound := bound_of(power, self.schema))]

    def counts(self, state: State) -> list[int]:
        """Return the number of observations up to each bound, and of all."""
        by = state[3] - self.schema
        positive, negative = coarser(state[5], by), coarser(state[6], by)
        found: list[int] = []
        count = 0
        for power in reversed(self._negative):
            count += negative.get(power, 0)
            found.append(count)
        if self._negative and not isfinite(bound_of(self._negative[-1], self.schema)):
            del found[0]
        if self._zeros:
            found.append(count + state[4])
        count += state[4]
        for power in self._positive:
            count += positive.get(power - 1, 0)
            found.append(count)
        if self._positive and not isfinite(bound_of(self._positive[-1], self.schema)):
            del found[-1]
        return [*found, count_of(state)]


def bound_text(bound: float) -> str:
    """Return a bound as the label `le` has it: as Go writes floats."""
    text = repr(bound)
    dot = text.find(".")
    if bound == inf:
        return "+Inf"
    if bound > 0 and dot > 6:  # Go uses exponents sooner than Python
        digits = f"{text[0]}.{text[1:dot]}{text[dot + 1 :]}".rstrip("0.")
        return f"{digits}e+{dot - 1:02}"
    return text


def _span(states: Sequence[State], place: int, schema: int) -> tuple[int, int]:
    """Return the first and the last bucket that a state has, with a schema; the first is the later one if there is none."""
    there = [state for state in states if state[place]]
    firsts = [min(state[place]) >> state[3] - schema for state in there]
    lasts = [max(state[place]) >> state[3] - schema for state in there]
    return (min(firsts), max(lasts)) if there else (1, 0)


def samples_of(definition: Definition) -> int:
    """Return the most samples that a series of a definition has in a scrape."""
    return BOUNDS_MAX + 3 if definition.kind == "histogram" else 1


def choose(whole: Mapping[str, MergedDefinition], own: Collection[str] = ()) -> tuple[list[Definition], dict[str, str]]:
    """Return the definitions that can be exposed, as they are shown, and by name of each other view why it can't be.

    Alerts would take a view with a name of Prometheus' own, or of the program's metrics `own`, for these. Of two views that
    collide, the one that was defined first stays, so that nobody can disturb a view that exists. The choice depends on
    definitions only, so it does not flicker.
    """
    chosen: list[Definition] = []
    omitted: dict[str, str] = {}
    taken = {OMITTED, STALENESS}
    reserved_names = OF_PROMETHEUS.union(own)
    for view in sorted(whole, key=lambda it: (whole[it].defined_at_ms, it)):
        definition = exposed_as(whole[view].definition)
        names = family_names(definition)
        reserved = definition.kind == "histogram" and "le" in definition.labels
        if reserved or any(label.startswith("__") for label in definition.labels):
            omitted[view] = RESERVED_LABEL
        elif names & reserved_names:
            omitted[view] = RESERVED_NAME
        elif taken & names:
            omitted[view] = NAME_COLLISION
        else:
            taken |= names
            chosen.append(definition)
    return sorted(chosen, key=lambda it: it.view), omitted
