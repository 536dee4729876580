"""The bytes of a ring: no delta is lost or doubled, wherever its writer is interrupted."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import pipeline.publisher.spool.ring as module
from pipeline.core.kinds import KINDS
from pipeline.core.record import Definition
from pipeline.errors import BufferFull, Invalid
from pipeline.publisher.spool.ring import Ring, Segment, encode_delta, scan, segment_header, segment_path
from tests.publisher.spool.support import Recorder, as_kill_leaves_it, claim
from tests.support import traced

CALL_FREE = (
    "if end > segment.limit", "if segment.offset ==", "segment.bytes[", "del queue", "segment.words[", "segment.offset =",
    "if self.segment is old", "if old.limit", "old.bytes[", "old.words[", "old.limit =", "self.segment = new",
    "return False", "return True",
)  # fmt: skip
"""Lines behind the last call: no signal handler runs there."""
OWNER = bytes(range(8))
GOLDEN = (
    "50495045524e4733 0001020304050607 0100000000100000 0000000000000000 975710f900000000 "  # the segment's beginning
    "01000000b683c307 b004000000000000 0100000000000000 "  # header, word, payload: 1
    "01000000b1015d11 b404000000000000 ff00000000000000 "  # -1
    "090000004437a73e b804000000000000 cb3ff80000000000 0000000000000000 "  # 1.5
    "0c000000223475a3 bc04000000000000 c709014000000000 0000000000000000 "  # 2**70
    "070000001e6692c2 c004000000000000 930507a374656100 "  # (5, 7, "tea")
    "0f000000f74f9574 c404000000000000 930507c709010100 0000000000000000"  # (5, 7, 2**64)
)


class Writer(Ring):
    """A ring with segments of its own."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.made = [Segment(segment_path(folder, 1, n), OWNER, 1, n, 4096) for n in range(4)]

    def write(self, series: int, payload: bytes) -> None:
        while not self.append(series << 2, payload):
            self.adopt(self.made[self.segment.number + 1])


def read(folder: Path) -> list[tuple[int, bytes]]:
    records = []
    for number, path in enumerate(sorted(folder.iterdir())):
        header, seed = segment_header(OWNER, 1, number, path.stat().st_size)
        found = scan(path.read_bytes(), seed, len(header))
        assert not found.damages
        assert not found.torn_bytes
        records += found.records
    return records


def test_golden_bytes(tmp_path: Path) -> None:
    """A writer in another language makes these bytes of the same records."""
    ring = Writer(tmp_path)
    deltas = [1, -1, 1.5, 2**70, (5, 7, "tea"), (5, 7, 2**64)]
    for n, delta in enumerate(deltas):
        ring.write(300 + n, encode_delta(delta))
    data = segment_path(tmp_path, 1, 0).read_bytes()
    end = ring.segment.offset
    assert not any(data[end:])
    assert data[:end].hex(" ", 8) == GOLDEN


def test_values_come_back_or_are_told(tmp_path: Path) -> None:
    """Numbers of every size and type, and values of `last` views, come back; others are counted as bad."""
    recorder = Recorder(tmp_path / "s")
    deltas = {
        "sum": [1, -(2**63), 2**64 - 1, 2**80, -(2**80), 0.1, -0.0],
        "min": [3, 2.5],
        "max": [3, 2**65],
        "mean": [1, 2],
        "histogram": [1, -0.5, 2**1000],
        "distinct": [5, -(2**63), 5],
        "topk": [("tea", 2), ("milk", 1), ("tea", 2**63 - 1)],
        "last": [(5, 7, "x"), (5, 8, None), (4, 9, 2**70)],
    }
    for kind, values in deltas.items():
        series = recorder.define("a", Definition("v" + kind, kind, ("page",)))
        for value in values:
            recorder.append(series, encode_delta(value))
    up = recorder.define("a", Definition("up", "sum", ("page",), monotone=True))
    for payload in (b"\x05", encode_delta(-1), encode_delta("x"), encode_delta((1, 2, 3)), b"\xc1", b"\x06"):
        recorder.append(up, payload)
    distribution = recorder.define("b", Definition("vhistogram", "histogram", ("page",)))
    for delta in (4, 2**1024):
        recorder.append(distribution, encode_delta(delta))
    distinct = recorder.define("a", Definition("vdistinct", "distinct", ("page",)))
    topk = recorder.define("a", Definition("vtopk", "topk", ("page",)))
    for series, delta in ((distinct, 2**63), (distinct, "tea"), (topk, "tea"), (topk, ("tea", 0)), (topk, (1, 1))):
        recorder.append(series, encode_delta(delta))
    recorder.append(99, b"\x01")
    assert not recorder.spool.close()
    left = claim(recorder.spool.path)
    assert (left.report.corrupt, left.report.bad_count) == ([], 11)
    histograms = [item.state for item in left.pending if item.definition.kind == "histogram"]
    assert histograms == [*map(KINDS["histogram"].collect, ([1, -0.5, 2**1000], [4]))]
    found = {item.definition.view: (item.state, item.delta_count) for item in left.pending}
    assert (found["vsum"][1], found["up"]) == (7, (11, 2))
    assert (found["vmin"], found["vmax"], found["vmean"]) == ((2.5, 2), (2**65, 2), ((3, 2), 2))
    assert found["vdistinct"] == (frozenset([5, -(2**63)]), 3)
    assert found["vtopk"] == ((2**63 + 2, 0, {"tea": 2**63 + 1, "milk": 1}), 3)
    assert found["vlast"] == ((5, 8, None), 3)
    left.release()


def new_words(folder: Path) -> list[int]:
    return [word >> 2 for word, payload in read(folder) if payload == b"\x02" * 24]


def at_each_step(folder: Path, act: Callable[[Writer], None]) -> Iterator[tuple[int, Writer, list[int], Path]]:
    """Fill a segment to its last records, and call `act(ring)` at the n-th line of the next ones, for each n."""
    step = 0
    while True:
        step += 1
        there = folder / str(step)
        there.mkdir()
        ring = Writer(there)
        for i in range(100):
            ring.write(i, b"\x01" * 24)
        while ring.segment.offset < 4096 - 2 * 40:
            ring.write(0, b"\x01")
        count = [0]

        def trace(
            frame: FrameType, event: str, arg: object, count: list[int] = count, ring: Writer = ring, step: int = step
        ) -> Any:
            if frame.f_code.co_filename != module.__file__ or not frame.f_code.co_qualname.startswith("Ring."):
                return None
            line = linecache.getline(module.__file__, frame.f_lineno).strip()
            if event == "line" and not line.startswith(CALL_FREE):
                count[0] += 1
                if count[0] == step:
                    sys.settrace(None)
                    act(ring)
            return trace

        with suppress(KeyboardInterrupt), traced(trace):
            for i in range(4):
                ring.write(1000 + i, b"\x02" * 24)
        yield step, ring, new_words(there), there
        if count[0] < step:
            return


def test_a_handler_in_the_midst_of_recording(tmp_path: Path) -> None:
    """Deltas of the handler and of the interrupted call are there once, whichever line is interrupted."""
    without = []
    for step, _, words, _ in at_each_step(tmp_path, lambda ring: ring.write(2000, b"\x02" * 24)):
        assert sorted({*words} - {2000}) == [1000, 1001, 1002, 1003], step
        assert len(words) == len({*words}), step
        without += [step] if 2000 not in words else []
    assert without == [step] > [20]  # behind the last line nothing was recorded


def test_a_handler_that_raises_in_the_midst_of_recording(tmp_path: Path) -> None:
    """A handler that raises, at whichever line, loses no delta whose call returned, and doubles none; recording goes on."""

    def interrupt(ring: Writer) -> None:
        raise KeyboardInterrupt

    for step, ring, words, folder in at_each_step(tmp_path, interrupt):
        assert words == [*range(1000, 1000 + len(words))], step
        ring.write(3000, b"\x02" * 24)
        assert new_words(folder) == [*words, 3000], step


def test_a_record_that_was_begun_is_torn_and_not_damaged(tmp_path: Path) -> None:
    """A record that lacks only its header does not count, and is not reported as damage."""
    recorder = Recorder(tmp_path / "s")
    for n in range(5):
        recorder.add("a", n)
    path = as_kill_leaves_it(recorder.spool.path, tmp_path / "k")
    file = segment_path(path, 1, 0)
    data = bytearray(file.read_bytes())
    end = recorder.ends()[0].offset
    data[end - 24 : end - 16] = bytes(8)
    file.write_bytes(data)
    orphan = claim(path)
    assert (orphan.pending[0].state, orphan.report.torn_bytes, orphan.report.corrupt) == (6, 17, [])
    orphan.release()


def test_room_ends(tmp_path: Path) -> None:
    """Recording is refused beyond three quarters; commits and acknowledgements are not, and then it goes on.

    A segment has all its blocks, so that a full disk is noticed when one is made, and never by a bus error.
    """
    recorder = Recorder(tmp_path / "s", bytes_max=2**18)
    spool = recorder.spool

    def send() -> None:
        recorder.commit()
        for batch in [*recorder.outbox.pending()]:
            recorder.acknowledge(batch)

    with pytest.raises(BufferFull, match="of 262144 bytes of the spool are in use"):
        [recorder.add(count % 50) for count in range(10**6)]
    assert spool.used_bytes == sum(path.stat().st_size for path in spool.path.iterdir() if path.name != "LOCK") <= 2**18
    assert all(path.stat().st_blocks * 512 >= 4096 for path in spool.path.glob("ring-*"))
    send()
    recorder.add("b")
    with pytest.raises(Invalid, match="does not fit"):
        recorder.append(1, bytes(4096))
    assert spool.ring_bytes < 4096
    send()
    assert spool.close()
    with pytest.raises(Invalid, match="closed"):
        recorder.add("b")
