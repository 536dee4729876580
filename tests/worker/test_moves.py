"""Partitions that move between workers while they fold: each loop copes, and every record counts once."""

from __future__ import annotations

import random
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

import pipeline.metrics as m
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.memory import MemoryLog, MemoryStore
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Group, Records, series_suffix
from pipeline.errors import Fenced, NotReady, Unavailable
from pipeline.metrics import PARTITION_GAUGES, Metric
from pipeline.ports import NO_BEGINS, Begins, Message, Store, Transaction
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.replicas import ReplicaLoop
from tests.support import wait_until
from tests.worker.support import DAY_MS, TOPICS, VIEW, is_fence, series_of

NEVER_MS = 600_000
SEED = 5


class _OnceOpen(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.open = False

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        assert self.open, "written to after it was closed"
        super().write(keys, values)

    def close(self) -> None:
        self.open = False


class _Stores:
    """Stores of one process, each of which can be open once at a time, as RocksDB's."""

    def __init__(self) -> None:
        self.at: dict[int, _OnceOpen] = {}
        self._lock = threading.Lock()

    def open(self, partition: int) -> Store:
        with self._lock:
            store = self.at.setdefault(partition, _OnceOpen())
            assert not store.open, f"store {partition} is open already"
            store.open = True
            return store

    def destroy(self, partition: int) -> None:
        raise AssertionError(f"store {partition} was given up")

    def close(self) -> None:
        pass


class _Log(MemoryLog):
    """A log whose commits and new owners can be held up, by partition, and made to fail with `error` then."""

    def __init__(self, partition_count: int) -> None:
        super().__init__(dict.fromkeys(TOPICS, partition_count), SystemClock().now_ms)
        self.held: dict[int, threading.Event] = {}
        self.held_start: dict[int, threading.Event] = {}
        self.errors: dict[int, Exception] = {}
        self.asked = threading.Event()
        self.held_ask: threading.Event | None = None
        self.committing: Counter[int] = Counter()
        self.inits: Counter[int] = Counter()

    def topic_id(self, topic: str) -> str:
        held = self.held_ask
        if held is not None:
            self.asked.set()
            held.wait(30)
        return super().topic_id(topic)

    def transaction(self, transactional_id: str) -> Transaction:
        number = int(transactional_id.rpartition("-")[2])
        if number in self.held_start:
            self.inits[number] += 1
            self.held_start[number].wait(30)
        return _Held(self, number, super().transaction(transactional_id))


class _Held:
    def __init__(self, log: _Log, number: int, inner: Transaction) -> None:
        self._log, self._number, self._inner = log, number, inner

    marker_count = 0

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        if is_fence(messages):
            return self._inner.commit(messages, timeout_s=timeout_s)
        self._log.committing[self._number] += 1
        if self._number in self._log.held:
            self._log.held[self._number].wait(30)
        error = self._log.errors.pop(self._number, None)
        if error is not None:
            raise error
        return self._inner.commit(messages, timeout_s=timeout_s, begins=begins)

    def close(self) -> None:
        self._inner.close()


class _Host:
    """One worker process: a loop that folds, another that keeps copies, and their stores."""

    def __init__(self, log: _Log, *, settle_s: float = 0.0, **settings: int) -> None:
        self.stores = _Stores()
        self.errors: list[BaseException] = []
        self.generation = 0
        clock, worker = SystemClock(), WorkerSettings(**{"commit_interval_ms": 1, **settings})
        self.metrics = PrometheusMetrics()
        self.replicas = ReplicaLoop(
            log=log,
            stores=self.stores,
            clock=clock,
            settings=worker,
            delete_retention_ms=DAY_MS,
            on_fatal=self.errors.append,
            metrics=self.metrics,
            lag_max_s=1.0,  # so that it looks often
        )
        self.replicas.follow(frozenset())
        self.made: list[OwnedPartition] = []

        def make(number: int) -> OwnedPartition:
            self.made.append(
                OwnedPartition(
                    number,
                    log=log,
                    stores=self.stores,
                    clock=clock,
                    settings=worker,
                    delete_retention_ms=DAY_MS,
                    metrics=self.metrics,
                )
            )
            return self.made[-1]

        self.loop = WorkerLoop(
            make,
            log=log,
            clock=clock,
            settings=worker,
            on_fatal=self.errors.append,
            standbys=self.replicas,
            settle_s=settle_s,
            metrics=self.metrics,
        )

    def shown(self, metric: Metric) -> dict[int, float]:
        """Return a metric as /metrics shows it, by partition; a counter without labels at 0."""
        found = {}
        for line in self.metrics.render()[0].decode().splitlines():
            if match := re.fullmatch(rf'{metric.name}(?:{{partition="(\d+)"}})? (.+)', line):
                found[int(match[1] or 0)] = float(match[2])
        return found

    def assign(self, *actives: int, standbys: Sequence[int] = (), skip: int = 0) -> None:
        self.generation += 1 + skip
        self.loop.assign(actives, standbys, self.generation)

    def folds(self, *numbers: int) -> None:
        """Wait until this host folds these partitions, and no others."""
        wait_until(lambda: {n for n, it in self.loop.partitions.items() if it.started} == {*numbers}, f"{numbers} to fold")

    def follows(self, *numbers: int) -> None:
        """Wait until this host keeps copies of these partitions, and no others."""
        wait_until(lambda: self.replicas.caught_up() == {*numbers}, f"copies of {numbers}")

    def start(self) -> None:
        self.loop.start()
        self.replicas.start()

    def stop(self) -> None:
        assert self.loop.stop(30)
        assert self.replicas.stop(30)


class _World:
    """Hosts on one log, and the record of everything sent to it."""

    def __init__(self, partition_count: int = 2) -> None:
        self.log = _Log(partition_count)
        self.hosts: list[_Host] = []
        self.sent = [0] * partition_count

    def host(self, *, settle_s: float = 0.0, **settings: int) -> _Host:
        host = _Host(self.log, settle_s=settle_s, **settings)
        self.hosts.append(host)
        host.start()
        return host

    def send(self, number: int) -> None:
        """Send a batch that adds 1 to a series that all share, and to one of its own."""
        sequence = self.sent[number]
        group = Group(VIEW, [series_suffix(("all",)), series_suffix((str(sequence),))], [1, 1])
        value = encode_batch(Batch("p", 0, number, sequence, 0, 0, [group]))
        self.sent[number] += 1
        self.log.append([Message(DELTAS, number, None, value)], timeout_s=1)

    def exact(self, number: int) -> None:
        """Wait until a separate worker, restored from the changelog alone, would have counted everything once."""
        expected = {"all": self.sent[number], **{str(n): 1 for n in range(self.sent[number])}}

        def found() -> dict[str, float]:
            store = MemoryStore()
            rows = [*self.log.partition(CHANGELOG, number).rows]
            store.write([row.key or b"" for row in rows], [row.value for row in rows])
            return series_of(store)

        wait_until(lambda: found() == expected, f"partition {number} to be exact: {expected}")
        assert not self.log.partition(DEAD_LETTERS, number).rows


@pytest.fixture
def world() -> Iterator[_World]:
    it = _World()
    yield it
    for gates in (it.log.held, it.log.held_start):
        for gate in gates.values():
            gate.set()
    for host in it.hosts:
        host.stop()


def test_assigned_bit_by_bit(world: _World) -> None:
    """Partitions come and go while others fold; one that was lost and is back goes on where others left it."""
    a, b = world.host(), world.host()
    assert not a.loop.ready
    a.assign(0)
    a.folds(0)
    a.assign(0, 1)
    a.folds(0, 1)
    world.send(0)
    world.send(1)
    world.exact(1)
    a.assign(0)
    b.assign(1)
    b.folds(1)
    world.send(0)
    world.send(1)
    world.exact(0)
    world.exact(1)
    a.assign()
    b.assign(0, 1)
    b.folds(0, 1)
    b.assign(1)
    a.assign(0)
    a.folds(0)
    world.send(0)
    world.exact(0)
    assert not a.errors + b.errors


def test_ready_with_nothing(world: _World) -> None:
    """A worker that is assigned no partition is ready."""
    a = world.host()
    a.assign()
    assert a.loop.wait_ready(30)


def test_revoking_commits(world: _World) -> None:
    """`revoking` commits at once and waits for that; folding goes on."""
    a = world.host(commit_interval_ms=NEVER_MS)
    a.assign(0, 1)
    a.folds(0, 1)
    for number in (0, 1):
        world.send(number)
    wait_until(lambda: [it.task.next_offset for it in a.made] == [1, 1], "folding")
    assert a.loop.revoking([0, 1], 30)
    world.exact(0)
    world.exact(1)
    world.send(0)
    wait_until(lambda: a.made[0].task.next_offset == 2, "folding to go on")


def test_gauges_move_too(world: _World) -> None:
    """Gauges of a partition that moved are gone, its counters stay; when it is back, its gauges are, too."""
    a, b = world.host(), world.host()
    a.assign(0, 1)
    a.folds(0, 1)
    for number in (0, 1):
        world.send(number)
        world.exact(number)
    wait_until(lambda: a.shown(m.NEXT_OFFSET).keys() == {0, 1}, "both positions")
    assert a.loop.revoking([1], 30)
    a.assign(0)
    b.assign(1)
    b.folds(1)
    wait_until(lambda: all(1 not in a.shown(it) for it in PARTITION_GAUGES), "the gauges of 1 to be gone")
    assert a.shown(m.NEXT_OFFSET).keys() == {0}
    assert a.shown(Metric("pipeline_commits_total", "counter", "")).keys() == {0, 1}
    world.send(1)
    wait_until(lambda: b.shown(m.NEXT_OFFSET) == {1: 2}, "its position at its new owner")
    assert b.loop.revoking([1], 30)
    b.assign()
    a.assign(0, 1)
    a.folds(0, 1)
    world.send(1)
    wait_until(lambda: a.shown(m.NEXT_OFFSET).get(1) == 3, "its position at its old owner")
    wait_until(lambda: not any(b.shown(it) for it in PARTITION_GAUGES), "nothing told by who has nothing")
    assert not a.loop.fenced_count + b.loop.fenced_count


def test_revoking_is_bounded(world: _World) -> None:
    """A commit that hangs holds a revocation up for no longer than asked, and is waited for before its store is closed."""
    a, b = world.host(), world.host()
    a.assign(0)
    a.folds(0)
    gate = world.log.held[0] = threading.Event()
    world.send(0)
    wait_until(lambda: world.log.committing[0], "a commit")
    assert not a.loop.revoking([0], 1), "nothing is folded since, but what the commit writes is not durable yet"
    a.assign(1)
    b.assign(standbys=[0])
    a.folds(1)
    world.send(1)
    world.exact(1)
    a.assign(1, standbys=[0])
    assert a.stores.at[0].open
    assert not a.replicas.caught_up()
    gate.set()
    a.follows(0)
    world.log.held.clear()
    b.assign(0)
    world.exact(0)
    assert not a.errors + b.errors


def test_fenced_while_moving(world: _World) -> None:
    """A fence during a move loses the partition; others go on, and if it stays here, it is taken over again."""
    a = world.host()
    a.assign(0, 1)
    a.folds(0, 1)
    assert a.loop.revoking([0, 1], 30)
    world.log.transaction("pipeline-0")  # the next owner, who has heard of it before us
    for number in (0, 1):
        world.send(number)
    world.exact(1)
    a.folds(1)
    wait_until(lambda: not a.stores.at[0].open, "its store to be closed")
    a.assign(0, 1)
    a.folds(0, 1)
    world.exact(0)
    assert not a.errors
    assert a.loop.fenced_count == 1
    assert a.shown(m.FENCED) == {0: 1}


def test_fenced_before_the_assignment_is_acted_upon(world: _World) -> None:
    """A fence by a next owner that heard of the assignment first is no error; partitions that stay go on."""
    a = world.host()
    a.assign(0, 1)
    a.folds(0, 1)
    for number in (0, 1):
        world.send(number)
        world.exact(number)
    gate = world.log.held[0] = threading.Event()
    world.send(0)
    wait_until(lambda: a.loop._actives.all[0].is_committing, "a commit")
    folding, go_on = threading.Event(), threading.Event()
    fold = a.made[1].fold

    def hold(records: Records) -> None:
        folding.set()
        go_on.wait(30)
        fold(records)

    a.made[1].fold = hold  # type: ignore[method-assign]
    world.send(1)
    assert folding.wait(30)
    world.log.transaction("pipeline-0")
    a.assign(1)
    commit = a.loop._actives.all[0].commit_future()
    assert commit is not None
    gate.set()
    wait_until(commit.done, "the end of the commit")
    go_on.set()
    world.exact(1)
    a.folds(1)
    assert not a.errors


def test_undecided_while_moving(world: _World) -> None:
    """A commit that the log does not answer during a move loses the partition, and nothing counts twice if it succeeded."""
    a = world.host()
    a.assign(0)
    a.folds(0)
    gate = world.log.held[0] = threading.Event()
    world.send(0)
    wait_until(lambda: world.log.committing[0], "a commit")
    world.log.errors[0] = Unavailable("nobody answers")
    assert not a.loop.revoking([0], 0.05)
    gate.set()
    a.folds()
    a.assign(0)
    world.exact(0)
    assert not a.errors


def test_fenced_at_any_other_time(world: _World) -> None:
    """A fence without a move means an owner that should not be there: the process ends."""
    a = world.host()
    a.assign(0)
    a.folds(0)
    assert a.loop.revoking([0], 30)
    a.assign(0)
    wait_until(lambda: not a.loop._moving, "the move to be over")
    world.log.transaction("pipeline-0")
    world.send(0)
    wait_until(lambda: a.errors, "its end")
    assert isinstance(a.errors[0], Fenced)
    assert a.loop.fenced_count == 1


def test_fenced_soon_after_an_assignment(world: _World) -> None:
    """A fence soon after an assignment comes from an earlier owner: the partition is taken over again."""
    a = world.host(settle_s=60)
    a.assign(0)
    a.folds(0)
    world.log.transaction("pipeline-0")
    world.send(0)
    world.exact(0)
    assert len(a.made) == 2
    assert not a.errors


def test_a_generation_was_left_out(world: _World) -> None:
    """A partition that another may have had in a generation left out is taken over again before it is fenced."""
    a = world.host()
    a.assign(0)
    a.folds(0)
    first = a.made[0]
    world.log.transaction("pipeline-0")
    a.assign(0, skip=1)
    wait_until(lambda: a.loop.partitions.get(0) not in (None, first), "another life of it")
    a.folds(0)
    world.send(0)
    world.exact(0)
    assert not a.errors


def test_lost_while_it_starts(world: _World) -> None:
    """A lost start is given up and its store closed, without an error, also if the partition comes back meanwhile."""
    a = world.host()
    gate = world.log.held_start[0] = threading.Event()
    a.assign(0, 1)
    a.folds(1)
    wait_until(lambda: world.log.inits[0], "its start")
    a.assign(1, standbys=[0])
    a.assign(1)
    a.assign(0, 1)
    world.send(1)
    world.exact(1)
    assert world.log.inits[0] == 1, "one at a time"
    gate.set()
    a.folds(0, 1)
    world.send(0)
    world.exact(0)
    a.assign(1)
    a.folds(1)
    assert not a.errors


def test_lost_before_it_fences(world: _World) -> None:
    """A start that is given up in time fences nobody: the partition is another's."""
    a = world.host()
    gate = world.log.held_ask = threading.Event()
    a.assign(0)
    assert world.log.asked.wait(30)
    a.assign()
    wait_until(lambda: all(not active.is_ours for active in a.loop._actives.all.values()), "the assignment to be acted upon")
    world.log.held_ask = None
    gate.set()
    wait_until(lambda: not a.loop._actives.all, "the end of the start")
    assert "pipeline-0" not in world.log._owners
    assert not a.errors


def test_a_copy_is_let_go_of(world: _World) -> None:
    """`take` returns when the store is closed, and it is not opened again, whatever the loop was about to do."""
    host = world.host()
    gate, opening = threading.Event(), threading.Event()
    inner = host.stores.open

    def slow(partition: int) -> Store:
        opening.set()
        gate.wait(30)
        return inner(partition)

    host.stores.open = slow  # type: ignore[method-assign]
    host.replicas.follow(frozenset({0, 1}))
    assert opening.wait(30)
    host.replicas.take(1, lambda: False)
    gate.set()
    host.follows(0)
    assert 1 not in host.stores.at
    host.replicas.take(0, lambda: False)
    assert not host.stores.at[0].open
    host.follows()
    gate.clear()
    opening.clear()
    host.replicas.follow(frozenset({0}))
    assert opening.wait(30)
    with pytest.raises(NotReady):
        host.replicas.take(0, lambda: True)
    gate.set()


def test_a_copy_is_taken_over(world: _World) -> None:
    """An active becomes a standby and the other way round; no store is ever open twice, and little is left to restore."""
    a, b = world.host(), world.host()
    a.assign(0, 1)
    b.assign(standbys=[0, 1])
    a.folds(0, 1)
    for _ in range(50):
        world.send(0)
    world.exact(0)
    b.follows(0, 1)
    wait_until(lambda: series_of(b.stores.at[0]).get("all") == 50, "the copy")
    for _ in range(5):
        a.assign(1, standbys=[0])
        b.assign(0, standbys=[1])
        b.folds(0)
        a.follows(0)
        b.follows(1)
        world.send(0)
        world.send(1)
        a.assign(0, standbys=[1])
        b.assign(1, standbys=[0])
        a.folds(0)
        b.folds(1)
        world.send(0)
        world.send(1)
    world.exact(0)
    world.exact(1)
    assert not a.errors + b.errors


def test_stopped_while_moving(world: _World) -> None:
    """A stopping worker does not commit partitions that another has by then, and that is no failure."""
    a, b = world.host(commit_interval_ms=NEVER_MS), world.host()
    a.assign(0)
    a.folds(0)
    assert a.loop.revoking([0], 30)
    world.send(0)
    wait_until(lambda: a.made[0].task.next_offset == 1, "folding")
    b.assign(0)
    b.folds(0)
    world.exact(0)
    assert a.loop.stop(30)
    assert not a.errors
    assert a.loop.revoking([0], 30), "nobody waits for one that has ended"


@pytest.mark.parametrize("seed", range(4))
def test_moves_at_random(seed: int) -> None:
    """Three hosts that hear of each generation at different times, or not at all, under load: exact, and none ends."""
    count = 4
    rng, world, stop = random.Random(SEED + seed), _World(count), threading.Event()
    hosts = [world.host(settle_s=60) for _ in range(3)]

    def load() -> None:
        while not stop.wait(0.001):
            world.send(rng_load.randrange(count))

    rng_load = random.Random(seed)
    sender = threading.Thread(target=load)
    sender.start()
    try:
        for generation in range(1, 40):
            owners = [rng.randrange(3) for _ in range(count)]
            copies = [(owner + rng.randint(1, 2)) % 3 for owner in owners]
            heard = [host for host in hosts if generation in (1, 39) or rng.random() < 0.8]
            rng.shuffle(heard)
            for host in heard:
                host.loop.revoking(range(count), rng.choice((0.0, 0.02)))
            for host in heard:
                me = hosts.index(host)
                host.loop.assign(
                    [n for n in range(count) if owners[n] == me], [n for n in range(count) if copies[n] == me], generation
                )
                stop.wait(rng.choice((0.0, 0.002, 0.03)))
    finally:
        stop.set()
        sender.join()
    try:
        for number in range(count):
            world.exact(number)
        assert not [error for host in hosts for error in host.errors]
        for me, host in enumerate(hosts):
            host.follows(*(n for n in range(count) if copies[n] == me))
            for number in range(count):
                if copies[number] == me:
                    wait_until(lambda n=number, it=host: series_of(it.stores.at[n])["all"] == world.sent[n], "the copy")
    finally:
        for host in hosts:
            host.stop()


def test_fenced_soon_after_a_late_start(world: _World) -> None:
    """A late start allows for one more fence, as the former owner may be late, too; a second fence is an error."""
    a = world.host(settle_s=2.0)
    gate = world.log.held_start[0] = threading.Event()
    a.assign(0)
    wait_until(lambda: world.log.inits[0], "its start")
    threading.Event().wait(2.2)
    world.log.held_start.clear()
    gate.set()
    a.folds(0)
    threading.Event().wait(1.2)
    world.log.transaction("pipeline-0")
    world.send(0)
    world.exact(0)
    assert not a.errors
    assert len(a.made) == 2
    threading.Event().wait(1.2)
    world.log.transaction("pipeline-0")
    world.send(0)
    wait_until(lambda: a.errors, "its end")


def test_what_is_assigned(world: _World) -> None:
    """`assigned` has this worker's partitions, taken over or not; it is empty while partitions move."""
    a = world.host()
    gate = world.log.held_start[0] = threading.Event()
    assert a.loop.assigned == frozenset()
    a.assign(0, 1)
    a.folds(1)
    assert a.loop.assigned == {0, 1}
    a.loop.revoking([1], 0.0)
    wait_until(lambda: not a.loop.assigned, "it to be told")
    a.assign(0)
    wait_until(lambda: a.loop.assigned == {0}, "the assignment")
    gate.set()
    a.folds(0)
    assert not a.errors
