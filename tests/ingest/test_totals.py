"""Totals that outlive the process: after a crash at any step each increase counts once; what can't be told is refused."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.adapters.totals_file import TotalsFile
from pipeline.budget import Budget, Spent, check_budget
from pipeline.core.distribution import ExponentialBuckets, distribution_of
from pipeline.core.grants import Bounds
from pipeline.core.token import Token
from pipeline.errors import Invalid, NewerFormat, PipelineError, Unavailable
from pipeline.ingest.totals import RunningTotals
from pipeline.ports import RawDelta, RequestKey
from pipeline.pushed import RunningTotal, SavedTotals, SentIncreases, StreamTotals
from tests.support import LONG, HandClock, examples


class Killed(BaseException):
    """The end of the process."""


class Log:
    """An ingest that counts each key once. `end` says at which step the process ends, or the log is away."""

    def __init__(self) -> None:
        self.counted: dict[RequestKey, Any] = {}
        self.end = ""
        self.checks = False
        self._forgotten = 0

    def forget(self) -> None:
        """Forget all keys, and nothing that was counted."""
        self._forgotten += sum(self.counted.values())
        self.counted = {}

    def fitting(self, deltas: Any, key: Any, bounds: Any) -> Any:
        if self.end == "refused":
            raise Invalid("no room")
        if self.end in ("before", "away before"):
            raise Killed if self.end == "before" else Unavailable("away")
        for _ in range(10 if self.checks else 0):
            check_budget()
        total = sum(delta.value for delta in deltas)
        assert self.counted.setdefault(key, total) == total
        if self.end in ("after", "away after"):
            raise Killed if self.end == "after" else Unavailable("away")
        return Token(), []

    @property
    def total(self) -> int:
        return self._forgotten + sum(self.counted.values())


class File(TotalsFile):
    """A file that ends the process, or is full, where the log says so."""

    log: Log

    def _read(self) -> Any:
        saved = super()._read()
        assert self._connection is not None
        self._connection.execute("PRAGMA synchronous=OFF")  # no machine ends here
        return saved

    def save(self, *parts: Any) -> None:
        if self.log.end == "full":
            raise Unavailable("full")
        if self.log.end == "unsaved":
            raise Killed
        super().save(*parts)
        if self.log.end == "saved":
            raise Killed


class Process:
    """A process that publishes totals, with its memory on disk."""

    def __init__(self, log: Log, folder: Path, clock: HandClock, streams_max: int = 10, log_id: str = "log") -> None:
        self.file = File(folder / "totals.db", log_id, clock.now_ms)
        self.file.log = log
        self.totals = RunningTotals(log, clock, streams_max, self.file, resend_ms=1_000)  # type: ignore[arg-type]

    def publish(self, value: Any, at: int, start: int, stream: str = "a") -> list[str]:
        total = RunningTotal(1, stream.encode(), start, at, [RawDelta("v", "sum", {}, value, monotone=True)])
        return [it.reason for it in self.totals.publish([total], RequestKey("", stream, str(at).encode()))[1]]


def now_ns(clock: HandClock) -> int:
    return clock.now_ms() * 1_000_000


ENDS = ("", "", "full", "unsaved", "saved", "before", "after", "away before", "away after")
STEPS = st.tuples(st.integers(0, 5), st.sampled_from(ENDS), st.booleans())


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(STEPS, min_size=1, max_size=8))
def test_a_crash_at_any_step_neither_loses_nor_doubles(steps: list[tuple[int, str, bool]]) -> None:
    """The process ends before or after the save, the send, or the answer, and the client repeats its request or not: in the
    end the log has counted the last total.
    """
    log, clock = Log(), HandClock()
    with TemporaryDirectory() as folder:
        process = Process(log, Path(folder), clock)
        start, value = now_ns(clock) + 1, 0
        for at, (more, log.end, again) in enumerate([*steps, (1, "", False)], 1):
            value += more
            try:
                assert process.publish(value, at, start) == []
            except Unavailable:
                pass
            except Killed:
                process.file.close()
                process = Process(log, Path(folder), clock)
            log.end = ""
            if again:
                assert process.publish(value, at, start) == []
        process.file.close()
    assert log.total == value


def test_streams_that_begin_before_a_restart(tmp_path: Path) -> None:
    """A stream that began before the restart, and comes after it for the first time, counts in full; so does one whose
    clock is ahead; one that began before anything was known here, or that was forgotten to make room, is refused once.
    """
    log, clock = Log(), HandClock()
    began = now_ns(clock)
    process = Process(log, tmp_path, clock, streams_max=2)
    assert process.publish(5, 1, began + 10**15, "ahead") == []
    process.file.close()
    clock.s += 1
    process = Process(log, tmp_path, clock, streams_max=2)
    assert process.publish(7, 2, began + 10**15, "ahead") == []
    assert process.publish(3, 1, began + 1, "late") == []
    assert process.publish(100, 1, began - 1, "old") == ["baseline"]  # the first of three makes room
    assert process.publish(101, 2, began - 1, "old") == []
    process.file.close()
    process = Process(log, tmp_path, clock, streams_max=2)
    assert process.publish(9, 3, began + 10**15, "ahead") == ["baseline"]
    assert process.publish(102, 3, began - 1, "old") == []
    assert log.total == 7 + 3 + 2
    process.file.close()


def test_a_request_that_is_refused_leaves_nothing_to_send(tmp_path: Path) -> None:
    """Increases that the log has refused are not sent after a restart, and the next total has them."""
    log, clock = Log(), HandClock()
    start = now_ns(clock) + 1
    process = Process(log, tmp_path, clock)
    log.end = "refused"
    with pytest.raises(Invalid):
        process.publish(5, 1, start)
    process.file.close()
    process = Process(log, tmp_path, clock)
    log.end = ""
    assert process.publish(7, 2, start) == []
    assert [*log.counted.values()] == [7]
    process.file.close()


@pytest.mark.parametrize("what", ["damaged", "cut", "row", "other log", "newer", "taken"])
def test_a_file_that_can_not_be_used(tmp_path: Path, what: str) -> None:
    """A file that is damaged, or of another log, is kept aside, and older streams are refused once; a newer one ends the
    start, and so does one that another process has.
    """
    log, clock = Log(), HandClock()
    start = now_ns(clock) + 1
    path = tmp_path / "totals.db"
    process = Process(log, tmp_path, clock)
    assert process.publish(5, 1, start) == []
    if what == "taken":
        with pytest.raises(Unavailable, match="locked"):
            Process(log, tmp_path, clock)
    process.file.close()
    clock.s += 1
    if what in ("newer", "row"):
        with sqlite3.connect(path) as connection:
            connection.execute(
                "PRAGMA user_version = 9" if what == "newer" else "UPDATE state SET value = x'3030303030303030307b7d'"
            )
        connection.close()
    if what == "newer":
        with pytest.raises(NewerFormat):
            Process(log, tmp_path, clock)
    if what in ("newer", "taken"):
        return
    if what in ("damaged", "cut"):
        path.write_bytes(b"x" * 4_096 if what == "damaged" else path.read_bytes()[:5_000])
    process = Process(log, tmp_path, clock, log_id="other" if what == "other log" else "log")
    assert process.publish(7, 2, start) == ["baseline"]
    assert process.publish(8, 3, start) == []
    assert log.total == 5 + 1
    assert len([*tmp_path.glob("totals.db.lost-*")]) == 1
    assert path.stat().st_mode & 0o777 == 0o600
    process.file.close()


def test_no_damage_is_silent(tmp_path: Path) -> None:
    """A file with one damaged bit has all totals as they were, is kept aside, or ends the start with words."""
    rng, found = random.Random(5), Counter[str]()
    known = {sha256(b"%d" % i).digest(): StreamTotals(i, i, (i,)) for i in range(60)}
    saved = SavedTotals(known, 7, None)
    file = TotalsFile(tmp_path / "totals.db", "log", lambda: 0)
    assert file.load() is None
    file.save(known, 7, None)
    file.close()
    whole = (tmp_path / "totals.db").read_bytes()
    for number in range(2_000 if LONG else 200):
        damaged = bytearray(whole)
        # Half of them in the heads of pages, which say how many rows there are and where.
        at = rng.randrange(len(whole)) if number % 2 else rng.randrange(len(whole) // 4_096) * 4_096 + rng.randrange(12)
        damaged[at] ^= 1 << rng.randrange(8)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "totals.db").write_bytes(damaged)
        file = TotalsFile(folder / "totals.db", "log", lambda: 0)
        try:
            there = file.load()
        except PipelineError:
            found["refused"] += 1
        else:
            found["right" if there == saved else "aside"] += 1
            assert there in (saved, None)
        finally:
            file.close()
    assert found["right"] > 0
    assert found["aside"] > 0


def test_what_is_learned_without_increases_is_saved(tmp_path: Path) -> None:
    """A first total that is refused is what the next one counts from, after a restart, too; so is one that has fallen."""
    log, clock = Log(), HandClock()
    process = Process(log, tmp_path, clock)
    assert process.publish(100, 1, 5) == ["baseline"]
    process.file.close()
    process = Process(log, tmp_path, clock)
    assert process.publish(110, 2, 5) == []
    assert process.publish(10, 3, 5) == ["falls"]
    process.file.close()
    process = Process(log, tmp_path, clock)
    assert process.publish(120, 4, 5) == []
    assert log.total == 10 + 110
    process.file.close()


@pytest.mark.parametrize(("end", "restarts"), [("after", True), ("away after", True), ("away after", False)])
def test_increases_that_are_too_old_are_not_sent_again(tmp_path: Path, end: str, restarts: bool) -> None:
    """Tasks may have forgotten the key of what was sent long ago, so it may be lost; what follows counts."""
    log, clock = Log(), HandClock()
    start = now_ns(clock) + 1
    process = Process(log, tmp_path, clock)
    log.end = end
    with pytest.raises(Killed if end == "after" else Unavailable):
        process.publish(5, 1, start)
    log.end = ""
    log.forget()
    clock.s += 1.1
    if restarts:
        process.file.close()
        process = Process(log, tmp_path, clock)
    assert process.publish(7, 2, start) == []
    assert log.total == 5 + 2
    process.file.close()


class Working(HandClock):
    """A clock by which a thread works for 10 ms between two looks at its CPU time."""

    cpu_s = 0.0

    def thread_cpu_s(self) -> float:
        self.cpu_s += 0.01
        return self.cpu_s


def test_a_request_without_budget_leaves_nothing_to_others(tmp_path: Path) -> None:
    """A request ends for want of CPU time before its increases are saved, or not at all: no other pays for it."""
    log, clock = Log(), Working()
    start = now_ns(clock) + 1
    process = Process(log, tmp_path, clock)
    log.checks = True

    def within(cpu_ms_max: int, value: int, at: int) -> list[str]:
        budget = Budget(clock, cpu_ms_max, lambda: Invalid("used up"), Spent())
        return budget.work(lambda: process.publish(value, at, start))

    with pytest.raises(Invalid, match="used up"):
        within(15, 5, 1)
    assert within(45, 6, 2) == []
    assert within(45, 7, 3) == []
    assert log.total == 7
    process.file.close()


def test_all_values_come_back(tmp_path: Path) -> None:
    """Numbers of any size and distributions, labels of any text, and each field of what is not acknowledged."""
    observed = distribution_of(3, 4.5, ExponentialBuckets(3, 1, (-2, [1]), (5, [1])))
    values = 2**70, -0.1, observed
    deltas = [RawDelta("v", "sum", {"a": "é\ud800\0"}, value, 7, monotone=True) for value in values]
    bounds = Bounds(("shop_*",), (("team", "a"),))
    totals = {b"\0": StreamTotals(1, 2**64 - 1, values)}
    sent = SentIncreases(deltas, [1, 2, 3], RequestKey("/p", "k", b"\xff"), totals, 9, bounds)
    changes = {bytes([i]): StreamTotals(i, i, values) for i in (3, 1, 2)}
    file = TotalsFile(tmp_path / "totals.db", "log", lambda: 0)
    assert file.load() is None
    file.save(changes, 5, sent)
    file.save({b"\3": StreamTotals(9, 9, ()), b"\1": None}, 6, sent)
    file.close()
    saved = file.load()
    assert saved == SavedTotals({b"\2": changes[b"\2"], b"\3": StreamTotals(9, 9, ())}, 6, sent)
    assert saved is not None
    assert [*saved.known] == [b"\2", b"\3"]
    file.close()
    with pytest.raises(Unavailable, match="closed"):
        file.save({}, 7, None)
