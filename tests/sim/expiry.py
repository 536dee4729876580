"""Laws of expiry in one partition: what may be refused as expired, what may be gone, and when.

The task chooses when its watermarks move, within the limits of the true time. Its commits show its choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tests.sim.clocks import TrueTime
from tests.sim.count import Count, Row
from tests.sim.entries import (
    Entries,
    Failure,
    View,
    definition_key,
    expires_at_ms,
    key_of,
    rows_of_letter,
    series_prefix,
    start_of,
    unpack,
)
from tests.sim.laws import verdict as verdict_of


def watermark(view: View, entries: Entries) -> int:
    """Return the watermark of a definition; 0 if nothing has expired, or the definition is unknown."""
    value = entries.get(definition_key(view))
    return int((unpack(value) if value else [])[3:4][0]) if value and len(unpack(value)) > 3 else 0


class Expiry:
    """Expired windows and series, as the commits of one partition state them."""

    def __init__(self, true_time: TrueTime) -> None:
        self._time = true_time
        self.late: dict[int, dict[int, set[bytes]]] = {}
        """Keys of the refused series, by offset and index of the group."""
        self.refused_ever: set[bytes] = set()
        """Keys of all dead letters about expired series."""
        self._gone: list[tuple[bytes, int, list[tuple[bytes, bytes | None]]]] = []
        """Series that had expired, with their last entries, by position record and position of the commit."""

    def rewound(self, record: bytes, position: int) -> None:
        """Forget the commits after that of this position record, with which the changelog ends now."""
        records = [it[0] for it in self._gone]
        del self._gone[records.index(record) + 1 if record in records else 0 :]
        self.late = {offset: late for offset, late in self.late.items() if offset < position}

    def gone_at(self, position: int) -> Iterable[tuple[bytes, bytes | None]]:
        """Return the series that had expired by the commits at this position, with their last entries."""
        return [it for _, at, entries in self._gone if at == position for it in entries]

    def note_letters(self, rows: list[Row], start: int, end: int, letters: dict[bytes, list[Any]]) -> None:
        """Note what a commit refused as expired, and check that it is as it was sent."""
        for offset in range(start, end):
            self.late.pop(offset, None)
        for key, (_, offset, _, reason, _, value) in letters.items():
            if not reason.startswith("expired"):
                continue
            index, sent = int(key.split(b"-")[2]), rows[offset].sent
            assert sent is not None
            group = sent.groups[index]
            found = rows_of_letter(value)
            for suffix, state in found.items():
                its_key = series_prefix(group.view) + suffix
                deltas = [delta for place, delta in group.deltas if key_of((group.view, place)) == its_key]
                if wrong := verdict_of(group.view.kind, deltas, state) if deltas else "was not sent":
                    raise Failure(f"a series in dead letter {key!r} {wrong}")
            self.late.setdefault(offset, {})[index] = {series_prefix(group.view) + suffix for suffix in found}
            self.refused_ever.add(key)

    def check_rows(self, rows: list[Row], count: Count, start: int, end: int, old: Entries, new: Entries) -> None:
        """Check that a commit moved its watermarks as far as the time allows, and refused exactly what has expired."""
        dropped: set[View] = set()
        for offset in range(start, end):
            sent = rows[offset].sent
            if sent is None or count.verdicts[offset] != "folded":
                continue
            for order in sent.orders:
                dropped |= {
                    group.view
                    for row in rows
                    for group in (row.sent.groups if row.sent else ())
                    if order.concerns(group.view)
                }
            for index, group in enumerate(sent.groups):
                if not group.view.window_s or index in count.refused.get(offset, ()):
                    continue
                late = self.late.get(offset, {}).get(index, set())
                before = 0 if group.view in dropped else watermark(group.view, old)
                for place, _ in group.deltas:
                    is_late = key_of((group.view, place)) in late
                    if place[1] < before and not is_late:
                        raise Failure(f"a delta of a window before {before} was folded: {place}")
                    if is_late and place[1] >= max(watermark(group.view, new), before) and group.view in count.views:
                        raise Failure(f"a delta of a window that has not expired was refused: {place}")
        for view in count.views:
            moved = watermark(view, new)
            if moved > (view.expired_before_ms(self._time.at_ms) if view.retention_s else 0):
                raise Failure(f"the watermark of {view} is {moved} at {self._time.at_ms}")
            if moved < watermark(view, old) and view not in dropped:
                raise Failure(f"the watermark of {view} fell to {moved}")

    def note_gone(
        self, count: Count, record: bytes, position: int, old: Entries, new: Entries
    ) -> list[tuple[bytes, bytes | None]]:
        """Note the series that have expired by a commit, and return them with their last entries."""
        gone: list[tuple[bytes, bytes | None]] = []
        for key, (view, _) in count.series.items():
            mark = watermark(view, new)
            if view.window_s:
                if start_of(key, view) < mark:
                    gone.append((key, old.get(key)))
            elif view.retention_s and (value := new.get(key) or old.get(key)):
                at_ms = expires_at_ms(value)
                if at_ms < count.touched_ms[key] + view.retention_s * 1_000:
                    raise Failure(f"a series of {view} expires at {at_ms}; its last delta came at {count.touched_ms[key]}")
                if at_ms <= mark:
                    gone.append((key, value))
        self._gone.append((record, position, gone))
        return gone
