"""Expiry in one partition: which windows and silent series have expired, and where their entries may still be.

Each definition with a retention has a watermark (`Known.expired_before_ms`), which only rises, and is committed together
with what relies on it. From that commit on answers leave out what is below it, and deltas of such windows are refused.
The entries go later, in bounded work a commit: a *sweep* is a range of keys in which the next commit looks for them. After
a crash every range is looked at again from its beginning, so nothing but the watermark has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from pipeline.core import codec
from pipeline.core.changes import Changes
from pipeline.core.groups import PackedGroup
from pipeline.core.kinds import KINDS
from pipeline.core.overlay import Definitions, Known, Overlay
from pipeline.core.record import Definition, Group, expired_before_ms, prefix_end, window_bytes
from pipeline.errors import BadRecord, StoreCorrupt

SWEEPS_MAX = 100
"""Number of definitions in which one commit looks for expired entries: each takes a seek in the store."""

Entry = tuple[bytes, bytes]


class Sweep(NamedTuple):
    """A range of keys in which to look for expired entries of a definition."""

    prefix: bytes
    start: bytes
    end: bytes
    windowed: bool
    expired_before_ms: int


def late_suffixes(suffixes: Sequence[bytes], expired_before_ms: int) -> list[bytes]:
    """Return the suffixes of windows that start before a watermark."""
    oldest = window_bytes(expired_before_ms)
    return [suffix for suffix in suffixes if suffix[:8] < oldest] if expired_before_ms and min(suffixes) < oldest else []


def split_late(group: Group, known: Known) -> tuple[Group | None, Group | None]:
    """Return the part of a group that can be folded, and the part whose windows have expired; None: it is empty."""
    if isinstance(group, PackedGroup) and group.rows.earliest_ms >= known.expired_before_ms:
        return group, None
    late = {*late_suffixes(group.suffixes, known.expired_before_ms)}
    if not late:
        return group, None
    if len(late) == len({*group.suffixes}):
        return None, group
    rows = [*zip(group.suffixes, group.states, strict=True)]
    parts = [[row for row in rows if (row[0] in late) is is_late] for is_late in (False, True)]
    kept, refused = (Group(group.definition, [row[0] for row in part], [row[1] for row in part]) for part in parts)
    return kept, refused


def late_reason(late: Group, whole: Group, known: Known) -> str:
    """Return why series of a group are refused. All reasons of this kind begin with `expired`."""
    count = f"{len(late.suffixes)} of {len(whole.suffixes)} series"
    return (
        f"expired: {count} are of windows that start before {known.expired_before_ms}; windows of this view are kept for "
        f"{whole.definition.retention_s} s after their end (retention_s)"
    )


class Expiry:
    """Moves the watermarks of a partition's definitions, and plans the sweeps of its commits."""

    def __init__(self, definitions: Definitions) -> None:
        self._definitions = definitions
        self._due: dict[bytes, None] = {}
        """Prefixes of definitions that may have expired entries, the next to be swept first."""
        self._moved_s = -1
        """Second of the last time to which all watermarks were moved; they are whole seconds."""
        self._sweeps: list[Sweep] = []
        """Sweeps of the commit that is under way."""
        self._next: dict[bytes, bytes] = {}
        """By prefix, where the sweep goes on after that commit; empty: the sweep was finished."""
        self.gone: dict[bytes, int] = {}
        """By prefix, how many expired entries the commit under way deletes."""

    @property
    def due(self) -> bool:
        """True if there may be expired entries that no commit has deleted."""
        return bool(self._due)

    def restored(self) -> None:
        """Look for entries that earlier owners have left."""
        for prefix, known in self._definitions.expiring.items():
            if known.expired_before_ms and known.series_count:
                self._due[prefix] = None

    def move(self, prefix: bytes, known: Known, time_ms: int) -> bool:
        """Raise a definition's watermark to what it is at a time; return whether it has risen."""
        before_ms = expired_before_ms(known.definition, time_ms)
        if before_ms <= known.expired_before_ms:
            return False
        known.expired_before_ms = before_ms
        self._due[prefix] = None
        return True

    def forget(self, prefix: bytes) -> None:
        """Look no more for entries of a definition that was dropped or reset: the commit of that deletes all of them."""
        self._due.pop(prefix, None)

    def freeze(self, overlay: Overlay, time_ms: int) -> None:
        """Move all watermarks, and take states of expired windows out of the overlay that is to be committed."""
        if time_ms // 1_000 > self._moved_s:
            self._moved_s = time_ms // 1_000
            for prefix, known in self._definitions.expiring.items():
                if (known.series_count or prefix in overlay.states) and self.move(prefix, known, time_ms):
                    overlay.moved.add(prefix)
        for prefix in overlay.moved & overlay.states.keys():
            known, states = self._definitions[prefix], overlay.states[prefix]
            if not known.definition.window_s:
                continue
            if not isinstance(states, dict):
                states.drop_before(known.expired_before_ms)
            elif states:
                for suffix in late_suffixes([*states], known.expired_before_ms):
                    del states[suffix]
            if not states:
                del overlay.states[prefix]

    def plan(self, overlay: Overlay) -> list[Sweep]:
        """Return the sweeps of the commit of a frozen overlay."""
        self._sweeps = []
        for prefix in [*islice((it for it in self._due if it not in overlay.cleared), SWEEPS_MAX)]:
            known = self._definitions[prefix]
            windowed, before_ms = bool(known.definition.window_s), known.expired_before_ms
            if not known.series_count:
                self.forget(prefix)
                continue
            if not windowed and not known.swept:
                known.round_ms = before_ms
            end = prefix + window_bytes(before_ms) if windowed else prefix_end(prefix)
            self._sweeps.append(Sweep(prefix, known.swept or prefix, end, windowed, before_ms))
        return self._sweeps

    def find(
        self, found: Sequence[Sequence[Entry]], changes: Changes, known: Mapping[bytes, Known], *, entries_max: int
    ) -> list[bytes]:
        """Return the keys of expired entries among those that the shell found in the sweeps, and take them off the counts of
        `known`. What is touched by `changes`, those of the commit, stays.

        A sweep after the one that reached `entries_max` was not begun.
        """
        keys: list[bytes] = []
        self._next, self.gone = {}, {}
        left = entries_max
        for sweep, entries in zip(self._sweeps, found, strict=False):
            its = known[sweep.prefix]
            expired = [key for key, _ in entries] if sweep.windowed else _silent(sweep, its.definition, entries, changes)
            keys += expired
            its.series_count -= len(expired)
            if expired:
                self.gone[sweep.prefix] = len(expired)
            left -= len(entries)
            self._next[sweep.prefix] = entries[-1][0] + b"\x00" if entries and left <= 0 else b""
        return keys

    def committed(self, overlay: Overlay) -> None:
        """Note that the commit is durable. `overlay` is the one that is folded into meanwhile."""
        for sweep in self._sweeps:
            known, next_key = self._definitions.get(sweep.prefix), self._next.get(sweep.prefix)
            if known is None or next_key is None or sweep.prefix in overlay.cleared:
                continue
            known.series_count -= self.gone.get(sweep.prefix, 0)
            known.swept = next_key or (sweep.end if sweep.windowed else b"")
            self._due.pop(sweep.prefix, None)
            whole_ms = sweep.expired_before_ms if sweep.windowed else known.round_ms
            if next_key or known.expired_before_ms > whole_ms:
                self._due[sweep.prefix] = None  # behind the others
        self._sweeps, self._next, self.gone = [], {}, {}


def _silent(sweep: Sweep, definition: Definition, entries: Sequence[Entry], changes: Changes) -> list[bytes]:
    """Return the keys of entries that have expired. Raises `StoreCorrupt` if one of these can't be decoded."""
    alive, skip = {key for key, _ in codec.alive(entries, sweep.expired_before_ms)}, len(sweep.prefix)
    expired = [it for it in entries if it[0] not in alive and not changes.touches(sweep.prefix, it[0][skip:])]
    try:
        codec.decode_states(KINDS[definition.kind], [value for _, value in expired])
    except BadRecord as error:
        raise StoreCorrupt(f"view {definition.view}: {error}") from None
    return [key for key, _ in expired]
