"""Counts of what ingest leaves out: by reason, with the first example, and one log line a minute."""

from __future__ import annotations

import logging

import pytest

import pipeline.metrics as m
from pipeline.left_out import LINE_INTERVAL_S, LeftOut
from tests.publisher.support import Meter
from tests.support import HandClock


def test_one_line_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    """The first thing is logged at once, what follows within a minute in one line, with the first example of each reason."""
    clock, meter = HandClock(), Meter()
    left_out = LeftOut(logging.getLogger("test"), clock, meter)
    left_out.tick()
    assert not caplog.messages
    left_out.add("openmetrics", "value", "line 3")
    for number in range(1_000):
        left_out.add("openmetrics", "value", f"line {number + 4}")
        left_out.add("statsd_udp", "tag", b"a:1|c|#\xff\x1b[2J")
    left_out.add("otlp", "summary", lambda: "took", 7)
    left_out.add("otlp", "summary", lambda: 1 / 0, 0)
    assert caplog.messages == ["left out by ingest: openmetrics value 1 (the first: line 3)"]
    clock.s += LINE_INTERVAL_S
    left_out.tick()
    left_out.tick()
    assert caplog.messages[1:] == [
        "left out by ingest: openmetrics value 1,000 (the first: line 4); "
        "statsd_udp tag 1,000 (the first: 'a:1|c|#\\xff\\x1b[2J'); otlp summary 7 (the first: took)"
    ]
    left_out.add("otlp", "summary", "\x1b[31m")
    left_out.close()
    left_out.close()
    assert caplog.messages[2:] == ["left out by ingest: otlp summary 1 (the first: '\\x1b[31m')"]
    found = {(it.protocol, it.reason): (it.count, it.first) for it in left_out.status()}
    assert found == {
        ("openmetrics", "value"): (1_001, "line 3"),
        ("statsd_udp", "tag"): (1_000, "'a:1|c|#\\xff\\x1b[2J'"),
        ("otlp", "summary"): (8, "took"),
    }
    assert meter.of(m.INGEST_MALFORMED, "openmetrics", "value") == 1_001
    assert left_out.counts("otlp", "statsd_udp") == {"summary": 8, "tag": 1_000}
