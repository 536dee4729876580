"""Only the loss of a record counts as a loss in the simulator, not that of an offset without a record."""

from __future__ import annotations

import pytest

from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.sim.logfaults import Noticed
from tests.sim.world import DEPTH_MAX, World


def a_world(seed: int, folded: str, ahead: str = "") -> World:
    """Return a world whose deltas-0 has records, `r`, and empty offsets, `-`: those below its position, then those ahead."""
    world = World(seed, switches=frozenset())
    world.quiet = True
    for held in folded + ahead:
        if held == "r":
            world.cluster.deliver(Message(DELTAS, 0, None, b"noise"))
        else:
            world.cluster.skip(DELTAS, 0)
        if len(world.auditor.rows[0]) == len(folded):
            world._drain(0, world.machines[0])
            world._end(0)
    return world


def test_the_first_read_of_a_worker_is_from_where_folding_goes_on() -> None:
    """The first read names the leader of the last folded record, and so finds out what the log has lost."""
    for seed in range(600):
        world = a_world(seed, "rr")
        world.log_faults._cut_deltas(0)
        for _ in range(3):
            world.cluster.deliver(Message(DELTAS, 0, None, b"other noise"))
        world.quiet, world.trouble, world.depth = False, 0.0, DEPTH_MAX
        while (worker := world.active[0]) is None:  # a few starts are stopped
            world.start(0, world.machines[0])
        with pytest.raises(Noticed):
            worker.fold()


def test_a_history_ends_when_a_loss_of_what_was_safe_is_accepted() -> None:
    """After a person has accepted a loss, nothing says any more what the state must be."""
    world = a_world(0, "rr")
    world.accept_loss[0] = True
    world.start(0, world.machines[0])
    world._end(0)
    world.wounds.add(0)
    world.accept_loss[0] = True
    with pytest.raises(Noticed):
        world.start(0, world.machines[0])


def offsets(world: World) -> set[int]:
    return {row.offset for row in world.cluster.memory.partition(DELTAS, 0).rows}


@pytest.mark.parametrize("ahead", ["---", "-r-r-", "r--r-r"])
def test_a_hole_begins_where_a_record_is_gone(ahead: str) -> None:
    """A worker that has folded offsets without records has folded nothing that can be lost."""
    for seed in range(30):
        world = a_world(seed, "rr", ahead)
        before = offsets(world)
        world.log_faults._cut_middle(0)
        gone = before - offsets(world)
        assert world.auditor.holes == ({0: min(gone)} if gone else {})
        assert world.wounds == ({0} if gone else set())


@pytest.mark.parametrize("folded", ["rr--", "-r-", "r"])
def test_a_tail_that_is_lost_holds_a_record_that_was_folded(folded: str) -> None:
    """A start goes on behind the last folded record, and need not notice the loss of what lay further on."""
    for seed in range(30):
        world = a_world(seed, folded)
        before = offsets(world)
        world.log_faults._cut_deltas(0)
        assert world.wounds == {0}
        assert before - offsets(world)
