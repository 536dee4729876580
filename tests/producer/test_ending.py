"""How a producer ends: it says so, and what tasks may have forgotten is not sent again."""

from pathlib import Path
from typing import Any

import pytest

import pipeline.metrics as m
from pipeline.core.codec import decode_batch
from pipeline.errors import Invalid, Unavailable
from pipeline.publisher.client import BasePublisher
from pipeline.publisher.delivery import held_after_ms
from pipeline.publisher.rescue import drain
from pipeline.settings import PublisherSettings
from tests.producer.support import CLOCK, FaultyLog, Meter, fold, publisher, values, wait_until

DAY_MS = 86_400_000
AWAY = Unavailable("away")


class Moving:
    """A clock that tests move: the wall clock and the monotonic one apart."""

    def __init__(self) -> None:
        self.ms = 0
        self.s = 0.0

    def now_ms(self) -> int:
        return CLOCK.now_ms() + self.ms

    def rising_ns(self) -> int:
        return CLOCK.rising_ns()

    def monotonic_s(self) -> float:
        return CLOCK.monotonic_s() + self.s

    def new_id(self) -> str:
        return CLOCK.new_id()


def all_batches(log: FaultyLog) -> list[Any]:
    return [decode_batch(value) for number in range(4) for value in values(log.log, "deltas", number)]


@pytest.mark.parametrize("durability", ["memory", "process"])
def test_a_publisher_that_closes_says_so(durability: str, tmp_path: Path) -> None:
    """With a last, empty batch in each partition that it has sent to, and in no other; it is folded as such."""
    spool = {} if durability == "memory" else {"durability": durability, "spool_dir": str(tmp_path / "s")}
    log = FaultyLog()
    pub = publisher(log, **spool)
    pub.sum("v", labels=("a",)).add(1, a="x")
    pub.flush()
    assert not log.closings
    pub.close()
    pub.close()
    (closing,) = log.closings
    found = all_batches(log)
    (only,) = {batch.partition for batch in found}
    assert [(b.partition, b.sequence, b.floor, b.closing, len(b.groups)) for b in found] == [
        (only, 0, 0, False, 1), (only, 1, 1, True, 0),
    ]  # fmt: skip
    assert closing.producer_id == found[0].producer_id
    views = fold(log.log)
    assert views.of("v") == {("x",): 1}
    assert not views.dead


def test_one_that_has_sent_nothing_says_nothing() -> None:
    """Nobody remembers it."""
    log = FaultyLog()
    pub = publisher(log)
    pub.sum("v")
    pub.close()
    assert not log.attempts
    assert not log.closings


def test_one_that_leaves_something_does_not_say_that_it_has_ended(tmp_path: Path) -> None:
    """Whoever sends what is left in the spool must be remembered until then."""
    log = FaultyLog()
    pub = publisher(log, durability="process", spool_dir=str(tmp_path / "s"))
    pub.sum("v").add(1)
    pub.flush()
    log.fate = lambda n, batch: AWAY
    pub.sum("v").add(1)
    with pytest.raises(Unavailable):
        pub.close(0.05)
    assert not log.closings


def test_a_log_that_is_away_holds_nobody_up() -> None:
    """The last word is tried once, and lost without harm."""
    log = FaultyLog()
    pub = publisher(log)
    pub.sum("v").add(1)
    pub.flush()
    log.away = True
    pub.close()
    assert len(log.closings) == 1
    assert len(all_batches(log)) == 1


# What is held back


def test_what_may_be_forgotten_is_held_back() -> None:
    """A batch without an answer, sent days ago, may have been folded and forgotten: it stays, and is told of; the rest goes
    on. Either clock can say that it is old; when both say otherwise, it is sent.
    """
    log, clock, meter = FaultyLog(partitions=1), Moving(), Meter()
    log.fate = lambda n, batch: "unheard"
    settings = PublisherSettings(flush_interval_ms=5, linger_ms=5, retry_backoff_ms=1, retry_backoff_max_ms=2)
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


def test_what_was_never_sent_is_not_held_back() -> None:
    """A publisher that was cut off for weeks: nobody can have folded its batches, so they are sent."""
    log, clock = FaultyLog(), Moving()
    log.away = True
    pub = BasePublisher(log, clock, PublisherSettings(flush_interval_ms=5, linger_ms=5), Meter())
    pub.sum("v").add(1)
    with pytest.raises(Unavailable):
        pub.flush(0.1)
    clock.ms, clock.s = 30 * DAY_MS, 30 * DAY_MS / 1_000
    log.away = False
    pub.flush()
    pub.close()
    assert fold(log.log).of("v") == {(): 1}


@pytest.mark.parametrize(("ttl_ms", "held_ms"), [(7 * DAY_MS, 6 * DAY_MS), (DAY_MS, DAY_MS // 2), (1_000, 500)])
def test_the_rule_follows_the_setting(ttl_ms: int, held_ms: int, tmp_path: Path) -> None:
    """A day before tasks forget, or half of the time: the publisher's rule and the spool's."""
    assert held_after_ms(ttl_ms) == held_ms
    log = FaultyLog()
    log.fate = lambda n, batch: AWAY
    pub = publisher(log, durability="process", spool_dir=str(tmp_path / "s"))
    pub.sum("v").add(1)
    with pytest.raises(Unavailable):
        pub.close(0.2)
    log.fate = lambda n, batch: "kept"
    clock, settings = Moving(), PublisherSettings(producer_ttl_ms=ttl_ms)
    clock.ms = held_ms + 1_000
    [slot] = drain(tmp_path / "s", log, clock, settings, timeout_s=1.0)
    assert "would count twice" in slot.error
    clock.ms = held_ms - 60_000 if held_ms > 60_000 else 0
    [slot] = drain(tmp_path / "s", log, clock, settings, timeout_s=10.0, force=held_ms < 60_000)
    assert not slot.error
    assert fold(log.log).of("v") == {(): 1}


# Beyond series_max


@pytest.mark.parametrize("mode", ["memory", "process"])
def test_label_sets_beyond_series_max_merge(mode: str, tmp_path: Path) -> None:
    """Into the series whose labels are all `__overflow__`: totals are exact, here and there, and the excess is counted."""
    more: dict[str, Any] = {"durability": "process", "spool_dir": str(tmp_path / "s")} if mode == "process" else {}
    log, meter = FaultyLog(), Meter()
    pub = publisher(log, meter, flush_interval_ms=3_600_000, series_max=10, **more)
    view, newest, high = pub.sum("v", labels=("b", "a")), pub.last("l", labels=("a",)), pub.max("h", labels=("a",))
    held = [view.labels("kept", str(i)) for i in range(30)]  # handles count when they are first used
    for cell in held:
        cell.add(1)
        cell.add_many([1, 2])
    for i in range(500):
        view.add(1, b="x", a=str(i))
        high.observe(i, a=str(i))
        newest.set(i, a=str(i))
    pub.record_batch(view, {"a": [str(i) for i in range(700)], "b": "y", "value": 1})
    pub.record_batch(newest, {"a": [str(i) for i in range(700)], "value": [*range(700)]})
    pub.flush()
    local = {name: dict(it) for name, it in pub.local().items()}
    pub.close()
    views = fold(log.log)
    assert views.total("v") == sum(local["v"].values()) == 30 * 4 + 500 + 700
    assert len(views.of("v")) <= 11
    assert local["v"]["__overflow__", "__overflow__"] == views.of("v")["__overflow__", "__overflow__"] >= 1_200
    assert views.of("h")["__overflow__",] == 499
    assert views.of("l")["__overflow__",] == 699
    assert meter.of(m.PUBLISHER_OVERFLOWED) > 0
    assert not views.dead


def test_a_view_without_labels_has_one_series() -> None:
    """It never overflows; and what was known before goes on."""
    log = FaultyLog()
    with publisher(log, series_max=1) as pub:
        pub.sum("v").add(1)
        pub.sum("v").add(1)
        view = pub.sum("w", labels=("a",))
        view.add(1, a="x")
        view.add(1, a="x")
        view.add(1, a="y")
    views = fold(log.log)
    assert views.of("v") == {(): 2}
    assert views.of("w") == {("x",): 2, ("__overflow__",): 1}


# Who else can see it


def test_folders_are_for_one_user(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """New ones are; one that others can look into is told of, once; one that others can write to is refused."""
    settings: dict[str, Any] = {"durability": "process", "spool_dir": str(tmp_path / "new" / "spool")}
    pub = publisher(FaultyLog(), **settings)
    pub.sum("v").add(1)
    assert (tmp_path / "new" / "spool").stat().st_mode & 0o777 == 0o700
    producer_id = pub._running.delivery.outbox.producer_id
    assert not [path for path in (tmp_path / "new").rglob("*") if producer_id in path.name]
    pub.close()
    for mode, said in ((0o755, 1), (0o755, 0), (0o777, 0)):
        folder = tmp_path / f"mode{mode:o}"
        folder.mkdir(exist_ok=True)
        folder.chmod(mode)
        caplog.clear()
        if mode == 0o777:
            with pytest.raises(Invalid, match="everybody can write to it"):
                publisher(FaultyLog(), durability="process", spool_dir=str(folder))
        else:
            publisher(FaultyLog(), durability="process", spool_dir=str(folder)).close()
        assert len([it for it in caplog.records if "others can look into it" in it.message]) == said
