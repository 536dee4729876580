"""The journal: what is written is found again, whatever became of the end of the file; what is dead goes."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.codec import decode_batch
from pipeline.core.record import Definition
from pipeline.core.sequence import Outbox, Sealed
from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.producer.sealing import seal
from pipeline.producer.spool.leftover import Leftover
from pipeline.producer.spool.live import Spool
from pipeline.producer.spool.look import inspect
from tests.producer.spool.support import VIEW, as_kill_leaves_it, claim, left_in, loaded, merged, new_spool, record, suffix
from tests.producer.support import CLOCK


def seal_one(outbox: Outbox, name: str, value: float) -> list[Sealed]:
    return seal([merged(name, value)], outbox, partition_count=1, batch_bytes_max=10**6, now_ms=CLOCK.now_ms())


def filled(folder: Path) -> tuple[Spool, Outbox]:
    """A spool with a batch of 1 that is acknowledged, one of 2, 4 pending, 8 in a state, 16 in the ring."""
    spool, outbox = new_spool(folder), Outbox("p", 0)
    series_id = spool.define(VIEW, suffix("a"))
    record(spool, series_id, 1)
    spool.drain()
    spool.commit([*seal_one(outbox, "a", 1), *seal_one(outbox, "a", 2)], [merged("a", 4, 3)])
    spool.acknowledge([(0, 0)])
    spool.append_state(series_id, 8, 2)
    record(spool, series_id, 16)
    return spool, outbox


def test_what_was_written_is_found(tmp_path: Path) -> None:
    """A slot gives back batches, with a new epoch and all else as it was, and merges everything that is in none."""
    spool, _ = filled(tmp_path / "s")
    value = spool.load(0, 1)
    assert not spool.close()
    leftover = claim(spool.path)
    assert (leftover.producer_id, leftover.epoch, leftover.next_sequences) == ("p", 1, {0: 2})
    assert [(item.suffix, item.state, item.delta_count) for item in leftover.pending] == [(suffix("a"), 28, 6)]
    [batch] = loaded(leftover)
    was, now = decode_batch(value), decode_batch(batch.value)
    assert (batch.partition, batch.sequence, batch.entry_count, now.epoch) == (0, 1, 1, 1)
    assert (was.producer_id, was.sequence, was.floor, was.created_at_ms) == ("p", now.sequence, now.floor, now.created_at_ms)
    assert was.groups == now.groups
    with pytest.raises(Invalid, match="not empty"):
        leftover.remove()
    leftover.release()


def test_an_epoch_rises_with_each_claim(tmp_path: Path) -> None:
    """Also when the one before it did nothing, and before anything can be sent."""
    spool, _ = filled(tmp_path / "s")
    spool.close()
    for epoch in (1, 2, 3):
        leftover = claim(spool.path)
        assert leftover.epoch == epoch
        assert decode_batch(loaded(leftover)[0].value).epoch == epoch
        assert decode_batch(leftover.load(0, 1)).epoch == epoch
        [info] = inspect(tmp_path / "s")
        assert info.epoch == epoch
        leftover.release()


@pytest.mark.parametrize("kind", ["sum", "min", "max", "mean", "last"])
def test_every_kind_comes_back(tmp_path: Path, kind: str) -> None:
    """States of each kind, ints beyond 64 bits among them, from a state's record, from pending, and merged from both."""
    definition = Definition("v", kind, ("page",))
    big = 2**80
    values = {"sum": big, "min": -big, "max": big, "mean": (big, 3), "last": (5, "x")}
    spool = new_spool(tmp_path / "s")
    a, b = (spool.define(definition, suffix(name)) for name in "ab")
    spool.append_state(a, values[kind], 3)
    spool.append_state(b, values[kind], 3)
    spool.drain()
    spool.commit([], [merged("a", values[kind], 3, definition), merged("b", values[kind], 3, definition)])
    if kind != "last":
        record(spool, b, 1)
    spool.close()
    leftover = claim(spool.path)
    found = {item.suffix: item for item in leftover.pending}
    with_1 = {"sum": big + 1, "min": -big, "max": big, "mean": (big + 1, 4), "last": (5, "x")}
    assert found[suffix("a")] == merged("a", values[kind], 3, definition)
    assert found[suffix("b")] == merged("b", with_1[kind], 3 if kind == "last" else 4, definition)
    leftover.release()


def test_a_journal_that_is_mostly_dead_is_written_anew(tmp_path: Path) -> None:
    """It stays in proportion to what is alive, and every batch can still be loaded."""
    spool, outbox = filled(tmp_path / "s")
    spool._journal.rewrite_bytes_min = 4_000
    kept = spool.load(0, 1)
    for n in range(300):
        [batch] = seal_one(outbox, "b" * 100, n)
        spool.drain()
        spool.commit([batch], [])
        spool.acknowledge([(0, batch.sequence)])
        gone = spool.define(VIEW, suffix(n))
        spool.undefine(gone)
        assert spool.load(0, 1) == kept
    spool.drain()
    spool.commit([], [])
    [log] = spool.path.glob("log-*")
    assert log.name > "log-00000005"
    assert log.stat().st_size < 10_000
    assert len(spool._journal.ledger.series) == 1
    spool.close()
    leftover = claim(spool.path)
    assert left_in(leftover) == {suffix("a"): 2}
    assert leftover.next_sequences == {0: 302}
    leftover.release()


def test_a_series_that_left_is_kept_while_deltas_of_it_wait(tmp_path: Path) -> None:
    """Its deltas in the ring and in states still have their name, after a rewrite and a crash."""
    spool = new_spool(tmp_path / "s")
    a, b = (spool.define(VIEW, suffix(name)) for name in "ab")
    spool.drain()
    record(spool, a, 1)
    spool.append_state(b, 2, 1)
    spool.undefine(a)
    spool.undefine(b)
    spool.commit([], [])  # of what was drained: nothing
    spool._journal.rewrite()
    copy = as_kill_leaves_it(spool.path, tmp_path / "copy")
    leftover = claim(copy)
    assert left_in(leftover) == {suffix("a"): 1, suffix("b"): 2}
    assert leftover.report.bad_count == 0
    leftover.release()
    spool.drain()
    spool.commit([], [])
    assert spool._journal.ledger.series == {}


def test_what_was_drained_before_a_rewrite_is_committed_after_it(tmp_path: Path) -> None:
    """States in the flusher's hands are taken by its commit; those that came later wait."""
    spool = new_spool(tmp_path / "s")
    series_id = spool.define(VIEW, suffix("a"))
    spool.append_state(series_id, 1, 1)
    spool.drain()
    spool.append_state(series_id, 2, 1)
    spool._journal.rewrite()
    spool.append_state(series_id, 4, 1)
    spool.commit([], [merged("b", 1)])
    spool.close()
    leftover = claim(spool.path)
    assert left_in(leftover) == {suffix("a"): 6, suffix("b"): 1}
    leftover.release()


def test_a_torn_tail_is_cut_and_reported(tmp_path: Path) -> None:
    """Wherever the last record ends too early: what was before it is all there, and how much was cut is said."""
    spool, _ = filled(tmp_path / "s")
    [log] = spool.path.glob("log-*")
    size = log.stat().st_size
    spool.append_state(1, 32, 1)
    full = log.stat().st_size
    for end in range(size, full):
        copy = as_kill_leaves_it(spool.path, tmp_path / f"copy-{end}")
        os.truncate(copy / log.name, end)
        [info] = inspect(copy.parent)
        assert info.torn_bytes == end - size
        leftover = claim(copy)
        assert left_in(leftover) == {suffix("a"): 30}
        assert leftover.report.torn_bytes == end - size
        assert not leftover.report.corrupt
        assert os.stat(copy / log.name).st_size > size
        leftover.release()
        again = claim(copy)
        assert not again.report.torn_bytes
        again.release()


@pytest.mark.parametrize("at", [0, 3, 5, 9, 12, 20])
def test_a_journal_that_is_corrupt_is_kept(tmp_path: Path, at: int) -> None:
    """Batches that are whole are sent; what may have been sent is not; the files stay, and it is said each time."""
    spool, outbox = filled(tmp_path / "s")
    [log] = spool.path.glob("log-*")
    place = log.stat().st_size + at
    spool.append_state(1, 32, 1)
    spool.commit(seal_one(outbox, "a", 64), [])
    spool.close()
    data = bytearray(log.read_bytes())
    data[place] ^= 1
    log.write_bytes(data)
    assert inspect(tmp_path / "s")[0].corrupt
    leftover = claim(spool.path)
    assert "wrong checksum" in leftover.report.corrupt
    assert left_in(leftover) == {suffix("a"): 2}
    leftover.release()
    leftover = claim(spool.path)
    assert leftover.report.corrupt
    assert left_in(leftover) == {suffix("a"): 2}
    leftover.acknowledge([(0, 1)])
    leftover.remove()
    aside = tmp_path / "s" / "p.corrupt"
    assert (aside / f"{log.name}.corrupt").read_bytes() == data
    assert inspect(tmp_path / "s") == []


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_arbitrary_bytes_never_make_a_number(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A journal or ring with bytes changed anywhere gives what was recorded or less, with a report, or an error."""
    folder = tmp_path_factory.mktemp("noise")
    spool, _ = filled(folder / "s")
    [log] = spool.path.glob("log-*")
    noise = bytearray(log.read_bytes())
    if data.draw(st.booleans()):
        noise = bytearray(data.draw(st.binary(max_size=200)))
    else:
        at = data.draw(st.integers(0, len(noise) - 1))
        noise[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=8))
    same = bytes(noise) == log.read_bytes()
    log.write_bytes(noise)
    spool.close()
    try:
        inspect(folder / "s")
        leftover = Leftover.claim(spool.path)
    except PipelineError:
        return
    assert leftover is not None
    found = left_in(leftover).get(suffix("a"), 0)
    report = leftover.report
    assert same or report.torn_bytes or report.corrupt or report.bad_count
    # A batch, then also pending, then also the state: whatever was whole before the bytes that changed. (16 is in the ring.)
    assert found in (0, 1, 2, 3, 6, 14, 16, 17, 18, 20, 22, 23, 30)
    leftover.release()


def test_noise_in_the_ring_is_counted(tmp_path: Path) -> None:
    """Records of series that nobody knows, and values that a series can't have, are reported and not merged."""
    spool = new_spool(tmp_path / "s")
    plain = spool.define(VIEW, suffix("a"))
    monotone = spool.define(Definition("m", "sum", ("page",), 0, True), suffix("a"))
    last = spool.define(Definition("l", "last", ("page",)), suffix("a"))
    for series_id, value in ((plain, 1.0), (plain, float("nan")), (monotone, -1), (monotone, 2), (last, 1), (99, 1)):
        record(spool, series_id, value)
    spool.close()
    leftover = claim(spool.path)
    assert sorted((item.definition.view, item.state) for item in leftover.pending) == [("hits", 1.0), ("m", 2)]
    assert leftover.report.bad_count == 4
    leftover.release()


def test_a_full_disk_changes_nothing(tmp_path: Path) -> None:
    """A real limit on the size of files: the call fails, the next one that fits succeeds, and all of it is found."""
    spool, outbox = filled(tmp_path / "s")
    [log] = spool.path.glob("log-*")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    size = log.stat().st_size
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 30, before[1]))
        big = seal_one(outbox, "x" * 200, 1)
        spool.drain()
        for _ in range(2):
            with pytest.raises(Unavailable, match="can't be written"):
                spool.commit(big, [])
            assert log.stat().st_size == size
        spool.acknowledge([(0, 1)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (30, before[1]))
        with pytest.raises(Unavailable):
            spool._journal.rewrite()
        with pytest.raises(BufferFull, match="make a segment"):
            spool._ring.rotate(spool.segment)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert not [*spool.path.glob("new-*")]
    spool.commit(big, [])
    spool.close()
    leftover = claim(spool.path)
    assert left_in(leftover) == {suffix("x" * 200): 1}
    leftover.release()


def test_a_commit_has_room_that_recording_has_not(tmp_path: Path) -> None:
    """Commits go on when recording is refused; beyond all room they are refused too, until acknowledgements make some."""
    spool, outbox = new_spool(tmp_path / "s", bytes_max=2**15), Outbox("p", 0)
    committed = []
    batches = seal_one(outbox, "y" * 1000, 1)
    with suppress(Unavailable):
        while True:
            spool.commit(batches, [])
            committed += batches
            batches = seal_one(outbox, "y" * 1000, 1)
    with pytest.raises(Unavailable, match="no room"):
        spool.commit(batches, [])
    assert spool.used_bytes <= 2**15
    spool.acknowledge([(sealed.partition, sealed.sequence) for sealed in committed])
    spool.commit(batches, [])
    assert spool.load(0, batches[0].sequence) == batches[0].value


def test_a_small_spool_goes_on_for_ever(tmp_path: Path) -> None:
    """What is dead never keeps anybody from recording, however little room there is."""
    spool, outbox = new_spool(tmp_path / "s", bytes_max=2**15), Outbox("p", 0)
    for n in range(500):
        series_id = spool.define(VIEW, suffix("z" * 60 + str(n)))
        for _ in range(20):
            record(spool, series_id, 1)
        spool.append_state(series_id, 1 << 500, 1)
        spool.undefine(series_id)
        spool.drain()
        batches = seal_one(outbox, str(n) * 20, 1)
        spool.commit(batches, [merged(str(n), 1)])
        spool.acknowledge([(0, batches[0].sequence)])
        assert spool.used_bytes <= 2**15
    spool.commit([], [])
    assert spool.close()


def test_a_crash_between_two_generations(tmp_path: Path) -> None:
    """When the old journal is still there, the newer counts; when the newer is not whole, the old one does."""
    spool, _ = filled(tmp_path / "s")
    [old] = spool.path.glob("log-*")
    data = old.read_bytes()
    spool._journal.rewrite()
    [new] = spool.path.glob("log-*")
    both = as_kill_leaves_it(spool.path, tmp_path / "both")
    (both / old.name).write_bytes(data)
    leftover = claim(both)
    assert left_in(leftover) == {suffix("a"): 30}
    assert [path.name for path in both.glob("log-*")] == [new.name]
    leftover.release()
    torn = as_kill_leaves_it(spool.path, tmp_path / "torn")
    (torn / old.name).write_bytes(data)
    os.truncate(torn / new.name, new.stat().st_size - 1)
    leftover = claim(torn)
    assert left_in(leftover) == {suffix("a"): 30}
    leftover.release()


def test_disk_mode_syncs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `fsync` a commit is on the disk when it returns, without it no commit waits for the disk."""
    synced: list[int] = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    for fsync, count in ((False, 0), (True, 1)):
        spool = Spool(tmp_path / f"s{fsync}", "p", bytes_max=2**20, segment_bytes=4096, fsync=fsync)
        synced.clear()
        spool.commit([], [])
        assert len(synced) == count
        spool.sync()
        assert len(synced) == count + 2
        assert spool.close()
