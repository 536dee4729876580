"""A log that goes away, or never was there, is one line of log, and one more when it is back."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

import pytest

from pipeline.errors import Invalid, Unavailable
from tests.publisher.support import FaultyLog, publisher, wait_until

Lines = Callable[[], list[str]]
TIME = r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Lines:
    """Return the lines that are logged at INFO or above."""
    caplog.set_level(logging.INFO, "pipeline")
    return lambda: [f"{record.levelname} {record.getMessage()}" for record in [*caplog.records]]


@pytest.mark.parametrize("was_there", [True, False])
def test_one_line_when_it_goes_and_one_when_it_is_back(lines: Lines, was_there: bool) -> None:
    """There are two lines, however many batches and attempts fail, with the waiting batches, and the time of the outage.

    If the log never was there, nothing can even be sealed, so no batch waits.
    """
    log = FaultyLog()
    with publisher(log, retry_backoff_max_ms=20) as pub:
        view = pub.sum("v", labels=("a",))
        if was_there:
            view.add(1, a="0")
            pub.flush()
            log.fate = lambda n, batch: Unavailable("connection refused")
        log.away = not was_there
        for i in range(50):
            view.add(1, a=str(i))
        wait_until(lines)
        attempts = len(log.attempts)
        if was_there:
            wait_until(lambda: len(log.attempts) > attempts + 20)
        with pytest.raises(Unavailable):
            pub.flush(0.05)
        (line,) = lines()
        found = re.fullmatch(
            rf"WARNING the log is away since {TIME}: (\d+) batches and (\d+) buffered series wait \(([\d,]+) bytes\); "
            rf"the last error: {'connection refused' if was_there else 'the log is away'}",
            line,
        )
        assert found, line
        assert (int(found[1]) >= 1) == was_there
        assert (int(found[2]), int(found[3].replace(",", "")) > 50 * 100) == (50, True)
        log.fate, log.away = (lambda n, batch: "kept"), False
        pub.flush()
        (_, line) = lines()
        back = rf"WARNING the log is back; it was away for \d+\.\d s, since {TIME}: \d+ batches and 50 .* bytes\)"
        assert re.fullmatch(back, line)
        if not was_there:
            log.away = True
            view.add(1, a="0")
            wait_until(lambda: len(lines()) == 3)
            log.away = False
    assert [line.partition(";")[0][:23] for line in lines()] == ["WARNING the log is away", "WARNING the log is back"] * (
        1 if was_there else 2
    )


def test_what_a_second_attempt_mends_is_not_told(lines: Lines) -> None:
    """Errors that a second attempt mends, a refused batch among accepted ones, and errors without batches are not logged."""
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
