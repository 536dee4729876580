"""Bound of the size of commits, learned from how long commits take, so that they end in time.

A commit that can't end within its timeout ends the process, and the next start folds the same records again: a commit of the
same size would fail for ever. So every start begins with the smallest commit there is, that of one record. The bound rises
from there, and only so far that a commit would take `_GOAL` of the timeout if all of its time were due to its size: at most
fourfold from one commit to the next, or sixteenfold as long as the next one stays below a fourth of `_GOAL`. It falls when a
commit takes over `_SLOW` of the timeout.
"""

from __future__ import annotations

from math import ceil

_GOAL = 0.4
"""Share of the timeout up to which commits grow."""
_SLOW = 0.5
"""Share of the timeout above which commits shrink."""
_GROWTH_MAX = 4.0
_QUICK_GROWTH_MAX = 16.0
_QUICK_GOAL = _GOAL / 4
_HELPED = 0.75
"""A commit of half the size that takes more than this of the time shows that size is not what takes the time."""


def _capped(goal: float, share: float, most: float) -> float:
    """Return `goal / share`, at most `most`."""
    return most if share * most <= goal else goal / share


class CommitBound:
    """Bound of one partition's commits. `time_max_s` is what a commit may take before it fails."""

    def __init__(self, time_max_s: float) -> None:
        self.entries_max = 1
        """Number of entries that may be folded before a commit; one record may go beyond it."""
        self._time_max_s = time_max_s
        self._slow_s: float | None = None
        """Seconds that the commit took for which the bound was lowered last."""

    def note(self, entries: int, seconds: float) -> None:
        """Adjust the bound after a commit of so many folded entries, which took so long."""
        share = seconds / self._time_max_s
        if share <= _GOAL:
            self._slow_s = None
            growth = max(_capped(_GOAL, share, _GROWTH_MAX), _capped(_QUICK_GOAL, share, _QUICK_GROWTH_MAX))
            self.entries_max = max(self.entries_max, ceil(entries * growth))
        elif share > _SLOW and self._lowering_helps(seconds):
            self._slow_s = seconds
            self.entries_max = max(1, min(self.entries_max, entries) // 2)

    def _lowering_helps(self, seconds: float) -> bool:
        """Return whether size is what takes the time, as far as is known. Else commits would shrink for no gain."""
        return self._slow_s is None or not _HELPED * self._slow_s < seconds <= self._slow_s / _HELPED
