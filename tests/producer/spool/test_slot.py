"""Folders and locks: who may touch a slot, and when it goes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import Fenced, Invalid
from pipeline.producer.spool.leftover import Leftover, leftovers
from pipeline.producer.spool.live import Spool
from pipeline.producer.spool.look import inspect
from tests.producer.spool.support import VIEW, claim, left_in, merged, new_spool, record, suffix, total
from tests.producer.support import in_threads, wait_until


def test_a_live_slot_is_nobody_elses(tmp_path: Path) -> None:
    """While its process lives, or somebody has claimed it, a slot can't be claimed; looking at it changes nothing."""
    spool = new_spool(tmp_path / "s")
    record(spool, spool.define(VIEW, suffix("a")), 1)
    assert leftovers(tmp_path / "s") == [spool.path]
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in spool.path.iterdir()}
    assert Leftover.claim(spool.path) is None
    [info] = inspect(tmp_path / "s")
    assert (info.producer_id, info.live, info.epoch, info.delta_count, info.series_count) == ("p", True, 0, 1, 1)
    assert before == {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in spool.path.iterdir()}
    assert not spool.close()
    assert not inspect(tmp_path / "s")[0].live
    leftover = claim(spool.path)
    assert inspect(tmp_path / "s")[0].live
    assert Leftover.claim(spool.path) is None
    leftover.release()
    claim(spool.path).release()
    assert Leftover.claim(tmp_path / "s" / "nobody") is None


def test_an_empty_slot_goes(tmp_path: Path) -> None:
    """At the end, and of those that died while they made or removed theirs, nothing stays."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    record(spool, series_id, 1)
    assert total(spool.drain()) == {series_id: 1}
    spool.commit([Sealed(0, 0, b"x", 1)], [])
    spool.acknowledge([(0, 0)])
    for name in (".new-x", ".gone-x"):
        shutil.copytree(spool.path, tmp_path / "s" / name)
        lock = tmp_path / "s" / name / "LOCK"
        lock.write_text(str(lock.stat().st_ino))
    (tmp_path / "s" / ".gone-y").mkdir()
    assert spool.close()
    new_spool(tmp_path / "s", "q").close()
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["VERSION"]


@pytest.mark.parametrize("what", ["ring", "state", "pending", "batch"])
def test_a_slot_with_something_in_it_stays(tmp_path: Path, what: str) -> None:
    """Whatever waits, and wherever, is there after the end."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    if what == "ring":
        record(spool, series_id, 1)
        spool.drain()
    elif what == "state":
        spool.append_state(series_id, 1, 1)
        spool.drain()
    elif what == "pending":
        spool.commit([], [merged("a", 1)])
    else:
        spool.commit([Sealed(0, 0, b"x", 1)], [])
    assert not spool.close()
    assert not spool.close()
    assert leftovers(tmp_path / "s") == [spool.path]


def test_versions(tmp_path: Path) -> None:
    """A folder of another version, or of somebody else, is refused in words that name both, and stays as it is."""
    folder = tmp_path / "s"
    new_spool(folder).close()
    (folder / "VERSION").write_text("pipeline spool 7\n")
    for call in (lambda: new_spool(folder), lambda: leftovers(folder), lambda: inspect(folder)):
        with pytest.raises(Invalid, match=r"'pipeline spool 7'.*'pipeline spool 1'"):
            call()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "letter").touch()
    for call in (lambda: new_spool(foreign), lambda: leftovers(foreign), lambda: inspect(foreign)):
        with pytest.raises(Invalid, match="no spool"):
            call()
    assert [*foreign.iterdir()] == [foreign / "letter"]


@pytest.mark.parametrize("name", ["", ".x", "a/b", "x.corrupt", "a\nb", "VERSION", "x" * 101])
def test_names_of_slots(tmp_path: Path, name: str) -> None:
    """A producer id that could be mistaken for something else is refused."""
    with pytest.raises(Invalid, match="can't name a slot"):
        new_spool(tmp_path / "s", name)


def test_a_name_is_used_once(tmp_path: Path) -> None:
    """A slot is never continued by another process that records."""
    spool = new_spool(tmp_path / "s")
    with pytest.raises(Invalid, match="has a slot of producer p already"):
        new_spool(tmp_path / "s")
    spool.append_state(spool.define(VIEW, suffix("a")), 1, 1)
    assert not spool.close()
    with pytest.raises(Invalid, match="has a slot of producer p already"):
        new_spool(tmp_path / "s")
    with pytest.raises(Invalid, match="no room for 4 segments"):
        Spool(tmp_path / "s", "q", bytes_max=2**20, segment_bytes=2**19)


def test_a_copy_is_refused(tmp_path: Path) -> None:
    """A copy of a slot can't be claimed: its deltas would be sent by the original, too. A folder that was moved can."""
    spool = new_spool(tmp_path / "s")
    spool.append_state(spool.define(VIEW, suffix("a")), 1, 1)
    spool.close()
    shutil.copytree(tmp_path / "s", tmp_path / "t")
    with pytest.raises(Fenced, match="copy"):
        Leftover.claim(tmp_path / "t" / "p")
    (tmp_path / "s").rename(tmp_path / "u")
    leftover = claim(tmp_path / "u" / "p")
    assert left_in(leftover) == {suffix("a"): 1}
    leftover.commit([Sealed(0, 0, b"x", 1)])
    leftover.acknowledge([(0, 0)])
    leftover.remove()
    assert leftovers(tmp_path / "u") == []


def _in_child(spool: Spool, series_id: int, out: object) -> None:
    old = spool.segment
    spool.abandon()
    refused = 0
    for call in (
        lambda: record(spool, series_id, 1),
        lambda: spool.append_state(series_id, 1, 1),
        lambda: spool.define(VIEW, b""),
        lambda: spool.commit([], []),
        lambda: old.heads.__setitem__(0, 1),
    ):
        try:
            call()
        except (Invalid, ValueError):
            refused += 1
    spool.close()
    mine = new_spool(spool.path.parent, "child")
    record(mine, mine.define(VIEW, suffix("a")), 32)
    out.send((refused, Leftover.claim(spool.path) is None, os.listdir(spool.path.parent)))  # type: ignore[attr-defined]
    os._exit(0)


def test_a_forked_child_lets_go(tmp_path: Path) -> None:
    """It can't write to its parent's slot, nor unlock it, and neither keeps it locked when the parent is done."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    record(spool, series_id, 1)
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    child = context.Process(target=_in_child, args=(spool, series_id, send))
    child.start()
    refused, live, names = receive.recv()
    assert (refused, live, sorted(names)) == (5, True, ["VERSION", "child", "p"])
    child.join()
    record(spool, series_id, 2)
    assert total(spool.drain()) == {series_id: 3}
    assert not spool.close()
    left = {path.name: left_in(claim(path)) for path in leftovers(tmp_path / "s")}
    assert left == {"p": {suffix("a"): 3}, "child": {suffix("a"): 32}}


def test_a_program_that_is_started_inherits_nothing(tmp_path: Path) -> None:
    """A slot is free as soon as its process is gone, whatever that process has started."""
    spool = new_spool(tmp_path / "s")
    spool.append_state(spool.define(VIEW, suffix("a")), 1, 1)
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, close_fds=False
    ) as program:
        spool.close()
        wait_until(lambda: (left := Leftover.claim(spool.path)) and not left.release())  # once it has begun
        program.communicate(b"\n")


def test_an_outbox_is_restored(tmp_path: Path) -> None:
    """It goes on with the next sequence, under a floor that holds what is not acknowledged."""
    batches = [Sealed(0, 3, b"abc", 1), Sealed(0, 5, b"de", 1)]
    outbox = Outbox.restored("p", 2, {0: 6, 1: 4}, batches)
    assert (len(outbox), outbox.bytes_total, [*outbox.pending()]) == (2, 5, batches)
    assert (outbox.next_numbers(0), outbox.next_numbers(1), outbox.next_numbers(2)) == ((6, 3), (4, 4), (0, 0))
    outbox.acknowledge(0, 3)
    assert outbox.next_numbers(0) == (6, 5)
    with pytest.raises(AssertionError, match="still to come"):
        Outbox.restored("p", 2, {0: 5}, batches)


def test_many_start_at_once(tmp_path: Path) -> None:
    """As under a server with many workers: each gets its slot in a folder that none of them has seen before."""

    def work(n: int) -> None:
        for turn in range(10):
            folder = tmp_path / f"s{turn}"
            spool = new_spool(folder, f"p{n}")
            inspect(folder)
            assert spool.close()

    in_threads(6, work)
