"""Overlay of a task: what is folded and not committed, and how it becomes new absolute states of series.

The prefix of its series' keys identifies a definition. `Changes` is a frozen overlay on its way into a commit: it names the
committed values that it needs, and merges them with what was folded.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from pipeline.core import codec
from pipeline.core.kinds import KINDS, Kind, State
from pipeline.core.record import RUN_ENTRIES_MAX, Definition, Group, overflow_suffix, runs
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord, StoreCorrupt


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

    def __init__(self) -> None:
        self.states: dict[bytes, dict[bytes, State]] = {}
        """Folded states by prefix and suffix."""
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

    def merge(self, prefix: bytes, group: Group) -> None:
        """Merge the states of a group."""
        states = self.states.setdefault(prefix, {})
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


class Cache:
    """Committed states in two generations: when the young one reaches half a limit, it becomes the old one."""

    def __init__(self, entries_max: int, bytes_max: int) -> None:
        self._entries_half = entries_max // 2
        self._bytes_half = bytes_max // 2
        self._young: dict[bytes, dict[bytes, State]] = {}
        self._old: dict[bytes, dict[bytes, State]] = {}
        self._young_count = 0
        self._young_bytes = 0

    def of(self, prefix: bytes) -> tuple[Mapping[bytes, State], Mapping[bytes, State]]:
        """Return a definition's states by suffix, young and old ones; where a suffix is in both, the young state counts."""
        return self._young.get(prefix, {}), self._old.get(prefix, {})

    def states(self, prefix: bytes, suffixes: list[bytes]) -> list[State | None]:
        """Return one state for each suffix, None where it is not cached."""
        young, old = self.of(prefix)
        states = [*map(young.get, suffixes)]
        missing = states.count(None) if old else 0
        if missing == len(states):
            return [*map(old.get, suffixes)]
        return (
            [old.get(s) if state is None else state for s, state in zip(suffixes, states, strict=True)]
            if missing
            else states
        )

    def update(self, merged: MergedRun) -> None:
        """Keep states that were just committed."""
        young = self._young.setdefault(merged.prefix, {})
        self._young_count -= len(young)
        young.update(zip(merged.suffixes, merged.states, strict=True))
        self._young_count += len(young)
        self._young_bytes += merged.bytes_total  # an updated state counts again: the bound holds, a little early
        if self._young_count > self._entries_half or self._young_bytes > self._bytes_half:
            self._old, self._young = self._young, {}
            self._young_count = self._young_bytes = 0

    def clear(self, prefix: bytes) -> None:
        """Forget a definition's states."""
        self._young_count -= len(self._young.pop(prefix, ()))
        self._old.pop(prefix, None)


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


_EXPIRED = object()
"""Stands for the committed state of a series that has expired: it is there, and nothing is merged with it."""


class _KeyRun(NamedTuple):
    """Changes of one definition's series, by column, in the order of keys, so that lookup and write are cheap."""

    prefix: bytes
    suffixes: list[bytes]
    keys: list[bytes]
    cached: list[State | None]
    """Committed states that are cached, None elsewhere."""
    asked: bool
    """True if the store has to be asked for the others; False if there are none."""


class MergedRun(NamedTuple):
    """New absolute states of a run."""

    prefix: bytes
    suffixes: list[bytes]
    states: list[State]
    bytes_total: int


class Changes:
    """The states of a frozen overlay on their way into a commit.

    New series of a definition beyond `series_max` merge into the series whose labels are all `__overflow__`, one a window.
    `known` has each definition of the overlay, as it was when the overlay was frozen.
    """

    def __init__(
        self,
        partition: int,
        overlay: Overlay,
        known: Mapping[bytes, Known],
        cache: Cache,
        *,
        series_max: int,
        silent_ms: Mapping[bytes, int],
    ) -> None:
        """`silent_ms` has the prefix of each definition whose series expire when they are silent, with the watermark that
        the commit before has recorded: what had expired by then begins anew.
        """
        self._partition = partition
        self._known = known
        self._silent_ms = silent_ms
        self._touched_ms = overlay.touched_ms
        self._series_max = series_max
        self._overflow: dict[bytes, dict[bytes, State | None]] = {}
        """Overflow series of definitions that may need one, by prefix and suffix, with the state to be merged into it."""
        self._runs: list[_KeyRun] = []
        self._states = overlay.states
        self.keys: list[bytes] = []
        """Keys of series whose committed values `merge` needs."""
        self.merged: list[MergedRun] = []
        self.new_counts: dict[bytes, int] = {}
        """Number of new series by prefix."""
        self.overflow_count = 0
        """Number of entries that were merged into an overflow series."""
        for prefix, states in sorted(overlay.states.items()):
            asked = prefix not in overlay.cleared
            self._set_overflow_apart(prefix, states)
            for suffixes in _in_order(states):
                cached: list[State | None] = cache.states(prefix, suffixes) if asked else [None] * len(suffixes)
                run = _KeyRun(prefix, suffixes, [prefix + suffix for suffix in suffixes], cached, asked)
                self._runs.append(run)
                if not asked:
                    continue
                if cached.count(None) == len(cached):
                    self.keys += run.keys
                else:
                    self.keys += [key for key, state in zip(run.keys, cached, strict=True) if state is None]
        self._asked_overflow = [
            (prefix, suffix) for prefix, found in self._overflow.items() if prefix not in overlay.cleared for suffix in found
        ]
        self.keys += [prefix + suffix for prefix, suffix in self._asked_overflow]

    def _set_overflow_apart(self, prefix: bytes, states: dict[bytes, State]) -> None:
        known = self._known[prefix]
        if known.series_count + len(states) <= self._series_max or not known.definition.labels:
            return
        window_starts = sorted({suffix[:8] for suffix in states})
        suffixes = [overflow_suffix(known.definition, start) for start in window_starts]
        self._overflow[prefix] = {suffix: states.pop(suffix, None) for suffix in suffixes}

    def touches(self, prefix: bytes, suffix: bytes) -> bool:
        """Return whether the commit may write this series."""
        return suffix in self._states.get(prefix, ()) or suffix in self._overflow.get(prefix, ())

    def merge(self, values: Sequence[bytes | None]) -> tuple[list[bytes], list[bytes | None]]:
        """Return keys and values of a commit's series, given the committed values of `keys` in their order."""
        if len(values) != len(self.keys):
            raise ValueError(f"{len(values)} values for {len(self.keys)} keys")
        keys: list[bytes] = []
        out: list[bytes | None] = []
        start = 0
        for run in self._runs:
            end = start + (run.cached.count(None) if run.asked else 0)
            suffixes, states = self._merge_run(run, values[start:end])
            start = end
            whole = len(suffixes) == len(run.suffixes)
            keys += run.keys if whole else [run.prefix + suffix for suffix in suffixes]
            out += self._encode(run.prefix, suffixes, states)
        stored = dict(zip(self._asked_overflow, values[start:], strict=True))
        for prefix, found in self._overflow.items():
            for suffix, state in found.items():
                if state is not None:
                    keys.append(prefix + suffix)
                    out += self._encode(prefix, [suffix], [self._overflowed(prefix, state, stored.get((prefix, suffix)))])
        return keys, out

    def _encode(self, prefix: bytes, suffixes: list[bytes], states: list[State]) -> list[bytes]:
        definition = self._known[prefix].definition
        kind = KINDS[definition.kind]
        if prefix in self._silent_ms:  # not cached: the cache does not know when a state expires
            return codec.encode_states(kind, states, self._touched_ms + definition.retention_s * 1_000)
        encoded = codec.encode_states(kind, states)
        self.merged.append(MergedRun(prefix, suffixes, states, sum(map(len, encoded)) + sum(map(len, suffixes))))
        return encoded

    def _merge_run(self, run: _KeyRun, found: Sequence[bytes | None]) -> tuple[list[bytes], list[State]]:
        """Return suffixes of a run and their new absolute states; `found` are the stored values of states not cached."""
        prefix, suffixes, committed = run.prefix, run.suffixes, run.cached
        states = [*map(self._states[prefix].__getitem__, suffixes)]
        stored = [value for value in found if value is not None]
        new_count = len(found) - len(stored) if run.asked else len(states)
        known = iter(self._decode(prefix, stored))
        if stored:
            looked_up = iter([None if value is None else next(known) for value in found])
            committed = [next(looked_up) if state is None else state for state in committed]
        room = self._room(prefix)
        if new_count > room:
            suffixes, committed, states = self._take_excess(run, committed, states, room)
            new_count = room
        if new_count:
            self.new_counts[prefix] = self.new_counts.get(prefix, 0) + new_count
        if new_count == len(states):
            return suffixes, states  # all of them are new
        kind, silent = KINDS[self._known[prefix].definition.kind], prefix in self._silent_ms
        if not new_count and not silent:
            return suffixes, kind.merge_all(committed, states)
        if silent:
            committed = [None if old is _EXPIRED else old for old in committed]
        merge = kind.merge
        return suffixes, [new if old is None else merge(old, new) for old, new in zip(committed, states, strict=True)]

    def _decode(self, prefix: bytes, values: Sequence[bytes]) -> list[State]:
        definition = self._known[prefix].definition
        try:
            states = codec.decode_states(KINDS[definition.kind], values)
        except BadRecord as error:
            raise StoreCorrupt(f"partition {self._partition}, view {definition.view}: {error}") from None
        if not (silent_ms := self._silent_ms.get(prefix)):
            return states
        expired = [0 < codec.expires_at_ms(value) <= silent_ms for value in values]
        return [_EXPIRED if gone else state for gone, state in zip(expired, states, strict=True)]

    def _room(self, prefix: bytes) -> int:
        """Return for how many new series of a definition there is room."""
        if prefix not in self._overflow:
            return len(self._states[prefix])
        return max(0, self._series_max - self._known[prefix].series_count - self.new_counts.get(prefix, 0))

    def _take_excess(
        self, run: _KeyRun, committed: Sequence[State | None], states: list[State], room: int
    ) -> tuple[list[bytes], list[State | None], list[State]]:
        """Return the run without the new series that have no room, whose states go to the overflow series."""
        overflow = self._overflow[run.prefix]
        by_window = {suffix[:8]: suffix for suffix in overflow}
        merge = KINDS[self._known[run.prefix].definition.kind].merge
        kept: list[tuple[bytes, State | None, State]] = []
        for suffix, old, state in zip(run.suffixes, committed, states, strict=True):
            room -= old is None
            if old is not None or room >= 0:
                kept.append((suffix, old, state))
                continue
            into = by_window[suffix[:8]]
            waiting = overflow[into]
            overflow[into] = state if waiting is None else merge(waiting, state)
            self.overflow_count += 1
        return [row[0] for row in kept], [row[1] for row in kept], [row[2] for row in kept]

    def _overflowed(self, prefix: bytes, state: State, stored: bytes | None) -> State:
        if stored is None:
            self.new_counts[prefix] = self.new_counts.get(prefix, 0) + 1
            return state
        (old,) = self._decode(prefix, [stored])
        return state if old is _EXPIRED else KINDS[self._known[prefix].definition.kind].merge(old, state)


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


def _in_order(suffixes: Collection[bytes]) -> Iterable[list[bytes]]:
    """Yield all suffixes in order, in runs: the store writes ordered entries five times as fast."""
    if len(suffixes) <= RUN_ENTRIES_MAX:
        return (sorted(suffixes),)
    sample = sorted(islice(suffixes, 0, None, _SAMPLED))
    bounds = sample[:: RUN_ENTRIES_MAX // 2 // _SAMPLED][1:]  # half a run, so that one that is twice as large is one still
    found: list[list[bytes]] = [[] for _ in range(len(bounds) + 1)]
    for suffix in suffixes:
        found[bisect(bounds, suffix)].append(suffix)
    return map(sorted, found)


_SAMPLED = 100
"""One suffix of so many is sampled to find out how all of them are spread."""
