"""A table with a journal: sealed deltas and those left by a kill are exactly the recorded ones."""

from __future__ import annotations

import linecache
import shutil
import sys
import tempfile
import threading
from bisect import bisect_right
from collections import Counter
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

import pipeline.publisher.table as table
from pipeline.core.kinds import KINDS, State
from pipeline.core.record import OVERFLOW, Definition, series_suffix
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import Unavailable
from pipeline.publisher.batching import Pending, number
from pipeline.publisher.spool.live import Spool
from pipeline.publisher.spool.ring import DELTA, END_BYTES, HEADER, encode_delta, scan
from tests.contracts.tables import NOW_MS, Lab, Page, Pages, every_journal, extension, states_of
from tests.publisher.spool.support import Task, as_kill_leaves_it, claim, end
from tests.publisher.support import hurried_threads, in_threads
from tests.support import LONG, traced

KIND_NAMES = ("sum", "mean", "max", "last", "histogram")
VALUES = st.integers(-5, 2**70) | st.sampled_from([0.5, -2.25, 2.0**60])
decode = msgspec.msgpack.Decoder(Definition).decode


class Views(Task):
    """A task of several views."""

    def series(self, definition: Definition, suffix: bytes) -> Any:
        return definition.kind, suffix


class Tables(RuleBasedStateMachine):
    """Adds, drains, commits that fail, evictions and sends, in any order; a kill in between, at any time."""

    way = ""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.copies = count()
        self.expected: dict[tuple[str, bytes], State] = {}
        self.task = Views()

    @initialize()
    def start(self) -> None:
        self.lab = Lab(self.way, journal=self)
        self.spool = Spool(self.root / "s", "p", bytes_max=2**22, segment_bytes=4096, ends=self.lab.table.ends)
        self.views = [self.lab.define(kind, ("name",), series_max=3) for kind in KIND_NAMES]
        self.outbox = Outbox("p", 0)
        self.unkept: list[Sealed] = []
        self.kept: list[Sealed] = []
        self.positions: dict[int, tuple[int, int]] = {}
        self.gone: list[int] = []
        self.is_full = False

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        return None if self.is_full else self.spool.define(definition, suffix)

    def segment(self, shard: int, full: int, length: int) -> Any:
        return None if self.is_full else self.spool.segment(shard, full, length)

    @rule(view=st.integers(0, 4), name=st.sampled_from("abcde"), value=VALUES, times=st.sampled_from([1, 2, 120]))
    def record(self, view: int, name: str, value: float, times: int) -> None:
        kind = KIND_NAMES[view]
        for _ in range(times):
            known = self.views[view].overflow_count
            getattr(self.views[view], KINDS[kind].method)(value, name=name)
            own = self.views[view].overflow_count == known
            key = kind, series_suffix([name if own else OVERFLOW])
            delta = KINDS[kind].collect([(NOW_MS, 0, value) if kind == "last" else value])
            old = self.expected.get(key)
            self.expected[key] = delta if old is None or kind == "last" else KINDS[kind].merge(old, delta)

    @rule(partitions=st.integers(1, 3))
    def drain(self, partitions: int) -> None:
        for draft in self.lab.drain(partitions):
            self.unkept.append(number(draft, self.outbox, NOW_MS))
            self.outbox.add(self.unkept[-1])
        self.positions, gone = self.lab.table.cut()
        self.gone += gone
        self.drained = True

    @precondition(lambda self: self.unkept)
    @rule(fails=st.booleans())
    def commit(self, fails: bool) -> None:
        if fails:
            self.spool._database.is_writing = True
            with pytest.raises(Unavailable):
                self.spool.commit(self.unkept, (), self.positions, self.gone)
            self.spool._database.is_writing = False
            return
        self.spool.commit(self.unkept, (), self.positions, self.gone)
        self.kept += self.unkept
        self.unkept, self.gone = [], []

    @rule()
    def commit_what_waits(self) -> None:
        waiting = self.lab.table.waiting_states()
        positions, gone = self.lab.table.cut()
        self.spool.commit(self.unkept, [Pending(decode(row[0]), *row[1:]) for row in waiting], positions, self.gone + gone)
        self.kept += self.unkept
        self.unkept, self.gone = [], []

    @rule(silent=st.integers(0, 2))
    def evict(self, silent: int) -> None:
        self.lab.table.evict(silent)

    @precondition(lambda self: self.kept)
    @rule(acknowledge=st.booleans())
    def send(self, acknowledge: bool) -> None:
        batch = self.kept[0]
        self.task.fold(batch.value)
        if acknowledge:
            del self.kept[0]
            self.outbox.acknowledge(batch.partition, batch.sequence)
            self.spool.acknowledge([(batch.partition, batch.sequence)])

    @rule()
    def look_at_what_a_kill_leaves(self) -> None:
        task = Views()
        task.states, task._folded = {**self.task.states}, {**self.task._folded}
        left = claim(as_kill_leaves_it(self.spool.path, self.root / str(next(self.copies))))
        assert (left.report.corrupt, left.report.bad_count) == ([], 0)
        task.finish(left)
        assert plain(task.states) == plain(self.expected)

    def teardown(self) -> None:
        if hasattr(self, "spool"):
            self.look_at_what_a_kill_leaves()
            end(self.spool)
        shutil.rmtree(self.root)


def plain(states: dict[Any, State]) -> dict[Any, Any]:
    """Return states by series; for a `last` view only the value."""
    return {key: state[2] if key[0] == "last" else state for key, state in states.items()}


@every_journal
def test_any_order(way: str) -> None:
    """Each table is exact against the real spool, in any order of steps."""
    if not way.startswith("plain"):
        extension()

    class Of(Tables):
        pass

    Of.way = way
    case = Of.TestCase
    case.settings = settings(
        max_examples=25 if LONG else 12,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=[*HealthCheck],
        derandomize=True,
    )
    case().runTest()


@every_journal
def test_a_drain_and_its_position_are_one(way: str) -> None:
    """The records before each position are exactly the deltas drained up to then, while threads record."""
    pages = Pages(1 << 15)
    lab = Lab(way, journal=pages)
    view = lab.define(labels=("name",))
    stop = threading.Event()
    cuts: list[tuple[int, dict[int, tuple[int, int]]]] = []

    def work(i: int) -> None:
        if i:
            series = [view.labels(str(n)) for n in range(20)]
            for turn in count():
                series[turn * i % 20].add(1)
                if len(cuts) > (1_000 if LONG else 300):
                    break
            stop.set()
            return
        total = 0
        while not stop.is_set() or lab.table.waiting_count:
            drafts, positions = lab.drain(2), lab.table.cut()[0]
            if drafts:
                total += sum([draft.delta_count for draft in drafts])
                cuts.append((total, positions))
                lab.table.evict(len(cuts) % 3)

    with hurried_threads():
        in_threads(2, work)
    size, most = len(encode_delta(1)) + 16 + 7 & -8, pages.size - END_BYTES - HEADER.size
    for total, positions in cuts:
        records = [segment * (most // size) + (offset - HEADER.size) // size for segment, offset in positions.values()]
        assert total == sum(records)


def test_what_comes_in_the_midst_of_a_drain() -> None:
    """A delta that a handler or finaliser records during a drain, at any line, is drained, or behind the position."""
    for step in count(1):
        lab = Lab("plain-journal")
        view = lab.define(labels=("name",))
        for n in range(6):
            view.add(1, name=str(n % 4))
        lines = 0

        def trace(frame: FrameType, event: str, arg: object, view: Any = view, step: int = step) -> Any:
            nonlocal lines
            if frame.f_code.co_filename != table.__file__:
                return None
            line = linecache.getline(table.__file__, frame.f_lineno).strip()
            if event == "line" and not line.startswith(("number, offset =", "if not self.queue:")):
                lines += 1
                if lines == step:
                    sys.settrace(None)
                    view.add(1, name="0")
                    view.add(1, name="late")
            return trace

        with traced(trace):
            drafts = lab.table.drain(1, None, 1 << 20)
        drained = sum([draft.delta_count for draft in drafts])
        [page] = lab.journal.pages[0].values()
        assert bisect_right(record_ends(page), lab.table.cut()[0][0]) == drained, step
        late = states_of([*drafts, *lab.drain()])
        assert sum(late.values()) == (8 if lines >= step else 6), step
        if lines < step:
            assert step > 50
            return


def test_a_drain_that_has_no_memory_for_its_totals() -> None:
    """Without memory for totals drained states are handed over all the same, and `local` is marked as incomplete."""
    lab = Lab("plain-journal")
    view = lab.define(labels=("name",))
    for _ in range(2):
        view.add(1, name="a")
        failed = []

        def trace(frame: FrameType, event: str, arg: object, failed: list[int] = failed) -> Any:
            if frame.f_code.co_qualname == "Totals.add" and event == "line" and "states[" in source_of(frame) and not failed:
                failed.append(frame.f_lineno)
                raise MemoryError
            return trace

        with traced(trace):
            drafts = lab.table.drain(1, None, 1 << 20)
        assert failed
        assert states_of(drafts) == {("sum", ("a",)): 1}
    lab.table.snapshot()
    assert not lab.table.local(view).complete


def source_of(frame: FrameType) -> str:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno)


def record_ends(page: Page) -> list[tuple[int, int]]:
    """Return the ends of the records of a segment, without the one that ends the segment."""
    ends, offset = [], HEADER.size
    for _, payload in scan(bytes(page.bytes), page.seed, HEADER.size).records:
        offset += 16 + len(payload) + 7 & -8
        ends.append((page.number, offset))
    return ends


@every_journal
def test_a_segment_is_as_the_format_says(way: str, tmp_path: Path) -> None:
    """Both tables write the bytes that `Ring` writes, ends of segments too; and each value comes back."""
    lab = Lab(way)
    total, newest = lab.define("sum", ("name",)), lab.define("last", ("name",))
    numbers = [1, -1, 127, 128, -33, 255, 256, 65_536, 2**32, 2**63, 2**64 - 1, -(2**63), -(2**300), 0.5, -0.0, 1e300]
    texts = ["", "tea", "x" * 31, "x" * 32, "x" * 300, None, True, 2.5, 2**64]
    for value in numbers * 20:
        total.add(value, name="a")
    for value in texts:
        newest.set(value, 5, name="a")
    payloads: list[bytes] = []
    for pages in lab.journal.pages.values():
        for page in pages.values():
            found = scan(bytes(page.bytes), page.seed, HEADER.size)
            assert (found.damages, found.torn_bytes) == ([], 0)
            assert found.ended == (page.number < len(pages) - 1)
            payloads += [payload for word, payload in found.records if word & 3 == DELTA]
    deltas: list[Any] = numbers * 20 + [(5, NOW_MS * 10**6 + n, text) for n, text in enumerate(texts)]
    assert Counter(payloads) == Counter(map(encode_delta, deltas))


@every_journal
def test_what_the_journal_has_no_room_for_is_dropped_or_raised(way: str) -> None:
    """`None` drops the delta, an exception comes out of the call; nothing is recorded in either place."""
    lab = Lab(way, journal=(pages := Full()))
    view = lab.define(labels=("name",))
    for pages.error in (None, Unavailable("away")):
        for pages.full in ("define", "segment"):
            if pages.error is None:
                assert view.add_many((f"{pages.full} dropped",), [1]) == 0
            else:
                with pytest.raises(Unavailable, match="away"):
                    view.add(1, name=f"{pages.full} raised")
            assert (lab.table.waiting_count, lab.table.ends()) == (0, {})
    pages.full = ""
    view.add(1, name="a")
    assert lab.table.waiting_count == 1


class Full(Pages):
    full, error = "", None

    def define(self, definition: bytes, suffix: bytes) -> int | None:
        return self.answer() if self.full == "define" else super().define(definition, suffix)

    def segment(self, shard: int, full: int, length: int) -> Any:
        return self.answer() if self.full == "segment" else super().segment(shard, full, length)

    def answer(self) -> None:
        if self.error is not None:
            raise self.error
