"""Against a model: whatever happens to processes, disks and acknowledgements, a task counts each delta once."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import pipeline.producer.spool.journal as journal
from pipeline.core.merge import State
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import Unavailable
from pipeline.producer.sealing import Merged, seal
from pipeline.producer.spool.leftover import Leftover, leftovers
from pipeline.producer.spool.look import inspect
from pipeline.producer.spool.ring import Segment, head_of
from tests.producer.spool.support import Task, as_kill_leaves_it, claim, loaded, merged, new_spool, record, suffix

NAMES = st.sampled_from("abcde")
VALUES = st.integers(-100, 100) | st.integers(-1000, 1000).map(lambda n: n / 8)
PARTITIONS = 3


def sealed_of(items: list[Merged], outbox: Outbox) -> list[Sealed]:
    return seal(items, outbox, partition_count=PARTITIONS, batch_bytes_max=450, now_ms=1)


@contextmanager
def failing_after(byte_count: int) -> Any:
    """The next write to a journal writes so many bytes, and then the disk is full."""
    whole = journal._write_all

    def write(fd: int, data: bytes, place: int) -> None:
        journal._write_all = whole
        os.pwrite(fd, data[:byte_count], place)
        raise OSError(errno.ENOSPC, "No space left on device")

    journal._write_all = write
    try:
        yield
    finally:
        journal._write_all = whole


class Spools(RuleBasedStateMachine):
    """One process after the other records; what they leave is claimed at any time, also while the next one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.process_count = 0
        self.expected: dict[bytes, State] = defaultdict(int)
        self.task = Task()
        self.late: list[bytes] = []
        self.left: list[Path] = []

    @initialize()
    def start(self) -> None:
        self.process_count += 1
        self.spool = new_spool(self.root / "spool", f"p{self.process_count}", segment_bytes=4096)
        self.ids: dict[str, int] = {}
        self.names: dict[int, str] = {}
        self.memory: dict[str, Merged] = {}
        self.outbox = Outbox(self.spool.producer_id, 0)
        self.begun: list[tuple[Segment, int, str]] = []

    def series(self, name: str) -> int:
        if name not in self.ids:
            self.ids[name] = self.spool.define(merged(name, 0).definition, suffix(name))
            self.names[self.ids[name]] = name
        return self.ids[name]

    # Recording

    @rule(name=NAMES, value=VALUES, count=st.sampled_from([1, 1, 1, 3, 120, 300]))
    def add(self, name: str, value: float, count: int) -> None:
        for _ in range(count):
            record(self.spool, self.series(name), value)
            self.expected[suffix(name)] += value

    @rule(name=NAMES, value=st.integers(2**70, 2**72), count=st.integers(1, 3))
    def add_state(self, name: str, value: int, count: int) -> None:
        self.spool.append_state(self.series(name), value, count)
        self.expected[suffix(name)] += value

    @rule(name=NAMES)
    def begin_to_add(self, name: str) -> None:
        """A thread is interrupted with a number in its hands."""
        i = (segment := self.spool.segment).next()
        self.series(name)
        if i < segment.capacity:
            self.begun.append((segment, i, name))

    @precondition(lambda self: self.begun)
    @rule(value=VALUES.filter(lambda value: type(value) is float), void=st.booleans())
    def go_on_to_add(self, value: float, void: bool) -> None:
        segment, i, name = self.begun.pop(0)
        segment.values[i] = value
        segment.heads[i] = 2**64 - 1 if void else head_of(self.ids[name], is_int=False)
        self.expected[suffix(name)] += 0 if void else value

    @rule(name=NAMES)
    def undefine(self, name: str) -> None:
        if not any(begun[2] == name for begun in self.begun) and name in self.ids:
            self.spool.undefine(self.ids.pop(name))

    # Draining and sending

    def drain(self) -> None:
        for item in self.spool.drain():
            name = self.names[item.series_id]
            state = item.state if item.values is None else sum(item.values)
            old = self.memory.get(name)
            self.memory[name] = merged(name, state + (old.state if old else 0))

    @rule(names=st.sets(NAMES), fail=st.none() | st.integers(0, 400), drain_more=st.booleans())
    def commit(self, names: set[str], fail: int | None, drain_more: bool) -> None:
        self.drain()
        batches = sealed_of([self.memory.pop(name) for name in sorted(names & self.memory.keys())], self.outbox)
        if fail is not None:
            with failing_after(fail), pytest.raises(Unavailable):
                self.spool.commit(batches, [*self.memory.values()])
            if drain_more:
                self.drain()
        self.spool.commit(batches, [*self.memory.values()])

    @rule(name=NAMES, fail=st.integers(0, 60))
    def disk_is_full(self, name: str, fail: int) -> None:
        series_id = self.series(name)
        with failing_after(fail), pytest.raises(Unavailable):
            self.spool.append_state(series_id, 1, 1)

    @rule()
    def drain_without_commit(self) -> None:
        self.drain()

    @rule(data=st.data(), acknowledge=st.booleans())
    def send(self, data: st.DataObject, acknowledge: bool) -> None:
        waiting = [*self.outbox.pending()]
        for sealed in data.draw(st.lists(st.sampled_from(waiting), unique_by=id)) if waiting else ():
            value = self.spool.load(sealed.partition, sealed.sequence)
            assert value == sealed.value
            self.task.fold(value)
            if acknowledge:
                self.outbox.acknowledge(sealed.partition, sealed.sequence)
                self.spool.acknowledge([(sealed.partition, sealed.sequence)])

    @rule(data=st.data())
    def send_what_arrives_late(self, data: st.DataObject) -> None:
        waiting = [*self.outbox.pending()]
        if waiting:
            self.late.append(data.draw(st.sampled_from(waiting)).value)

    @precondition(lambda self: self.late)
    @rule()
    def arrive(self) -> None:
        self.task.fold(self.late.pop(0))

    @rule()
    def rewrite(self) -> None:
        self.spool._journal.rewrite()

    # The end of a process

    def crashed(self, path: Path) -> Path:
        """The slot as kill -9 leaves it, in the place of the one that was; the process is gone."""
        copy = as_kill_leaves_it(path, self.root / "copy")
        shutil.rmtree(path)
        copy.rename(path)
        (path / "LOCK").write_text(str((path / "LOCK").stat().st_ino))
        return path

    @rule()
    def crash(self) -> None:
        path = self.crashed(self.spool.path)
        self.spool.abandon()
        self.left.append(path)
        self.start()

    @rule(name=NAMES, at=st.integers(0, 2**16), garble=st.booleans(), what=st.booleans())
    def crash_in_a_write(self, name: str, at: int, garble: bool, what: bool) -> None:
        """The last write has not returned: of its record any part is there, or some byte is not."""
        self.series(name)
        path = self.spool.path
        before = as_kill_leaves_it(path, self.root / "before")
        [log] = path.glob("log-*")
        size = log.stat().st_size
        if what:
            self.spool.append_state(self.ids[name], 5, 1)
        else:
            self.drain()
            self.spool.commit(sealed_of([*self.memory.values()], self.outbox), [])
        more = bytearray(log.read_bytes()[size:])
        self.spool.abandon()
        at %= len(more)
        more[at] ^= 0xFF
        with (before / log.name).open("ab") as file:
            file.write(more if garble else more[:at])
        shutil.rmtree(path)
        before.rename(path)
        (path / "LOCK").write_text(str((path / "LOCK").stat().st_ino))
        self.left.append(path)
        self.start()

    @rule()
    def close(self) -> None:
        path = self.spool.path
        if not self.spool.close():
            self.left.append(path)
        self.start()

    # What it left

    @precondition(lambda self: self.left)
    @rule(seal_count=st.integers(0, 5), send_count=st.integers(0, 5), ack_count=st.integers(0, 5))
    def claim_and_crash(self, seal_count: int, send_count: int, ack_count: int) -> None:
        path = self.left.pop(0)
        leftover = claim(path)
        self.go_on(leftover, seal_count, send_count, ack_count)
        self.left.append(self.crashed(path))
        leftover.release()

    def go_on(self, leftover: Leftover, seal_count: int, send_count: int, ack_count: int) -> None:
        outbox = Outbox.restored(leftover.producer_id, leftover.epoch, leftover.next_sequences, loaded(leftover))
        if leftover.pending:
            leftover.commit(sealed_of(leftover.pending[:seal_count], outbox), leftover.pending[seal_count:])
        for n, sealed in enumerate([*outbox.pending()][:send_count]):
            value = leftover.load(sealed.partition, sealed.sequence)
            assert value == sealed.value
            self.task.fold(value)
            if n < ack_count:
                leftover.acknowledge([(sealed.partition, sealed.sequence)])

    @precondition(lambda self: self.left)
    @rule()
    def claim_and_finish(self) -> None:
        leftover = claim(self.left.pop(0))
        assert not leftover.report.corrupt
        assert not leftover.report.bad_count
        self.go_on(leftover, 10**9, 10**9, 10**9)
        leftover.remove()
        assert not leftover.path.exists()

    @invariant()
    def can_be_looked_at(self) -> None:
        if hasattr(self, "spool"):
            live = [info.producer_id for info in inspect(self.root / "spool") if info.live]
            assert live == [self.spool.producer_id]

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.begun.clear()
            self.crash()
            while self.left:
                self.claim_and_finish()
            while self.late:
                self.arrive()
            path = self.spool.path
            assert self.spool.close()
            assert leftovers(path.parent) == []
            states = {key: state for key, state in self.task.states.items() if state}
            assert states == {key: state for key, state in self.expected.items() if state}
        shutil.rmtree(self.root)


Spools.TestCase.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True
)
TestSpools = Spools.TestCase
