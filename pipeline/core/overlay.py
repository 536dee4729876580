"""Overlay of a task: what is folded and not committed. The prefix of its series' keys identifies a definition."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

from pipeline.core import codec
from pipeline.core.groups import PackedGroup, rows_of
from pipeline.core.kinds import KINDS, Kind, State
from pipeline.core.record import RUN_ENTRIES_MAX, Definition, Group, runs
from pipeline.core.sequence import Folded


class Known:
    """A definition of a partition, the number of its committed series, and its expiry: see `core.expiry`."""

    __slots__ = ("defined_at_ms", "definition", "expired_before_ms", "round_ms", "series_count", "swept")

    def __init__(self, definition: Definition, series_count: int, defined_at_ms: int, expired_before_ms: int = 0) -> None:
        self.definition = definition
        self.series_count = series_count
        self.defined_at_ms = defined_at_ms
        self.expired_before_ms = expired_before_ms
        self.swept = b""
        """Key from which the next sweep looks for expired entries; empty: from the first key on."""
        self.round_ms = 0
        """Watermark at which the present sweep over series without windows began."""

    def copy(self) -> Known:
        """Return the same for an entry."""
        return Known(self.definition, self.series_count, self.defined_at_ms, self.expired_before_ms)


class Definitions:
    """Definitions of a partition by the prefix of their series' keys, uncommitted ones included."""

    def __init__(self) -> None:
        self._all: dict[bytes, Known] = {}
        self.expiring: dict[bytes, Known] = {}
        """Definitions that have a retention."""
        self._views: dict[str, dict[bytes, Known]] = {}

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, prefix: bytes) -> Known:
        return self._all[prefix]

    def get(self, prefix: bytes) -> Known | None:
        """Return the definition whose series' keys start with a prefix; None if there is none."""
        return self._all.get(prefix)

    def of(self, view: str) -> list[tuple[bytes, Known]]:
        """Return all definitions of a view, each with its prefix."""
        return [*self._views.get(view, {}).items()]

    def add(self, prefix: bytes, known: Known) -> None:
        """Add a committed definition."""
        self._all[prefix] = self._views.setdefault(known.definition.view, {})[prefix] = known
        if known.definition.retention_s:
            self.expiring[prefix] = known

    def define(self, prefix: bytes, definition: Definition, log_ms: int) -> Known:
        """Add a new definition as defined now, and in any case later than all that the view has; return it."""
        latest_ms = max((it.defined_at_ms for _, it in self.of(definition.view)), default=-1)
        known = Known(definition, 0, max(log_ms, latest_ms + 1))
        self.add(prefix, known)
        return known

    def drop(self, prefix: bytes) -> None:
        """Forget a definition."""
        view = self._all.pop(prefix).definition.view
        self.expiring.pop(prefix, None)
        del self._views[view][prefix]
        if not self._views[view]:
            del self._views[view]


class Overlay:
    """Folded and not yet committed changes."""

    def __init__(self, native: Any = None) -> None:
        self._native = native
        self.states: dict[bytes, dict[bytes, State] | Any] = {}
        """Folded states by prefix and suffix: in a dict, or in a `Folded` of the native core."""
        self.producers: dict[str, Folded | None] = {}
        """Producers by id; None: forgotten."""
        self.defined: set[bytes] = set()
        """Prefixes of new definitions."""
        self.moved: set[bytes] = set()
        """Prefixes of definitions whose watermark has risen: the commit must record it."""
        self.cleared: set[bytes] = set()
        """Prefixes of definitions that were dropped or reset: only series in `states` are left of them."""
        self.cleared_count = 0
        """Number of committed series that these definitions had."""
        self.letters: dict[bytes, codec.DeadLetter | None] = {}
        """Dead letters by key; None: what the letter holds has been folded."""
        self.bytes_total = 0
        self.next_offset = 0
        self.source_at_ms = 0
        self.touched_ms = 0
        """Latest time by any clock at which a record was folded: its series are silent from then on."""

    def entry_count(self) -> int:
        """Return about how many entries, tombstones and dead letters a commit of this overlay has."""
        return sum(map(len, self.states.values())) + self.cleared_count + len(self.producers) + len(self.letters)

    def plain_states(self, prefix: bytes) -> dict[bytes, State]:
        """Return the states of a definition that Python has."""
        states = self.states.get(prefix)
        return states if isinstance(states, dict) else {}

    def merge(self, prefix: bytes, group: Group | PackedGroup) -> None:
        """Merge the states of a group. What the native core can't take makes all states of its definition plain."""
        states = self.states.get(prefix)
        if states is None:
            states = None if self._native is None else self._native.Folded.of(group.definition.kind)
            states = self.states[prefix] = {} if states is None else states
        if not isinstance(states, dict):
            if (rows := rows_of(self._native, group)) is not None:
                states.fold(rows)
                return
            states = self.states[prefix] = states.states()
        kind = KINDS[group.definition.kind]
        if len(group.suffixes) <= RUN_ENTRIES_MAX:
            _merge_into(states, kind, group.suffixes, group.states)
            return
        for suffixes, new in zip(runs(group.suffixes), runs(group.states), strict=True):
            _merge_into(states, kind, suffixes, new)


def _merge_into(states: dict[bytes, State], kind: Kind, suffixes: list[bytes], new_states: list[State]) -> None:
    new = dict(zip(suffixes, new_states, strict=True))
    if len(new) == len(suffixes):
        known = states.keys() & new
        if not known:
            states.update(new)
            return
        if len(known) == len(new):
            states.update(zip(suffixes, kind.merge_all([*map(states.__getitem__, suffixes)], new_states), strict=True))
            return
    merge, get = kind.merge, states.get
    for suffix, state in zip(suffixes, new_states, strict=True):
        old = get(suffix)
        states[suffix] = state if old is None else merge(old, state)


class Producers:
    """Committed entries of producers, cached in two generations as in `Cache`."""

    def __init__(self, producers_max: int) -> None:
        self._half = producers_max // 2
        self._young: dict[str, Folded] = {}
        self._old: dict[str, Folded] = {}

    def __contains__(self, producer_id: object) -> bool:
        return producer_id in self._young or producer_id in self._old

    def __getitem__(self, producer_id: str) -> Folded:
        if producer_id not in self._young:
            self.keep(producer_id, self._old[producer_id])
        return self._young[producer_id]

    def keep(self, producer_id: str, folded: Folded | None) -> None:
        """Keep the committed entry of a producer; None: the producer is forgotten."""
        if folded is None:
            self._young.pop(producer_id, None)
            self._old.pop(producer_id, None)
            return
        if len(self._young) >= self._half:
            self._old, self._young = self._young, {}
        self._young[producer_id] = folded  # also where there is room for none: until the next one is kept


def gone_keys(existing: Sequence[bytes], series: Iterable[bytes], cleared: Collection[bytes]) -> list[bytes]:
    """Return the existing keys, which begin with prefixes in `cleared`, that are no series of a commit.

    The work is done in runs, in the order of keys, because there can be a million of them.
    """
    prefixes = tuple(cleared)
    kept = {key for key in series if key.startswith(prefixes)} if existing else set[bytes]()
    if not kept:
        return [*existing]
    gone: list[bytes] = []
    for run in runs(existing):
        gone += [key for key in run if key not in kept]
    return gone
