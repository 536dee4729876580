"""Recording to the ring: nothing is lost or doubled, whoever is interrupted, wherever."""

from __future__ import annotations

import linecache
import shutil
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import pipeline.producer.spool.ring as ring
from pipeline.errors import BufferFull, Invalid, Unavailable
from pipeline.producer.spool.ring import HOLED_MIN, INT_FLAG, VOID, head_of
from tests.producer.spool.support import VIEW, claim, left_in, new_spool, record, suffix, total
from tests.producer.support import FaultyLog, fold, in_threads, publisher


def test_ints_stay_exact_and_floats_floats(tmp_path: Path) -> None:
    """What is drained is what was recorded, bit by bit: ints beyond 2**53, floats, and both in one series."""
    spool = new_spool(tmp_path / "s")
    series = [spool.define(VIEW, suffix(n)) for n in range(3)]
    values = [[2**63 - 1, -(2**63)], [0.1, -0.0, 5e-324], [2**53 + 1, 0.5]]
    for series_id, run in zip(series, values, strict=True):
        for value in run:
            record(spool, series_id, value)
    drained = {item.series_id: item.values for item in spool.drain()}
    assert drained == dict(zip(series, values, strict=True))
    assert [type(value) for value in drained[series[2]] or ()] == [int, float]
    assert head_of(5, is_int=True) & INT_FLAG
    assert not head_of(5, is_int=False) & INT_FLAG


def test_many_threads_lose_nothing_while_segments_change(tmp_path: Path) -> None:
    """Threads that are switched at every chance record, fill segments at once, while another drains and commits."""
    spool = new_spool(tmp_path / "s", bytes_max=2**20)
    series = [spool.define(VIEW, suffix(n)) for n in range(4)]
    each, sums = 3_000, dict.fromkeys(series, 0)
    done = threading.Event()

    def drain() -> None:
        for series_id, value in total(spool.drain()).items():
            sums[series_id] += value
        spool.commit([], [])

    def drain_all() -> None:
        while not done.is_set():
            drain()

    drainer = threading.Thread(target=drain_all)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        drainer.start()

        def work(n: int) -> None:
            for i in range(each):
                while True:
                    try:
                        record(spool, series[n], i)
                        break
                    except BufferFull:
                        done.wait(0.001)

        in_threads(4, work)
    finally:
        sys.setswitchinterval(interval)
        done.set()
        drainer.join()
    drain()
    assert sums == dict.fromkeys(series, sum(range(each)))
    assert spool.given_up_count == 0
    assert len([*spool.path.glob("ring-*")]) == 1
    assert spool.close()


def test_a_hole_holds_up_nobody_and_is_not_forgotten(tmp_path: Path) -> None:
    """What others recorded behind a record that is begun is drained, and it is, too, when it is ended later."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    first = spool.segment
    hole = first.next()
    for _ in range(first.capacity + 10):
        record(spool, series_id, 1)
    assert spool.segment is not first
    assert total(spool.drain()) == {series_id: first.capacity + 10}
    spool.commit([], [])
    assert first.path.exists()
    first.values[hole] = 0.5
    first.heads[hole] = head_of(series_id, is_int=False)
    assert not spool._is_empty()
    assert total(spool.drain()) == {series_id: 0.5}
    assert spool.drain() == []
    spool.commit([], [])
    assert not first.path.exists()


def test_a_hole_that_is_ended_behind_a_commit_survives(tmp_path: Path) -> None:
    """A record that was passed over by a commit, and ended before the process died, is found; nothing else is, again."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    late, never = spool.segment.next(), spool.segment.next()
    assert late != never
    record(spool, series_id, 1)
    spool.drain()
    spool.commit([], [])
    spool.segment.ints[late] = 41
    spool.segment.heads[late] = head_of(series_id, is_int=True)
    assert not spool.close()
    leftover = claim(spool.path)
    assert left_in(leftover) == {suffix("a"): 41}
    assert leftover.report.hole_count == 1
    leftover.release()


def test_void_is_nothing(tmp_path: Path) -> None:
    """A record that its thread took back counts for nothing, and keeps nobody waiting."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    with pytest.raises(TypeError):
        record(spool, series_id, "x")  # type: ignore[arg-type]
    record(spool, series_id, 2)
    assert total(spool.drain()) == {series_id: 2}
    spool.commit([], [])
    assert spool.close()
    assert head_of(2**62 - 1, is_int=True) != VOID


def test_segments_with_holes_are_bounded(tmp_path: Path) -> None:
    """Threads that never end what they began cost so many segments, no more, and each is counted when it is given up."""
    spool = new_spool(tmp_path / "s", bytes_max=2**18)
    series_id = spool.define(VIEW, suffix("a"))
    for _ in range(HOLED_MIN + 5):
        segment = spool.segment
        segment.next()
        while spool.segment is segment:
            record(spool, series_id, 1)
        spool.drain()
        spool.commit([], [])
    assert spool.given_up_count == 5
    assert len([*spool.path.glob("ring-*")]) == HOLED_MIN + 1


def test_room_ends(tmp_path: Path) -> None:
    """A ring that nobody drains grows to what it may take; then recording is refused, and goes on after a commit."""
    spool = new_spool(tmp_path / "s", bytes_max=2**16)
    series_id = spool.define(VIEW, suffix("a"))
    count = 0
    first = spool.segment
    with suppress(BufferFull):
        while True:
            record(spool, series_id, 1)
            count += 1
    with pytest.raises(BufferFull, match="of 65536 of the spool in use"):
        spool.rotate(spool.segment)
    spool.rotate(first)  # was replaced long ago
    with suppress(BufferFull):
        for _ in range(100):
            spool.append_state(series_id, 1 << 8000, 1)
    assert spool.used_bytes <= 2**16
    assert spool.used_bytes == sum(path.stat().st_size for path in spool.path.iterdir() if path.name != "LOCK")
    assert spool.ring_bytes >= 16 * count
    drained = {item.series_id: item.values for item in spool.drain() if item.values}
    assert drained == {series_id: [1] * count}
    spool.commit([], [])
    assert spool.ring_bytes == 0
    record(spool, series_id, 1)
    spool.append_state(series_id, 1 << 80, 1)


def test_a_closed_spool_takes_nothing(tmp_path: Path) -> None:
    """Whoever records after the end is told so."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    old = spool.segment
    assert spool.close()
    assert spool.close()
    with pytest.raises(Invalid, match="closed"):
        record(spool, series_id, 1)
    with pytest.raises(ValueError, match="released"):
        old.values[0] = 1.0
    for call in (lambda: spool.append_state(series_id, 1, 1), lambda: spool.define(VIEW, b""), lambda: spool.rotate(old)):
        with pytest.raises(Invalid, match="closed"):
            call()


def test_a_handler_that_records_in_the_midst_of_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that fills the segment while its own thread is replacing it loses nothing."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    capacity = spool.segment.capacity
    reserve = ring._reserve
    calls = []

    def reserve_interrupted(path: Path, size: int) -> object:
        calls.append(path)
        if len(calls) == 1:
            for _ in range(2 * capacity):  # the handler
                record(spool, series_id, 1)
        return reserve(path, size)

    monkeypatch.setattr(ring, "_reserve", reserve_interrupted)
    for _ in range(capacity + 1):
        record(spool, series_id, 1)
    assert total(spool.drain()) == {series_id: 3 * capacity + 1}
    spool.commit([], [])
    assert [*spool.path.glob("ring-*")] == [spool.segment.path]
    assert spool.close()


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """When somebody deletes the spool under a process, it is told so, and what it recorded can still be drained."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    record(spool, series_id, 1)
    shutil.rmtree(tmp_path / "s")
    with pytest.raises(Unavailable, match="make a segment"):
        spool.rotate(spool.segment)
    assert total(spool.drain()) == {series_id: 1}
    spool.commit([], [])
    record(spool, series_id, 1)
    assert not spool.close()


def test_a_segment_has_its_blocks(tmp_path: Path) -> None:
    """A full disk is noticed when a segment is made, never by a bus error when it is written to."""
    spool = new_spool(tmp_path / "s", bytes_max=2**22, segment_bytes=2**20)
    assert spool.segment.path.stat().st_blocks * 512 >= 2**20
    assert spool.close()


@pytest.mark.parametrize("line", ["values[i] = value", "heads[i] = self.head"])
def test_a_thread_held_up_for_many_segments_records_all_the_same(tmp_path: Path, line: str) -> None:
    """Wherever in `add` a thread is held up, and however much others record meanwhile, what it adds is drained."""
    log, go, held = FaultyLog(), threading.Event(), threading.Event()
    with publisher(log, durability="process", spool_dir=str(tmp_path / "s"), spool_bytes_max=2**26) as pub:
        view = pub.sum("v", labels=("page",))
        cell, other = view.labels("a"), view.labels("b")
        cell.add(1.0)
        assert pub._running.own is not None
        spool = pub._running.own.get()

        def trace(frame: Any, event: str, arg: object) -> Any:
            if event == "line" and line in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
                held.set()
                go.wait(30)
            return trace

        def work() -> None:
            sys.settrace(lambda frame, *_: trace if frame.f_code.co_name == "add" else None)
            cell.add(1_000.0)
            sys.settrace(None)

        thread = threading.Thread(target=work)
        thread.start()
        assert held.wait(30)
        count = 0
        for _ in range(HOLED_MIN + 2):
            segment = spool.segment
            segment.next()  # one that never ends
            while spool.segment is segment:
                other.add(1.0)
                count += 1
            pub.flush()
        assert spool.given_up_count
        go.set()
        thread.join()
        pub.flush()
        assert fold(log.log).total("v") == 1_001 + count


def test_a_journal_written_anew_is_the_one_that_goes_on_or_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal handler that raises just behind the renaming leaves the old journal, and no newer one beside it."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    rename = Path.rename

    def interrupted(path: Path, target: Path) -> Path:
        rename(path, target)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spool._journal.rewrite()
    monkeypatch.undo()
    spool.append_state(series_id, 2**90, 1)
    spool._let_go()
    leftover = claim(spool.path)
    assert left_in(leftover) == {suffix("a"): 2**90}
    leftover.release()
