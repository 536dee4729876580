"""Deltas over HTTP to views with windows and a retention: given and omitted fields, and refusals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.core.grants import Bounds
from pipeline.core.record import Definition, expired_before_ms, parse_suffix
from pipeline.errors import Invalid
from pipeline.ingest.admission import NoFacts
from pipeline.ingest.gateway import Gateway
from pipeline.ports import RawDelta, RequestKey
from pipeline.settings import PublisherSettings
from tests.publisher.support import CLOCK, FaultyLog, batches

HOUR_S = 3_600
MINUTELY = Definition("minutely", "sum", ("a",), 60, retention_s=HOUR_S)
KNOWN: Sequence[Definition] = (
    MINUTELY,
    Definition("minutely", "sum", ("a", "b"), 60, retention_s=2 * HOUR_S),
    Definition("minutely", "sum", ("a",), 10),
    Definition("kept", "sum", ("a",), retention_s=60),
    Definition("two", "max", (), 60, retention_s=60),
    Definition("two", "max", (), 60, retention_s=120),
    Definition("ever", "max", (), 60, retention_s=60),
    Definition("ever", "max", (), 60),
)
NOW_MS = CLOCK.now_ms()


class Still(SystemClock):
    """A clock that shows one time."""

    def now_ms(self) -> int:
        return NOW_MS


def like(view: str, kind: str, window_s: int | None, bounds: Bounds | None) -> Sequence[Definition]:
    """Return the definitions of a view and kind with this window, or with that of the first of them."""
    found = [it for it in KNOWN if (it.view, it.kind) == (view, kind)]
    window = window_s if window_s is not None or not found else found[0].window_s
    return tuple(it for it in found if it.window_s == window)


class Facts(NoFacts):
    def __init__(self, expired_ms: int = 0) -> None:
        self.expired_ms = expired_ms

    def expired_before_ms(self, partition: int, definition: Definition) -> int:
        return expired_before_ms(definition, self.expired_ms)


def gateway(log: FaultyLog, expired_ms: int = 0) -> Gateway:
    first = {it.view: it for it in reversed(KNOWN)}
    return Gateway(log, Still(), PublisherSettings(), first.get, facts=Facts(expired_ms), definitions_of=like)


def delta(view: str, kind: str = "sum", ts_ms: Any = None, value: object = 1, **more: Any) -> RawDelta:
    shape = {name: more.pop(name) for name in ("window_s", "retention_s", "monotone") if name in more}
    return RawDelta(view, kind, more, value, ts_ms, **shape)


def series(log: FaultyLog) -> dict[tuple[Definition, int], Any]:
    """Return the states in a log, by definition and start of their window."""
    found: dict[tuple[Definition, int], Any] = {}
    for batch in batches(log.log):
        for group in batch.groups:
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                key = group.definition, parse_suffix(suffix)[0]
                assert key not in found
                found[key] = state
    return found


@pytest.mark.parametrize(
    ("given", "window_s", "retention_s"),
    [
        (delta("minutely", a="x"), 60, HOUR_S),
        (delta("minutely", a="x", window_s=60), 60, HOUR_S),
        (delta("minutely", a="x", b="y"), 60, 2 * HOUR_S),
        (delta("minutely", other="x"), 60, 2 * HOUR_S),
        (delta("minutely", a="x", window_s=10), 10, 0),
        (delta("minutely", a="x", window_s=0), 0, 0),
        (delta("minutely", a="x", window_s=5), 5, 0),
        (delta("minutely", a="x", retention_s=0), 60, 0),
        (delta("minutely", a="x", window_s=60, retention_s=7), 60, 7),
        (delta("minutely", "min", a="x"), 0, 0),
        (delta("kept", a="x"), 0, 60),
        (delta("two", "max"), 60, 120),
        (delta("ever", "max"), 60, 0),
        (delta("new"), 0, 0),
        (delta("new", window_s=60), 60, 0),
        (delta("new", window_s=60, retention_s=60), 60, 60),
    ],
)
def test_what_a_delta_leaves_out_is_as_its_view_is_known(given: RawDelta, window_s: int, retention_s: int) -> None:
    """An omitted window and retention are those of the definition with these labels, or the longest; a new view has none."""
    log = FaultyLog()
    gateway(log).deltas([given])
    ((definition, start),) = series(log)
    assert (definition.window_s, definition.retention_s) == (window_s, retention_s)
    assert start == (NOW_MS - NOW_MS % (window_s * 1_000) if window_s else 0)


def test_deltas_that_say_less_follow_those_that_say_more() -> None:
    """A view has one definition, within a request and across requests, even before a store knows it."""
    log = FaultyLog()
    gate = gateway(log)
    gate.deltas([delta("new", window_s=60, retention_s=120, ts_ms=NOW_MS), delta("new", ts_ms=NOW_MS)])
    gate.deltas([delta("new", window_s=60, ts_ms=NOW_MS)])
    gate.fitting([delta("new", ts_ms=NOW_MS)])
    definitions = {group.definition for batch in batches(log.log) for group in batch.groups}
    assert definitions == {Definition("new", "sum", (), 60, retention_s=120)}
    gate.deltas([delta("new", window_s=10)])
    definitions = {group.definition for batch in batches(log.log) for group in batch.groups}
    assert definitions == {Definition("new", "sum", (), 60, retention_s=120), Definition("new", "sum", (), 10)}


def test_each_delta_is_in_the_window_of_its_time() -> None:
    """A delta is in the window of its time, or of now, and deltas of a window merge, for any kind."""
    log = FaultyLog()
    start = NOW_MS - NOW_MS % 60_000
    times = (0, 59_999, 60_000, start, None, NOW_MS + 3_600_000)
    gateway(log).deltas([delta("v", window_s=60, ts_ms=ts_ms) for ts_ms in times])
    found = {start: state for (_, start), state in series(log).items()}
    assert found == {0: 2, 60_000: 1, start: 2, NOW_MS + 3_600_000 - (NOW_MS + 3_600_000) % 60_000: 1}


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (delta("v", window_s=60, ts_ms=NOW_MS + 3_600_001), "ahead"),
        (delta("v", window_s=60, ts_ms=-1), "ts_ms"),
        (delta("v", window_s=60, ts_ms=1.5), "ts_ms"),
        (delta("v", window_s=60, ts_ms=2**60), "ts_ms"),
        (delta("v", window_s=-1), "window_s"),
        (delta("v", window_s=1.5), "window_s"),
        (delta("v", window_s=True), "window_s"),
        (delta("v", window_s=10**10), "window_s"),
        (delta("v", retention_s=-1), "retention_s"),
        (delta("v", retention_s="1h"), "retention_s"),
        (delta("v", retention_s=10**11), "retention_s"),
        (delta("minutely", a="x", ts_ms=NOW_MS - 2 * HOUR_S * 1_000), "its window has expired: the oldest that is kept"),
    ],
)
def test_what_tasks_would_refuse_is_refused(bad: RawDelta, says: str) -> None:
    """A delta that tasks would refuse is `Invalid` with its number, and nothing is appended; others may go on without it."""
    log = FaultyLog()
    gate = gateway(log, expired_ms=NOW_MS)
    good = delta("good", window_s=60)
    with pytest.raises(Invalid, match=rf"delta 1: .*{says}"):
        gate.deltas([good, bad, good])
    assert not log.attempts
    _, refused = gate.fitting([good, bad, good])
    assert [(it.line, it.reason in ("view", "labels", "value", "expired")) for it in refused] == [(1, True)]
    assert [*series(log).values()] == [2]


def test_the_oldest_window_that_is_kept_is_taken() -> None:
    """A late delta is taken until its window has expired by the partition's stored watermark; then it alone is refused."""
    log = FaultyLog()
    oldest = expired_before_ms(MINUTELY, NOW_MS)
    gate = gateway(log, expired_ms=NOW_MS)
    gate.deltas([delta("minutely", a="x", ts_ms=oldest)])
    _, refused = gate.fitting([delta("minutely", a="x", ts_ms=oldest - 1), delta("minutely", a="x", ts_ms=oldest)])
    assert [(it.line, it.reason) for it in refused] == [(0, "expired")]
    assert len(batches(log.log)) == 2
    _, refused = gate.fitting([delta("minutely", a="x", ts_ms=oldest - 1)])
    assert len(refused) == 1


def test_a_repeat_is_not_refused_for_its_age() -> None:
    """A request with a key counts once for the tasks, whether its windows have expired meanwhile or not."""
    log = FaultyLog()
    old = [delta("minutely", a="x", ts_ms=NOW_MS - 2 * HOUR_S * 1_000)]
    gateway(log, expired_ms=NOW_MS).deltas(old, RequestKey("/v1/deltas", "k", b"d"))
    assert len(batches(log.log)) == 1
