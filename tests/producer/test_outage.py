"""A log that goes away, or never was there: one line, and one more when it is back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from pipeline.errors import Invalid, Unavailable
from tests.producer.support import FaultyLog, publisher, wait_until

Lines = Callable[[], list[str]]
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """What is logged at INFO or above."""
    caplog.set_level(logging.INFO, "pipeline")
    return lambda: [record.getMessage() for record in [*caplog.records]]


def test_one_line_when_it_goes_and_one_when_it_is_back(lines: Lines, caplog: pytest.LogCaptureFixture) -> None:
    """However many batches and attempts fail meanwhile; both say what waits, and since when."""
    log = FaultyLog()
    with publisher(log, retry_backoff_max_ms=20) as pub:
        view = pub.sum("v", labels=("a",))
        view.add(1, a="0")
        pub.flush()
        log.fate = lambda n, batch: Unavailable("connection refused")
        for i in range(50):
            view.add(1, a=str(i))
        wait_until(lines)
        attempts = len(log.attempts)
        wait_until(lambda: len(log.attempts) > attempts + 20)
        (line,) = lines()
        found = re.fullmatch(
            rf"the log is away since {TIME}: (\d+) batches and (\d+) buffered series wait \(([\d,]+) bytes\); "
            "the last error: connection refused",
            line,
        )
        assert found, line
        assert int(found[1]) >= 1
        assert int(found[2]) == 50
        assert int(found[3].replace(",", "")) > 50 * 100
        log.fate = lambda n, batch: "kept"
        pub.flush()
        (_, line) = lines()
        assert re.fullmatch(
            rf"the log is back; it was away for \d+\.\d s, since {TIME}: \d+ batches and 50 .* bytes\)", line
        )
    assert len(lines()) == 2
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_a_log_that_never_was_there(lines: Lines) -> None:
    """Nothing can even be sealed then, so no batch waits; and again when it goes once more."""
    log = FaultyLog()
    log.away = True
    with publisher(log, retry_backoff_max_ms=20) as pub:
        pub.sum("v").add(1)
        wait_until(lines)
        with pytest.raises(Unavailable):
            pub.flush(0.3)
        (line,) = lines()
        assert re.search(r": 0 batches and 1 buffered series wait \([\d,]+ bytes\); the last error: the log is away", line)
        log.away = False
        pub.flush()
        log.away = True
        pub.sum("v").add(1)
        wait_until(lambda: len(lines()) == 3)
        log.away = False
        pub.flush()
        assert [line.partition(";")[0][:15] for line in lines()] == ["the log is away", "the log is back"] * 2


def test_what_a_second_attempt_mends_is_not_told(lines: Lines) -> None:
    """Nor a batch that the log refuses while it takes others, nor what fails while nothing waits."""
    log = FaultyLog(lambda n, batch: Unavailable("busy") if n % 2 else "kept")
    pub = publisher(log)
    for _ in range(20):
        pub.sum("v").add(1)
        pub.flush()
    assert not lines()
    log.fate = lambda n, batch: Invalid("not this one")
    pub.sum("v").add(1)
    with pytest.raises(Invalid):
        pub.flush()
    log.away = True
    pub.close()
    assert not [line for line in lines() if "the log is" in line and "rejected" not in line and "has ended" not in line]
