"""Batches are sent until they are acknowledged, in order, with the same bytes; losses are counted and logged."""

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

import pipeline.metrics as m
import pipeline.publisher.batching as sealing
from pipeline.core.codec import decode_batch
from pipeline.core.record import Batch
from pipeline.core.sequence import GAP_COUNT_MAX
from pipeline.errors import BadRecord, Fenced, GroupsRefused, Invalid, NotReady, PipelineError, Unavailable
from pipeline.ports import Message
from tests.publisher.modes import MODES, SPOOL, kept_count, settings_of
from tests.publisher.spool.support import Task, as_kill_leaves_it, claim
from tests.publisher.support import FaultyLog, Meter, batches, fold, partition_of, publisher, stalled, wait_until

AWAY = Unavailable("away")


@pytest.mark.parametrize("seed", range(2))
def test_a_batch_is_sent_again_with_the_same_bytes_and_in_order(seed: int) -> None:
    """A sequence has the same content in every attempt, and the sequences of a partition rise.

    Everything below the floor of a batch was accepted before it was sealed, and nothing above it, so that gaps close.
    """
    rng = random.Random(seed)
    accepted: dict[tuple[int, int], int] = {}

    def fate(n: int, batch: Batch) -> PipelineError | str:
        chosen = AWAY if batch.sequence % 3 == 1 and n % 4 else rng.choice(["kept", "unheard", AWAY, NotReady("starting")])
        if chosen == "kept":
            accepted[batch.partition, batch.sequence] = n
        return chosen

    log, meter = FaultyLog(fate), Meter()
    pub = publisher(log, meter, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    for i in range(400):
        view.add(i, a=str(i % 13))
        if i % 3 == 0:
            time.sleep(0.001)
    pub.flush(20)
    contents, floors, first_sent = defaultdict(set), dict[tuple[int, int], int](), dict[tuple[int, int], int]()
    for n, attempt in enumerate(log.attempts):
        sequences = defaultdict(list)
        for batch, value in zip(map(decode_batch, attempt), attempt, strict=True):
            key = batch.partition, batch.sequence
            sequences[batch.partition].append(batch.sequence)
            contents[key].add(value)
            floors[key] = batch.floor
            first_sent.setdefault(key, n)
        assert all(mine == sorted(set(mine)) for mine in sequences.values())
    assert all(len(values) == 1 for values in contents.values())
    assert accepted.keys() == contents.keys()
    for partition in range(4):
        mine = [sequence for at, sequence in contents if at == partition]
        assert sorted(mine) == list(range(len(mine))), "sequences rise by one"
    for (partition, sequence), floor in floors.items():
        assert all(accepted[partition, below] < first_sent[partition, sequence] for below in range(floor))
    assert max(floors.values()) > 5, "the floor rises"
    assert any(floor < sequence for (_, sequence), floor in floors.items()), "the log was not bad enough"
    views = fold(log.log)
    assert views.total("v") == sum(range(400))
    assert not views.dead
    assert views.duplicates == len(batches(log.log)) - len(contents) > 0
    assert meter.of(m.PUBLISHER_RETRIES) > 0
    assert meter.of(m.PUBLISHER_BATCHES) == len(contents) == pub.stats()["batches"]
    pub.close()


def test_a_partition_that_is_away_does_not_hold_up_the_others() -> None:
    """A few batches wait for an absent partition, more than one attempt can carry; batches for others are sent meanwhile."""
    log = FaultyLog()
    log.fate = lambda n, batch: AWAY if batch.partition == 0 else "kept"
    pub = publisher(log, flush_interval_ms=1)
    view = pub.last("v", labels=("a",))
    labels = defaultdict(list)
    for i in range(1_000):
        labels[partition_of(view, str(i))].append(str(i))
    stuck, there = labels[0][:120], labels[1][:20]
    for label in stuck:
        view.set("x" * 60_000, 1, a=label)
    wait_until(lambda: sum(len(batch.value) for batch in pub._runtime.sender.outbox.pending()) > 6 * 2**20)
    waiting_count = pub.stats()["waiting"]
    for i in range(50):
        for label in (*there, *stuck[:20]):
            view.set(f"{label} {i}", 2 + i, a=label)
        if i % 5 == 0:
            wait_until(lambda i=i: fold(log.log).of("v") == {(label,): f"{label} {i}" for label in there})  # type: ignore[misc]
    wait_until(lambda: {batch.partition for batch in pub._runtime.sender.outbox.pending()} == {0})
    assert pub.stats()["waiting"] <= max(waiting_count, 16 + len(stuck))
    with pytest.raises(Unavailable, match=r"not acknowledged .* away"):
        pub.flush(0.05)
    log.fate = lambda n, batch: "kept"
    pub.flush()  # which waits for what could not be drained at once, too
    last = {(label,): f"{label} 49" for label in (*there, *stuck[:20])}
    assert fold(log.log).of("v") == {(label,): "x" * 60_000 for label in stuck} | last
    pub.close()


def test_what_is_sent_stays_within_the_gaps_that_a_task_remembers() -> None:
    """Thousands of batches wait, every other one failing, and none is refused for its gaps."""
    rng = random.Random(5)
    log = FaultyLog(partitions=1)
    log.away = True
    pub = publisher(log, flush_interval_ms=3_600_000, batch_bytes_max=1_024, buffer_bytes_max=2**30)
    view = pub.last("v", labels=("a",))
    for i in range(3_000):
        view.set("x" * 1_000, 1, a=str(i))
    log.away = False
    log.fate = lambda n, batch: "kept" if (batch.sequence % 2 and n < 30) or rng.random() < 0.4 else AWAY
    pub.flush(30)
    assert pub.stats()["batches"] > 2 * GAP_COUNT_MAX
    highest = [max(decode_batch(v).sequence for v in attempt) for attempt in log.attempts]
    lowest = [min(decode_batch(v).sequence for v in attempt) for attempt in log.attempts]
    assert all(high - low < GAP_COUNT_MAX for low, high in zip(lowest, highest, strict=True))
    views = fold(log.log)
    assert not views.dead
    assert len(views.of("v")) == 3_000
    pub.close()


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("error", [Invalid("too large"), BadRecord("no batch"), Fenced("another")])
def test_a_rejected_batch_is_counted_and_said_once(error: PipelineError, together: bool) -> None:
    """The batch is given up at once; the next flush raises, the one after that does not; other batches are not affected.

    If the log refuses all because of one, they are asked for one by one.
    """
    log, meter, most = FaultyLog(), Meter(), 1 if together else 1_000
    pub = publisher(log, meter, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    for i in range(40):
        view.add(1, a=str(i))
    log.fate = lambda n, batch: error if batch.partition == 1 or len(log.attempts[n]) > most else "kept"
    with pytest.raises(Invalid, match=rf"1 batches were rejected and are lost: batch 0 for partition 1: {error}"):
        pub.flush()
    assert meter.of(m.PUBLISHER_DROPPED, "rejected") == pub.stats()["rejected"] == 1
    assert pub.stats()["waiting"] == 0
    log.fate = lambda n, batch: "kept"
    pub.flush()
    for i in range(40):
        view.add(10, a=str(i))
    pub.close()
    lost = [i for i in range(40) if partition_of(view, str(i)) == 1]
    assert lost
    assert fold(log.log).of("v") == {(str(i),): 10 if i in lost else 11 for i in range(40)}


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("first", ["unheard", "away", "refused with others"])
def test_what_is_said_of_a_rejected_batch_is_known(first: str, groups: bool) -> None:
    """A rejected batch may have been counted if an earlier try was not answered, but not if none was sent."""
    log = FaultyLog(partitions=2)
    pub = publisher(log, flush_interval_ms=3_600_000)
    view, other = pub.sum("v", labels=("a",)), pub.sum("w", labels=("a",))
    for i in range(10):
        view.add(1, a=str(i))
        other.add(1, a=str(i))
    error = GroupsRefused("no room", [(0, "v", "no room")], 0) if groups else Invalid("too large")

    def refuse(n: int, batch: Batch) -> PipelineError | str:
        is_fine = batch.partition or [group.definition.view for group in batch.groups] == ["w"]
        return "kept" if is_fine else error

    log.away = first == "away"
    log.fate = (lambda n, batch: "unheard") if first == "unheard" else refuse
    if first != "refused with others":
        with pytest.raises(Unavailable):
            pub.flush(0.05)
        wait_until(lambda: log.attempts or log.away)
    log.away, log.fate = False, refuse
    with pytest.raises(Invalid) as caught:
        pub.flush()
    perhaps, counted = " unless they were counted before" if first == "unheard" else "", fold(log.log).total("v")
    what = "1 groups of batch" if groups else "batch"
    said = str(caught.value)
    assert said.startswith(f"1 batches were rejected and are lost{perhaps}: {what} 0 for partition 0")
    assert said.endswith("; an earlier try of it was not answered, and may have been counted") == bool(perhaps)
    assert (counted == 10) == bool(perhaps)  # and it was
    pub.flush()
    pub.close()


def test_rejections_are_remembered_in_bounded_memory() -> None:
    """Rejections that no flush has raised are remembered as a number and a few reasons."""
    log = FaultyLog(lambda n, batch: Invalid("no"), partitions=1)
    pub = publisher(log, flush_interval_ms=1)
    cell = pub.sum("v").labels()
    for i in range(1, 21):
        cell.add(1)
        wait_until(lambda i=i: pub.stats()["rejected"] >= i)  # type: ignore[misc]
    with pytest.raises(Invalid, match=r"^20 batches") as caught:
        pub.flush()
    assert len(str(caught.value)) < 500
    pub.close()


@pytest.mark.parametrize("answers", ["raises", "nonsense", "short"])
def test_a_writer_with_a_bug_loses_nothing(answers: str) -> None:
    """An invalid answer is no acknowledgement: the same bytes are sent again."""
    log = FaultyLog()
    append = log.append

    def odd(messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        if len(log.attempts) >= 3:
            return append(messages, timeout_s=timeout_s)
        log.attempts.append([message.value or b"" for message in messages])
        if answers == "raises":
            raise ConnectionError("a bug")
        return [] if answers == "short" else [None] * len(messages)  # type: ignore[list-item]

    log.append = odd  # type: ignore[method-assign]
    with publisher(log) as pub:
        pub.sum("v").add(5)
        pub.flush()
    assert len(log.attempts) == 4
    assert len({tuple(attempt) for attempt in log.attempts}) == 1
    assert fold(log.log).of("v") == {(): 5}


def test_partitions_added_between_flushes_are_used() -> None:
    """Sealed batches keep their partition, new ones use all; reads merge a series' parts."""
    log = FaultyLog(partitions=8)
    log.partition_total = 2
    pub = publisher(log, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))

    def add(value: int) -> None:
        for i in range(50):
            view.add(value, a=str(i))

    add(1)
    assert set(pub.flush().next_offsets) <= {0, 1}
    log.fate = lambda n, batch: AWAY
    add(10)
    with pytest.raises(Unavailable):
        pub.flush(0.05)
    log.partition_total = 8
    add(100)
    log.fate = lambda n, batch: "kept"
    assert len(pub.flush().next_offsets) > 4
    views = fold(log.log)
    assert views.of("v") == {(str(i),): 111 for i in range(50)}
    assert not views.dead
    pub.close()


def test_the_token_covers_everything_acknowledged() -> None:
    """A token has the offset behind the last batch of each partition, in whatever order the acknowledgements came."""
    log = FaultyLog(lambda n, batch: AWAY if (n + batch.sequence) % 2 else "kept")
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    for i in range(20):  # some batches for each partition
        for j in range(20):
            view.add(1, a=str(j))
        wait_until(lambda i=i: pub.stats()["batches"] > i)  # type: ignore[misc]
    token = pub.flush()
    ends = {p: log.log.watermarks("deltas", p).end_offset for p in range(4)}
    assert token.next_offsets == {p: end for p, end in ends.items() if end}
    assert pub.flush() == token == pub.close()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("broken", ["encode_drafted", "Sealed", "metrics"])
def test_what_fails_in_a_flush_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str, mode: str
) -> None:
    """Drained states are kept, and sealed once by a later flush, wherever sealing runs out of memory, or counting fails.

    Until then the spool does not take them for sealed.
    """
    calls, stuck = 0, True

    def failing(real: Callable[..., object]) -> Callable[..., object]:
        def fail(*args: object, **kwargs: object) -> object:
            nonlocal calls
            if broken != "metrics" or args[0] is m.PUBLISHER_DELTAS:
                calls += 1
                if (stuck and (calls > 1 or broken == "metrics")) or calls % 3 == 2:  # of what was drained a part is sealed
                    raise MemoryError
            return real(*args, **kwargs)

        return fail

    log, meter, is_kept = FaultyLog(), Meter(), SPOOL in MODES[mode].values()
    pub = publisher(log, meter, flush_interval_ms=40, snapshot_interval_ms=2, **settings_of(mode, tmp_path))
    view = pub.sum("v", labels=("a",))
    for i in range(40):
        view.add(1, a=str(i))
    pub.flush()
    wait_until(lambda: not is_kept or not kept_count(tmp_path / "spool"))
    log.fate = lambda n, batch: AWAY
    place, name = (meter, "inc") if broken == "metrics" else (sealing, broken)
    monkeypatch.setattr(place, name, failing(getattr(place, name)))
    with stalled(pub):
        for i in range(40):
            view.add(10, a=str(i))
            view.add(100, a=str(i))
    wait_until(lambda: calls > (0 if broken == "metrics" else 10))
    if is_kept and broken != "metrics":
        [slot] = (tmp_path / "spool").glob("*[0-9a-f]")
        task = Task()
        task.finish(claim(as_kill_leaves_it(slot, tmp_path / "copy")))
        assert sum(task.states.values()) == 40 * 110
    stuck, log.fate = False, lambda n, batch: "kept"
    pub.flush(20)
    monkeypatch.undo()
    pub.close()
    views = fold(log.log)
    assert views.of("v") == {(str(i),): 111 for i in range(40)}
    assert views.duplicates == 0
