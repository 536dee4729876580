"""The simulator's histories, one for each seed."""

import pytest

from tests.sim.world import check_seeds

PARTS = 20
"""So that many seeds stay within a test's timeout."""


@pytest.mark.parametrize("part", range(PARTS))
def test_every_history_ends_exact(seeds: int, part: int) -> None:
    """Whatever happens, in whatever order: every commit, every restored store and every end is exact."""
    check_seeds(range(part, seeds, PARTS))
