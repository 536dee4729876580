"""Kinds that estimate: answers are within their bounds, and do not depend on how deltas were merged."""

from collections import Counter
from math import sqrt
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack
from msgspec.msgpack import Ext

from pipeline.core.kinds import KINDS
from pipeline.core.kinds.base import PACKED
from pipeline.core.kinds.sketches import (
    EXACT_MAX,
    ITEM_BYTES_MAX,
    STANDARD_ERROR,
    TOPK_ITEMS_MAX,
    item_hash,
)
from pipeline.errors import BadRecord, Invalid

DISTINCT, TOPK = KINDS["distinct"], KINDS["topk"]


def hashes(count: int, seed: int = 1) -> list[int]:
    """Return `count` different hashes."""
    random = Random(seed)
    found: dict[int, None] = {}
    while len(found) < count:
        found[random.getrandbits(64) - 2**63] = None
    return [*found]


@pytest.mark.parametrize("count", [1, 2, 255, EXACT_MAX])
def test_a_few_items_are_counted_exactly(count: int) -> None:
    """Up to a limit the estimate is the exact number of items, however often each comes."""
    found = hashes(count)
    answer = DISTINCT.answer(DISTINCT.collect(found * 3))
    assert answer == {"estimate": count, "lower": count, "upper": count}


@pytest.mark.parametrize("count", [EXACT_MAX + 1, 1_000, 10_000, 50_000])
def test_estimates_are_within_the_published_error(count: int) -> None:
    """The root of the mean square of relative errors is the standard error of HyperLogLog; 95 % are within the bounds."""
    rounds = 40 if count <= 10_000 else 10
    answers = [DISTINCT.answer(DISTINCT.collect(hashes(count, seed))) for seed in range(rounds)]
    errors = [it["estimate"] / count - 1 for it in answers]
    assert sqrt(sum(error**2 for error in errors) / rounds) < 1.5 * STANDARD_ERROR
    assert sum(not it["lower"] <= count <= it["upper"] for it in answers) <= 0.1 * rounds + 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 400)), min_size=1, max_size=12), st.randoms())
def test_distinct_depends_on_nothing_but_the_items(parts: list[tuple[int, int]], random: Any) -> None:
    """Overlapping sets, exact and estimated, merge to the state of their union in any order and grouping."""
    pool = hashes(1_000, 7)
    sets = [pool[150 * start : 150 * start + size + 1] for start, size in parts]
    states = [DISTINCT.collect(it) for it in sets]
    while len(states) > 1:
        a, b = (states.pop(random.randrange(len(states))) for _ in range(2))
        states.append(DISTINCT.merge(a, b))
    assert states == [DISTINCT.collect([it for items in sets for it in items])]
    assert DISTINCT.from_columns(DISTINCT.to_columns(states), 1) == states


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 600), st.integers(1, 50)), min_size=1), min_size=1, max_size=8), st.randoms()
)
def test_counts_of_topk_are_within_their_bounds(parts: list[list[tuple[int, int]]], random: Any) -> None:
    """In any order of merges the truth is between `count` and `upper`, whose distance the total bounds."""
    many = [(number, 1 + number % 3) for number in range(TOPK_ITEMS_MAX + 40)]
    true: Counter[str] = Counter()
    states = []
    for part in [*parts, many, many]:
        deltas = [(str(item), count) for item, count in part]
        for item, count in deltas:
            true[item] += count
        states.append(TOPK.collect(deltas))
    while len(states) > 1:
        a, b = (states.pop(random.randrange(len(states))) for _ in range(2))
        states.append(TOPK.merge(a, b))
        assert states[-1] == TOPK.merge(b, a)
    total, error, counts = states[0]
    assert total == sum(true.values())
    assert error * (TOPK_ITEMS_MAX + 1) <= total
    assert len(counts) <= TOPK_ITEMS_MAX
    assert all(counts.get(item, 0) <= count <= counts.get(item, 0) + error for item, count in true.items())
    assert TOPK.from_columns(TOPK.to_columns(states), 1) == states


def test_topk_finds_what_is_frequent() -> None:
    """An item with more than its share of the total is never missing, and the answer begins with the most frequent."""
    deltas = [(f"rare{number}", 1) for number in range(5_000)] + [("tea", 300), ("milk", 200)] * 3
    Random(3).shuffle(deltas)
    answer = TOPK.answer(TOPK.collect(deltas))
    assert [it["item"] for it in answer["items"][:2]] == ["tea", "milk"]
    assert answer["total"] == 6_500
    assert answer["items"][0]["count"] <= 900 <= answer["items"][0]["upper"]


def test_items_are_texts_and_ints() -> None:
    """7 and "7" are one item: a line of StatsD or CSV can't tell them apart."""
    assert item_hash(7) == item_hash("7") != item_hash("07")
    assert TOPK.check(7) == TOPK.check(("7", 1)) == ("7", 1)
    assert TOPK.check(["tea", 3]) == ("tea", 3)


@pytest.mark.parametrize("item", [None, 1.5, True, b"x", ["a"], {}, "\ud800", "x" * (ITEM_BYTES_MAX + 1), "ü" * 200, 2**300])
def test_what_is_no_item_is_refused(item: object) -> None:
    """A value that is no item is `Invalid`, in few words."""
    for kind in (DISTINCT, TOPK):
        with pytest.raises(Invalid) as caught:
            kind.check(item)
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("count", [0, -1, 1.0, True, None, 2**63])
def test_an_item_is_added_a_whole_number_of_times(count: object) -> None:
    """A number of times that is not whole and positive is `Invalid`."""
    with pytest.raises(Invalid, match="whole number of times"):
        TOPK.check(("tea", count))


def packed(*rows: tuple[str, int]) -> Ext:
    return Ext(PACKED, msgpack.encode([part for row in rows for part in row]))


WORD = (1).to_bytes(8, "big")


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        *(
            ("distinct", [[column]])
            for column in (
                1, "a", Ext(1, WORD), Ext(PACKED, b""), Ext(PACKED, WORD * 2), Ext(PACKED, WORD + bytes(8)),
                Ext(PACKED, WORD[:7]), Ext(PACKED, bytes(4_096)), Ext(PACKED, b"\x36" * 4_096), Ext(PACKED, b"\x01" * 4_095),
                Ext(PACKED, b"".join(it.to_bytes(8, "big") for it in range(EXACT_MAX + 1))),
            )
        ),
        ("distinct", [[Ext(PACKED, WORD)] * 2]),
        ("distinct", [[Ext(PACKED, WORD)], [1]]),
        *(
            ("topk", [[total], [error], [column]])
            for total, error, column in (
                (1, 0, 1), (1, 0, Ext(1, b"\x90")), (1, 0, packed()), (1, 0, Ext(PACKED, b"")), (1.0, 0, packed(("a", 1))),
                (1, 0, packed(("a", 2))), (1, 0, packed(("a", 0))), (5, -1, packed(("a", 1))), (5, 1, packed(("a", 1))),
                (2, 0, packed(("b", 1), ("a", 1))), (2, 0, packed(("a", 1), ("a", 1))),
                (1, 0, Ext(PACKED, b"\x92\xa1a\x01\x00")),
                (1, 0, Ext(PACKED, b"\x92\xa1\xff\x01")), (1, 0, packed(("x" * 257, 1))),
                (9, 0, packed(("a", 1))), (1, 0, Ext(PACKED, b"\x92\xa1a\xcc\x01")), (True, 0, packed(("a", 1))),
                (TOPK_ITEMS_MAX + 1, 0, packed(*((f"{it:04}", 1) for it in range(TOPK_ITEMS_MAX + 1)))),
            )
        ),
    ],
)  # fmt: skip
def test_states_that_are_bad(kind: str, columns: list[list[Any]]) -> None:
    """Columns that no merge of deltas can make are a bad record."""
    with pytest.raises(BadRecord):
        KINDS[kind].from_columns(columns, 1)
