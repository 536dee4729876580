"""What can be recorded, what cannot, and what it says then."""

import enum
import gc
import math
import tracemalloc
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest

from pipeline.core.kinds import INT_BITS_MAX
from pipeline.core.kinds import KINDS as ALGEBRA
from pipeline.core.record import LABEL_VALUE_BYTES_MAX
from pipeline.errors import Invalid
from pipeline.publisher.client import BasePublisher, publisher_settings
from tests.producer.support import fold, memory_log, publisher, same

np = pytest.importorskip("numpy")


class Celsius:
    """A number of another library: it can become a float, and change."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __float__(self) -> float:
        return float(self.value)


class Region(enum.StrEnum):
    EU = "eu"


class OldRegion(str, enum.Enum):  # noqa: UP042  # what StrEnum replaced prints another way
    EU = "eu"


def record(view: Any, value: Any) -> None:
    getattr(view.labels(), ALGEBRA[view.definition.kind].method)(value)


GOOD: list[tuple[Any, int | float]] = [
    (0, 0), (-3, -3), (2.5, 2.5), (True, 1), (10**30, 10**30), (-(2**64), -(2**64)), (10**400, 10**400),
    (2**63, 2**63), (2**63 - 1, 2**63 - 1), (-(2**63) - 1, -(2**63) - 1),
    (2**INT_BITS_MAX - 1, 2**INT_BITS_MAX - 1), (1.7e308, 1.7e308), (5e-324, 5e-324),
    (Decimal("1.25"), 1.25), (Fraction(1, 4), 0.25), (Celsius(1.5), 1.5),
    (np.int8(3), 3), (np.uint64(2**64 - 1), 2**64 - 1), (np.int64(-5), -5), (np.float32(0.5), 0.5),
    (np.float64(2.25), 2.25), (np.bool_(True), 1.0), (np.array(4.5), 4.5), (np.array(7), 7),
]  # fmt: skip
BAD: list[Any] = [
    math.nan, math.inf, -math.inf, None, "", "1", b"1", 1j, [], [1], {}, object(), int, np.float64("nan"),
    np.float32("inf"), np.array([1.0, 2.0]), Decimal("NaN"), Decimal("sNaN"), Decimal("1e400"), Celsius("nan"),
    2**INT_BITS_MAX, -(2**INT_BITS_MAX), np.datetime64(0, "s"), range(1),
]  # fmt: skip
KINDS = ["sum", "min", "max", "mean"]


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_all_sorts_are_exact(kind: str) -> None:
    """Each number arrives as the int or float that it is, alone and after numbers of every other sort."""
    log = memory_log()
    ints = [value for value, plain in GOOD if type(plain) is int]
    with publisher(log) as pub:
        for i, (value, _) in enumerate(GOOD):
            record(pub.view(kind, f"alone_{i}"), value)
        for value in ints * 3:
            record(pub.view(kind, "together"), value)
    views = fold(log)
    for i, (value, plain) in enumerate(GOOD):
        answer, expected = views.of(f"alone_{i}")[()], plain if kind != "mean" else ALGEBRA["mean"].answer((plain, 1))
        assert answer == expected, value
        assert type(answer) is type(expected), value
    plain_ints = [plain for _, plain in GOOD if type(plain) is int] * 3
    mean = sum(plain_ints) // len(plain_ints)
    assert views.of("together")[()] == {"sum": sum, "min": min, "max": max, "mean": lambda _: mean}[kind](plain_ints)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_finite_number_is_refused_and_leaves_no_trace(kind: str) -> None:
    """`Invalid` comes from the call that records, at first and in the midst of good numbers, and changes nothing."""
    log = memory_log()
    with publisher(log) as pub:
        view = pub.view(kind, "v")
        for value in BAD:
            with pytest.raises(Invalid, match=r"needed|int of"):
                record(view, value)
        assert not pub._running.threads, "a refused delta started the publisher"
        record(view, 3)
        for value in BAD:
            with pytest.raises(Invalid):
                record(view, value)
        record(view, 3)
    assert fold(log).of("v") == {(): 6 if kind == "sum" else 3}


def test_an_object_that_changes_counts_as_it_was() -> None:
    """A mutable number is read when it is recorded, not when it is merged."""
    log = memory_log()
    with publisher(log, flush_interval_ms=100_000) as pub:
        cell, most = pub.sum("v").labels(), pub.max("m").labels()
        array, celsius = np.zeros(()), Celsius(0)
        for i in range(1, 40):
            array += 1
            celsius.value = i
            cell.add(array)
            cell.add(celsius)  # type: ignore[arg-type]
            most.observe(array)
            celsius.value = "nan"
            array += 1000
            array -= 1000
    assert fold(log).answers == {("v", ()): 2 * sum(range(1, 40)), ("m", ()): 39}


def test_last_takes_text_numbers_bools_and_none() -> None:
    """The newest by timestamp wins; text of a str subclass is plain text."""
    log = memory_log()
    good = [None, True, "text", "", "ü\x00", 5, 2.5, 10**400, Region.EU, OldRegion.EU, "x" * 60_000]
    with publisher(log) as pub:
        view = pub.last("v", labels=("i",))
        for i, value in enumerate(good):
            view.set("old", 5, i=str(i))
            view.set(value, 7, i=str(i))  # type: ignore[arg-type]
            view.labels(str(i)).set("older", 6)
        now = pub.last("now")
        now.set("first", 1)
        now.set("second")
        for value in (math.nan, math.inf, b"x", object(), "\ud800", "x" * 70_000, 1j, 2**INT_BITS_MAX):
            with pytest.raises(Invalid):
                view.set(value, i="bad")  # type: ignore[arg-type]
        for ts_ms in (-1, 1.5, "1", 2**60, True):
            with pytest.raises(Invalid, match="ts_ms"):
                view.set(1, ts_ms, i="bad")  # type: ignore[arg-type]
    views = fold(log)
    plain = ["eu" if isinstance(value, enum.Enum) else value for value in good]
    same(views.of("v"), {(str(i),): value for i, value in enumerate(plain)})
    assert views.of("now") == {(): "second"}


def test_labels_by_position_and_by_name_are_one_series() -> None:
    """Order of names does not matter; text of a str subclass is the text that it is; any Unicode text will do."""
    log = memory_log()
    with publisher(log) as pub:
        view = pub.sum("v", labels=("a", "b"))
        view.add(1, a="eu", b="tea")
        view.add(1, b="tea", a="eu")
        view.labels("eu", "tea").add()
        view.labels(b="tea", a="eu").add()
        view.labels(Region.EU, "tea").add()
        view.labels(OldRegion.EU, "tea").add()
        view.labels(np.str_("eu"), "tea").add()
        assert view.labels("eu", "tea").suffix == view.labels(a=Region.EU, b="tea").suffix
        odd = [("", ""), ("\x00", "a\x00b"), ("ü🎉", "\n"), ("x" * LABEL_VALUE_BYTES_MAX, "y")]
        for labels in odd:
            view.labels(*labels).add(2)
    same(fold(log).of("v"), {("eu", "tea"): 7, **dict.fromkeys(odd, 2)})


@pytest.mark.parametrize(
    ("positional", "named", "says"),
    [
        (("x",), {}, "has labels"),
        (("x", "y", "z"), {}, "has labels"),
        ((), {"a": "x"}, "has labels"),
        ((), {"a": "x", "c": "y"}, "has labels"),
        (("x",), {"b": "y"}, "not both"),
        (("x", 1), {}, "text expected, got int"),
        (("x", None), {}, "text expected"),
        (("x", b"y"), {}, "text expected, got bytes"),
        (("x", ["y"]), {}, "text expected, got list"),
        ((), {"a": "x", "b": {}}, "text expected, got dict"),
        (("x", "\ud800"), {}, "lone surrogate"),
        (("x", "y" * 2**20), {}, "at most"),
    ],
)
def test_wrong_labels_are_refused(positional: tuple[Any, ...], named: dict[str, Any], says: str) -> None:
    """`Invalid` names the view and what is wrong, and nothing is buffered."""
    with publisher(memory_log()) as pub:
        view = pub.sum("sales", labels=("a", "b"))
        with pytest.raises(Invalid, match=says) as caught:
            view.labels(*positional, **named)
        assert "sales" in str(caught.value)
        assert len(str(caught.value)) < 500
        if named and not positional:
            with pytest.raises(Invalid, match=says):
                view.add(1, **named)
        assert pub.stats()["series"] == 0


def test_labels_may_be_named_like_parameters() -> None:
    """`self`, `value`, `labels` are label names like any; `ts_ms` must go through `labels` in a last view."""
    log = memory_log()
    names = ("self", "value", "labels", "names", "view")
    with publisher(log) as pub:
        pub.sum("s", labels=names).add(2, **dict.fromkeys(names, "x"))
        pub.sum("s", labels=names).labels(**dict.fromkeys(names, "x")).add(1)
        pub.mean("m", labels=names).observe(2, **dict.fromkeys(names, "x"))
        pub.last("l", labels=(*names, "ts_ms")).labels(**dict.fromkeys((*names, "ts_ms"), "x")).set(5)
        with pytest.raises(Invalid, match="has labels"):
            pub.last("l", labels=(*names, "ts_ms")).set(5, **dict.fromkeys((*names, "ts_ms"), "x"))  # type: ignore[arg-type]
    views = fold(log)
    assert views.of("s") == {("x",) * 5: 3}
    assert views.of("m") == {("x",) * 5: 2}
    assert views.of("l") == {("x",) * 6: 5}


def test_a_view_is_defined_once() -> None:
    """The same definition gives the same view, however often; another one is `Invalid`, and says what the view is."""
    with publisher(memory_log()) as pub:
        view = pub.sum("v", labels=("a", "b"))
        assert pub.sum("v", labels=["a", "b"]) is view
        assert pub.view("sum", "v", labels=iter(("a", "b"))) is view  # type: ignore[arg-type]
        assert pub.sum("one", labels="a") is pub.sum("one", labels=("a",))
        for again in (
            lambda: pub.mean("v", labels=("a", "b")),
            lambda: pub.sum("v", labels=("b", "a")),
            lambda: pub.sum("v"),
            lambda: pub.sum("v", labels=("a", "b"), monotone=True),
        ):
            with pytest.raises(Invalid, match=r"view v is sum\(a, b\) here"):
                again()


@pytest.mark.parametrize(
    ("view", "labels", "says"),
    [
        ("", (), "view name"),
        ("a-b", (), "view name"),
        ("1a", (), "view name"),
        ("ü", (), "view name"),
        ("a\n", (), "view name"),
        ("a" * 1000, (), "view name"),
        (None, (), "text"),
        (b"v", (), "text"),
        ("v", ("a b",), "label name"),
        ("v", ("a", "a"), "twice"),
        ("v", (1,), "text"),
        ("v", None, "text"),
        ("v", 5, "text"),
        ("v", tuple(f"l{i}" for i in range(40)), "labels; at most"),
    ],
)
def test_bad_names_are_refused(view: Any, labels: Any, says: str) -> None:
    """`Invalid` where the view is made."""
    with publisher(memory_log()) as pub:
        with pytest.raises(Invalid, match=says) as caught:
            pub.sum(view, labels=labels)
        assert len(str(caught.value)) < 500


def test_names_of_an_enum_are_plain_text() -> None:
    """A view that is named by a `StrEnum` member can be encoded."""
    log = memory_log()
    with publisher(log) as pub:
        pub.sum(Region.EU, labels=(OldRegion.EU,)).add(1, eu="x")
        assert pub.sum("eu", labels=("eu",)) is pub.sum(Region.EU, labels=(Region.EU,))
    assert fold(log).of("eu") == {("x",): 1}


def test_what_this_version_lacks_is_refused() -> None:
    """Windows, unknown kinds, and more views than a partition takes."""
    with publisher(memory_log()) as pub:
        for window_s in (60, 1):
            with pytest.raises(Invalid, match="window"):
                pub.sum("v", window_s=window_s)
        for odd in (0, -1, 1.5, "60", True):
            with pytest.raises(Invalid, match="window_s"):
                pub.sum("v", window_s=odd)  # type: ignore[arg-type]
        for kind in ("median", "", None, ["sum"], 1):
            with pytest.raises(Invalid, match="unknown kind"):
                pub.view(kind, "v")  # type: ignore[arg-type]
        assert pub.sum("v", window_s=None).definition.window_s == 0
        for i in range(9_999):
            pub.sum(f"v{i}")
        with pytest.raises(Invalid, match="over 10000 views"):
            pub.sum("one_more")
        assert pub.sum("v5").definition.view == "v5"


def test_settings_are_checked() -> None:
    """A name that is no setting, or a value out of bounds, is `Invalid`."""
    assert publisher_settings({"flush_interval_ms": 7}).flush_interval_ms == 7
    with pytest.raises(Invalid, match="unknown settings: flush_intervall_ms"):
        publisher_settings({"flush_intervall_ms": 7})
    for bad in ({"flush_interval_ms": 0}, {"on_full": "wait"}, {"batch_bytes_max": "1"}, {"buffer_bytes_max": True}):
        with pytest.raises(Invalid):
            publisher_settings(bad)


def test_handles_that_are_not_recorded_to_cost_nothing() -> None:
    """`labels` of a million different values, without a delta, keeps nothing."""
    with publisher(memory_log()) as pub:
        view = pub.sum("v", labels=("a",))
        view.labels("warm")
        gc.collect()
        tracemalloc.start()
        for i in range(20_000):
            view.labels(str(i))
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 100_000
        assert isinstance(pub, BasePublisher)
        assert pub.stats()["buffer_bytes"] == 0
