"""Queries: how rows are matched, grouped, merged and selected."""

from collections import Counter
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipeline.core.query as query_module
from pipeline.core.codec import DefinitionEntry
from pipeline.core.kinds import KINDS
from pipeline.core.query import (
    Labels,
    Matcher,
    Query,
    TopN,
    chain_blocks,
    decode_labels,
    describe,
    fold,
    group_key,
    is_complete,
    merge_sorted_blocks,
    merged,
    narrow,
    parse_matcher,
    pinned_labels,
    widen,
)
from pipeline.core.record import Definition, series_prefix, series_suffix
from pipeline.errors import BadRecord, Invalid, NotFound
from tests.core import strategies as some

SUM = KINDS["sum"]
REVENUE = Definition("revenue", "sum", ("region", "product"))


@pytest.mark.parametrize(
    ("text", "matcher"),
    [
        ("region=eu", Matcher("region", "=", "eu")),
        ("region!=eu", Matcher("region", "!=", "eu")),
        ("region=~e.*", Matcher("region", "=~", "e.*")),
        ("region!~e.*", Matcher("region", "!~", "e.*")),
        ("region=", Matcher("region", "=", "")),
        ("region==~=", Matcher("region", "=", "=~=")),
        ("region=!=x", Matcher("region", "=", "!=x")),
        ("_r9=a=b\n\0c", Matcher("_r9", "=", "a=b\n\0c")),
    ],
)
def test_a_matcher_is_a_label_an_operator_and_the_rest(text: str, matcher: Matcher) -> None:
    """The longest operator behind the label counts; everything behind it is the value."""
    assert parse_matcher(text) == matcher


@pytest.mark.parametrize("text", ["", "region", "=eu", "9r=eu", "re gion=eu", "region!eu", "région=eu", " region=eu"])
def test_what_is_no_matcher_is_refused(text: str) -> None:
    """Text without a label name and an operator is `Invalid`."""
    with pytest.raises(Invalid, match="where"):
        parse_matcher(text)


@given(st.text(max_size=30))
def test_any_text_is_a_matcher_or_invalid(text: str) -> None:
    """Any text is parsed whole, or `Invalid`."""
    try:
        matcher = parse_matcher(text)
    except Invalid:
        return
    assert matcher.label + matcher.op + matcher.pattern == text


# Definitions that a read merges

SHAPES = [("sum", 0), ("sum", 60), ("last", 0), ("max", 0)]
view_entries = st.builds(
    lambda shape, labels, monotone, defined_at_ms: DefinitionEntry(
        Definition("revenue", shape[0], labels, shape[1], monotone and shape[0] == "sum"), 1, defined_at_ms
    ),
    st.sampled_from(SHAPES),
    st.sets(st.sampled_from(["a", "b", "c"])).map(lambda labels: tuple(sorted(labels))),
    st.booleans(),
    st.integers(0, 3),
)


@given(entries=st.lists(view_entries, min_size=1, max_size=6), data=st.data())
def test_a_read_merges_the_definitions_of_the_kind_and_window_that_came_first(
    entries: list[DefinitionEntry], data: st.DataObject
) -> None:
    """All definitions of the first kind and window are merged, and the others named, whatever their order and partition."""
    found = merged("revenue", entries)
    assert merged("revenue", data.draw(st.permutations(entries))) == found
    shape = found.definition.kind, found.definition.window_s
    first_ms = min(entry.defined_at_ms for entry in entries)
    assert shape in {shape_of(entry) for entry in entries if entry.defined_at_ms == first_ms}
    assert {*found.parts} == {entry.definition for entry in entries if shape_of(entry) == shape}
    assert len({*found.parts}) == len(found.parts)
    assert [(it.kind, it.window_s) for it in found.also] == sorted({*map(shape_of, entries)} - {shape})
    assert found.definition.labels == tuple(sorted({label for part in found.parts for label in part.labels}))
    assert found.definition.monotone == all(part.monotone for part in found.parts)


def shape_of(entry: DefinitionEntry) -> tuple[str, int]:
    return entry.definition.kind, entry.definition.window_s


@given(entries=st.lists(view_entries, min_size=1, max_size=6), later=view_entries)
def test_a_later_definition_never_disturbs_a_read(entries: list[DefinitionEntry], later: DefinitionEntry) -> None:
    """A later definition adds to an answer of its kind and window, or is named in the answer."""
    before = merged("revenue", entries)
    last_ms = max(entry.defined_at_ms for entry in entries)
    late = DefinitionEntry(later.definition, later.series_count, last_ms + 1)
    after = merged("revenue", [*entries, late])
    assert (after.definition.kind, after.definition.window_s) == (before.definition.kind, before.definition.window_s)
    assert {*before.parts} <= {*after.parts}


@given(entries=st.lists(view_entries, min_size=1, max_size=6))
def test_kind_and_window_choose(entries: list[DefinitionEntry]) -> None:
    """Every kind and window that a view has can be read by name; another one is `NotFound`, which says what there is."""
    there = {*map(shape_of, entries)}
    for kind, window_s in SHAPES:
        if (kind, window_s) not in there:
            with pytest.raises(NotFound, match="no definition of this kind and window; it is "):
                merged("revenue", entries, kind=kind, window_s=window_s)
            continue
        found = merged("revenue", entries, kind=kind, window_s=window_s)
        assert (found.definition.kind, found.definition.window_s) == (kind, window_s)
        assert merged("revenue", entries, kind=kind).definition.kind == kind
        assert merged("revenue", entries, window_s=window_s).definition.window_s == window_s


def test_a_view_without_definitions_is_not_found() -> None:
    """The message has the name, as far as it is one."""
    with pytest.raises(NotFound, match="no view 'revenue'"):
        merged("revenue", [])


@given(entries=st.lists(view_entries, min_size=1, max_size=6), values=st.lists(some.texts, min_size=3, max_size=3))
def test_a_label_that_a_definition_lacks_is_empty(entries: list[DefinitionEntry], values: list[str]) -> None:
    """A row is widened to the labels of all definitions, and narrowed back; a definition has no series with a label
    that it does not know.
    """
    found = merged("revenue", entries)
    named = dict(zip("abc", values, strict=True))
    for part in found.parts:
        row = tuple([named[label] for label in part.labels])
        ((*wide,),) = widen(found, part)([row])
        assert wide == [named[label] if label in part.labels else "" for label in found.definition.labels]
        assert widen(found, part)([row, row]) == [tuple(wide)] * 2
        assert narrow(found, part, tuple(wide)) == row
        asked = tuple([named[label] for label in found.definition.labels])
        fits = all(label in part.labels or not named[label] for label in found.definition.labels)
        assert narrow(found, part, asked) == (row if fits else None)


def test_definitions_in_short() -> None:
    """Messages show a definition's kind and labels, and whether it is monotone."""
    assert describe(REVENUE) == "sum(region, product)"
    assert describe(Definition("v", "sum", monotone=True)) == "monotone sum()"


@pytest.mark.parametrize(
    ("where", "pinned"),
    [
        (["region=eu", "product=tea"], ("eu", "tea")),
        (["product=tea", "region=eu", "region=~e.*"], ("eu", "tea")),
        (["region=eu"], None),
        (["region=eu", "product!=tea"], None),
        (["region=eu", "product=~tea"], None),
    ],
)
def test_equality_on_every_label_pins_one_series(where: list[str], pinned: Labels | None) -> None:
    """A series is pinned only if each label of the view has an `=`."""
    assert pinned_labels(REVENUE, [*map(parse_matcher, where)]) == pinned


def test_a_view_without_labels_has_one_series() -> None:
    """A view without labels is pinned by any query."""
    assert pinned_labels(Definition("total", "sum"), []) == ()


ROWS = [("eu", "tea"), ("us", "tea"), ("eu", "coffee")]


@pytest.mark.parametrize(
    ("by", "keys"),
    [
        (None, ROWS),
        (("region", "product"), ROWS),
        (("product", "region"), [("tea", "eu"), ("tea", "us"), ("coffee", "eu")]),
        (("product",), [("tea",), ("tea",), ("coffee",)]),
        ((), [(), (), ()]),
    ],
)
def test_group_keys_are_the_labels_kept(by: Labels | None, keys: list[Labels]) -> None:
    """`by` picks label values, in its own order; empty picks none; None leaves a series alone."""
    assert [*group_key(REVENUE, by)(ROWS)] == keys
    assert is_complete(REVENUE, by) == (len(set(keys)) == len(ROWS))


def test_an_unknown_label_is_named_with_those_there_are() -> None:
    """`Invalid` says which labels the view has."""
    with pytest.raises(Invalid, match="no label 'country'; its labels: region, product"):
        group_key(REVENUE, ("country",))
    with pytest.raises(Invalid, match="its labels: none"):
        group_key(Definition("total", "sum"), ("country",))


@given(data=st.data(), kind=st.sampled_from([*KINDS.values()]))
def test_the_order_and_place_of_entries_do_not_matter(data: st.DataObject, kind: Any) -> None:
    """Folding entries in any order, from any number of partitions, gives the same groups."""
    keys = data.draw(st.lists(st.sampled_from([("a",), ("b",), ("c",)]), min_size=1, max_size=12))
    states = data.draw(some.states(kind.name, count=len(keys)))
    order = data.draw(st.permutations(range(len(keys))))
    cut = data.draw(st.integers(0, len(keys)))
    one: dict[Labels, Any] = {}
    fold(kind, one, keys, states)
    other: dict[Labels, Any] = {}
    for part in (order[:cut], order[cut:]):
        fold(kind, other, [keys[i] for i in part], [states[i] for i in part])
    assert one.keys() == other.keys()
    assert all(some.same(kind, one[key], other[key]) for key in one)


@given(st.lists(st.tuples(some.label_values, some.label_values), max_size=20), some.names)
def test_label_values_come_back_from_keys(rows: list[Labels], view: str) -> None:
    """Decoding many keys at once is decoding each."""
    prefix = series_prefix(Definition(view, "sum", ("a", "b")))
    assert decode_labels([prefix + series_suffix(row) for row in rows], len(prefix) + 8, 2) == rows


@given(st.lists(st.binary(max_size=12), min_size=1, max_size=5), st.integers(0, 3))
def test_keys_that_are_none_are_bad_records(tails: list[bytes], width: int) -> None:
    """Arbitrary bytes give as many rows of `width` texts, or `BadRecord`."""
    try:
        rows = decode_labels(tails, 0, width)
    except BadRecord:
        return
    assert [len(row) for row in rows] == [width] * len(tails)


@pytest.mark.parametrize(
    "tail", [b"", b"\x90", b"\x92\xa1a\xa1b", b"\x91", b"\x91\x01", b"\x91\xa2a", b"\x91\xa1a\x00", b"\x91\xa1\xff"]
)
def test_one_bad_key_spoils_the_block(tail: bytes) -> None:
    """A key with too few or too many label values, or with none, is found wherever it stands."""
    good = b"\x91\xa1a"
    for keys in ([tail], [tail, good], [good, tail], [good, tail, good]):
        with pytest.raises(BadRecord):
            decode_labels(keys, 0, 1)


short_keys = st.text("ab", max_size=4).map(str.encode)  # many are the beginning of others
entries = st.lists(st.dictionaries(short_keys, st.binary(max_size=1), max_size=12), min_size=1, max_size=4)


@given(entries, st.integers(1, 5), st.sampled_from([chain_blocks, merge_sorted_blocks]))
def test_blocks_hold_each_entry_once(parts: list[dict[bytes, bytes]], size: int, blocks: Any) -> None:
    """All entries of all scans come once, in blocks that are never empty."""
    got: Counter[tuple[bytes, bytes]] = Counter()
    for keys, values in blocks([iter(sorted(part.items())) for part in parts], size):
        assert keys
        got.update(zip(keys, values, strict=True))
    assert got == Counter(item for part in parts for item in part.items())


@given(entries, st.integers(1, 5))
def test_no_key_stands_in_two_blocks_in_step(parts: list[dict[bytes, bytes]], size: int) -> None:
    """All entries of one key, from several scans, are in one block of `merge_sorted_blocks`, and blocks stay small."""
    seen: set[bytes] = set()
    for keys, _ in merge_sorted_blocks([iter(sorted(part.items())) for part in parts], size):
        assert seen.isdisjoint(keys)
        assert len(keys) <= size * len(parts)
        seen.update(keys)


def chosen(
    groups: dict[Labels, Any], *, top: int | None, bottom: int | None, limit: int, blocks: int = 1
) -> tuple[list[Any], list[Any], int]:
    choice = TopN(SUM, Query("v", top=top, bottom=bottom, limit=limit))
    items = [*groups.items()]
    for i in range(blocks):
        choice.offer(dict(items[i::blocks]))
    selected = choice.selected()
    return selected.labels, selected.values, selected.series_total


@given(
    st.dictionaries(st.tuples(some.texts), some.numbers, max_size=30),
    st.none() | st.integers(1, 40),
    st.sampled_from(["top", "bottom"]),
    st.integers(1, 40),
    st.integers(1, 4),
)
def test_what_is_chosen_is_the_head_of_everything_sorted(
    groups: dict[Labels, Any], count: int | None, end: str, limit: int, blocks: int
) -> None:
    """Rows are sorted by labels, or with `top` by falling and `bottom` by rising answers, then labels, in any order of
    arrival.
    """
    sign = -1 if end == "top" else 1
    by_value = sorted(groups.items(), key=lambda item: (sign * item[1], item[0]))
    expected = (sorted(groups.items()) if count is None else by_value[:count])[:limit]
    top, bottom = (count, None) if end == "top" else (None, count)
    labels, values, total = chosen(groups, top=top, bottom=bottom, limit=limit, blocks=blocks)
    assert [*zip(labels, values, strict=True)] == expected
    assert total == len(groups)


@pytest.mark.parametrize("top", [None, 10])
def test_choosing_holds_little_more_than_it_selects(top: int | None) -> None:
    """The right rows are kept when far more go through, in an order that is bad for it."""
    choice = TopN(SUM, Query("v", top=top, limit=10))
    held = 0
    for start in range(200_000, 0, -1_000):
        choice.offer({(f"{i:06}",): -i for i in range(start - 1_000, start)})
        held = max(held, len(choice._rows))
    assert held < 6_000
    assert choice.selected().labels == [(f"{i:06}",) for i in range(10)]


TOP = Query("v", top=10)


def test_top_needs_numbers() -> None:
    """Texts and bools do not rank: `Invalid`. A row without an answer ranks behind all numbers."""
    for value in ("text", True):
        with pytest.raises(Invalid, match="top and bottom need answers that are numbers"):
            top_of_last([("a", 1), ("b", value)])
    several = [("a", None), ("b", -5), ("c", 2**70), ("d", 0.5)]
    assert top_of_last(several) == ["c", "d", "b", "a"]
    assert top_of_last(several, Query("v", bottom=10)) == ["b", "d", "c", "a"]


def top_of_last(values: Sequence[tuple[str, Any]], query: Query = TOP) -> list[str]:
    choice = TopN(KINDS["last"], query)
    choice.offer({(label,): (1, 1, value) for label, value in values})
    return [labels[0] for labels in choice.selected().labels]


@pytest.mark.parametrize("limit", [1, 7, 1_000])
@given(rows=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=300))
def test_rows_are_sorted_in_slices(rows: list[tuple[int, int]], limit: int) -> None:
    """Sorting in slices is sorting, and stable; no slice is much larger than it may be if keys differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query_module, "_SLICE", limit)
        assert query_module.sorted_in_slices(rows, itemgetter(0)) == sorted(rows, key=itemgetter(0))
        freed = [*rows]
        slices = [*query_module.freed_in_slices(freed)]
        assert [row for it in slices for row in it] == rows
        assert not freed
        assert all(len(it) <= limit for it in slices)


def test_no_call_sorts_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call sorts about one slice of many rows in any order, so that the interpreter's lock is free in between."""
    sizes: list[int] = []

    def noting(rows: Any, **options: Any) -> list[Any]:
        found = sorted(rows, **options)
        sizes.append(len(found))
        return found

    monkeypatch.setattr(query_module, "sorted", noting, raising=False)
    for order in (1, -1, 7_919):
        rows = [(i * order % 200_003, i) for i in range(200_003)]
        assert query_module.sorted_in_slices(rows, itemgetter(0)) == sorted(rows)
    assert max(sizes) <= 2 * query_module._SLICE
