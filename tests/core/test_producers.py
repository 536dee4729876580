"""Producers: a task's memory of them, however little of it fits into memory, and when it forgets them."""

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pipeline.core.commit import Counts
from pipeline.core.limits import TaskLimits
from pipeline.core.overlay import Producers
from pipeline.core.record import Definition, Group, producer_key
from pipeline.core.sequence import EPOCH_STEP_MAX, SEQUENCE_STEP_MAX, Folded
from pipeline.core.task import Phase
from pipeline.errors import BadRecord
from tests.core.driver import Shell, batch, group, totals
from tests.core.strategies import records
from tests.support import examples

V = Definition("v", "sum", ("a",))


def add(value: int = 1, label: str = "x") -> Group:
    return group(V, {(label,): value})


class SmallMemory(RuleBasedStateMachine):
    """Many producers send batches once or more, in any order, through a task whose memory holds next to none of them.

    Law: each batch counts once, whatever is cached, committed, under way, crashed or read ahead of its fold.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shell = Shell()
        self.sent: set[tuple[str, int]] = set()
        self.readings: list[tuple[Any, list[bytes | None]]] = []

    @initialize(producers_max=st.sampled_from([0, 1, 2, 3, 100]), cache_entries_max=st.sampled_from([0, 100]))
    def start(self, producers_max: int, cache_entries_max: int) -> None:
        self.shell = Shell(TaskLimits(producers_max=producers_max, cache_entries_max=cache_entries_max))

    @rule(sends=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3)), min_size=1, max_size=4))
    def fold(self, sends: list[tuple[str, int]]) -> None:
        self.finish_readings()
        self.shell.fold(*(batch(sequence, add(), producer_id=name) for name, sequence in sends))
        self.sent.update(sends)

    @rule(sends=st.lists(st.tuples(st.sampled_from("abcde"), st.integers(0, 3)), min_size=1, max_size=3))
    def read_ahead(self, sends: list[tuple[str, int]]) -> None:
        """Read and look up records before the earlier ones are folded."""
        shell, start = self.shell, len(self.shell.log)
        shell.append(*(batch(sequence, add(), producer_id=name) for name, sequence in sends))
        reading = shell.task.read(records({i: shell.log[i] for i in range(start, len(shell.log))}, len(shell.log)))
        self.readings.append((reading, [shell.store.get(key) for key in reading.producer_keys]))
        self.sent.update(sends)

    @rule()
    def finish_readings(self) -> None:
        for reading, found in self.readings:
            self.shell.task.fold(reading, found, now_ms=self.shell.now_ms)
        self.readings = []

    @rule()
    def refold(self) -> None:
        self.finish_readings()
        self.shell.refold()

    @rule()
    def crash(self) -> None:
        self.readings = []
        self.shell.restart()
        self.shell.fold()

    @rule(step=st.sampled_from(["freeze", "prepare", "write", "committed"]))
    def step(self, step: str) -> None:
        legal = {"freeze": Phase.FOLDING, "prepare": Phase.FROZEN, "write": Phase.COMMITTING, "committed": Phase.COMMITTING}
        if self.shell.task.phase is legal[step]:
            getattr(self.shell, step)()

    @rule()
    def sweep(self) -> None:
        """Sweep, and forget nobody."""
        self.shell.sweep()

    def teardown(self) -> None:
        self.finish_readings()
        for step in ("prepare", "committed"):
            self.step(step)
        for _ in range(2):  # as the task is, and as the next one begins
            self.shell.commit()
            assert sum(totals(self.shell)) == len(self.sent) if self.sent else self.shell.entries("v") == []
            self.shell.restart()
            self.shell.fold(*self.shell.log)

    @invariant()
    def no_batch_is_refused(self) -> None:
        assert self.shell.task.counts.records_bad == 0


SmallMemory.TestCase.settings = settings(max_examples=examples(150), stateful_step_count=30, deadline=None)
TestSmallMemory = SmallMemory.TestCase


class Cached(RuleBasedStateMachine):
    """The cache against a plain dict: its entries are the newest, and it holds no more than its limit and one."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = Producers(0)
        self.producers_max = 0
        self.model: dict[str, Folded] = {}

    @initialize(producers_max=st.integers(0, 6))
    def start(self, producers_max: int) -> None:
        self.cache, self.producers_max = Producers(producers_max), producers_max

    @rule(name=st.sampled_from("abcdefgh"), seen_at_ms=st.integers(0, 9))
    def keep(self, name: str, seen_at_ms: int) -> None:
        self.model[name] = Folded(seen_at_ms=seen_at_ms)
        self.cache.keep(name, self.model[name])
        assert self.cache[name] is self.model[name], "what was kept last is there, even if there is room for none"

    @rule(name=st.sampled_from("abcdefgh"))
    def forget(self, name: str) -> None:
        self.model.pop(name, None)
        self.cache.keep(name, None)
        assert name not in self.cache

    @rule(name=st.sampled_from("abcdefgh"))
    def look(self, name: str) -> None:
        if name in self.cache:
            assert self.cache[name] is self.model[name]
            assert name in self.cache

    @invariant()
    def it_is_bounded(self) -> None:
        assert sum(name in self.cache for name in "abcdefgh") <= max(self.producers_max, 2)


Cached.TestCase.settings = settings(max_examples=examples(100), stateful_step_count=40, deadline=None)
TestCached = Cached.TestCase


def test_producers_that_the_task_knows_are_not_looked_up() -> None:
    """The store is asked only for producers that are not in the overlay, in a commit under way, or in the cache."""
    shell = Shell()
    first = shell.task.read(records({0: batch(0, add())}, 1))
    assert first.producer_keys == [producer_key("p")]
    shell.fold(batch(0, add()), batch(0, add(), producer_id="q"))
    for step in (lambda: None, shell.freeze, shell.prepare, shell.committed):
        step()
        assert shell.task.read(records({2: batch(1, add()), 3: batch(1, add(), producer_id="q")}, 4)).producer_keys == []
    shell.restart()
    reading = shell.task.read(records({2: batch(1, add()), 3: batch(2, add()), 4: b"?"}, 5))
    assert reading.producer_keys == [producer_key("p")]
    assert shell.task.read(records({0: batch(0, add(), producer_id="never")}, 1)).producer_keys == [], "folded before"


# Forgetting

DAY_MS = 86_400_000


def at(shell: Shell, log_ms: int, now_ms: int, *values: bytes) -> None:
    """Fold values, or an empty batch, at a time of the log and of the worker; then commit with a sweep."""
    shell.now_ms = now_ms
    shell.hand_over_at(log_ms, *values)
    shell.sweep()
    shell.commit()


def test_silent_producers_are_forgotten() -> None:
    """A producer is forgotten once its time is over by both clocks; then a batch of it would count again."""
    shell = Shell(TaskLimits(producer_ttl_ms=1_000))
    at(shell, 5_000, 5_000, batch(0, add()))
    at(shell, 6_000, 6_000)
    assert shell.has_producer("p"), "its time is not over yet"
    at(shell, 6_001, 6_000)
    assert shell.has_producer("p"), "not by the worker's clock"
    at(shell, 6_001, 6_001)
    assert not shell.has_producer("p")
    assert shell.task.counts.producers_forgotten == 1
    assert shell.task.counts.records_bad == 0
    at(shell, 6_002, 6_002, batch(0, add()))
    assert totals(shell) == [2]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("log_jump", "clock_jump"), [(8 * DAY_MS, 0), (0, 8 * DAY_MS), (-8 * DAY_MS, 8 * DAY_MS), (8 * DAY_MS, 8 * DAY_MS)]
)
def test_one_wrong_clock_forgets_nobody(log_jump: int, clock_jump: int, restart: bool) -> None:
    """A batch that is sent again counts once, after one record or one machine that is eight days ahead."""
    shell = Shell()
    now = 100 * DAY_MS
    at(shell, now, now, batch(0, add()))
    at(shell, now + log_jump, now)
    if restart:
        shell.restart()
    at(shell, now, now + clock_jump)
    if restart:
        shell.restart()
    at(shell, now + 5, now + 5, batch(0, add()))
    assert totals(shell) == [1]
    assert shell.task.counts.producers_forgotten == 0


def test_a_producer_lives_by_the_later_clock() -> None:
    """A producer seen when one clock was ahead is kept until both have passed that time plus its time to live."""
    for log_ms, now_ms in ((9_000, 5_000), (5_000, 9_000)):
        shell = Shell(TaskLimits(producer_ttl_ms=1_000))
        at(shell, log_ms, now_ms, batch(0, add()))
        at(shell, 10_000, 10_000)
        assert shell.has_producer("p")
        at(shell, 10_001, 10_001)
        assert not shell.has_producer("p")


def test_time_to_live_starts_anew_with_each_batch() -> None:
    """A producer that goes on sending is not forgotten, not even by the commit that has its batch."""
    shell = Shell(TaskLimits(producer_ttl_ms=1_000))
    for i in range(5):
        at(shell, 5_000 + 900 * i, 5_000 + 900 * i, batch(i, add()))
    at(shell, 20_000, 20_000, batch(5, add()))
    assert shell.has_producer("p")
    shell.restart()
    at(shell, 20_500, 20_500, batch(5, add()))
    assert shell.task.counts == Counts(batches_duplicate=1)


def test_a_producer_that_returns_while_its_tombstone_is_committed_is_kept() -> None:
    """A producer forgotten in one commit and folded again during it is in the next commit again."""
    shell = Shell(TaskLimits(producer_ttl_ms=1_000))
    at(shell, 5_000, 5_000, batch(0, add()))
    shell.now_ms = 9_000
    shell.hand_over_at(9_000)
    shell.sweep()
    shell.freeze()
    shell.hand_over_at(9_001, batch(3, add()))
    shell.prepare()
    shell.committed()
    assert not shell.has_producer("p")
    shell.commit()
    assert shell.has_producer("p")
    shell.restart()
    shell.hand_over_at(9_002, batch(3, add()))
    assert shell.task.counts == Counts(batches_duplicate=1)


@pytest.mark.parametrize("freeze", [False, True])
def test_a_sweep_forgets_nobody_who_has_sent_since(freeze: bool) -> None:
    """A producer with an old entry in the store, but a newer one in the overlay or in a commit, is kept."""
    shell = Shell(TaskLimits(producer_ttl_ms=1_000))
    at(shell, 5_000, 5_000, batch(0, add()))
    shell.now_ms = 9_000
    shell.hand_over_at(9_000, batch(1, add()))
    if freeze:
        shell.freeze()
    shell.sweep()
    if freeze:
        shell.prepare()
        shell.committed()
    shell.commit()
    assert shell.has_producer("p")
    shell.fold(batch(1, add()))
    assert shell.task.counts.batches_duplicate == 1
    assert shell.task.counts.producers_forgotten == 0


# Closing


def closes(shell: Shell, ms: int) -> bool:
    """Return whether the producer is forgotten within the time for closed ones."""
    at(shell, ms + 102, ms + 102)
    return not shell.has_producer("p")


CLOSING = TaskLimits(closed_producer_ttl_ms=100, producer_ttl_ms=10_000)


def test_a_closed_producer_is_forgotten_soon() -> None:
    """A closed producer is forgotten soon, but not at once: a copy of a batch may be on its way, and counts once."""
    shell = Shell(CLOSING)
    at(shell, 1_000, 1_000, batch(0, add()), batch(1, add(), closing=True))
    at(shell, 1_101, 1_101, batch(0, add()))
    assert shell.has_producer("p")
    assert totals(shell) == [2]
    assert closes(shell, 1_001)


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize(
    ("values", "closed"),
    [
        ([batch(0), batch(2, closing=True), batch(1)], True),
        ([batch(0), batch(1, closing=True), batch(2)], False),
        ([batch(0), batch(1, closing=True), batch(1, epoch=1)], False),
        ([batch(0), batch(2, closing=True), batch(1, epoch=1)], False),
        ([batch(0), batch(1, closing=True), batch(1)], True),
        ([batch(0), batch(1, closing=True), batch(2, epoch=1), batch(3, epoch=1, closing=True)], True),
    ],
)
def test_a_producer_is_closed_by_its_last_batch(values: list[bytes], closed: bool, restart: bool) -> None:
    """A late batch from before the close changes nothing; one behind it, or of a newer process, opens the producer again."""
    shell = Shell(CLOSING)
    for value in values:
        at(shell, 1_000, 1_000, value)
        if restart:
            shell.restart()
    assert closes(shell, 1_000) == closed


# Steps


@pytest.mark.parametrize(
    ("sequence", "epoch", "offset", "reason"),
    [
        (10 + SEQUENCE_STEP_MAX, 3, 50, None), (11 + SEQUENCE_STEP_MAX, 3, 50, "sequence"),
        (15 + SEQUENCE_STEP_MAX, 3, 55, None), (16 + SEQUENCE_STEP_MAX, 3, 55, "sequence"),
        (2**62, 3, 49, None), (2**62, 3, 50, "sequence"), (10, 3 + EPOCH_STEP_MAX, 50, None),
        (10, 4 + EPOCH_STEP_MAX, 50, "epoch"), (10, 2**63 - 1, 50, "epoch"),
    ],
)  # fmt: skip
def test_steps_are_bounded(sequence: int, epoch: int, offset: int, reason: str | None) -> None:
    """A sequence may rise by as many records as there were, and by those that were given up; an epoch by its own step."""
    for folded in (Folded(3, 10, [], 0, 50), Folded(3, 4, [(6, 10)], 0, 50)):
        if reason is None:
            folded.check_step(sequence, epoch, offset)
        else:
            with pytest.raises(BadRecord, match=f"{reason} .* jumps"):
                folded.check_step(sequence, epoch, offset)


@pytest.mark.parametrize(
    "stranger",
    [
        batch(2**62, floor=2**62), batch(2**63 - 2, floor=2**63 - 2), batch(1, epoch=2**63 - 1), batch(0, epoch=2**63 - 1),
        batch(2**62, producer_id="s", floor=2**62),
    ],
    ids=["floor", "last floor", "epoch", "epoch of a duplicate", "another id"],
)  # fmt: skip
@pytest.mark.parametrize("restart", [False, True])
def test_a_jump_silences_nobody(stranger: bytes, restart: bool) -> None:
    """A batch that is far ahead is refused, or changes nothing: the producer goes on, and all its batches count."""
    shell = Shell()
    shell.fold(batch(0, add(1)), stranger)
    shell.commit()
    if restart:
        shell.restart()
    shell.fold(batch(1, add(2)), batch(2, add(4), epoch=1))
    shell.commit()
    assert totals(shell) == [7]


def test_a_producer_that_gave_up_much_goes_on() -> None:
    """A producer may have given up as many batches as the step allows."""
    shell = Shell()
    shell.fold(batch(0, add(1)), batch(SEQUENCE_STEP_MAX + 2, add(2), floor=SEQUENCE_STEP_MAX + 2))
    shell.commit()
    assert totals(shell) == [3]
    assert shell.letters() == []


def test_a_duplicate_of_an_old_process_is_a_duplicate() -> None:
    """A duplicate of an old process was folded: it is dropped, without a dead letter."""
    shell = Shell()
    shell.fold(batch(0, add(1), epoch=1), batch(1, add(2), epoch=2), batch(0, add(1), epoch=1))
    shell.commit()
    assert totals(shell) == [3]
    assert shell.task.counts == Counts(batches_folded=2, entries_folded=2, batches_duplicate=1)


def test_reasons_name_no_producer() -> None:
    """A reason shows a producer's fingerprint, as its id is a secret."""
    secret = "3f1c-secret"
    shell = Shell()
    shell.fold(batch(0, add(), producer_id=secret, epoch=5))
    shell.fold(batch(1, add(), producer_id=secret, epoch=4), batch(2**62, add(), producer_id=secret, epoch=5))
    shell.fold(batch(2, add(), producer_id=secret, epoch=2**62), batch(3, add(), producer_id=secret, epoch=5, partition=1))
    shell.fold(*(batch(10 + 2 * i, producer_id=secret, epoch=5) for i in range(1_001)))
    shell.commit()
    assert len(shell.reasons()) == 5
    assert not any(secret in reason for reason in shell.reasons())
