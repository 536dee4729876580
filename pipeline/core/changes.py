"""Changes of a commit: how folded states become new absolute states of series, and the cache of committed ones.

`Changes` is a frozen overlay on its way into a commit: it names the committed values that it needs, and merges them with
what was folded. Where the native core has the states of a definition, it puts them in order, merges and encodes them; what
it finds unusual or wrong is left to Python, which then says what is wrong.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from pipeline.core import codec
from pipeline.core.kinds import KINDS, State
from pipeline.core.overlay import Known, Overlay
from pipeline.core.record import RUN_ENTRIES_MAX, overflow_suffix
from pipeline.errors import BadRecord, StoreCorrupt

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


class FoldedRun(NamedTuple):
    """Changes of one definition's series, which the native core has, merges and encodes."""

    prefix: bytes
    states: Any
    asked_count: int
    """Number of states for which the store has to be asked."""
    cacheable: bool


class MergedRun(NamedTuple):
    """New absolute states of a run."""

    prefix: bytes
    suffixes: list[bytes]
    states: list[State]
    bytes_total: int


class Cache:
    """Committed states in two generations: when the young one reaches half a limit, it becomes the old one."""

    def __init__(self, entries_max: int, bytes_max: int, native: Any = None) -> None:
        self.native: Any = None if native is None else native.Committed(entries_max, bytes_max)
        """Committed states that the native core keeps, of definitions whose states it has; None without it."""
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

    def update(self, merged: MergedRun | FoldedRun) -> None:
        """Keep states that were just committed."""
        if isinstance(merged, FoldedRun):
            self.clear(merged.prefix)
            self.native.keep(merged.prefix, merged.states, merged.cacheable)
            return
        young = self._young.setdefault(merged.prefix, {})
        self._young_count -= len(young)
        young.update(zip(merged.suffixes, merged.states, strict=True))
        self._young_count += len(young)
        self._young_bytes += merged.bytes_total  # an updated state counts again: the bound holds, a little early
        if self._young_count > self._entries_half or self._young_bytes > self._bytes_half:
            self._old, self._young = self._young, {}
            self._young_count = self._young_bytes = 0

    def clear(self, prefix: bytes) -> None:
        """Forget those states of a definition that Python has."""
        self._young_count -= len(self._young.pop(prefix, ()))
        self._old.pop(prefix, None)

    def begin(self, prefix: bytes) -> None:
        """Forget a definition's states. From now on those of coming commits are all that there are."""
        self.clear(prefix)
        if self.native is not None:
            self.native.begin(prefix)

    def forget(self, prefix: bytes) -> None:
        """Forget all about a definition."""
        self.clear(prefix)
        if self.native is not None:
            self.native.forget(prefix)


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
        self._runs: list[_KeyRun | FoldedRun] = []
        self._states = overlay.states
        self._cache = cache
        self.keys: list[bytes] = []
        """Keys of series whose committed values `merge` needs."""
        self.merged: list[MergedRun | FoldedRun] = []
        self.new_counts: dict[bytes, int] = {}
        """Number of new series by prefix."""
        self.overflow_count = 0
        """Number of entries that were merged into an overflow series."""
        for prefix, states in sorted(overlay.states.items()):
            asked = prefix not in overlay.cleared
            if not isinstance(states, dict):
                if not self._may_overflow(prefix):
                    self._add_folded(prefix, states, asked=asked)
                    continue
                states = self._states[prefix] = states.states()
            if cache.native is not None:
                cache.native.forget(prefix)  # nobody tells it what the commit adds
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

    def _may_overflow(self, prefix: bytes) -> bool:
        known = self._known[prefix]
        return known.series_count + len(self._states[prefix]) > self._series_max and bool(known.definition.labels)

    def _add_folded(self, prefix: bytes, states: Any, *, asked: bool) -> None:
        asked_count = states.freeze(prefix, self._cache.native if asked else None)
        self._runs.append(FoldedRun(prefix, states, asked_count, prefix not in self._silent_ms))
        for start in range(0, len(states) if asked_count else 0, RUN_ENTRIES_MAX):
            self.keys += states.keys(prefix, start, start + RUN_ENTRIES_MAX, True)

    def _set_overflow_apart(self, prefix: bytes, states: dict[bytes, State]) -> None:
        if not self._may_overflow(prefix):
            return
        window_starts = sorted({suffix[:8] for suffix in states})
        suffixes = [overflow_suffix(self._known[prefix].definition, start) for start in window_starts]
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
            if isinstance(run, FoldedRun):
                asked, start = values[start : start + run.asked_count], start + run.asked_count
                if self._merge_folded(run, asked, keys, out):
                    continue
                run, asked = self._plain_run(run, asked)
            else:
                end = start + (run.cached.count(None) if run.asked else 0)
                asked, start = values[start:end], end
            suffixes, states = self._merge_run(run, asked)
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

    def _merge_folded(
        self, run: FoldedRun, found: Sequence[bytes | None], keys: list[bytes], out: list[bytes | None]
    ) -> bool:
        """Merge a run and append its keys and values; return False if the native core has done nothing."""
        prefix, definition, silent_ms = run.prefix, self._known[run.prefix].definition, self._silent_ms.get(run.prefix)
        expires_at_ms = 0 if silent_ms is None else self._touched_ms + definition.retention_s * 1_000
        head, own = codec.entry_heads(KINDS[definition.kind], expires_at_ms)
        new_count: int | None = run.states.merge(found, head, own, silent_ms or 0)
        if new_count is None:
            return False
        if new_count:
            self.new_counts[prefix] = self.new_counts.get(prefix, 0) + new_count
        for start in range(0, len(run.states), RUN_ENTRIES_MAX):
            keys += run.states.keys(prefix, start, start + RUN_ENTRIES_MAX, False)
            out += run.states.values(start, start + RUN_ENTRIES_MAX)
        self.merged.append(run)
        return True

    def _plain_run(self, run: FoldedRun, found: Sequence[bytes | None]) -> tuple[_KeyRun, list[bytes | None]]:
        """Return a run as Python merges it, and the stored value of each state that is not cached."""
        prefix = run.prefix
        self._cache.native.forget(prefix)
        states = self._states[prefix] = run.states.states()
        suffixes, cached, looked_up = sorted(states), run.states.cached(), iter(found)
        stored = [
            next(looked_up) if asked else None
            for asked, state in zip(run.states.asked(), cached, strict=True)
            if state is None
        ]
        return _KeyRun(prefix, suffixes, [prefix + suffix for suffix in suffixes], cached, asked=True), stored

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
