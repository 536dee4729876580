"""Encoded bytes come back as they were, and any other bytes are a value or `BadRecord`."""

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import google_crc32c
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core import codec, frames, parts
from pipeline.core.codec import DeadLetter, DefinitionEntry
from pipeline.core.groups import DENSE_FACTOR
from pipeline.core.kinds import (
    BATCH_INT_BYTES_MAX,
    INT_BITS_MAX,
    KINDS,
    RECORDED_NS_MAX,
    STATE_INT_BYTES_MAX,
    TEXT_BYTES_MAX,
    TS_MS_MAX,
    Kind,
    to_wire,
)
from pipeline.core.record import Batch, Control, Definition, Group, Origin, Position, parse_suffix, series_suffix, travelling
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord, NewerFormat
from tests.core import strategies as some
from tests.support import examples

every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
pack = msgspec.msgpack.encode


def sealed(body: bytes, partition: int = 0) -> bytes:
    """Return a batch of these bytes, with a checksum that is right."""
    rest = partition.to_bytes(4, "big") + body
    return codec.VERSION + int(google_crc32c.value(rest)).to_bytes(4, "big") + rest


definition_entries = st.builds(DefinitionEntry, some.definitions(), some.counters, some.counters)
letters = st.builds(
    DeadLetter, some.counters, some.counters, some.counters, some.texts, some.texts, st.none() | st.binary(max_size=40)
)

positions = st.builds(Position, some.counters, some.counters, some.counters)


@st.composite
def foldeds(draw: st.DrawFn) -> Folded:
    folded = Folded()
    for sequence in draw(st.lists(st.integers(0, 30) | some.counters, unique=True, max_size=8)):
        if not folded.has(sequence):
            floor = draw(st.integers(0, min(sequence, 9)))
            folded = folded.with_folded(sequence, floor, draw(some.counters), sequence, draw(some.counters))
    folded.closed = draw(st.booleans())
    return folded


@st.composite
def kind_states(draw: st.DrawFn) -> tuple[Kind, list[Any]]:
    kind = draw(st.sampled_from([*KINDS.values()]))
    return kind, draw(some.any_states(kind.name, count=draw(st.integers(0, 5))))


def images(batch: Batch) -> list[list[bytes]]:
    return [[some.image(KINDS[g.definition.kind], state) for state in g.states] for g in batch.groups]


# Round trips


@given(batch=some.batches())
def test_batches_come_back(batch: Batch) -> None:
    """decode(encode(batch)) is the batch, value by value and type by type; partition and checksum stand apart."""
    value = codec.encode_batch(batch)
    found = codec.decode_batch(value)
    assert found == batch
    assert images(found) == images(batch)
    assert codec.encode_batch(found) == value
    assert codec.partition_of(value) == batch.partition
    codec.check_sealed(value)


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


@given(kind_states=kind_states(), expires_at_ms=st.integers(1, 2**64 - 1), at_ms=st.integers(0, 2**64 - 1))
def test_entries_that_expire_come_back(kind_states: tuple[Kind, list[Any]], expires_at_ms: int, at_ms: int) -> None:
    """Entries that expire come back beside others; each tells when it expires, and is left out then."""
    kind, states = kind_states
    lasting, expiring = codec.encode_states(kind, states), codec.encode_states(kind, states, expires_at_ms)
    assert codec.decode_states(kind, [*expiring, *lasting]) == [*states, *states]
    assert {*map(codec.expires_at_ms, lasting)} <= {0}
    assert {*map(codec.expires_at_ms, expiring)} <= {expires_at_ms}
    assert all(codec.kind_of_entry(value) is kind for value in [*expiring, *lasting])
    entries = [(b"%d" % i, value) for i, value in enumerate([*expiring, *lasting])]
    left = [*codec.alive(entries, at_ms)]
    assert left == (entries[len(states) :] if expires_at_ms <= at_ms else entries)


COME_BACK: dict[str, tuple[Callable[[Any], bytes], Callable[[bytes], Any], st.SearchStrategy[Any]]] = {
    "definition": (codec.encode_definition, codec.decode_definition, definition_entries),
    "dead letter": (codec.encode_letter, codec.decode_letter, letters),
    "producer": (codec.encode_folded, codec.decode_folded, foldeds()),
    "frames": (frames.encode_frames, frames.decode_frames, st.lists(st.binary(min_size=1))),
}


@pytest.mark.parametrize("name", COME_BACK)
@given(data=st.data())
def test_values_come_back(name: str, data: st.DataObject) -> None:
    """decode(encode(value)) is the value. Positions: see test_position."""
    encode, decode, values = COME_BACK[name]
    value = data.draw(values)
    assert decode(encode(value)) == value


NOT_FINITE = [math.inf, -math.inf, math.nan]
BAD_TOTALS = [
    *NOT_FINITE, *((value, 0.5) for value in NOT_FINITE), *((1.5, value) for value in NOT_FINITE), (1.0, 0.0), (0.0, -0.0),
    (1.0, 1.0), (1.0, 2.0), (0.0, 5e-324), (1.0, 2.0**-52), (-1.0, 2.0**-53), (1e308, -1e308),
]  # fmt: skip
"""Totals that no merge of sums makes: not finite, or with an error term that is zero or belongs into the float."""


@pytest.mark.parametrize("value", BAD_TOTALS, ids=repr)
def test_sums_that_are_none_are_refused(value: Any) -> None:
    """A bad total is refused from a batch and from a store, alone and among others, in every kind that adds up."""
    for kind, bad, good in ((KINDS["sum"], value, 1), (KINDS["mean"], (value, 3), (1, 1))):
        for states in ([bad], [good, bad], [bad, good]):
            with pytest.raises(BadRecord, match=r"not finite|error term"):
                codec.decode_states(kind, codec.encode_states(kind, states))
            group = Group(Definition("v", kind.name, ("n",)), [series_suffix((f"{n}",)) for n in range(len(states))], states)
            with pytest.raises(BadRecord, match=r"not finite|error term"):
                codec.decode_batch(codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [group])))


@pytest.mark.parametrize("value", NOT_FINITE)
def test_no_kind_takes_what_is_not_finite(value: float) -> None:
    """A group with a number that is not finite is refused, beside ints beyond all floats too; other groups stay whole."""
    innocent = Group(Definition("w", "sum"), [series_suffix(())], [7])
    states = {"last": lambda v: (0, 0, v), "mean": lambda v: (v, 1), "histogram": lambda v: (v, 0, 0, 8, 1, {}, {})}
    for kind in [name for name, it in KINDS.items() if it.takes_numbers]:
        make = states.get(kind, lambda v: v)
        for others in ([], [1.5], [10**400, 1e308, 1e308], [-1e308, -1e308]):
            column = [make(v) for v in (*others, value)]
            group = Group(Definition("v", kind, ("n",)), [series_suffix((f"{n}",)) for n in range(len(column))], column)
            received = codec.receive_batch(codec.encode_batch(Batch("p", 0, 0, 0, 0, 0, [innocent, group, innocent])))
            assert received.batch.groups == [innocent, innocent]
            assert received.indexes == [0, 2]
            ((index, view, reason),) = map(msgspec.structs.astuple, received.refused)
            assert (index, view) == (1, "v")
            assert "not finite" in reason


# What a batch is refused for, as a whole and by group


@given(batch=some.batches(groups_max=1), data=st.data())
def test_no_bit_of_a_batch_can_be_wrong(batch: Batch, data: st.DataObject) -> None:
    """Any flipped bit and any byte lost or added makes a batch a bad record: the checksum covers everything."""
    value = codec.encode_batch(batch)
    at = data.draw(st.integers(0, 8 * len(value) - 1))
    flipped = bytearray(value)
    flipped[at // 8] ^= 1 << at % 8
    for damaged in (bytes(flipped), value[: at // 8] + value[at // 8 + 1 :], value[: at // 8], value + b"\x00"):
        with pytest.raises(BadRecord):
            codec.check_sealed(damaged)
        with pytest.raises(BadRecord):
            codec.receive_batch(damaged)


def test_every_bit_of_a_batch_is_checked() -> None:
    """Each single bit of a batch is checked."""
    value = codec.encode_batch(Batch("p", 1, 2, 3, 2, 4, [Group(Definition("v", "sum"), [series_suffix(())], [12.34])]))
    for at in range(8 * len(value)):
        flipped = bytearray(value)
        flipped[at // 8] ^= 1 << at % 8
        with pytest.raises(BadRecord, match="checksum" if at >= 8 else "version byte"):
            codec.receive_batch(bytes(flipped))


@settings(max_examples=examples(60))
@given(good=st.lists(some.groups(), max_size=3), data=st.data())
def test_what_is_wrong_with_a_group_is_told_of_that_one(good: list[Group], data: st.DataObject) -> None:
    """Only the wrong group is refused, and as a batch of its own again; the others keep their places."""
    bad = [
        Group(Definition("v", "median"), [b""], []), Group(Definition("v", "sum", ("b", "a")), [b""], [1]),
        Group(Definition("v", "sum"), [], []), Group(Definition("v-w", "sum"), [b""], [1]),
        Group(Definition("v", "sum"), [b""], [1, 2]), Group(Definition("v", "max"), [b""], [(1.5, 2.0**-60)]),
        Group(Definition("v", "sum", (), -60), [b""], [1]), Group(Definition("v", "min", monotone=True), [b""], [1]),
    ]  # fmt: skip
    chosen = data.draw(st.lists(st.sampled_from(bad), min_size=1, max_size=3))
    order = data.draw(st.permutations([*((True, it) for it in good), *((False, it) for it in chosen)]))
    groups = [(travelling(it.definition), it.suffixes, columns_of(it)) for _, it in order]
    value = wire("p", 1, 7, 5, 4, closing=True, controls=[Control("drop", "v")], groups=groups, origin=Origin("q", 1))
    received = codec.receive_batch(value)
    assert received.batch.groups == [it for is_good, it in order if is_good]
    assert received.indexes == [i for i, (is_good, _) in enumerate(order) if is_good]
    assert [it.index for it in received.refused] == [i for i, (is_good, _) in enumerate(order) if not is_good]
    with pytest.raises(BadRecord, match=f"group {received.refused[0].index}: "):
        codec.decode_batch(value)
    for i, (is_good, group) in enumerate(order):
        alone = codec.receive_batch(parts.with_group(received, i))
        assert (alone.batch.producer_id, alone.batch.epoch, alone.batch.sequence) == ("p", 1, 7)
        assert alone.batch.partition == received.batch.partition
        assert alone.batch.groups == ([group] if is_good else [])
        assert [it.reason for it in alone.refused] == [it.reason for it in received.refused if it.index == i]
        assert alone.batch.controls == []
        assert (alone.batch.origin, alone.batch.closing) == (None, False), "the rest of the batch has been folded"


def columns_of(group: Group) -> list[list[Any]]:
    kind = KINDS.get(group.definition.kind)
    return [*map(to_wire, kind.to_columns(group.states))] if kind else [[1]]


# Arbitrary bytes


def reencoded_batch(value: bytes) -> bytes:
    return codec.encode_batch(codec.decode_batch(value))


def reencoded_states(kind: Kind) -> Callable[[bytes], bytes]:
    return lambda value: codec.encode_states(kind, codec.decode_states(kind, [value]), codec.expires_at_ms(value))[0]


def reencoded_suffix(value: bytes) -> bytes:
    window_start_ms, labels = parse_suffix(value)
    assert series_suffix(labels, window_start_ms) == value
    return value


def reencoded_partition(value: bytes) -> bytes:
    return codec.VERSION + bytes(4) + codec.partition_of(value).to_bytes(4, "big")


READERS: dict[str, tuple[Callable[[bytes], bytes], st.SearchStrategy[bytes]]] = {
    "batch": (reencoded_batch, some.batches(groups_max=2).map(codec.encode_batch)),
    "definition": (
        lambda v: codec.encode_definition(codec.decode_definition(v)),
        definition_entries.map(codec.encode_definition),
    ),
    "dead letter": (lambda v: codec.encode_letter(codec.decode_letter(v)), letters.map(codec.encode_letter)),
    "producer": (lambda v: codec.encode_folded(codec.decode_folded(v)), foldeds().map(codec.encode_folded)),
    "position": (lambda v: codec.encode_position(codec.decode_position(v)), positions.map(codec.encode_position)),
    "frames": (
        lambda v: frames.encode_frames(frames.decode_frames(v)),
        st.lists(st.binary(min_size=1, max_size=20)).map(frames.encode_frames),
    ),
    "suffix": (reencoded_suffix, st.lists(some.label_values, max_size=4).map(series_suffix)),
    "partition": (reencoded_partition, some.batches(groups_max=0).map(codec.encode_batch)),
    **{
        f"{name} state": (reencoded_states(kind), some.any_states(name).map(lambda s, kind=kind: some.image(kind, s[0])))
        for name, kind in KINDS.items()
    },
}
every_reader = pytest.mark.parametrize("name", READERS)


STATE = [name for name in READERS if name not in ("batch", "frames", "partition", "suffix")]
"""Readers of values that only our programs write."""


def value_or_bad_record(read: Callable[[bytes], bytes], value: bytes) -> None:
    try:
        again = read(value)
    except BadRecord:
        return
    assert read(again) == again


@every_reader
@settings(max_examples=examples(120))
@given(data=st.data())
def test_damaged_bytes_are_a_value_or_bad(name: str, data: st.DataObject) -> None:
    """A decoder makes a stable value or `BadRecord` of valid bytes that were cut, flipped or overwritten."""
    read, valid = READERS[name]
    damaged = data.draw(some.damaged(valid))
    value_or_bad_record(read, damaged)
    value_or_bad_record(read, sealed(damaged[9:]))  # with a checksum that is right


@every_reader
@given(data=st.data())
def test_any_bytes_are_a_value_or_bad(name: str, data: st.DataObject) -> None:
    """A decoder makes a stable value or `BadRecord` of any bytes, and of any msgpack behind the version byte."""
    read, _ = READERS[name]
    anything = data.draw(st.binary(max_size=60) | some.wire_values.map(pack))
    for head in (b"", codec.VERSION, bytes(8), codec.VERSION + b"\x93\xa3sum\x00", codec.VERSION + b"\x94\xa4mean\x00"):
        value_or_bad_record(read, head + anything)
    value_or_bad_record(read, sealed(anything))


@given(data=st.data())
def test_any_columns_are_a_batch_or_bad(data: st.DataObject) -> None:
    """The decoder makes a batch that can be stored, or `BadRecord`, of a well-formed batch with any columns."""
    kind = data.draw(st.sampled_from([*KINDS.values()]))
    count = data.draw(st.integers(0, 3))
    scalar = some.scalars.filter(lambda v: type(v) is not int or -(2**63) <= v < 2**64) | st.floats()
    pair = st.tuples(st.floats() | st.integers(-9, 9), st.floats()) | st.sampled_from([(1e16, 1.0), (1.0, 5e-324)])
    packed = st.lists(st.integers(-9, 9), max_size=7).map(lambda ints: msgspec.msgpack.Ext(2, pack(ints)))
    item = scalar | pair | packed | st.binary(max_size=12) | st.just([]) | st.just({})
    column = st.lists(item, min_size=count, max_size=count)
    columns = data.draw(st.lists(column, max_size=4) | st.lists(column, min_size=2, max_size=2))
    value = wire(groups=[(("v", kind.name, ()), [b""] * count, columns)])
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
    header = b"\x99\xa1p\0\0\0\0\xc2\xc0"
    column = sealed(header + b"\x90\x91\x93\x92\xa1v\xa3sum\x91\xc4\0\x91" + body)
    parts = [sealed(header + b"\x90" + body), sealed(header + body), sealed(header + b"\x91\x94\xa4drop\xa1v\xa0" + body)]
    value = codec.VERSION + b"\x92\xa3sum\0" + body
    heads = [b"", codec.VERSION, codec.VERSION + bytes(4), bytes(8)]
    states = [value, value.replace(b"\x92", b"\x93", 1), codec.VERSION + b"\x94\xa4mean\0" + body]
    for candidate in (*(head + body for head in heads), sealed(body), column, *parts, *states):
        assert peak_bytes(read, candidate) < codec.MEMORY_FACTOR * len(candidate) + 400_000


def peak_bytes(read: Callable[[bytes], bytes], value: bytes) -> int:
    tracemalloc.start()
    try:
        value_or_bad_record(read, value)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def array(items: bytes, count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + items * count


EMPTY_GROUP = b"\x93\x93\xa0\xa0\x90\x90\x90"
DENSE = {
    "empty columns": (array(b"\x90", N), 0), "pairs": (array(b"\x92\xca\0\0\0\0\xca\0\0\0\0", N), 1),
    "short pairs": (array(b"\x92\0\0", N), 1),
    "small floats": (array(b"\xca\x3f\x80\0\0", N), 1), "extensions": (array(b"\xc7\x00\x01", N), 1),
    "other extensions": (array(b"\xd4\x07\x00", N), 1), "ints": (array(b"\xcd\xff\xff", N), 1),
    "texts": (array(b"\xa1x", N), 1), "letters": (array(b"\xa2\xc3\xa9", N), 1),
}  # fmt: skip
"""Columns that make the most memory of few bytes."""


SUFFIX = b"\xc4\x09" + bytes(8) + b"\x90"


@pytest.mark.parametrize(("columns", "depth"), DENSE.values(), ids=DENSE)
def test_columns_are_counted_before_they_are_decoded(columns: bytes, depth: int) -> None:
    """Columns of another length than there are series, and more columns than any kind has, take no memory at all."""
    head = b"\x99\xa1p\0\0\0\0\xc2\xc0\x90\x91\x93\x93\xa1v\xa3%s\x90\x91\xc4\0" + b"\x91" * depth
    for kind in (b"sum", b"min"):
        value = sealed(head % kind + columns)
        assert peak_bytes(reencoded_batch, value) < len(value) + 50_000


@pytest.mark.parametrize("suffixes", [array(SUFFIX, N), array(b"\xc4\x01x", N), array(b"\xc4\0", N)], ids=["9", "1", "0"])
@pytest.mark.parametrize(("columns", "depth"), DENSE.values(), ids=DENSE)
def test_dense_series_are_decoded_in_bounded_memory(columns: bytes, depth: int, suffixes: bytes) -> None:
    """The factor that the codec states for series holds for the values that take the most memory for their bytes."""
    head = b"\x99\xa1p\0\0\0\0\xc2\xc0\x90\x91\x93\x93\xa1v\xa3%s\x90" + suffixes + b"\x91" * depth
    for kind in (b"sum", b"min"):
        value = sealed(head % kind + columns)
        assert peak_bytes(reencoded_batch, value) < DENSE_FACTOR * len(value) + 100_000


@pytest.mark.parametrize("count", [10_000, 10_001, N])
@pytest.mark.parametrize("item", [EMPTY_GROUP, b"\x93\x93\xa0\xa0\x90\x91\xc4\0\x90", b"\x93\x93\xa1v\xa3sum\x90\x90\x90"])
def test_many_groups_are_decoded_in_bounded_memory(item: bytes, count: int) -> None:
    """Groups that are refused one by one, with a reason each, stay within the factor, up to their limit and beyond it."""
    value = sealed(b"\x99\xa1p\0\0\0\0\xc2\xc0\x90" + array(item, count))
    assert peak_bytes(reencoded_batch, value) < codec.MEMORY_FACTOR * len(value) + 100_000


@pytest.mark.parametrize("item", [b"\x93\xa0\xa0\xa0", b"\x94\xa0\xa0\xa0\x90", b"\x92\xa0\xa0"])
def test_many_controls_are_decoded_in_bounded_memory(item: bytes) -> None:
    """Control records beyond a batch's limit are refused before any is decoded."""
    value = sealed(b"\x99\xa1p\0\0\0\0\xc2\xc0" + array(item, N) + b"\x90")
    assert peak_bytes(reencoded_batch, value) < codec.MEMORY_FACTOR * len(value) + 100_000


@pytest.mark.parametrize("name", [name for name in READERS if name not in ("frames", "suffix")])
@settings(max_examples=examples(20))
@given(data=st.data())
def test_other_versions_are_bad(name: str, data: st.DataObject) -> None:
    """Every value states its version; a decoder reads its own only, and says so."""
    read, valid = READERS[name]
    value = data.draw(valid)
    newer = [bytes([it]) for it in range(3, 32)] if name in STATE else []
    version = data.draw(st.binary(max_size=1).filter(lambda first: first not in (codec.VERSION, *newer)))
    with pytest.raises(BadRecord, match="version"):
        read(version + value[1:] if version else b"")


@pytest.mark.parametrize("name", STATE)
@settings(max_examples=examples(20))
@given(data=st.data())
def test_newer_state_is_not_called_bad(name: str, data: st.DataObject) -> None:
    """Entries of a later format raise `NewerFormat`, which names both formats; a batch of that version is just bad."""
    read, valid = READERS[name]
    newer = data.draw(st.integers(3, 31))
    with pytest.raises(NewerFormat, match=f"format {newer}, and this program reads 2"):
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
    *,
    closing: Any = False,
    origin: Any = None,
    controls: Any = (),
    groups: Any = (),
    more: Any = (),
) -> bytes:
    return sealed(pack((producer_id, epoch, sequence, floor, created_at_ms, closing, origin, controls, groups, *more)))


def long_int(size: int) -> msgspec.msgpack.Ext:
    return msgspec.msgpack.Ext(1, bytes(size))


def group(kind: str, *columns: list[Any], labels: Any = (), count: int = 1, view: str = "v") -> bytes:
    return wire(groups=[((view, kind, labels), [b""] * count, columns)])


@pytest.mark.parametrize(
    "value",
    [
        wire(), wire(producer_id="x" * 100), wire(producer_id="é" * 50), wire(sequence=2**63 - 2, floor=2**63 - 2),
        wire(epoch=2**63 - 1, created_at_ms=2**63 - 1), group("sum", [1]), wire(closing=True),
        group("sum", [(1e16, 1.0)]), group("sum", [0, (-1e16, 1.0)], count=2), group("mean", [(1.0, 1e-17)], [2]),
        wire(controls=[["drop", "v"]] * 1_000), wire(controls=[["reset", "v", "anything", ["a"]]]),
        wire(origin=["q", 2**63 - 2]), wire(origin=["x" * 100, 0]),
        wire(groups=[(("v", "sum", (), 0, False), [b""], [[1]])]),
        group("sum", [-(2**63)]), group("sum", [2**64 - 1]), group("mean", [1], [1]), group("last", [0], [0], [None]),
        group("sum", [long_int(BATCH_INT_BYTES_MAX)]),
        group("last", [TS_MS_MAX], [RECORDED_NS_MAX], ["x" * TEXT_BYTES_MAX]),
        group("last", [0], [0], ["é" * (TEXT_BYTES_MAX // 2)]), wire(groups=[(("v", "min", ()), [b""], [[1]])] * 10_000),
    ],
    ids=lambda value: f"{value[9:]!r:.40}",
)  # fmt: skip
def test_batches_at_their_limits(value: bytes) -> None:
    """A batch that reaches every limit is decoded."""
    codec.decode_batch(value)


@pytest.mark.parametrize(
    "value",
    [
        wire(producer_id=""), wire(producer_id="x" * 101), wire(producer_id="é" * 51), wire(producer_id=b"p"),
        wire(producer_id=None), wire(sequence=-1), wire(sequence=2**63 - 1), wire(epoch=2**63), wire(epoch=-1),
        wire(epoch=True), wire(epoch=1.5), wire(floor=1), wire(sequence=3, floor=4), wire(created_at_ms=None),
        wire(more=[1]), wire(groups=None), wire(groups=[1]), wire(groups=[(("v", "sum", ()), [])]),
        wire(groups=[(("v", "min", ()), [b""], [[1]])] * 10_001), wire(groups=[(("v", "sum", ()), ["text"], [[1]])]),
        wire(groups=[(("v", "sum", (), 0, "more"), [b""], [[1]])]), wire(groups=[(("v",), [b""], [[1]])]),
        wire(groups=[(("v", "sum", (), 0, False, 0, (), 1), [b""], [[1]])]), wire(groups=[(("v", "sum", ()), [], [[]])]),
        wire(groups=[(("v", "sum", (), 0, False, -60), [b""], [[1]])]), wire(groups=[(("v", "sum", ()), [], [])]),
        wire(groups=[(("v", "sum", (), 0, False, 0, [["p", 1]]), [b""], [[1]])]), group("sum", [1], labels=["b", "a"]),
        wire(closing=1), wire(closing=None), wire(origin=["", 0]), wire(origin=["x" * 101, 0]), wire(origin=["q", -1]),
        wire(origin=["p", 0]),
        wire(origin=["q", 2**63 - 1]), wire(origin=["p"]), wire(origin=["p", 0, 0]), wire(origin="p"), wire(origin=False),
        wire(controls=[["drop", "v"]] * 1_001), wire(controls=[["purge", "v"]]), wire(controls=[["drop", "v-w"]]),
        wire(controls=[["drop", ""]]), wire(controls=[["drop"]]), wire(controls=[["drop", "v", None]]),
        wire(controls=[["drop", "v", "", "a"]]), wire(controls=[["drop", "v", "", None, 0]]), wire(controls=None),
        wire(controls=[["drop", "v" * 201]]),
        group("sum", [(1.5,)]), group("sum", [(1.5, 1e-17, 0.5)]), group("sum", [("1", 1.5)]),
        group("sum", [[[1.5, 1e-17], 1.5]]),
        group("min", [(1e16, 1.0)]), group("max", [(1e16, 1.0)]), group("mean", [1], [(1e16, 1.0)]),
        group("last", [0], [0], [(1e16, 1.0)]), group("last", [(1e16, 1.0)], [0], [1]), group("sum", [math.nan]),
        group("sum", [math.inf]), group("mean", [math.inf], [1]), group("mean", [1], [math.inf]),
        group("sum", [(math.inf, 1.0)]),
        group("sum"), group("sum", []), group("sum", [1, 2]), group("sum", [1], [1]), group("sum", [1], count=0),
        group("sum", [True]), group("sum", [None]), group("sum", ["1"]), group("sum", [[1]]), group("sum", [{}]),
        group("sum", [1, 2.5, True], count=3), group("sum", [long_int(BATCH_INT_BYTES_MAX + 1)]),
        group("min", [math.nan]), group("min", [math.inf]), group("max", [-math.inf]), group("max", [False]),
        group("min", [long_int(BATCH_INT_BYTES_MAX + 1)]), group("max", [b"", long_int(BATCH_INT_BYTES_MAX + 1)], count=2),
        group("mean", [1]), group("mean", [1], [0]), group("mean", [1], [-1]), group("mean", [1], [1.0]),
        group("mean", [1], [True]), group("mean", [True], [1]), group("mean", [1], [b""]), group("mean", ["1"], [1]),
        group("mean", [1], [long_int(BATCH_INT_BYTES_MAX + 1)]), group("mean", [long_int(BATCH_INT_BYTES_MAX + 1)], [1]),
        group("last", [0]), group("last", [0], [0]), group("last", [0], [0], [math.nan]),
        group("last", [0], [0], [math.inf]), group("last", [0], [0], [[]]), group("last", [-1], [0], [1]),
        group("last", [TS_MS_MAX + 1], [0], [1]),
        group("last", [True], [0], [1]), group("last", [1.0], [0], [1]), group("last", [None], [0], [1]),
        group("last", [0], [-1], [1]), group("last", [0], [2**63], [1]), group("last", [0], [1.0], [1]),
        group("last", [0], [None], [1]), group("last", [0], [True], [1]), group("last", [0], [long_int(8)], [1]),
        group("last", [0], [0], ["x" * (TEXT_BYTES_MAX + 1)]), group("last", [b"\x01"], [0], [1]),
        group("last", [0], [0], ["é" * (TEXT_BYTES_MAX // 2 + 1)]),
        group("last", [0], [0], [long_int(BATCH_INT_BYTES_MAX + 1)]),
        group("count", [1]), group("", [1]), group("SUM", [1]), group("sum", [1], view=""), group("sum", [1], view="1a"),
        group("sum", [1], view="a-b"), group("sum", [1], view="é"), group("sum", [1], view="a\n"),
        group("sum", [1], view="a\0"), group("sum", [1], view="v" * 201), group("sum", [1], labels=["a", "a"]),
        group("sum", [1], labels=["a b"]), group("sum", [1], labels=[f"l{i}" for i in range(33)]),
        group("sum", [1], labels="ab"), group("sum", [1], labels=[1]),
        wire(groups=[(("v", "sum", (), 10**10), [b""], [[1]])]), wire(groups=[(("v", "sum", (), -1), [b""], [[1]])]),
    ],
    ids=lambda value: f"{value[9:]!r:.60}",
)  # fmt: skip
def test_batches_that_are_bad(value: bytes) -> None:
    """A batch that breaks a rule is `BadRecord`, with a short reason."""
    with pytest.raises(BadRecord) as caught:
        codec.decode_batch(value)
    assert "checksum" not in str(caught.value)
    assert len(str(caught.value)) < 500


@every_kind
def test_truncated_batches_are_bad(kind: Kind) -> None:
    """No prefix of a batch is a batch, and nothing may follow one."""
    batch = Batch(
        "p", 0, 3, 5, 4, 0, [Group(Definition("v", kind.name), [series_suffix(())], [kind.collect([kind.check(7, 9, 11)])])]
    )
    value = codec.encode_batch(batch)
    for cut in range(len(value)):
        with pytest.raises(BadRecord):
            codec.decode_batch(value[:cut])
        with pytest.raises(BadRecord):
            codec.decode_batch(sealed(value[9:cut]))
    for longer in (value + b"\x00", sealed(value[9:] + b"\x00")):
        with pytest.raises(BadRecord):
            codec.decode_batch(longer)


@every_kind
def test_entries_of_another_kind_are_bad(kind: Kind) -> None:
    """A stored state names its kind, and is never read as another, alone or among others."""
    state = kind.collect([kind.check(7, 9, 11)])
    (value,) = codec.encode_states(kind, [state])
    for other in KINDS.values():
        if other is not kind:
            with pytest.raises(BadRecord):
                codec.decode_states(other, [value])
            with pytest.raises(BadRecord):
                codec.decode_states(kind, [value, *codec.encode_states(other, [other.collect([other.check(7, 9, 11)])])])


@pytest.mark.parametrize(
    "row",
    [
        [], ["sum"], ["sum", 0], ["sum", 0, 1, 1], ["sum", 0, True], ["sum", 0, None], ["sum", 0, "1"], [None, 0, 1],
        [[], 0, 1], [{}, 0, 1], ["sum", 17, 1], ["sum", None, 1], ["sum", [], 1], [b"sum", 0, 1], "sum", None, {"sum": 0},
        ["sum", 0, long_int(STATE_INT_BYTES_MAX + 1)], ["sum", 0, [1.0, 0.0]], ["sum", 0, [1e16, 1.0, 1.0]],
        ["sum", 0, [[], 1.0]],
        ["sum", 0, [1e16, "1"]], ["sum", 2**32, 1, 1], ["sum", 2**32], ["sum", -(2**40), 1], ["sum", 2**31, 1],
    ],
    ids=lambda value: repr(value).partition(" at 0x")[0],
)  # fmt: skip
def test_entries_that_are_bad(row: Any) -> None:
    """A series entry is its kind, its expiry (0, or eight bytes of another number), and one value of each column."""
    good = codec.encode_states(KINDS["sum"], [1])
    with pytest.raises(BadRecord):
        codec.decode_states(KINDS["sum"], [good[0].replace(b"\x00", b"\xcf" + bytes(8))])
    for values in ([codec.VERSION + pack(row)], [*good, codec.VERSION + pack(row)], [codec.VERSION + pack(row), *good]):
        with pytest.raises(BadRecord):
            codec.decode_states(KINDS["sum"], values)


@settings(max_examples=examples(300))
@given(kind=st.sampled_from([*KINDS.values()]), data=st.data())
def test_many_entries_are_decoded_as_each_is(kind: Kind, data: st.DataObject) -> None:
    """All entries are read together exactly if each can be read alone: no entry can borrow bytes from its neighbours."""
    head = codec.encode_states(kind, [kind.collect([kind.check(7, 9, 11)])])[0].partition(b"\x00")[0] + b"\x00"
    items = st.sampled_from([1, 2, 1.5, 2.5, [1e16, 2.0], [1e17, 1], 1e17, None, "x", [1, 1], [1, 1, 1]])
    body = st.lists(items, max_size=6).map(lambda values: head + b"".join(map(pack, values)))
    good = some.any_states(kind.name).map(lambda states: codec.encode_states(kind, states)[0])
    values = data.draw(st.lists(good | body, min_size=1, max_size=4))
    try:
        alone = [codec.decode_states(kind, [value])[0] for value in values]
    except BadRecord:
        with pytest.raises(BadRecord):
            codec.decode_states(kind, values)
    else:
        assert codec.decode_states(kind, values) == alone


def test_entries_of_means_do_not_join() -> None:
    """Three bad entries of a mean never pass for three good ones, though two values look like a float and its error."""
    head = codec.VERSION + b"\x94\xa4mean\x00"
    bodies = [b"", pack(1e17) + pack(1) + pack(7), pack(1) + pack(1) + b"\x92" + pack(1) + pack(1)]
    values = [head + body for body in bodies]
    for value in values:
        with pytest.raises(BadRecord):
            codec.decode_states(KINDS["mean"], [value])
    with pytest.raises(BadRecord):
        codec.decode_states(KINDS["mean"], values)


def test_states_outgrow_what_a_batch_may_hold() -> None:
    """The ints of a batch are so far below a state's limit that the merge of 2**64 of them can be stored."""
    largest = 2 ** (8 * BATCH_INT_BYTES_MAX - 1) - 1
    grown = largest * 2**64
    for kind, state in ((KINDS["sum"], grown), (KINDS["sum"], -grown), (KINDS["mean"], (grown, grown))):
        assert codec.decode_states(kind, codec.encode_states(kind, [state])) == [state]
        assert len(str(kind.answer(state))) < 4_300
    assert largest >= (2**INT_BITS_MAX - 1) * 2**64, "what a publisher can merge fits into a batch"


@pytest.mark.parametrize(
    "entry",
    [
        [["v", "sum", []]], [["v", "sum", []], 1], [["v", "sum", []], -1, 0], [["v", "sum", []], 1, -1],
        [["v", "sum", []], 1, 1, -1], [["v", "sum", []], 1, 1, 1, 1], [["v", "sum", [], -60], 1, 1],
        [["v", "nothing", []], 1, 1], [["v-w", "sum", []], 1, 1],
        [["v", "sum", ["a", "a"]], 1, 1], [None, 1, 1], [], "v", [["v", "sum", [], 0, 0], 1, 1],
        [["v", "sum", ["b", "a"]], 1, 1], [["v", "sum", [], 0, False, -60], 1, 1],
        [["v", "sum", [], 0, False, 0, [["p", 1]]], 1, 1],
        [["v"], 1, 1],
    ],
    ids=repr,
)  # fmt: skip
def test_definition_entries_that_are_bad(entry: Any) -> None:
    """A definition entry that this version could not have written, or could not hold, is bad."""
    with pytest.raises(BadRecord):
        codec.decode_definition(codec.VERSION + pack(entry))


@pytest.mark.parametrize(
    "body",
    [
        [-1],
        [0, -1],
        [0, 0, [[0]]],
        [0, 0, [[1, 2, 3]]],
        [0, 0, [[-1, 2]]],
        [0, 0, [], 0, 0, 0],
        [0, 0, [], 0, 0, False, 0],
        [0, 0, [], 0, -1],
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
        frames.decode_frames(body)


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
