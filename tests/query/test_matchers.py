"""Conditions on label values: whole-value matches, linear time, bounded memory."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapters.read_parameters import _condition
from pipeline.core.query import parse_matcher
from pipeline.errors import Invalid, Unavailable
from pipeline.query import matchers
from pipeline.query.matchers import Test, compile_matcher
from tests.core import strategies as some


def never() -> None:
    """Never reach a deadline."""


def matching(text: str) -> Test:
    return compile_matcher(parse_matcher(text), regex_bytes_max=1_000, check=never)


@pytest.mark.parametrize(
    ("text", "value", "fits"),
    [
        ("x=eu", "eu", True),
        ("x=eu", "eus", False),
        ("x!=eu", "us", True),
        ("x=~e.", "eu", True),
        ("x=~e.", "eus", False),
        ("x=~u", "eu", False),
        ("x=~a|b", "ab", False),
        ("x=~(?i)EU", "eu", True),
        ("x=~.*", "a\nb\0c", True),
        ("x=~a\0b", "a\0b", True),
        ("x=~.", "é", True),
        ("x=~.", "\U0001f600", True),
        ("x=~\\pL+", "née", True),
        ("x=~", "", True),
        ("x=~", "a", False),
        ("x!~e.", "eu", False),
        ("x!~e.", "us", True),
        ("x=~(?P<name>e)u", "eu", True),
    ],
)
def test_a_condition_looks_at_the_whole_value(text: str, value: str, fits: bool) -> None:
    """A regular expression is anchored at both ends, and `.` is any character."""
    assert matching(text)([value]) == [fits]


@given(st.lists(some.label_values, max_size=20), st.sampled_from(["a.*", "[a-z]*", "", "(é|x*)"]))
def test_columns_are_matched_value_by_value(column: list[str], pattern: str) -> None:
    """The result for a column is that for each value alone; `!~` is the opposite of `=~`."""
    found = matching(f"x=~{pattern}")
    expected = [re.fullmatch(pattern, value, re.DOTALL) is not None for value in column]
    assert found(column) == expected
    assert found(column) == expected
    assert matching(f"x!~{pattern}")(column) == [not fits for fits in expected]


@pytest.mark.parametrize(
    "pattern",
    ["(", "[a", "*a", "(?P<n", "(a)\\1", "(?=a)", "(?<!a)b", "((a{100}){100}){100}", "a{1001}", "\\pL{900}", "\\8"],
)
def test_what_re2_refuses_is_invalid(pattern: str) -> None:
    """An expression that is broken, refers back, looks around or is too large is `Invalid`, and costs no memory."""
    with pytest.raises(Invalid, match="where x: "):
        matching(f"x=~{pattern}")


def test_long_expressions_are_refused() -> None:
    """`regex_bytes_max` counts bytes."""
    compile_matcher(parse_matcher("x=~" + "é" * 5), regex_bytes_max=10, check=never)
    with pytest.raises(Invalid, match="over 10 bytes"):
        compile_matcher(parse_matcher("x=~" + "é" * 6), regex_bytes_max=10, check=never)


BOMBS = ["(a*)*b", "(a|a)*b", "(a?){300}a{300}", "(.*a){15}.{80}", "((.?){30}){30}", ".*[ab].{900}.{10}"]


@pytest.mark.parametrize("pattern", BOMBS)
def test_an_expression_cannot_blow_up(pattern: str) -> None:
    """Patterns that take a backtracking matcher centuries take well under a second on the longest label value."""
    value = "a" * 4_095 + "c"
    started = time.process_time()
    matching(f"x=~{pattern}")([value])
    assert time.process_time() - started < 1


def test_matching_looks_at_the_deadline() -> None:
    """The deadline is looked at in the middle of a column, after a bounded amount of text; equal values are matched once."""
    checks = 0

    def check() -> None:
        nonlocal checks
        checks += 1
        if checks == 3:
            raise Unavailable("out of time")

    test = compile_matcher(parse_matcher("x=~.*a"), regex_bytes_max=1_000, check=check)
    assert test(["x" * 4_000] * 10_000) == [False] * 10_000
    assert checks == 0
    with pytest.raises(Unavailable):
        test([f"{i}" + "x" * 4_000 for i in range(100)])
    assert checks == 3


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A column of many values is matched right and does not stay in memory."""
    monkeypatch.setattr(matchers, "REMEMBERED_MAX", 10)
    test = matching("x=~.*7")
    for start in range(0, 100, 10):
        values = [str(i) for i in range(start, start + 10)]
        assert test(values) == [value.endswith("7") for value in values]


@given(some.label_values | st.text("~.*[]()\\^$|+?{}#-& \n\t\x0b\r\x0c\0é", max_size=10))
def test_a_client_can_ask_for_any_value(value: str) -> None:
    """The condition that a reader makes of a label and a value fits that value and no other."""
    test = compile_matcher(parse_matcher(_condition("x", value)), regex_bytes_max=4_000, check=never)
    assert test([value, value + "x", "x" + value]) == [True, False, False]
