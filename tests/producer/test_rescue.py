"""Sending what is left: each delta once, through a log that loses answers, is away, or refuses."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

from pipeline.adapters.clock import SystemClock
from pipeline.core.codec import decode_batch
from pipeline.core.record import series_prefix
from pipeline.core.sequence import Sealed
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Message
from pipeline.publisher.batching import Pending, seal
from pipeline.publisher.rescue import DrainedSlot, drain
from pipeline.publisher.spool.leftover import Leftover, leftovers
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS
from tests.producer.support import CLOCK, FaultyLog, fold, publisher
from tests.publisher.spool.support import VIEW, Recorder, suffix

SETTINGS = PublisherSettings(retry_backoff_ms=1, retry_backoff_max_ms=2)


def filled(folder: Path) -> Recorder:
    """A spool with a batch of 1 that is acknowledged, one of 2, 4 pending, and 24 in the ring."""
    recorder = Recorder(folder)
    for value in (1, 2, 4):
        items = [Pending(VIEW, suffix("a"), value)]
        batches = [] if value == 4 else seal_in(recorder, items, CLOCK.now_ms())
        recorder.spool.commit(batches, [Pending(VIEW, suffix("a"), 4, 3)] if value == 4 else (), {})
    recorder.acknowledge(next(recorder.outbox.pending()))
    for value in (8, 10, 6):
        recorder.add("a", value)
    return recorder


def seal_in(recorder: Recorder, items: list[Pending], now_ms: int, partitions: int = 1) -> list[Sealed]:
    return seal(items, recorder.outbox, partition_count=partitions, batch_bytes_max=10_000, now_ms=now_ms)


def drained(folder: Path, log: FaultyLog, timeout_s: float = 20.0) -> list[DrainedSlot]:
    return [*drain(folder, log, CLOCK, SETTINGS, timeout_s=timeout_s)]


def test_everything_left_is_sent_once(tmp_path: Path) -> None:
    """Also what was sent by the process itself, unheard, and what is answered only at the third attempt."""
    spool = filled(tmp_path / "s").spool  # 1 was acknowledged there; 30 are left, 2 of them in a batch
    log = FaultyLog(lambda n, batch: ("unheard", Unavailable("no"), "kept")[n % 3], partitions=1)
    log.log.append([Message(DELTAS, 0, None, spool.load(0, 1))], timeout_s=1)
    live = Recorder(tmp_path / "s", "q").spool
    spool.close()
    first, second = drained(tmp_path / "s", log)
    assert (first.slot, first.live, first.batch_count, first.left_count, first.error) == ("p", False, 2, 0, "")
    assert (first.epoch, first.delta_count) == (1, 6)
    assert second == DrainedSlot("q", live=True)
    views = fold(log.log)
    assert (views.total("hits"), views.dead) == (30, [])
    assert views.duplicates > 1
    assert leftovers(tmp_path / "s") == [live.path]


def test_what_is_not_sent_in_time_stays(tmp_path: Path) -> None:
    """A log that is away, or refuses, is reported; the next attempt sends all of it, with an epoch of its own."""
    spool = filled(tmp_path / "s").spool
    spool.close()
    log = FaultyLog(
        lambda n, batch: Invalid("too large") if n == 1 else Unavailable("no") if n == 0 else "kept", partitions=1
    )
    log.away = True
    [slot] = drained(tmp_path / "s", log, 0.01)
    assert (slot.left_count, slot.batch_count, slot.error) == (1, 0, "the log is away")
    log.away = False
    [slot] = drained(tmp_path / "s", log, 20.0)
    assert (slot.epoch, slot.left_count, slot.batch_count, slot.error) == (2, 2, 0, "too large")
    [slot] = drained(tmp_path / "s", log)
    assert (slot.epoch, slot.left_count, slot.batch_count, slot.error) == (3, 0, 2, "")
    assert fold(log.log).total("hits") == 30
    assert drained(tmp_path / "s", log) == []


def test_batches_that_a_task_may_have_forgotten_are_not_sent_unasked(tmp_path: Path) -> None:
    """Sealed over six days ago, they could have been folded, and would count twice."""
    spool = filled(tmp_path / "s").spool
    spool.close()
    log = FaultyLog(partitions=1)
    sealed_ms = decode_batch(spool_batch(tmp_path / "s")).created_at_ms

    class Later(SystemClock):
        def now_ms(self) -> int:
            return sealed_ms + 6 * 86_400_000 + 1_000

    [slot] = drain(tmp_path / "s", log, Later(), SETTINGS, timeout_s=1.0)
    assert "sealed 6 days ago" in slot.error
    assert not log.attempts
    [slot] = drain(tmp_path / "s", log, Later(), SETTINGS, timeout_s=20.0, force=True)
    assert slot.error == ""
    assert leftovers(tmp_path / "s") == []


def spool_batch(folder: Path) -> bytes:
    """The first batch that is left in a spool."""
    leftover = Leftover.claim(leftovers(folder)[0])
    assert leftover is not None
    try:
        return leftover.load(leftover.batches[0].partition, leftover.batches[0].sequence)
    finally:
        leftover.release()


def test_the_oldest_batch_of_each_partition_counts(tmp_path: Path) -> None:
    """A partition that was away for a week has batches that a task may have forgotten, whatever the others have."""
    recorder = Recorder(tmp_path / "s")
    now_ms = CLOCK.now_ms()
    items = [Pending(VIEW, suffix(i), 1) for i in range(20)]
    for odd, at_ms in ((1, now_ms - 7 * 86_400_000), (0, now_ms)):
        part = [item for item in items if crc32(series_prefix(VIEW) + item.suffix) % 2 == odd]
        recorder.spool.commit(seal_in(recorder, part, at_ms, 2), [], {})
    spool = recorder.spool
    spool.close()
    log = FaultyLog(partitions=2)
    [slot] = drain(tmp_path / "s", log, CLOCK, SETTINGS, timeout_s=1.0)
    assert "sealed 7 days ago" in slot.error
    assert not log.attempts


def test_who_follows_a_killed_process_sends_what_it_left_before_it_ends(tmp_path: Path) -> None:
    """However short it lives, and whether it records or not: `close` waits for that, as long as it may."""
    for count in (0, 1):
        spool = filled(folder := tmp_path / f"s{count}").spool
        spool.close()
        log = FaultyLog(lambda n, batch: Unavailable("no") if n < 2 else "kept", partitions=1)
        with publisher(log, durability="process", spool_dir=str(folder)) as pub:
            for _ in range(count):
                pub.sum("v").add(1)
        assert leftovers(folder) == []
        assert (fold(log.log).total("hits"), fold(log.log).total("v")) == (30, count)
    spool = filled(folder := tmp_path / "t").spool
    spool.close()
    log.away = True
    publisher(log, durability="process", spool_dir=str(folder)).close(0.1)
    assert len(leftovers(folder)) == 1
