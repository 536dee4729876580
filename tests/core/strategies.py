"""Hypothesis strategies for the nouns of the core: deltas, states, definitions, series, batches, records."""

from collections.abc import Mapping
from operator import itemgetter
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from pipeline.core.codec import encode_states
from pipeline.core.kinds import INT_BITS_MAX, KINDS, RECORDED_NS_MAX, TS_MS_MAX, Kind, State
from pipeline.core.kinds.histogram import BITS_MAX
from pipeline.core.record import (
    CONTROL_ACTIONS,
    LABEL_COUNT_MAX,
    Batch,
    Control,
    Definition,
    Group,
    Origin,
    Records,
    series_suffix,
)

big_ints = (
    st.integers()
    | st.integers(-(2**200), 2**200)
    | st.sampled_from([-(2**63), -(2**63) - 1, 2**63, 2**64 - 1, 2**64, -(2**64), 2**INT_BITS_MAX - 1, 1 - 2**INT_BITS_MAX])
)
"""Ints, within and far beyond 64 bits."""

grid = st.integers(-(2**20), 2**20) | st.integers(-(2**20), 2**20).map(lambda n: n * 2.0**-10)
"""Ints and floats so small and so coarse that their sums are exact in any order."""

close = st.integers(-(2**12), 2**12).map(lambda n: n * 2.0**-6)
"""Numbers so close together that a few of them fill most buckets of a histogram."""

floats = st.floats(allow_nan=False, allow_infinity=False)
numbers = big_ints | floats
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
stamps = st.integers(0, TS_MS_MAX) | st.integers(0, 3)
recorded = st.integers(0, RECORDED_NS_MAX) | st.integers(0, 3)
scalars = st.none() | st.booleans() | texts | numbers | st.sampled_from([0, 0.0, -0.0, False, 1, 1.0, True, "", "1"])

ADDITIVE = ("sum", "mean", "histogram")
"""Kinds that add numbers up, so that their laws hold exactly where floats add exactly."""


def families(kind: str) -> SearchStrategy[SearchStrategy[Any]]:
    """Return strategies of raw deltas, as `check` returns them; those of one family merge exactly, whatever the order.

    A kind that is not named here is given numbers.
    """
    if kind == "distinct":
        return st.just(st.integers(-(2**63), 2**63 - 1) | st.integers(-9, 9))
    if kind == "topk":
        return st.just(st.tuples(texts, st.integers(1, 2**63 - 1) | st.integers(1, 9)))
    if kind == "last":
        return st.just(st.tuples(stamps, recorded, scalars))
    if kind == "histogram":
        return st.sampled_from([big_ints.filter(lambda n: n.bit_length() <= BITS_MAX), grid, close])
    if kind in ADDITIVE:
        return st.sampled_from([big_ints, grid])
    return st.just(numbers)


def runs(kind: str, *, count: int = 1, size_max: int = 6) -> SearchStrategy[list[list[Any]]]:
    """Return a strategy of `count` non-empty runs of raw deltas of one family; in a run of `last` no two have one time."""
    unique_by = itemgetter(0, 1) if kind == "last" else None

    def of(deltas: SearchStrategy[Any]) -> SearchStrategy[list[list[Any]]]:
        run = st.lists(deltas, min_size=1, max_size=size_max, unique_by=unique_by)
        return st.lists(run, min_size=count, max_size=count)

    return families(kind).flatmap(of)


def states(kind: str, *, count: int = 1) -> SearchStrategy[list[State]]:
    """Return a strategy of `count` states of one family."""
    return runs(kind, count=count, size_max=3).map(lambda found: [KINDS[kind].collect(run) for run in found])


def any_states(kind: str, *, count: int = 1) -> SearchStrategy[list[State]]:
    """Return a strategy of `count` states; float sums with an error term among them depend on the order a little."""
    if kind not in ADDITIVE:
        return states(kind, count=count)
    values = numbers.filter(lambda n: type(n) is float or n.bit_length() <= BITS_MAX) if kind == "histogram" else numbers
    run = st.lists(values, min_size=1, max_size=3)
    inexact = st.lists(run.map(KINDS[kind].collect), min_size=count, max_size=count)
    return states(kind, count=count) | inexact


def magnitude(total: Any) -> Any:
    """Return the absolute value of a sum."""
    if type(total) is tuple:
        return total if total[0] >= 0 else (-total[0], -total[1])
    return abs(total)


def image(kind: Kind, state: State) -> bytes:
    """Return the bytes of a state: unlike `==`, they tell 1 from True, and 0.0 from -0.0."""
    return encode_states(kind, [state])[0]


def same(kind: Kind, a: State, b: State) -> bool:
    """Return whether two states are one and the same to a reader. `last` keeps the type of a value: 1 is not True."""
    return image(kind, a) == image(kind, b) if kind.name == "last" else bool(a == b)


names = st.tuples(st.sampled_from("azAZ_"), st.text("azAZ_019", max_size=8)).map("".join)
label_values = texts | st.sampled_from(["", "\0", "a\0b", "\U0001f600", "x" * 31, "x" * 32, "x" * 300])


@st.composite
def definitions(draw: st.DrawFn, kinds: SearchStrategy[str] = st.sampled_from([*KINDS])) -> Definition:  # noqa: B008
    labels = draw(st.lists(names, max_size=4, unique=True) | st.just([f"l{i}" for i in range(LABEL_COUNT_MAX)]))
    kind = draw(kinds)
    return Definition(draw(names), kind, tuple(sorted(labels)), monotone=kind == "sum" and draw(st.booleans()))


@st.composite
def groups(draw: st.DrawFn, definition: Definition | None = None) -> Group:
    definition = definition or draw(definitions())
    width = len(definition.labels)
    series = draw(st.lists(st.tuples(*[label_values] * width), min_size=1, max_size=4 if width < 9 else 1, unique=True))
    found = draw(any_states(definition.kind, count=len(series)))
    if definition.monotone:
        found = [magnitude(state) for state in found]
    return Group(definition, [series_suffix(labels) for labels in series], found)


counters = st.integers(0, 2**63 - 2) | st.integers(0, 5)
producer_ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=25)
controls = st.builds(
    Control,
    st.sampled_from(CONTROL_ACTIONS),
    names,
    st.sampled_from(["", *KINDS]),
    st.none() | st.lists(names, max_size=2).map(tuple),
)
origins = st.builds(Origin, producer_ids, counters)


@st.composite
def batches(draw: st.DrawFn, groups_max: int = 3) -> Batch:
    """Draw batches that are right by themselves; two of them can contradict each other."""
    sequence = draw(counters)
    producer_id = draw(producer_ids)
    return Batch(
        producer_id=producer_id,
        epoch=draw(counters),
        partition=draw(st.integers(0, 2**32 - 1)),
        sequence=sequence,
        floor=draw(st.integers(0, sequence)),
        created_at_ms=draw(counters),
        groups=draw(st.lists(groups(), max_size=groups_max)),
        closing=draw(st.booleans()),
        controls=draw(st.lists(controls, max_size=2)),
        origin=draw(st.none() | origins.filter(lambda origin: origin.producer_id != producer_id)),
    )


def records(values: Mapping[int, bytes | None], next_offset: int, at_ms: int = 1_000) -> Records:
    """Return a run of records of partition 0 by offset; each was accepted a millisecond after the offset before it."""
    return Records(
        partition=0,
        offsets=[*values],
        at_ms=[at_ms + offset for offset in values],
        keys=[None] * len(values),
        values=[*values.values()],
        next_offset=next_offset,
    )


wire_values: SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(texts | st.integers(-9, 9), inner, max_size=3),
    max_leaves=20,
)
"""All values that msgpack can express."""


@st.composite
def damaged(draw: st.DrawFn, valid: SearchStrategy[bytes]) -> bytes:
    """Draw valid bytes with a few bits flipped, a piece cut out, doubled or overwritten, or an end cut off."""
    value = bytearray(draw(valid))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(value)))
        match draw(st.sampled_from(["flip", "cut", "double", "overwrite", "truncate", "insert"])):
            case "flip" if at < len(value):
                value[at] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del value[at : at + draw(st.integers(1, 9))]
            case "double":
                value[at:at] = value[at : at + draw(st.integers(1, 40))]
            case "overwrite":
                new = draw(st.sampled_from(OPCODES))
                value[at : at + len(new)] = new
            case "insert":
                value[at:at] = draw(st.binary(min_size=1, max_size=4) | st.sampled_from(OPCODES))
            case "truncate":
                del value[at:]
    return bytes(value)


OPCODES = [
    b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\x9f", b"\x90", b"\x80", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01", b"\xd4\x01\x00", b"\xd6\xff\x00\x00\x00\x00", b"\xc0", b"\xc1",
    b"\xc2", b"\xc3", b"\xcb\x7f\xf8\0\0\0\0\0\0", b"\xcb\x7f\xf0\0\0\0\0\0\0", b"\xca\x7f\xc0\0\0", b"\xff", b"\xe0",
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff", b"\xcf\x7f\xff\xff\xff\xff\xff\xff\xff", b"\xd3\x80\0\0\0\0\0\0\0",
    b"\x81\x90\x01", b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80", b"\xc4\x00", b"\xc4\x01\x80",
]  # fmt: skip
"""Openings of msgpack values that decoders trip over."""
