"""The simulator's histories, one for each seed."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.sim.world import check_seeds

PARTS = 20
"""Number of tests among which the seeds are dealt out, so that each test stays within its timeout."""

EVENTS = """
answer of several partitions, append: crash after, append: crash before, append: gone, append: in, append: late,
append: refused, append: unsure, black-out, clock is right again, clock jumps, compaction, crash at commit: after,
crash at commit: before, crash at end offsets, crash at fenced, crash at open, crash at poll, crash at transaction,
crash at write: after, crash at write: before, damage of a server: open, damage of a server: read, damage: bytes,
damage: open, damage: read, deltas cut, deposed leader, deposed leader of a server, expired delta refused, foreign
transaction on changelog, foreign transaction on deltas, forged: entry, forged: noise, forged: position, hold-up, job,
junk, late message, loss accepted, loss noticed, marker left out,
order: drop, order: reset, others act at commit: after, others act at
commit: before, others act at destroyed, others act at end offsets, others act at fenced, others act at open, others
act at poll, others act at transaction, others act at write: after, others act at write: before, producers expire,
publisher closed, publisher restarted, retention, server at a boundary, server falls behind, server hides, series
expired, sleep, spool reopened, standby at a boundary, store lost, store rebuilt, store restored, store rolled back,
stranger: a jump, stranger: far ahead, stranger: invented, tombstones dropped, torn tail, unavailable at commit:
after, unavailable at commit: before, unavailable at end offsets, unavailable at poll, zombie, zombie fenced, zombie
publisher sends
"""


@pytest.fixture(scope="module")
def stats() -> Counter[str]:
    """Number of occurrences of each kind of trouble in the histories so far; "histories" is the number of histories."""
    return Counter()


@pytest.mark.parametrize("part", range(PARTS))
def test_every_history_ends_exact(seeds: int, part: int, stats: Counter[str]) -> None:
    """Every commit, every restored store and every end is exact, whatever happens in whatever order."""
    part_seeds = range(part, seeds, PARTS)
    stats.update(check_seeds(part_seeds), histories=len(part_seeds))


def test_everything_happens(stats: Counter[str]) -> None:
    """Each kind of trouble comes about in the histories of a usual run."""
    if stats["histories"] < 200:
        pytest.skip("needs 200 histories")
    missing = {event.strip() for event in EVENTS.replace("\n", " ").split(",")} - stats.keys()
    assert not missing
