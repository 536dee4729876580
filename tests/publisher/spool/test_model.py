"""A model of spools: a task counts each delta once, whatever happens to processes and disks."""

from __future__ import annotations

import shutil
import sqlite3
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.errors import Unavailable
from pipeline.publisher.spool.orphan import find_slots, inspect
from pipeline.publisher.spool.ring import HEADER, RingPosition, segment_path
from tests.publisher.spool.support import SHARDS, Recorder, Task, as_kill_leaves_it, claim, end, sealed, suffix
from tests.support import examples, traced

NAMES = st.sampled_from("abcde")


class Spools(RuleBasedStateMachine):
    """Successive processes record, and their slots are claimed at any time, also while the next one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.process_count = 0
        self.expected: Counter[bytes] = Counter()
        self.task = Task()
        self.left: list[Path] = []
        self.late: list[bytes] = []

    @initialize()
    def start(self) -> None:
        self.process_count += 1
        self.recorder = Recorder(self.root / "s", f"p{self.process_count}", fsync=self.process_count % 2 == 0)
        self.spool, self.outbox = self.recorder.spool, self.recorder.outbox
        self.unsynced: list[tuple[int, RingPosition, bytes, int]] = []

    @rule(name=NAMES, shard=st.integers(0, SHARDS - 1), value=st.integers(1, 2**70), count=st.sampled_from([1, 3, 200]))
    def add(self, name: str, shard: int, value: int, count: int) -> None:
        for _ in range(count):
            self.recorder.add(name, value, shard)
            self.expected[suffix(name)] += value
            self.unsynced.append((shard, self.recorder.ends()[shard], suffix(name), value))

    @rule(seal_count=st.integers(0, 5), fail=st.booleans())
    def commit(self, seal_count: int, fail: bool) -> None:
        if fail:  # the disk is full, in the midst
            connection = self.spool._database._connection
            assert connection is not None
            self.spool._database._connection = Failing(connection)  # type: ignore[assignment]
            before = {**self.recorder.waiting}
            with pytest.raises(Unavailable):
                self.recorder.commit(0)
            self.spool._database._connection = connection
            self.recorder.waiting = before
        self.recorder.commit(seal_count)
        self.unsynced.clear()

    @rule(name=NAMES)
    def evict(self, name: str) -> None:
        if name in self.recorder.ids:
            self.recorder.commit(gone=[name])
            self.unsynced.clear()

    @rule(data=st.data(), acknowledge=st.booleans())
    def send(self, data: st.DataObject, acknowledge: bool) -> None:
        waiting = [*self.outbox.pending()]
        for batch in data.draw(st.lists(st.sampled_from(waiting), unique_by=id)) if waiting else ():
            value = self.spool.load(batch.partition, batch.sequence)
            assert value == batch.value
            self.task.fold(value)
            if acknowledge:
                self.recorder.acknowledge(batch)
            else:
                self.late.append(value)

    @precondition(lambda self: self.late)
    @rule()
    def arrive_again(self) -> None:
        self.task.fold(self.late.pop(0))

    @rule()
    def sync(self) -> None:
        self.spool.sync()
        self.unsynced.clear()

    # The end of a process

    def crashed(self, path: Path, let_go: Callable[[], None]) -> None:
        """Replace the slot by its state after kill -9; the process is gone."""
        copy = as_kill_leaves_it(path, self.root / "copy")
        let_go()
        shutil.rmtree(path)
        copy.rename(path)
        self.left.append(path)

    @rule()
    def crash(self) -> None:
        self.crashed(self.spool.path, lambda: end(self.spool))
        self.start()

    @rule(data=st.data())
    def lose_power(self, data: st.DataObject) -> None:
        """Replace unsynced ends of rings by zeros, from any record on, of which a part remains."""
        self.crashed(self.spool.path, lambda: end(self.spool))
        for shard in range(SHARDS):
            mine = [record for record in self.unsynced if record[0] == shard]
            lost = mine[data.draw(st.integers(0, len(mine))) :]
            for _, _, key, value in lost:
                self.expected[key] -= value
            if lost:
                self.cut_off(shard, lost[0][1])
        self.start()

    def cut_off(self, shard: int, end: RingPosition) -> None:
        """Zero everything behind the begin of the record that ends at `end`."""
        for number in range(end.number, 10**6):
            file = segment_path(self.left[-1], shard + 1, number)
            if not file.exists():
                return
            data = bytearray(file.read_bytes())
            start = HEADER.size
            while number == end.number:
                following = start + 16 + int.from_bytes(data[start : start + 4], "little") + 7 & -8
                if following == end.offset:
                    break
                start = following
            torn = data[start + 8 : start + 12] if number == end.number else b""
            data[start:] = bytes(len(data) - start)
            data[start + 8 : start + 8 + len(torn)] = torn
            file.write_bytes(data)

    @rule()
    def close(self) -> None:
        path = self.spool.path
        if not self.spool.close():
            self.left.append(path)
        self.start()

    # What it left

    @precondition(lambda self: self.left)
    @rule(seal_count=st.integers(0, 5), send_count=st.integers(0, 5), commit=st.booleans())
    def claim_and_crash(self, seal_count: int, send_count: int, commit: bool) -> None:
        path = self.left.pop(0)
        orphan = claim(path)
        outbox = self.task.outbox_of(orphan)
        if orphan.pending and commit:
            orphan.commit(sealed(orphan.pending[:seal_count], outbox), orphan.pending[seal_count:])
        for n, batch in enumerate([*outbox.pending()][:send_count]):
            self.task.fold(orphan.load(batch.partition, batch.sequence))
            if n % 2:
                orphan.acknowledge([(batch.partition, batch.sequence)])
        self.crashed(path, orphan.release)

    @precondition(lambda self: self.left)
    @rule()
    def claim_and_finish(self) -> None:
        orphan = claim(self.left.pop(0))
        assert not orphan.report.corrupt
        assert not orphan.report.bad_count
        self.task.finish(orphan)
        assert not orphan.path.exists()

    @invariant()
    def can_be_looked_at(self) -> None:
        if hasattr(self, "spool"):
            infos = inspect(self.root / "s")
            assert [info.slot for info in infos if info.live] == [self.spool.path.name]
            assert not any(info.corrupt for info in infos)

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.crash()
            while self.left:
                self.claim_and_finish()
            while self.late:
                self.arrive_again()
            assert self.spool.close()
            assert find_slots(self.root / "s") == []
            assert self.task.states == {key: count for key, count in self.expected.items() if count}
        shutil.rmtree(self.root)


class Failing:
    """A connection to a database whose disk is full."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self.connection, name)

    def execute(self, query: str, *arguments: Any) -> Any:
        if query == "COMMIT":
            raise sqlite3.OperationalError("disk I/O error")
        return self.connection.execute(query, *arguments)


Spools.TestCase.settings = settings(
    max_examples=examples(30), stateful_step_count=25, deadline=None, suppress_health_check=[*HealthCheck], derandomize=True
)
TestSpools = Spools.TestCase


READERS = "Recorded", "Contents._", "scan", "_record", "_deltas", "segment_", "encode", "decode", "checksum", "inspect"
"""Functions that only read, during which the files need not be compared at each line."""


def killed_at_each_line(act: Callable[[], None], path: Path, folder: Path) -> list[Path]:
    """Let `act` run, and yield a copy of the slot, as a kill of the process would leave it, at each line of the spool's code
    that finds its files changed.
    """
    copies: list[Path] = []
    seen: set[int] = set()

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        if "/publisher/spool/" not in code.co_filename or code.co_filename == __file__:
            return None
        if code.co_qualname.startswith(READERS):
            return None
        if event == "line" and path.exists():
            sys.settrace(None)
            files = [file for file in sorted(path.rglob("*")) if file.is_file()]
            state = hash(tuple([(str(file), file.read_bytes()) for file in files]))
            if state not in seen:
                seen.add(state)
                copies.append(as_kill_leaves_it(path, folder / str(len(copies))))
            sys.settrace(trace)
        return trace

    with traced(trace):
        act()
    return copies


@pytest.mark.parametrize("what", ["commit", "rotate", "acknowledge", "define", "claim", "claimed", "damaged"])
def test_a_kill_at_each_line(tmp_path: Path, what: str) -> None:
    """Every delta is found once, wherever the process dies while it works on its files."""
    recorder = Recorder(tmp_path / "s")
    spool, path, task = recorder.spool, recorder.spool.path, Task()
    for i in range(500):
        recorder.add(i % 5, shard=i % 2)
    recorder.commit(2)
    first, *_ = recorder.outbox.pending()
    for i in range(200):
        recorder.add(i % 7, shard=i % 2)
    truth = {suffix(name): 100 * (name < 5) + 28 + (name < 4) for name in range(7)}
    acts: dict[str, Callable[[], object]] = {
        "commit": recorder.commit,
        "rotate": lambda: spool.segment(0, recorder.rings[0].segment.number, 1),
        "acknowledge": lambda: recorder.acknowledge(first),
        "define": lambda: recorder.define("x"),
        "claim": lambda: claim(path).release(),
        "damaged": lambda: claim(path).release(),
    }
    if what == "acknowledge":
        task.fold(first.value)
    if what in ("claim", "claimed", "damaged"):
        assert not spool.close()
    if what == "claimed":
        orphan = claim(path)
        batches = sealed(orphan.pending, task.outbox_of(orphan))
        acts["claimed"] = lambda: orphan.commit(batches)
    if what == "damaged":  # one of two copies of a number: nothing is lost by it
        data = bytearray((path / "SEAL").read_bytes())
        data[0] ^= 1
        (path / "SEAL").write_bytes(data)
    copies = killed_at_each_line(acts[what], path, tmp_path)
    assert len(copies) > 1
    for n, copy in enumerate(copies):
        after = Task()
        for batch in [first] * (what == "acknowledge"):
            after.fold(batch.value)
        left = claim(copy)
        assert bool(left.report.corrupt) == (what == "damaged"), (n, left.report)
        after.finish(left)
        assert after.states == truth, (n, left.report)
        shutil.rmtree(copy.parent)
