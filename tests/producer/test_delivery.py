"""Batches are sent until they are acknowledged, in order, with the same bytes; what is lost is counted and said."""

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence

import pytest

import pipeline.metrics as m
import pipeline.publisher.batching as sealing
from pipeline.adapters.clock import SystemClock
from pipeline.core.codec import decode_batch
from pipeline.core.record import Batch
from pipeline.core.sequence import GAP_COUNT_MAX
from pipeline.errors import BadRecord, Fenced, GroupsRefused, Invalid, NotReady, PipelineError, Unavailable
from pipeline.metrics import Metric
from pipeline.ports import Message
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings
from tests.producer.support import FaultyLog, Meter, batches, fold, partition_of, publisher, wait_until

AWAY = Unavailable("away")


@pytest.mark.parametrize("seed", range(3))
def test_a_batch_is_sent_again_with_the_same_bytes_and_in_order(seed: int) -> None:
    """Whether it was appended or not: a sequence has one content; within an attempt and a partition sequences rise."""
    rng = random.Random(seed)
    log = FaultyLog(lambda n, batch: rng.choice(["kept", "unheard", AWAY, NotReady("starting")]))
    meter = Meter()
    pub = publisher(log, meter, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    for i in range(400):
        view.add(i, a=str(i % 13))
        if i % 5 == 0:
            time.sleep(0.001)
    pub.flush(20)
    contents = defaultdict(set)
    for attempt in log.attempts:
        found = [decode_batch(value) for value in attempt]
        for batch, value in zip(found, attempt, strict=True):
            contents[batch.partition, batch.sequence].add(value)
        for partition in range(4):
            sequences = [batch.sequence for batch in found if batch.partition == partition]
            assert sequences == sorted(set(sequences))
    assert all(len(values) == 1 for values in contents.values())
    for partition in range(4):
        mine = [sequence for at, sequence in contents if at == partition]
        assert sorted(mine) == list(range(len(mine))), "sequences rise by one"
    views = fold(log.log)
    assert views.total("v") == sum(range(400))
    assert not views.dead
    assert views.duplicates == len(batches(log.log)) - len(contents) > 0
    assert meter.of(m.PUBLISHER_RETRIES) > 0
    assert meter.of(m.PUBLISHER_BATCHES) == len(contents) == pub.stats()["batches"]
    pub.close()


def test_the_floor_never_passes_a_batch_that_could_still_be_sent() -> None:
    """Below the floor of a batch everything was acknowledged before it was sealed; above it not, so that gaps close."""
    accepted: dict[tuple[int, int], int] = {}

    def fate(n: int, batch: Batch) -> PipelineError | str:
        if batch.sequence % 3 == 1 and n % 4:
            return AWAY
        accepted[batch.partition, batch.sequence] = n
        return "kept"

    log = FaultyLog(fate)
    with publisher(log, flush_interval_ms=1) as pub:
        view = pub.sum("v", labels=("a",))
        for i in range(300):
            view.add(1, a=str(i % 5))
            if i % 3 == 0:
                time.sleep(0.001)
    first_sent: dict[tuple[int, int], int] = {}
    floors: dict[tuple[int, int], int] = {}
    for n, attempt in enumerate(log.attempts):
        for batch in map(decode_batch, attempt):
            first_sent.setdefault((batch.partition, batch.sequence), n)
            floors[batch.partition, batch.sequence] = batch.floor
    assert accepted.keys() == first_sent.keys()
    for (partition, sequence), floor in floors.items():
        assert all(accepted[partition, below] < first_sent[partition, sequence] for below in range(floor))
    assert max(floors.values()) > 10, "the floor rises"
    assert any(floor < sequence for (_, sequence), floor in floors.items()), "the log was not bad enough"
    assert fold(log.log).total("v") == 300


def test_a_batch_that_fails_while_later_ones_succeed_is_folded_once() -> None:
    """The one in the middle is sent again, and it is new to the task."""
    log = FaultyLog(partitions=1)
    pub = publisher(log, flush_interval_ms=1)
    cell = pub.sum("v").labels()
    log.fate = lambda n, batch: AWAY if batch.sequence == 2 else "kept"
    for _ in range(8):
        before = pub._running.delivery.outbox.next_sequences().get(0, 0)
        cell.add(1)
        wait_until(lambda before=before: pub._running.delivery.outbox.next_sequences().get(0, 0) > before)  # type: ignore[misc]
    wait_until(lambda: pub.stats()["batches"] == 7)
    with pytest.raises(Unavailable):
        pub.flush(0.01)
    log.fate = lambda n, batch: "kept"
    pub.flush()
    assert [batch.sequence for batch in batches(log.log)] == [0, 1, 3, 4, 5, 6, 7, 2]
    assert fold(log.log).of("v") == {(): 8}
    pub.close()


def test_a_partition_that_is_away_does_not_hold_up_the_others() -> None:
    """Its batches wait, few of them; other partitions are sent and acknowledged meanwhile, however much waits."""
    log = FaultyLog()
    log.fate = lambda n, batch: AWAY if batch.partition == 0 else "kept"
    pub = publisher(log, flush_interval_ms=1, batch_bytes_max=1_024)
    view = pub.last("v", labels=("a",))
    last: dict[str, str] = {}
    for i in range(200):
        for j in range(20):
            view.set(text := f"{i} {'x' * 900}", i, a=str(j))
            last[str(j)] = text
        time.sleep(0.001)
    wait_until(lambda: len({s for (s,) in fold(log.log).of("v")} & last.keys()) > 10)
    stuck = [label for label in last if partition_of(view, label) == 0]
    assert stuck
    wait_until(lambda: fold(log.log).of("v") == {(s,): text for s, text in last.items() if s not in stuck})
    assert {batch.partition for batch in pub._running.delivery.outbox.pending()} == {0}
    assert pub.stats()["waiting"] <= 16 + len(stuck)
    with pytest.raises(Unavailable, match=r"not acknowledged .* away"):
        pub.flush(0.05)
    log.fate = lambda n, batch: "kept"
    pub.close()
    assert fold(log.log).of("v") == {(s,): text for s, text in last.items()}


def test_a_partition_that_is_away_leaves_room_in_every_attempt() -> None:
    """More waits for it than one attempt can carry; what comes later for another partition is sent all the same."""
    log = FaultyLog()
    log.fate = lambda n, batch: AWAY if batch.partition == 0 else "kept"
    pub = publisher(log, flush_interval_ms=1)
    view = pub.last("v", labels=("a",))
    by_partition: dict[int, list[str]] = {0: [], 1: []}
    for i in range(1_000):
        by_partition.setdefault(partition_of(view, str(i)), []).append(str(i))
    stuck = by_partition[0][:120]
    for label in stuck:
        view.set("x" * 60_000, 1, a=label)
    wait_until(lambda: sum(len(batch.value) for batch in pub._running.delivery.outbox.pending()) > 6 * 2**20)
    view.set("here", 1, a=by_partition[1][0])
    wait_until(lambda: fold(log.log).of("v") == {(by_partition[1][0],): "here"}, 5)
    log.fate = lambda n, batch: "kept"
    pub.close()
    assert len(fold(log.log).of("v")) == 121


def test_what_is_sent_stays_within_the_gaps_that_a_task_remembers() -> None:
    """Thousands of waiting batches, every other one failing: none is ever refused for its gaps."""
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


@pytest.mark.parametrize("error", [Invalid("too large"), BadRecord("no batch"), Fenced("another")])
def test_a_rejected_batch_is_counted_and_said_once(error: PipelineError) -> None:
    """It is given up at once; the next flush raises, the one after that does not; other batches are not affected."""
    log, meter = FaultyLog(), Meter()
    pub = publisher(log, meter, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    for i in range(40):
        view.add(1, a=str(i))
    log.fate = lambda n, batch: error if batch.partition == 1 else "kept"
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
    """It may have been counted if an earlier try may have got into the log; not if none was sent, or all were answered."""
    log = FaultyLog(partitions=2)
    pub = publisher(log, flush_interval_ms=3_600_000)
    view, other = pub.sum("v", labels=("a",)), pub.sum("w", labels=("a",))
    for i in range(10):
        view.add(1, a=str(i))
        other.add(1, a=str(i))
    error = GroupsRefused("no room", [(0, "v", "no room")], 0) if groups else Invalid("too large")
    log.away = first == "away"
    log.fate = lambda n, batch: "kept" if batch.partition or decode_batch_views(batch) == ["w"] else error
    if first != "refused with others":
        if first == "unheard":
            log.fate = lambda n, batch: "unheard"
        with pytest.raises(Unavailable):
            pub.flush(0.05)
        log.away = False
        log.fate = lambda n, batch: "kept" if batch.partition or decode_batch_views(batch) == ["w"] else error
    with pytest.raises(Invalid) as caught:
        pub.flush()
    said = str(caught.value)
    what = "1 groups of batch" if groups else "batch"
    if first == "unheard":
        assert said.startswith(
            f"1 batches were rejected and are lost unless they were counted before: {what} 0 for partition 0"
        )
        assert said.endswith("; an earlier try of it was not answered, and may have been counted")
        assert fold(log.log).total("v") == 10, "and it was"
    else:
        assert said.startswith(f"1 batches were rejected and are lost: {what} 0 for partition 0")
        assert "may have been counted" not in said
        assert fold(log.log).total("v") < 10
    pub.flush()
    pub.close()


def decode_batch_views(batch: Batch) -> list[str]:
    return [group.definition.view for group in batch.groups]


class LaterClock(SystemClock):
    """The machine's clocks, days later when it is told so."""

    days = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.days * 86_400_000

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.days * 86_400


@pytest.mark.parametrize("sent", [False, True])
def test_what_was_never_sent_is_never_held_back(sent: bool) -> None:
    """A try that ends before anything is sent, because nobody says the topic's id, can't have got into the log."""
    log, clock = FaultyLog(partitions=1), LaterClock()
    asked = threading.Event()

    def nobody_says(topic: str) -> str:
        asked.set()
        raise AWAY

    topic_id = log.topic_id
    if sent:
        log.fate = lambda n, batch: AWAY
    else:
        log.topic_id = nobody_says  # type: ignore[method-assign]
    settings = PublisherSettings(flush_interval_ms=1, retry_backoff_ms=1, retry_backoff_max_ms=5)
    pub = BasePublisher(log, clock, settings, Meter())
    pub.sum("v").add(1)
    wait_until(lambda: log.attempts if sent else asked.is_set())
    clock.days = 30
    log.fate, log.topic_id = (lambda n, batch: "kept"), topic_id  # type: ignore[method-assign]
    if sent:
        with pytest.raises(Unavailable, match="held back"):
            pub.close(1)
        assert not batches(log.log)
    else:
        pub.close(20)
        assert fold(log.log).total("v") == 1


def test_a_log_that_refuses_all_because_of_one_costs_one() -> None:
    """Batches that are refused together are asked for one by one before any is given up."""
    log, meter = FaultyLog(), Meter()
    append = log.append

    def all_or_none(messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        if any(decode_batch(message.value or b"").partition == 2 for message in messages):
            log.attempts.append([])
            return [Invalid("a record is too large")] * len(messages)
        return append(messages, timeout_s=timeout_s)

    log.append = all_or_none  # type: ignore[method-assign]
    pub = publisher(log, meter, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    for i in range(40):
        view.add(1, a=str(i))
    with pytest.raises(Invalid, match=r"1 batches .* partition 2: a record is too large"):
        pub.flush()
    assert meter.of(m.PUBLISHER_DROPPED, "rejected") == 1
    kept = [i for i in range(40) if partition_of(view, str(i)) != 2]
    assert fold(log.log).of("v") == {(str(i),): 1 for i in kept}
    pub.close()


def test_rejections_are_remembered_in_bounded_memory() -> None:
    """Without a flush they add up to a number, and a few reasons."""
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
    """An answer that is none is no acknowledgement: the same bytes are sent again."""
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
    """Sealed batches keep their partition, new ones use all; reads merge what a series has in each."""
    log = FaultyLog(partitions=8)
    log.partition_total = 2
    pub = publisher(log, flush_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    for i in range(50):
        view.add(1, a=str(i))
    first = pub.flush()
    assert set(first.next_offsets) <= {0, 1}
    log.fate = lambda n, batch: AWAY
    for i in range(50):
        view.add(10, a=str(i))
    with pytest.raises(Unavailable):
        pub.flush(0.05)
    log.partition_total = 8
    for i in range(50):
        view.add(100, a=str(i))
    log.fate = lambda n, batch: "kept"
    second = pub.flush()
    assert len(second.next_offsets) > 4
    views = fold(log.log)
    assert views.of("v") == {(str(i),): 111 for i in range(50)}
    assert not views.dead
    pub.close()


def test_the_token_covers_everything_acknowledged() -> None:
    """Its offsets are those behind the last batch of each partition, whatever order the acknowledgements came in."""
    log = FaultyLog(lambda n, batch: AWAY if (n + batch.sequence) % 2 else "kept")
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    for i in range(300):
        view.add(1, a=str(i % 20))
    token = pub.flush()
    ends = {p: log.log.watermarks("deltas", p).end_offset for p in range(4)}
    assert token.next_offsets == {p: end for p, end in ends.items() if end}
    assert pub.flush() == token == pub.close()


@pytest.mark.parametrize("broken", ["encode_drafted", "Sealed"])
def test_a_shortage_of_memory_loses_nothing(monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """Wherever sealing runs out of memory, what was drained is kept, and sealed by a later flush, once."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=5)
    view = pub.sum("v", labels=("a",))
    for i in range(40):
        view.add(1, a=str(i))
    pub.flush()
    failures = 0
    real: Callable[..., object] = getattr(sealing, broken)

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal failures
        failures += 1
        if failures % 3:
            raise MemoryError
        return real(*args, **kwargs)

    monkeypatch.setattr(sealing, broken, failing)
    for i in range(40):
        view.add(10, a=str(i))
        view.add(100, a=str(i))
    pub.flush(20)
    assert failures >= 3
    monkeypatch.undo()
    pub.close()
    views = fold(log.log)
    assert views.of("v") == {(str(i),): 111 for i in range(40)}
    assert views.duplicates == 0


def test_metrics_that_fail_lose_nothing() -> None:
    """A flush that fails between draining and counting has kept what it drained."""

    class Failing(Meter):
        failures = 0

        def inc(self, metric: Metric, amount: float = 1, *labels: object) -> None:
            if metric is m.PUBLISHER_DELTAS and self.failures < 3:
                self.failures += 1
                raise RuntimeError("metrics are away")
            super().inc(metric, amount, *labels)

    log, meter = FaultyLog(), Failing()
    pub = publisher(log, meter, flush_interval_ms=5)
    view = pub.sum("v", labels=("a",))
    for i in range(200):
        view.add(1, a=str(i % 7))
        if i % 50 == 0:
            pub.flush()
    pub.close()
    assert meter.failures == 3
    views = fold(log.log)
    assert views.total("v") == 200
    assert views.duplicates == 0


def test_a_flush_while_the_sender_waits_longest_is_not_lost() -> None:
    """A slow append delays its flush and the next, no more."""
    log = FaultyLog()
    pub = publisher(log, flush_interval_ms=1)
    cell = pub.sum("v").labels()
    log.gate.clear()
    cell.add(1)
    wait_until(lambda: log.attempts)
    tokens = []
    threads = [threading.Thread(target=lambda: tokens.append(pub.flush(20))) for _ in range(4)]
    for thread in threads:
        thread.start()
    cell.add(2)
    time.sleep(0.02)
    assert not tokens
    log.gate.set()
    for thread in threads:
        thread.join(20)
    assert len(tokens) == 4
    pub.close()
    assert fold(log.log).of("v") == {(): 3}
