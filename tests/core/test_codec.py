"""Bytes: what is encoded comes back as it was, and whatever else comes in is a value or `BadRecord`."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import codec
from pipeline.core.codec import ViewEntry
from pipeline.core.merge import (
    BATCH_INT_BYTES_MAX,
    INT_BITS_MAX,
    KINDS,
    STATE_INT_BYTES_MAX,
    TEXT_BYTES_MAX,
    TS_MS_MAX,
    Kind,
)
from pipeline.core.record import Batch, Definition, Group, Position, parse_suffix, series_suffix
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord, NewerFormat
from tests.core import strategies as some

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
pack = msgspec.msgpack.encode

views = st.builds(ViewEntry, some.definitions(), some.counters)
positions = st.builds(Position, some.counters, some.counters, some.counters)


@st.composite
def foldeds(draw: st.DrawFn) -> Folded:
    folded = Folded()
    for sequence in draw(st.lists(st.integers(0, 30) | some.counters, unique=True, max_size=8)):
        if not folded.has(sequence):
            folded = folded.with_folded(sequence, draw(st.integers(0, min(sequence, 9))), draw(some.counters), sequence)
    return folded


@st.composite
def kind_states(draw: st.DrawFn) -> tuple[Kind, list[Any]]:
    kind = draw(st.sampled_from([*KINDS.values()]))
    return kind, draw(some.states(kind.name, count=draw(st.integers(0, 5))))


def images(batch: Batch) -> list[list[bytes]]:
    return [[some.image(KINDS[g.definition.kind], state) for state in g.states] for g in batch.groups]


# Round trips


@given(batch=some.batches())
def test_batches_come_back(batch: Batch) -> None:
    """decode(encode(batch)) is the batch, value by value and type by type; its partition is readable by itself."""
    value = codec.encode_batch(batch)
    found = codec.decode_batch(value)
    assert found == batch
    assert images(found) == images(batch)
    assert codec.encode_batch(found) == value
    assert codec.partition_of(value) == batch.partition


@given(kind_states=kind_states())
def test_states_come_back(kind_states: tuple[Kind, list[Any]]) -> None:
    """States keep value, type and order; each state's bytes are its own, whatever it was encoded with."""
    kind, states = kind_states
    values = codec.encode_states(kind, states)
    found = codec.decode_states(kind, values)
    assert found == states
    assert [*map(type, found)] == [*map(type, states)]
    assert codec.encode_states(kind, found) == values
    assert values == [some.image(kind, state) for state in states]


@given(entry=views)
def test_views_come_back(entry: ViewEntry) -> None:
    """decode(encode(entry)) is the entry."""
    assert codec.decode_view(codec.encode_view(entry)) == entry


@given(folded=foldeds())
def test_producers_come_back(folded: Folded) -> None:
    """decode(encode(folded)) is what was folded."""
    assert codec.decode_folded(codec.encode_folded(folded)) == folded


@given(position=positions)
def test_positions_come_back(position: Position) -> None:
    """decode(encode(position)) is the position."""
    assert codec.decode_position(codec.encode_position(position)) == position


@given(frames=st.lists(st.binary(min_size=1)))
def test_frames_come_back(frames: list[bytes]) -> None:
    """Any number of batches, of any bytes, come back from one body."""
    assert codec.decode_frames(codec.encode_frames(frames)) == frames


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_overflown_sums_come_back(value: float) -> None:
    """A sum that left the floats is a state like any other: it travels, and is stored."""
    for kind, state in ((KINDS["sum"], value), (KINDS["mean"], (value, 3))):
        definition = Definition("v", kind.name)
        batch = Batch("p", 0, 0, 0, 0, 0, [Group(definition, [series_suffix(())], [state])])
        assert repr(codec.decode_batch(codec.encode_batch(batch)).groups[0].states) == repr([state])
        assert repr(codec.decode_states(kind, codec.encode_states(kind, [state]))) == repr([state])


# Arbitrary bytes


def reencoded_batch(value: bytes) -> bytes:
    return codec.encode_batch(codec.decode_batch(value))


def reencoded_states(kind: Kind) -> Callable[[bytes], bytes]:
    return lambda value: codec.encode_states(kind, codec.decode_states(kind, [value]))[0]


def reencoded_suffix(value: bytes) -> bytes:
    window_start_ms, labels = parse_suffix(value)
    assert series_suffix(labels, window_start_ms) == value
    return value


def reencoded_partition(value: bytes) -> bytes:
    return codec.VERSION + codec.partition_of(value).to_bytes(4, "big")


READERS: dict[str, tuple[Callable[[bytes], bytes], st.SearchStrategy[bytes]]] = {
    "batch": (reencoded_batch, some.batches(groups_max=2).map(codec.encode_batch)),
    "definition": (lambda v: codec.encode_view(codec.decode_view(v)), views.map(codec.encode_view)),
    "producer": (lambda v: codec.encode_folded(codec.decode_folded(v)), foldeds().map(codec.encode_folded)),
    "position": (lambda v: codec.encode_position(codec.decode_position(v)), positions.map(codec.encode_position)),
    "frames": (
        lambda v: codec.encode_frames(codec.decode_frames(v)),
        st.lists(st.binary(min_size=1, max_size=20)).map(codec.encode_frames),
    ),
    "suffix": (reencoded_suffix, st.lists(some.label_values, max_size=4).map(series_suffix)),
    "partition": (reencoded_partition, some.batches(groups_max=0).map(codec.encode_batch)),
    **{
        f"{name} state": (reencoded_states(kind), some.states(name).map(lambda s, kind=kind: some.image(kind, s[0])))
        for name, kind in KINDS.items()
    },
}
every_reader = pytest.mark.parametrize("name", READERS)


STATE = [name for name in READERS if name not in ("batch", "frames", "partition", "suffix")]
"""What only a program of ours writes."""


def value_or_bad_record(read: Callable[[bytes], bytes], value: bytes) -> None:
    try:
        again = read(value)
    except BadRecord:
        return
    assert read(again) == again


@every_reader
@settings(max_examples=120)
@given(data=st.data())
def test_damaged_bytes_are_a_value_or_bad(name: str, data: st.DataObject) -> None:
    """Of valid bytes that were cut, flipped or overwritten, a decoder makes a stable value or `BadRecord`."""
    read, valid = READERS[name]
    value_or_bad_record(read, data.draw(some.damaged(valid)))


@every_reader
@given(data=st.data())
def test_any_bytes_are_a_value_or_bad(name: str, data: st.DataObject) -> None:
    """Of any bytes, and of any msgpack behind the version byte, a decoder makes a stable value or `BadRecord`."""
    read, _ = READERS[name]
    anything = data.draw(st.binary(max_size=60) | some.wire_values.map(pack))
    for head in (b"", codec.VERSION, codec.VERSION + bytes(4), bytes(8), codec.VERSION + b"\x93\xa3sum\x00"):
        value_or_bad_record(read, head + anything)


@given(data=st.data())
def test_any_columns_are_a_batch_or_bad(data: st.DataObject) -> None:
    """Of a well-formed batch with any columns, the decoder makes a batch that can be stored, or `BadRecord`."""
    kind = data.draw(st.sampled_from([*KINDS.values()]))
    count = data.draw(st.integers(0, 3))
    scalar = some.scalars.filter(lambda v: type(v) is not int or -(2**63) <= v < 2**64) | st.floats()
    column = st.lists(scalar | st.binary(max_size=12) | st.just([]) | st.just({}), min_size=count, max_size=count)
    columns = data.draw(st.lists(column, max_size=3) | st.lists(column, min_size=2, max_size=2))
    group = (Definition("v", kind.name), [b""] * count, columns)
    value = codec.VERSION + bytes(4) + pack(("p", 0, 0, 0, 0, [group]))
    try:
        batch = codec.decode_batch(value)
    except BadRecord:
        return
    (found,) = batch.groups
    stored = codec.encode_states(kind, found.states)
    assert codec.encode_states(kind, codec.decode_states(kind, stored)) == stored
    for state in found.states:
        kind.answer(kind.merge(state, state))


N = 50_000
HOSTILE = {
    "nothing": b"",
    "deep arrays": b"\x91" * 100_000,
    "deep maps": b"\x81\x01" * 100_000,
    "deep map keys": b"\x81" * 100_000,
    "array of 4 G": b"\xdd\xff\xff\xff\xff",
    "array of 4 G, some there": b"\xdd\xff\xff\xff\xff" + b"\x01" * N,
    "map of 4 G": b"\xdf\xff\xff\xff\xff",
    "text of 4 GB": b"\xdb\xff\xff\xff\xff",
    "binary of 4 GB": b"\xc6\xff\xff\xff\xff",
    "ext of 4 GB": b"\xc9\xff\xff\xff\xff\x01",
    "arrays that each announce the rest": b"".join(b"\xdd" + (N - 5 * i).to_bytes(4, "big") for i in range(900))
    + b"\x01" * N,
    "empty arrays": b"\xdd" + N.to_bytes(4, "big") + b"\x90" * N,
    "empty maps": b"\xdd" + N.to_bytes(4, "big") + b"\x80" * N,
    "array as a key": b"\x81\xdd" + N.to_bytes(4, "big") + b"\x01" * N + b"\x01",
    "map as a key": b"\x81\x80\x01",
    "list of lists as a key": b"\x81\x91\x80\x01",
    "invalid UTF-8": b"\xa2\xff\xfe",
    "encoded surrogate": b"\xa3\xed\xa0\x80",
    "invalid UTF-8 as a key": b"\x81\xa2\xff\xfe\x01",
    "ext": b"\xd4\x05\x00",
    "timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "timestamp out of range": b"\xd7\xff" + b"\xff" * 8,
    "reserved opcode": b"\xc1",
    "trailing bytes": b"\x90\x00",
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
@every_reader
def test_hostile_bytes_are_bad_in_bounded_memory(name: str, body: bytes) -> None:
    """Bytes that announce more than they hold, or nest without end, are refused without memory to match."""
    read, _ = READERS[name]
    column = b"\x01" + bytes(4) + b"\x96\xa1p\0\0\0\0\x91\x93\x92\xa1v\xa3sum\x91\xc4\0\x91" + body
    value = b"\x01\x92\xa3sum\0" + body
    heads = [b"", codec.VERSION, codec.VERSION + bytes(4), bytes(8)]
    for candidate in (*(head + body for head in heads), column, value, value.replace(b"\x92", b"\x93", 1)):
        tracemalloc.start()
        try:
            value_or_bad_record(read, candidate)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 100 * len(candidate) + 400_000


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("frames", "suffix")])
@settings(max_examples=20)
@given(data=st.data())
def test_other_versions_are_bad(name: str, data: st.DataObject) -> None:
    """Every value says which version it is; a decoder reads its own only, and says so."""
    read, valid = READERS[name]
    value = data.draw(valid)
    newer = [bytes([it]) for it in range(2, 32)] if name in STATE else []
    version = data.draw(st.binary(max_size=1).filter(lambda first: first not in (codec.VERSION, *newer)))
    with pytest.raises(BadRecord, match="version"):
        read(version + value[1:] if version else b"")


@pytest.mark.parametrize("name", STATE)
@settings(max_examples=20)
@given(data=st.data())
def test_newer_state_is_not_called_bad(name: str, data: st.DataObject) -> None:
    """It is named as what it is, with both formats, so that nobody throws it away; a batch of the same byte is just bad."""
    read, valid = READERS[name]
    newer = data.draw(st.integers(2, 31))
    with pytest.raises(NewerFormat, match=f"format {newer}, and this program reads 1"):
        read(bytes([newer]) + data.draw(valid)[1:])
    with pytest.raises(BadRecord, match="version byte"):
        codec.decode_batch(bytes([newer]) + bytes(20))


# What is refused


def wire(
    producer_id: Any = "p",
    epoch: Any = 0,
    sequence: Any = 0,
    floor: Any = 0,
    created_at_ms: Any = 0,
    groups: Any = (),
    *more: Any,
) -> bytes:
    return codec.VERSION + bytes(4) + pack((producer_id, epoch, sequence, floor, created_at_ms, groups, *more))


def long_int(size: int) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(1, bytes(size))


def group(kind: str, *columns: list[Any], labels: Any = (), count: int = 1, view: str = "v") -> bytes:
    return wire(groups=[((view, kind, labels, 0), [b""] * count, columns)])


@pytest.mark.parametrize(
    "value",
    [
        wire(), wire(producer_id="x" * 100), wire(producer_id="é" * 50), wire(sequence=2**63 - 2, floor=2**63 - 2),
        wire(epoch=2**63 - 1, created_at_ms=2**63 - 1), wire(groups=[(("v", "sum"), [], [[]])]), group("sum", [1]),
        group("sum", [-(2**63)]), group("sum", [2**64 - 1]), group("mean", [1], [1]), group("last", [0], [None]),
        group("sum", [long_int(BATCH_INT_BYTES_MAX)]), group("last", [TS_MS_MAX], ["x" * TEXT_BYTES_MAX]),
        group("last", [0], ["é" * (TEXT_BYTES_MAX // 2)]), wire(groups=[(("v", "min"), [], [[]])] * 10_000),
    ],
    ids=lambda value: f"{value[5:]!r:.40}",
)  # fmt: skip
def test_batches_at_their_limits(value: bytes) -> None:
    """What a limit allows is allowed."""
    codec.decode_batch(value)


@pytest.mark.parametrize(
    "value",
    [
        wire(producer_id=""), wire(producer_id="x" * 101), wire(producer_id="é" * 51), wire(producer_id=b"p"),
        wire(producer_id=None), wire(sequence=-1), wire(sequence=2**63 - 1), wire(epoch=2**63), wire(epoch=-1),
        wire(epoch=True), wire(epoch=1.5), wire(floor=1), wire(sequence=3, floor=4), wire(created_at_ms=None),
        wire("p", 0, 0, 0, 0, (), 1), wire(groups=None), wire(groups=[1]), wire(groups=[(("v", "sum"), [])]),
        wire(groups=[(("v", "min"), [], [[]])] * 10_001), wire(groups=[(("v", "sum"), ["text"], [[1]])]),
        wire(groups=[(("v", "sum", (), 0, "more"), [], [[]])]), wire(groups=[(("v",), [], [[]])]),
        group("sum"), group("sum", []), group("sum", [1, 2]), group("sum", [1], [1]), group("sum", [1], count=0),
        group("sum", [True]), group("sum", [None]), group("sum", ["1"]), group("sum", [[1]]), group("sum", [{}]),
        group("sum", [1, 2.5, True], count=3), group("sum", [long_int(BATCH_INT_BYTES_MAX + 1)]),
        group("min", [math.nan]), group("min", [math.inf]), group("max", [-math.inf]), group("max", [False]),
        group("min", [long_int(BATCH_INT_BYTES_MAX + 1)]), group("max", [b"", long_int(BATCH_INT_BYTES_MAX + 1)], count=2),
        group("mean", [1]), group("mean", [1], [0]), group("mean", [1], [-1]), group("mean", [1], [1.0]),
        group("mean", [1], [True]), group("mean", [True], [1]), group("mean", [1], [b""]), group("mean", ["1"], [1]),
        group("mean", [1], [long_int(BATCH_INT_BYTES_MAX + 1)]), group("mean", [long_int(BATCH_INT_BYTES_MAX + 1)], [1]),
        group("last", [0]), group("last", [0], [math.nan]), group("last", [0], [math.inf]), group("last", [0], [[]]),
        group("last", [-1], [1]), group("last", [TS_MS_MAX + 1], [1]), group("last", [True], [1]), group("last", [1.0], [1]),
        group("last", [None], [1]), group("last", [0], ["x" * (TEXT_BYTES_MAX + 1)]), group("last", [b"\x01"], [1]),
        group("last", [0], ["é" * (TEXT_BYTES_MAX // 2 + 1)]), group("last", [0], [long_int(BATCH_INT_BYTES_MAX + 1)]),
        group("count", [1]), group("", [1]), group("SUM", [1]), group("sum", [1], view=""), group("sum", [1], view="1a"),
        group("sum", [1], view="a-b"), group("sum", [1], view="é"), group("sum", [1], view="a\n"),
        group("sum", [1], view="a\0"), group("sum", [1], view="v" * 201), group("sum", [1], labels=["a", "a"]),
        group("sum", [1], labels=["a b"]), group("sum", [1], labels=[f"l{i}" for i in range(33)]),
        group("sum", [1], labels="ab"), group("sum", [1], labels=[1]),
        wire(groups=[(("v", "sum", (), 60), [], [[]])]), wire(groups=[(("v", "sum", (), -1), [], [[]])]),
    ],
    ids=lambda value: f"{value[5:]!r:.60}",
)  # fmt: skip
def test_batches_that_are_bad(value: bytes) -> None:
    """A batch that breaks a rule is `BadRecord`, with a short reason."""
    with pytest.raises(BadRecord) as caught:
        codec.decode_batch(value)
    assert len(str(caught.value)) < 500


@every_kind
def test_truncated_batches_are_bad(kind: Kind) -> None:
    """No prefix of a batch is a batch, and nothing may follow one."""
    batch = Batch(
        "p", 0, 3, 5, 4, 0, [Group(Definition("v", kind.name), [series_suffix(())], [kind.collect([kind.check(7, 9)])])]
    )
    value = codec.encode_batch(batch)
    for cut in range(len(value)):
        with pytest.raises(BadRecord):
            codec.decode_batch(value[:cut])
    with pytest.raises(BadRecord):
        codec.decode_batch(value + b"\x00")


@every_kind
def test_entries_of_another_kind_are_bad(kind: Kind) -> None:
    """A stored state says of which kind it is; it is never read as another, alone or among others."""
    state = kind.collect([kind.check(7, 9)])
    (value,) = codec.encode_states(kind, [state])
    for other in KINDS.values():
        if other is not kind:
            with pytest.raises(BadRecord):
                codec.decode_states(other, [value])
            with pytest.raises(BadRecord):
                codec.decode_states(kind, [value, *codec.encode_states(other, [other.collect([other.check(7, 9)])])])


@pytest.mark.parametrize(
    "row",
    [
        [], ["sum"], ["sum", 0], ["sum", 0, 1, 1], ["sum", 0, True], ["sum", 0, None], ["sum", 0, "1"], [None, 0, 1],
        [[], 0, 1], [{}, 0, 1], ["sum", 17, 1], ["sum", None, 1], ["sum", [], 1], [b"sum", 0, 1], "sum", None, {"sum": 0},
        ["sum", 0, long_int(STATE_INT_BYTES_MAX + 1)],
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)  # fmt: skip
def test_entries_that_are_bad(row: Any) -> None:
    """A series entry is its kind, no expiry (this version knows none), and one value of each column."""
    good = codec.encode_states(KINDS["sum"], [1])
    for values in ([codec.VERSION + pack(row)], [*good, codec.VERSION + pack(row)], [codec.VERSION + pack(row), *good]):
        with pytest.raises(BadRecord):
            codec.decode_states(KINDS["sum"], values)


def test_states_outgrow_what_a_batch_may_hold() -> None:
    """Batches hold ints that are so far below a state's limit that merging 2**64 of them can be stored."""
    largest = 2 ** (8 * BATCH_INT_BYTES_MAX - 1) - 1
    grown = largest * 2**64
    for kind, state in ((KINDS["sum"], grown), (KINDS["sum"], -grown), (KINDS["mean"], (grown, grown))):
        assert codec.decode_states(kind, codec.encode_states(kind, [state])) == [state]
        assert len(str(kind.answer(state))) < 4_300
    assert largest >= (2**INT_BITS_MAX - 1) * 2**64, "what a publisher can merge fits into a batch"


@pytest.mark.parametrize(
    "entry",
    [
        [["v", "sum", [], 0]], [["v", "sum", [], 0], -1], [["v", "sum", [], 0], 1, 1], [["v", "sum", [], 60], 1],
        [["v", "nothing", [], 0], 1], [["v-w", "sum", [], 0], 1], [["v", "sum", ["a", "a"], 0], 1], [None, 1], [], "v",
        [["v", "sum", [], 0, 0], 1],
    ],
    ids=repr,
)  # fmt: skip
def test_definition_entries_that_are_bad(entry: Any) -> None:
    """A definition entry that this version could not have written, or could not hold, is bad."""
    with pytest.raises(BadRecord):
        codec.decode_view(codec.VERSION + pack(entry))


@pytest.mark.parametrize(
    "body", [[], [0, 0], [0, 0, 0, 0], ["0", 0, 0], [0.5, 0, 0], [None, 0, 0], [2**64 - 1, 0, b""], {}, None], ids=repr
)
def test_positions_that_are_bad(body: Any) -> None:
    """A position is three ints and nothing else."""
    with pytest.raises(BadRecord):
        codec.decode_position(codec.VERSION + pack(body))


@pytest.mark.parametrize(
    "body",
    [
        [-1],
        [0, -1],
        [0, 0, [[0]]],
        [0, 0, [[1, 2, 3]]],
        [0, 0, [[-1, 2]]],
        [0, 0, [], 0, 0],
        [0, 2**63],
        [True],
        [0, 0, 5],
        {},
    ],
    ids=repr,
)
def test_producer_entries_that_are_bad(body: Any) -> None:
    """A producer entry holds counters and ranges of counters."""
    with pytest.raises(BadRecord):
        codec.decode_folded(codec.VERSION + pack(body))


@pytest.mark.parametrize(
    "body",
    [
        b"\0", b"\x01", b"\0\0\0", b"\0\0\0\0", b"\0\0\0\x01", b"\0\0\0\x02a", b"\xff\xff\xff\xffabc", b"\0\0\0\x01ab",
        b"\0\0\0\x01a\0\0\0\0", b"\0\0\0\x01a\0\0\0\x05abcd",
    ],
)  # fmt: skip
def test_frames_that_are_bad(body: bytes) -> None:
    """A frame is never empty, and never longer than what is there."""
    with pytest.raises(BadRecord):
        codec.decode_frames(body)


def test_frames_of_nothing() -> None:
    """An empty body holds no frames."""
    assert codec.decode_frames(b"") == []
    assert codec.encode_frames([]) == b""


@pytest.mark.parametrize("labels", [b"\xd9\x01a", b"\xda\x00\x01a", b"\xdb\x00\x00\x00\x01a"])
@pytest.mark.parametrize("array", [b"\x91", b"\xdc\x00\x01", b"\xdd\x00\x00\x00\x01"])
def test_labels_have_one_encoding(array: bytes, labels: bytes) -> None:
    """Two encodings of one series would be two series: only the shortest is taken."""
    assert parse_suffix(bytes(8) + b"\x91\xa1a") == (0, ("a",))
    with pytest.raises(BadRecord, match="canonical"):
        parse_suffix(bytes(8) + array + labels)
    if array != b"\x91":
        with pytest.raises(BadRecord, match="canonical"):
            parse_suffix(bytes(8) + array + b"\xa1a")
