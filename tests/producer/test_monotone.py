"""Monotone sums of a publisher: what they refuse, and that nothing negative gets out."""

from decimal import Decimal
from typing import Any

import pytest

from pipeline.core.record import Definition
from pipeline.errors import Invalid
from tests.producer.support import batches, fold, memory_log, publisher
from tests.producer.test_values import BAD, Celsius

np = pytest.importorskip("numpy")

NEGATIVE: list[Any] = [
    -1, -0.5, -5e-324, -(2**70), -(10**400), -1.7e308, Decimal("-0.1"), np.int8(-1), np.float32(-0.5), np.array(-2),
    Celsius(-1),
]  # fmt: skip


@pytest.mark.parametrize("values", [NEGATIVE, BAD], ids=["negative", "no number"])
def test_what_is_negative_is_refused_and_leaves_no_trace(values: list[Any]) -> None:
    """`Invalid` at once, by the view and by a cell, as the first delta and among others; the rest counts."""
    log = memory_log()
    with publisher(log) as pub:
        view = pub.sum("v", labels=("a",), monotone=True)
        cell = view.labels("x")
        for value in values:
            for add in (cell.add, lambda v: view.add(v, a="x")):
                with pytest.raises(Invalid):
                    add(value)
            cell.add(1)
            cell.add(0.5)
    views = fold(log)
    assert views.of("v") == {("x",): 1.5 * len(values)}
    assert not views.dead


def test_what_is_not_negative_counts() -> None:
    """Zero of either sign, bools, ints of any size, numbers of others; the definition travels."""
    log = memory_log()
    values = [0, 0.0, -0.0, True, 3, np.uint8(7), Decimal("1"), Celsius(2)]
    with publisher(log) as pub:
        cell = pub.sum("v", monotone=True).labels()
        for value in values:
            cell.add(value)
        cell.add()
        pub.sum("w", monotone=True).add(10**400)
    definitions = {Definition(view, "sum", monotone=True) for view in "vw"}
    assert {group.definition for batch in batches(log) for group in batch.groups} == definitions
    assert fold(log).answers == {("v", ()): 15, ("w", ()): 10**400}


def test_an_object_that_turns_negative_counts_as_it_was() -> None:
    """It is read when it is recorded, not when it is merged."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=100_000)
    cell = pub.sum("v", monotone=True).labels()
    cell.add(1)
    array = np.array(2.0)
    cell.add(array)
    cell.add(3)
    array -= 10
    pub.close()
    assert fold(log).of("v") == {(): 6}


def test_it_is_part_of_what_a_view_is() -> None:
    """Asked for again it is the same view; otherwise `Invalid` says what it is. Only sums, only True and False."""
    with publisher(memory_log()) as pub:
        view = pub.sum("v", labels=("a",), monotone=True)
        assert pub.view("sum", "v", labels=("a",), monotone=True) is view
        with pytest.raises(Invalid, match=r"view v is monotone sum\(a\) here; not sum\(a\)"):
            pub.sum("v", labels=("a",))
        pub.sum("w")
        with pytest.raises(Invalid, match=r"view w is sum\(\) here; not monotone sum\(\)"):
            pub.sum("w", monotone=True)
        with pytest.raises(Invalid, match="a max cannot be monotone"):
            pub.view("max", "x", monotone=True)
        for wrong in (1, None, "yes"):
            with pytest.raises(Invalid, match="True or False"):
                pub.sum("y", monotone=wrong)  # type: ignore[arg-type]
