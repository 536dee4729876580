"""Scrapes: all views at one moment of each store, each whole or left out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from pipeline.core import codec
from pipeline.core.exposition import SERIES_MAX, Exposed, choose, newest_final_ms, samples_of, state_exposed
from pipeline.core.grants import Bounds
from pipeline.core.query import MergedDefinition, Query, Selected, merged
from pipeline.errors import NotFound, Unreadable
from pipeline.metrics import NAMES
from pipeline.query.cuts import Cut
from pipeline.query.plans import all_definitions, is_seen
from pipeline.query.ranges import expired_before

ReadWindow = Callable[[Query, MergedDefinition, int, Callable[[Any], Any] | None], Selected]
"""Reads all series, or those of the window that starts then; the last argument makes what is selected of a state."""


def scrape_cut(
    cut: Cut,
    views: Collection[str],
    read: ReadWindow,
    unreadable: Callable[[str, Unreadable], str],
    *,
    windowed: bool,
    series_max: int,
    bounds: Bounds | None = None,
) -> tuple[list[Exposed], dict[str, str]]:
    """Return all views within bounds, or these, and the reason of each that is left out.

    `unreadable` returns the reason for a view that can't be decoded, or raises. Raises `NotFound` for an unknown view.
    """
    found: dict[str, list[codec.DefinitionEntry]] = {}
    broken: dict[str, str] = {}
    for view, entry in all_definitions(cut.snapshots):
        if (views and view not in views) or not is_seen(bounds, view, entry):
            continue
        if isinstance(entry, Unreadable):
            broken[view] = unreadable(view, entry)
        else:
            found.setdefault(view, []).append(entry)
    if unknown := set(views) - found.keys():
        raise NotFound(f"no view {min(unknown)[:100]!r}")
    whole = {view: merged(view, entries) for view, entries in found.items() if view not in broken}
    chosen, omitted = choose(whole, NAMES)
    omitted |= broken
    exposed: list[Exposed] = []
    left = series_max
    for definition in chosen:
        view = definition.view
        window_start_ms = newest_final_ms(definition, cut.final_before_ms)
        if definition.window_s and not (windowed and window_start_ms >= max(expired_before(found[view]).values())):
            continue  # not asked for, or the window is gone, or there is none yet
        room = left // samples_of(definition)
        # Of a view without windows too many series are not read at all, so that the work is bounded, too.
        held = [entry.series_count for entry in found[view] if entry.definition in whole[view].parts]
        if not definition.window_s and max(held) > room and (bounds is None or not bounds.labels):
            omitted[view] = SERIES_MAX
            continue
        try:
            asked, answer = Query(view, limit=room or 1).within(bounds), state_exposed(definition)
            selected = read(asked, whole[view], window_start_ms, answer)
        except Unreadable as error:
            omitted[view] = unreadable(view, error)
            continue
        if selected.series_total > room:
            omitted[view] = SERIES_MAX
            continue
        left -= selected.series_total * samples_of(definition)
        exposed.append(Exposed(definition, selected.labels, selected.values))
    return exposed, dict(sorted(omitted.items()))
