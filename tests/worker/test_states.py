"""The states of stores, of partitions that are folded and of replicas, follow tables of transitions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest

from pipeline.adapters.memory import MemoryStores
from pipeline.errors import IllegalTransition, NotReady, PipelineError
from pipeline.ports import Store
from pipeline.worker.follower import Follower
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.replica import Replica, ReplicaState
from pipeline.worker.stage import Stage
from tests.support import HandClock
from tests.worker.support import ChangingLog, new_partition

PARTITION_ACTS: dict[str, Callable[[OwnedPartition], None]] = {
    "start": lambda it: it.start(),
    "distrust": lambda it: it.distrust("a test"),
    "close": lambda it: it.close(),
}
PARTITION_LEGAL = {
    (Stage.NEW, "start"): Stage.OPEN,
    (Stage.NEW, "close"): Stage.CLOSED,
    (Stage.OPEN, "distrust"): Stage.DISTRUSTED,
    (Stage.OPEN, "close"): Stage.CLOSED,
    (Stage.DISTRUSTED, "distrust"): Stage.DISTRUSTED,
    (Stage.DISTRUSTED, "close"): Stage.CLOSED,
    (Stage.CLOSED, "start"): Stage.OPEN,
    (Stage.CLOSED, "close"): Stage.CLOSED,
}
PARTITION_WAYS = {
    Stage.NEW: [],
    Stage.OPEN: ["start"],
    Stage.DISTRUSTED: ["start", "distrust"],
    Stage.CLOSED: ["start", "close"],
}


@pytest.mark.parametrize(("stage", "act"), [*product(PARTITION_WAYS, PARTITION_ACTS)])
def test_every_stage_of_a_partition(stage: Stage, act: str) -> None:
    """Only a partition that is closed, or new, starts; only an open store is distrusted, and then closed as a new one."""
    clock, stores = HandClock(), MemoryStores()
    partition = new_partition(0, ChangingLog(1, clock), stores, clock)
    for before in PARTITION_WAYS[stage]:
        PARTITION_ACTS[before](partition)
    assert partition.stage is stage
    if (stage, act) in PARTITION_LEGAL:
        PARTITION_ACTS[act](partition)
    else:
        with pytest.raises((IllegalTransition, PipelineError)):
            PARTITION_ACTS[act](partition)
    assert partition.stage is PARTITION_LEGAL.get((stage, act), stage)


def test_a_distrusted_store_is_deleted_when_its_partition_is_closed() -> None:
    """A distrusted store is deleted when its partition is closed, as a reader may be in it; the next start fills another."""
    clock, stores = HandClock(), MemoryStores()
    partition = new_partition(0, ChangingLog(1, clock), stores, clock)
    partition.start()
    damaged: Store = partition.store
    partition.distrust("a test")
    assert partition.started
    assert not partition.has(damaged)
    partition.close()
    assert not partition.started
    with pytest.raises(NotReady):
        _ = partition.store
    partition.start()
    assert partition.has(partition.store)


REPLICA_ACTS: dict[str, Callable[[Replica], None]] = {
    "serve": lambda it: it.serve(),
    "hide": lambda it: it.hide(),
    "distrust": lambda it: it.distrust("a test"),
}
REPLICA_LEGAL = {
    (ReplicaState.RESTORING, "serve"): ReplicaState.SERVED,
    (ReplicaState.RESTORING, "hide"): ReplicaState.RESTORING,
    (ReplicaState.SERVED, "hide"): ReplicaState.RESTORING,
    (ReplicaState.SERVED, "distrust"): ReplicaState.DAMAGED,
    (ReplicaState.DAMAGED, "hide"): ReplicaState.DAMAGED,
}
REPLICA_WAYS = {
    ReplicaState.RESTORING: [],
    ReplicaState.SERVED: ["serve"],
    ReplicaState.DAMAGED: ["serve", "distrust"],
}


@pytest.mark.parametrize(("state", "act"), [*product(REPLICA_WAYS, REPLICA_ACTS)])
def test_every_state_of_a_replica(state: ReplicaState, act: str) -> None:
    """A damaged store is never served again, and only a store that is served can be read."""
    store = MemoryStores().open(0)
    replica = Replica(0, store, Follower(0, store, buffer_entries_max=10), 0.0)
    for before in REPLICA_WAYS[state]:
        REPLICA_ACTS[before](replica)
    if (state, act) in REPLICA_LEGAL:
        REPLICA_ACTS[act](replica)
    else:
        with pytest.raises(IllegalTransition):
            REPLICA_ACTS[act](replica)
    assert replica.state is REPLICA_LEGAL.get((state, act), state)
    assert (replica.served is not None) is (replica.state is ReplicaState.SERVED)
