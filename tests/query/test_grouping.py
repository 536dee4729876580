"""Groups are merged by the native core as in Python: to the bit, whatever the entries are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline import native
from pipeline.core import codec
from pipeline.core.kinds import KINDS, Kind
from pipeline.core.query import Entry, Labels, decode_labels
from pipeline.core.record import WINDOW_NONE, Definition, series_prefix, series_suffix
from pipeline.errors import BadRecord
from pipeline.query.grouping import Grouping

LABELS = ("region", "shop")
BY = ("shop", "till")
"""Labels to keep; series have no label `till`, so it is empty."""

ints = st.integers(-5, 5) | st.integers(-(2**63), 2**63) | st.integers(-(2**80), 2**80)
floats = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 0.1, 1e16, 1e300])
numbers = ints | floats
states: dict[str, st.SearchStrategy[Any]] = {
    "sum": st.lists(numbers, min_size=1, max_size=3).map(KINDS["sum"].collect),
    "min": numbers,
    "max": numbers,
    "mean": st.lists(numbers, min_size=1, max_size=3).map(KINDS["mean"].collect),
    "histogram": st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3).map(KINDS["histogram"].collect),
}
texts = st.text(max_size=3) | st.sampled_from(["a", "x" * 31, "x" * 32, "x" * 300])
label_values = st.tuples(st.sampled_from(["eu", "us", "é"]), texts)


def grouped(kind: Kind, blocks: list[list[Entry]], *, natively: bool) -> list[str]:
    """Return the groups of some blocks, as text, or the error that they raise."""
    part = Definition("sales", kind.name, LABELS)
    skip = len(series_prefix(part)) + len(WINDOW_NONE)

    def decode(keys: Any, values: Any) -> Any:
        rows = decode_labels(keys, skip, len(LABELS))
        return [(row[1], "") for row in rows], codec.decode_states(kind, values)

    grouping = Grouping(kind, BY, natively=natively)
    try:
        for block in blocks:
            grouping.add(part, skip, block, decode)
            assert len(grouping) <= sum(map(len, blocks))
        return sorted(map(repr, grouping.take().items()))
    except BadRecord as error:
        return [f"error: {error}"]


def entries_of(kind: Kind, rows: Sequence[tuple[Labels, Any]], expires_at_ms: int = 0) -> list[Entry]:
    """Return entries as a worker writes them."""
    prefix = series_prefix(Definition("sales", kind.name, LABELS))
    values = codec.encode_states(kind, [state for _, state in rows], expires_at_ms)
    return [(prefix + series_suffix(labels), value) for (labels, _), value in zip(rows, values, strict=True)]


@pytest.mark.parametrize("name", states)
@given(data=st.data())
def test_native_groups_are_the_plain_ones(name: str, data: st.DataObject) -> None:
    """Entries of every size and type merge to groups that print alike: 1 is told from 1.0, and 0.0 from -0.0."""
    kind = KINDS[name]
    rows = st.lists(st.tuples(label_values, states[name]), max_size=6)
    expiries = st.sampled_from([0, 0, 1, 2**62])
    blocks = [entries_of(kind, data.draw(rows), data.draw(expiries)) for _ in range(data.draw(st.integers(1, 3)))]
    plain, natively = (grouped(kind, blocks, natively=way) for way in (False, True))
    assert natively == plain
    assert not plain or "error" not in plain[0]


@given(data=st.data())
def test_damage_is_found_alike(data: st.DataObject) -> None:
    """Entries with changed bytes raise the error of the plain way, or merge to the same; usual ones are merged natively."""
    kind = KINDS[data.draw(st.sampled_from([*states]))]
    good = entries_of(kind, [(("eu", "a"), data.draw(states[kind.name])), (("us", "b"), data.draw(states[kind.name]))])
    key, value = good[1]
    skip = len(series_prefix(Definition("sales", kind.name, LABELS))) + len(WINDOW_NONE)
    in_key = data.draw(st.booleans())
    part = bytearray(key if in_key else value)
    place = data.draw(st.integers(skip if in_key else 0, len(part) - 1))
    changed = data.draw(st.sampled_from(["flip", "cut", "more"]))
    if changed == "flip":
        part[place] = data.draw(st.integers(0, 255))
    elif changed == "cut":
        del part[place:]
    else:
        part[place:place] = data.draw(st.binary(min_size=1, max_size=3))
    bad = (bytes(part), value) if in_key else (key, bytes(part))
    plain, natively = (grouped(kind, [good[:1], [good[0], bad]], natively=way) for way in (False, True))
    assert natively == plain


def test_usual_entries_are_merged_natively() -> None:
    """The native core, where it is, takes whole blocks of what is common: else nobody would notice that it takes none."""
    extension = native.extension()
    if extension is None:
        pytest.skip(native.describe())
    rng = random.Random(1)
    for name, value in (("sum", 2**62), ("sum", 0.1), ("min", 3), ("max", 2.5), ("mean", (7, 3))):
        groups = extension.Groups.of(name)
        rows = [((f"r{rng.randrange(3)}", f"s{i}"), value) for i in range(100)]
        skip = len(series_prefix(Definition("sales", name, LABELS))) + len(WINDOW_NONE)
        assert groups.add(entries_of(KINDS[name], rows), skip, len(LABELS), [0])
        assert sorted(groups.take()) == [("r0",), ("r1",), ("r2",)]
        assert not groups.add([(b"short", b"")], skip, len(LABELS), [0])
        assert len(groups) == 0
    assert extension.Groups.of("last") is None
