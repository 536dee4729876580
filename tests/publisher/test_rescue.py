"""Sending remaining batches: each delta once, through a log that loses answers, is away, or refuses."""

from __future__ import annotations

from pathlib import Path
from zlib import crc32

import pytest

from pipeline.core.record import series_prefix
from pipeline.core.sequence import Sealed
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Message
from pipeline.publisher.batching import Pending, drafts_of, seal
from pipeline.publisher.rescue import DrainedSlot, drain
from pipeline.publisher.spool.orphan import find_slots
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS
from tests.publisher.spool.support import VIEW, Recorder, suffix
from tests.publisher.support import CLOCK, FaultyLog, fold, publisher

SETTINGS = PublisherSettings(retry_backoff_ms=1, retry_backoff_max_ms=2)
DAY_MS = 86_400_000


def filled(folder: Path) -> Recorder:
    """Return a spool with a batch of 1 that is acknowledged, one of 2, 4 pending, and 24 in the ring."""
    recorder = Recorder(folder)
    for value in (1, 2):
        recorder.spool.commit(seal_in(recorder, [Pending(VIEW, suffix("a"), value)], CLOCK.now_ms()), (), {})
    recorder.spool.commit((), [Pending(VIEW, suffix("a"), 4, 3)], {})
    recorder.acknowledge(next(recorder.outbox.pending()))
    for value in (8, 10, 6):
        recorder.add("a", value)
    return recorder


def seal_in(recorder: Recorder, items: list[Pending], now_ms: int, partitions: int = 1) -> list[Sealed]:
    return seal(drafts_of(items, partition_count=partitions, batch_bytes_max=10_000), recorder.outbox, now_ms=now_ms)


def drained(folder: Path, log: FaultyLog, timeout_s: float = 20.0, *, force: bool = False) -> list[DrainedSlot]:
    return [*drain(folder, log, CLOCK, SETTINGS, timeout_s=timeout_s, force=force)]


def test_everything_left_is_sent_once(tmp_path: Path) -> None:
    """Batches that the process itself has sent, unheard, are included, and those answered only at the third attempt."""
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
    assert find_slots(tmp_path / "s") == [live.path]


def test_what_is_not_sent_in_time_stays(tmp_path: Path) -> None:
    """A log that is away, or refuses, is reported; the next attempt sends everything, with an epoch of its own."""
    filled(tmp_path / "s").spool.close()
    log = FaultyLog(lambda n, batch: (Unavailable("no"), Invalid("too large"), "kept")[min(n, 2)], partitions=1)
    log.away = True
    for attempt in (
        (1, 0, 1, "the log is away"),  # epoch, and batches sent and left
        (2, 0, 2, "too large"),
        (3, 2, 0, ""),
    ):
        [slot] = drained(tmp_path / "s", log, 0.01 if log.away else 20.0)
        assert (slot.epoch, slot.batch_count, slot.left_count, slot.error) == attempt
        log.away = False
    assert fold(log.log).total("hits") == 30
    assert drained(tmp_path / "s", log) == []


@pytest.mark.parametrize("newer", ["nothing", "another partition", "the same"])
def test_batches_that_a_task_may_have_forgotten_are_not_sent_unasked(tmp_path: Path, newer: str) -> None:
    """Batches sealed over six days ago could have been folded, and would count twice, whatever newer ones there are."""
    recorder, now_ms = Recorder(tmp_path / "s"), CLOCK.now_ms()
    items = [Pending(VIEW, suffix(i), 1) for i in range(20)]
    parts = [[item for item in items if crc32(series_prefix(VIEW) + item.suffix) % 2 == odd] for odd in (0, 1)]
    recorder.spool.commit(seal_in(recorder, parts[1], now_ms - 7 * DAY_MS, 2), [], {})
    if newer != "nothing":
        recorder.spool.commit(seal_in(recorder, parts[newer == "the same"], now_ms, 2), [], {})
    recorder.spool.close()
    log = FaultyLog(partitions=2)
    [slot] = drained(tmp_path / "s", log)
    assert "sealed 7 days ago" in slot.error
    assert not log.attempts
    [slot] = drained(tmp_path / "s", log, force=True)
    assert slot.error == ""
    assert find_slots(tmp_path / "s") == []


@pytest.mark.parametrize("count", [0, 1])
def test_who_follows_a_killed_process_sends_what_it_left_before_it_ends(tmp_path: Path, count: int) -> None:
    """A process that follows a killed one sends its batches, whether it records or not: `close` waits as long as it may."""
    filled(tmp_path / "s").spool.close()
    log = FaultyLog(lambda n, batch: Unavailable("no") if n < 2 else "kept", partitions=1)
    log.away = True
    publisher(log, durability="process", spool_dir=str(tmp_path / "s")).close(0.1)
    assert len(find_slots(tmp_path / "s")) == 1
    log.away = False
    with publisher(log, durability="process", spool_dir=str(tmp_path / "s")) as pub:
        for _ in range(count):
            pub.sum("v").add(1)
    assert find_slots(tmp_path / "s") == []
    assert (fold(log.log).total("hits"), fold(log.log).total("v")) == (30, count)
