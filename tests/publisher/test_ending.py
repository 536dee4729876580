"""The end of a producer: tasks learn of it, and batches that tasks may have forgotten are not sent again."""

import threading
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline.core.codec import decode_batch
from pipeline.errors import Unavailable
from pipeline.publisher.client import BasePublisher
from pipeline.publisher.rescue import drain
from pipeline.publisher.sender import held_after_ms
from pipeline.settings import PublisherSettings
from tests.publisher.modes import MODES, settings_of
from tests.publisher.support import FaultyLog, Meter, MovedClock, fold, publisher, values, wait_until

DAY_MS = 86_400_000
AWAY = Unavailable("away")


@pytest.mark.parametrize("mode", MODES)
def test_a_publisher_that_closes_says_so(mode: str, tmp_path: Path) -> None:
    """A last, empty batch goes to each partition that the publisher has sent to; tasks fold it as a close."""
    log = FaultyLog()
    pub = publisher(log, **settings_of(mode, tmp_path))
    pub.sum("v", labels=("a",)).add(1, a="x")
    pub.flush()
    assert not log.closings
    pub.close()
    pub.close()
    (closing,) = log.closings
    found = [decode_batch(value) for number in range(4) for value in values(log.log, "deltas", number)]
    (only,) = {batch.partition for batch in found}
    assert [(b.partition, b.sequence, b.floor, b.closing, len(b.groups)) for b in found] == [
        (only, 0, 0, False, 1), (only, 1, 1, True, 0),
    ]  # fmt: skip
    assert closing.producer_id == found[0].producer_id
    views = fold(log.log)
    assert views.of("v") == {("x",): 1}
    assert not views.dead


@pytest.mark.parametrize(("mode", "what"), [("memory", "nothing"), ("memory", "away"), ("process", "left")])
def test_one_that_does_not_say_that_it_has_ended(mode: str, what: str, tmp_path: Path) -> None:
    """A publisher sends no close if it has sent nothing, if its log is away, which is tried once, or if its spool is not
    empty: the sender of those batches must be remembered until then.
    """
    log = FaultyLog()
    pub = publisher(log, **settings_of(mode, tmp_path))
    view = pub.sum("v")
    if what != "nothing":
        view.add(1)
        pub.flush()
    log.away = what == "away"
    if what == "left":
        log.fate = lambda n, batch: AWAY
        view.add(1)
        with pytest.raises(Unavailable):
            pub.close(0.05)
    pub.close()
    assert len(log.closings) == (what == "away")
    assert sum(len(values(log.log, "deltas", number)) for number in range(4)) == (what != "nothing")


# What is held back


def test_what_may_be_forgotten_is_held_back() -> None:
    """A batch sent days ago without an answer may have been folded and forgotten: it stays and is reported, and the rest
    goes on. Either clock can make it old; when both say otherwise, it is sent.
    """
    log, clock, meter = FaultyLog(partitions=1), MovedClock(), Meter()
    log.fate = lambda n, batch: "unheard"
    settings = PublisherSettings(flush_interval_ms=5, flush_interval_min_ms=5, retry_backoff_ms=1, retry_backoff_max_ms=2)
    pub = BasePublisher(log, clock, settings, meter)
    view = pub.sum("v")
    view.add(1)
    wait_until(lambda: log.attempts)
    clock.ms = 6 * DAY_MS + 1
    with pytest.raises(Unavailable, match="1 batches are held back: they were sent over 6 days ago"):
        pub.flush(0.3)
    count = len(log.attempts)
    log.fate = lambda n, batch: "kept"
    view.add(10)
    with pytest.raises(Unavailable, match="held back"):
        pub.flush(0.3)
    assert len(log.attempts) == count + 1  # what is new has gone
    wait_until(lambda: meter.of(m.PUBLISHER_HELD_BACK) == 1)
    clock.ms, clock.s = 0, 6 * DAY_MS / 1_000 + 1
    with pytest.raises(Unavailable, match="held back"):
        pub.flush(0.3)
    clock.s = 0.0
    view.add(100)  # wakes the sender
    pub.flush()
    pub.close()
    views = fold(log.log)
    assert views.of("v") == {(): 111}
    assert views.duplicates > 0


@pytest.mark.parametrize("fails", ["asking for partitions", "asking for the topic's id", "sending"])
def test_what_was_never_sent_is_not_held_back(fails: str) -> None:
    """Batches of which nothing was ever sent, by a publisher cut off for weeks, cannot have been folded, and are sent."""
    log, clock, asked = FaultyLog(partitions=1), MovedClock(), threading.Event()

    def nobody_says(topic: str) -> str:
        asked.set()
        raise AWAY

    log.away = fails == "asking for partitions"
    topic_id = log.topic_id
    if fails == "asking for the topic's id":
        log.topic_id = nobody_says  # type: ignore[method-assign]
    elif fails == "sending":
        log.fate = lambda n, batch: AWAY
    settings = PublisherSettings(flush_interval_ms=5, flush_interval_min_ms=5, retry_backoff_max_ms=50)
    pub = BasePublisher(log, clock, settings, Meter())
    pub.sum("v").add(1)
    with pytest.raises(Unavailable):
        pub.flush(0.1)
    if fails != "asking for partitions":
        wait_until(lambda: log.attempts or asked.is_set())
    clock.ms, clock.s = 30 * DAY_MS, 30 * DAY_MS / 1_000
    log.away, log.fate, log.topic_id = False, lambda n, batch: "kept", topic_id  # type: ignore[method-assign]
    if fails == "sending":
        with pytest.raises(Unavailable, match="held back"):
            pub.close(1)
    else:
        pub.close(20)
    assert fold(log.log).of("v") == ({} if fails == "sending" else {(): 1})


@pytest.mark.parametrize(("ttl_ms", "held_ms"), [(7 * DAY_MS, 6 * DAY_MS), (DAY_MS, DAY_MS // 2), (1_000, 500)])
def test_the_rule_follows_the_setting(ttl_ms: int, held_ms: int, tmp_path: Path) -> None:
    """Batches are held back a day before tasks forget, or at half of the time, by the publisher and by the spool."""
    assert held_after_ms(ttl_ms) == held_ms
    log = FaultyLog(lambda n, batch: AWAY)
    pub = publisher(log, durability="process", spool_dir=str(tmp_path))
    pub.sum("v").add(1)
    with pytest.raises(Unavailable):
        pub.close(0.2)
    log.fate = lambda n, batch: "kept"
    clock, settings = MovedClock(), PublisherSettings(producer_ttl_ms=ttl_ms)
    clock.ms = held_ms + 1_000
    [slot] = drain(tmp_path, log, clock, settings, timeout_s=1.0)
    assert "would count twice" in slot.error
    clock.ms = held_ms - 60_000 if held_ms > 60_000 else 0
    [slot] = drain(tmp_path, log, clock, settings, timeout_s=10.0, force=held_ms < 60_000)
    assert not slot.error
    assert fold(log.log).of("v") == {(): 1}
