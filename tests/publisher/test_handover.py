"""Drained states are handed over once: none is lost or sent twice, whatever happens in between."""

from __future__ import annotations

import threading

import pytest

import pipeline.metrics as m
from pipeline.errors import BufferFull, Invalid, Unavailable
from tests.publisher.support import FaultyLog, Meter, fold, hurried_threads, in_threads, publisher, wait_until


def test_closing_while_threads_record() -> None:
    """Every delta whose call returned is in the log, whatever the threads were doing, such as waiting for memory."""
    log = FaultyLog()
    log.away = True
    meter = Meter()
    pub = publisher(log, meter, flush_interval_ms=1, buffer_bytes_max=65_536, block_timeout_ms=20_000)
    view, recorded, refused = pub.sum("v", labels=("t", "i")), [0] * 6, [0] * 6

    def work(t: int) -> None:
        if t == 0:
            wait_until(lambda: meter.of(m.PUBLISHER_BLOCKED))
            log.away = False
            wait_until(lambda: sum(recorded) > 2_000)
            pub.close()
        for i in range(2_000 if t else 0):
            try:
                if t == 5:
                    recorded[t] += pub.record_batch(view, {"t": str(t), "i": [str(i)], "value": 1})
                else:
                    view.add(1, t=str(t), i=str(i % (10 if t == 4 else 2_000)))
                    recorded[t] += 1
            except (Invalid, BufferFull):
                refused[t] += 1

    with hurried_threads():
        in_threads(6, work)
    views = fold(log.log)
    assert (views.total("v"), views.duplicates) == (sum(recorded), 0)
    assert sum(recorded) + sum(refused) == 10_000


def test_what_could_not_be_sealed_is_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close that gives up counts drained deltas as lost, too."""
    meter, failed = Meter(), threading.Event()
    pub = publisher(FaultyLog(), meter, flush_interval_ms=1)

    def failing(*_: object) -> bytes:
        failed.set()
        raise MemoryError

    monkeypatch.setattr("pipeline.publisher.batching.encode_drafted", failing)
    pub.sum("v").add(1)
    assert failed.wait(20)
    with pytest.raises(Unavailable):
        pub.close(0.1)
    assert meter.values["pipeline_publisher_dropped_total", "closed"] == 1
