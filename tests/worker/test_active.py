"""The life of an active partition is a table of transitions: any other step raises, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

import pytest

from pipeline.adapters.memory import MemoryStores
from pipeline.errors import IllegalTransition
from pipeline.worker.active import ActivePartition, ActiveState
from tests.support import HandClock
from tests.worker.support import ChangingLog, new_partition

Act = Callable[[ActivePartition], object]
ACTS: dict[str, Act] = {
    "end of start": lambda it: it.end_start(),
    "commit": lambda it: it.begin_commit(Future()),
    "end of commit": lambda it: it.end_commit(),
    "loss": lambda it: it.lose("a test"),
    "close": lambda it: it.begin_close(Future()),
}
LEGAL: dict[ActiveState, dict[str, ActiveState]] = {
    ActiveState.STARTING: {"end of start": ActiveState.FOLDING, "loss": ActiveState.LOST_STARTING},
    ActiveState.LOST_STARTING: {"end of start": ActiveState.LOST},
    ActiveState.FOLDING: {"commit": ActiveState.COMMITTING, "loss": ActiveState.LOST},
    ActiveState.COMMITTING: {"end of commit": ActiveState.FOLDING, "loss": ActiveState.LOST_COMMITTING},
    ActiveState.LOST_COMMITTING: {"end of commit": ActiveState.LOST},
    ActiveState.LOST: {"close": ActiveState.CLOSING},
    ActiveState.CLOSING: {},
}
WAYS = {
    ActiveState.STARTING: [],
    ActiveState.LOST_STARTING: ["loss"],
    ActiveState.FOLDING: ["end of start"],
    ActiveState.COMMITTING: ["end of start", "commit"],
    ActiveState.LOST_COMMITTING: ["end of start", "commit", "loss"],
    ActiveState.LOST: ["end of start", "loss"],
    ActiveState.CLOSING: ["end of start", "loss", "close"],
}


def in_state(state: ActiveState) -> ActivePartition:
    clock = HandClock()
    active = ActivePartition(new_partition(0, ChangingLog(1, clock), MemoryStores(), clock), 60.0)
    running: Future[None] = Future()
    running.set_running_or_notify_cancel()
    active.begin_start(running)
    for act in WAYS[state]:
        ACTS[act](active)
    assert active.state is state
    return active


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("state", LEGAL, ids=lambda it: it.value)
def test_every_step_is_legal_or_raises(state: ActiveState, act: str) -> None:
    """No partition is closed while a thread works in it, and no lost one folds again; a second loss changes nothing."""
    active = in_state(state)
    if act in LEGAL[state] or (act == "loss" and not active.is_ours):
        ACTS[act](active)
    else:
        with pytest.raises(IllegalTransition):
            ACTS[act](active)
    assert active.state is LEGAL[state].get(act, state)


def test_a_start_that_waits_for_a_thread_is_cancelled_with_its_partition() -> None:
    """A partition whose start still waits for a thread can be closed at once."""
    clock = HandClock()
    active = ActivePartition(new_partition(0, ChangingLog(1, clock), MemoryStores(), clock), 60.0)
    active.begin_start(Future())
    active.lose("a test")
    assert active.state is ActiveState.LOST
