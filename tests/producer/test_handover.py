"""What was drained from the table is handed over once: not lost, and not sent twice, whatever comes in between."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.errors import BufferFull, Invalid, Unavailable
from tests.producer.support import FaultyLog, Meter, fold, hurried_threads, in_threads, partition_of, publisher, wait_until


@pytest.mark.parametrize("waits", [False, True])
def test_closing_while_threads_record(waits: bool) -> None:
    """Every delta whose call returned is in the log, whatever threads were in the midst of, such as waiting for memory."""
    for _ in range(2 if waits else 8):
        log = FaultyLog()
        log.away = waits
        pub = publisher(log, flush_interval_ms=1, buffer_bytes_max=65_536 if waits else 2**26, block_timeout_ms=20_000)
        view, recorded = pub.sum("v", labels=("a", "i")), [0] * 6

        def work(t: int, log: Any = log, view: Any = view, pub: Any = pub, recorded: Any = recorded) -> None:
            if t == 0:
                wait_until(lambda: pub._running.account.starved or sum(recorded) > 50 if waits else min(recorded[1:]) > 100)
                log.away = False
                pub.close()
                return
            series, i = view.labels(str(t), "0"), 0
            while True:
                i += 1
                try:
                    if t == 5:
                        recorded[t] += pub.record_batch(view, {"a": str(t), "i": [str(i)], "value": 1})
                        continue
                    if t == 4 and not waits:
                        series.add(1)
                    else:
                        view.add(1, a=str(t), i=str(i % 10 if t == 3 and not waits else i))
                except (Invalid, BufferFull):
                    return
                recorded[t] += 1

        with hurried_threads():
            in_threads(6, work)
        views = fold(log.log)
        assert (views.total("v"), views.duplicates) == (sum(recorded), 0)


def test_a_flush_waits_for_partitions_that_have_enough_waiting() -> None:
    """Its barrier is behind what could not be drained at once."""
    log = FaultyLog(lambda n, batch: Unavailable("away") if batch.partition == 0 else "kept")
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    stuck, other = (next(str(i) for i in range(100) if partition_of(view, str(i)) == number) for number in (0, 1))
    count = 0
    while pub.stats()["waiting"] < 16:
        view.add(1, a=stuck)
        count += 1
    for _ in range(50):  # no further batch is sealed for it
        view.add(1, a=stuck)
        view.add(1, a=other)
    with pytest.raises(Unavailable):
        pub.flush(0.2)
    assert fold(log.log).of("v") == {(other,): 50}
    log.fate = lambda n, batch: "kept"
    pub.flush()
    assert fold(log.log).of("v") == {(stuck,): count + 50, (other,): 50}
    pub.close()


def test_what_could_not_be_sealed_is_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close that gives up says so of what was drained too."""
    meter = Meter()
    pub = publisher(FaultyLog(), meter, flush_interval_ms=1)

    def failing(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("pipeline.producer.sealing.encode_drafted", failing)
    pub.sum("v").add(1)
    wait_until(lambda: pub._running.delivery.has_drafts)
    with pytest.raises(Unavailable):
        pub.close(0.1)
    assert meter.values["pipeline_publisher_dropped_total", "closed"] == 1
