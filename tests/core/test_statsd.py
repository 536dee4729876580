"""StatsD lines: their samples, or the reason why they have none."""

from __future__ import annotations

import timeit
from math import inf
from time import thread_time
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.core.record import NAME
from pipeline.core.statsd import REASONS, Dialect, Line, Malformed, joined_lines, parse_line, prometheus_name
from pipeline.settings.base import DIALECTS
from tests.support import LONG

MOST = 8_192


def read(line: bytes) -> Line:
    found = parse_line(line, MOST)
    assert isinstance(found, Line), (line, found)
    return found


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"a.b-c/d:1|c", {"source": "a.b-c/d", "name": "a_b_c_d", "type": "counter", "values": (1,)}),
        (b"  a:1|c\r", {"name": "a", "values": (1,)}),
        (b"404.hits:1|c", {"name": "_404_hits"}),
        (b"a:-3|c", {"values": (-3,)}),
        (b"a:1|c|@0.1", {"values": (10,)}),
        (b"a:3|c|@0.7", {"values": (30 / 7,)}),
        (b"a:0.5|c|@0.1", {"values": (5,)}),
        (b"a:1|c|@1", {"values": (1,)}),
        (b"a:1|c|@1e-3", {"values": (1_000,)}),
        (b"a:1:2:3.5|c|@0.5", {"values": (2, 4, 7)}),
        (b"a:5|g", {"values": (5,), "relative": (False,)}),
        (b"a:+5:-2.5:7|g", {"values": (5, -2.5, 7), "relative": (True, True, False)}),
        (b"a:5|g|@0.1", {"values": (5,), "weight": 1}),
        (b"a:5|g|T1656581400|c:abc|e:it-x|card:low", {"ts_ms": 1_656_581_400_000}),
        (b"a:320:.5|ms|@0.1", {"type": "timer", "values": (320, 0.5), "weight": 10}),
        (b"a:320|h", {"type": "histogram", "weight": 1}),
        (b"a:320|d", {"type": "histogram"}),
        (b"a:x:y z|s", {"type": "set", "member": "x:y z", "values": ()}),
        ("a:é|s".encode(), {"member": "é"}),
        (b"a:1|c|#env:prod,flag,a-b:x:y,,e:", {"tags": (("a_b", "x:y"), ("e", ""), ("env", "prod"), ("flag", "true"))}),
        (b"a:1|c|#", {"tags": ()}),
        (b"a:1|c|#env:p,flag,env:p,flag,a-b:1,a.b:1", {"tags": (("a_b", "1"), ("env", "p"), ("flag", "true"))}),
        (b"a:1|c|#" + b",".join([b"t%d" % (i % 32) for i in range(99)]), {"values": (1,)}),
        (b"a:1e3|g", {"values": (1_000.0,)}),
        (b"a:" + b"9" * 2_400 + b"|c", {"values": (int("9" * 2_400),)}),
    ],
)
def test_what_a_line_says(line: bytes, said: dict[str, Any]) -> None:
    """Every part of StatsD's and DogStatsD's grammar is read; ints stay ints, and a tenth is a tenth."""
    found = read(line)
    for name, value in said.items():
        assert getattr(found, name) == value
        assert repr(getattr(found, name)) == repr(value)  # 1 is not 1.0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a" * 9_000, "line_long"),
        (b"\xff:1|c", "utf8"),
        (b"_e{5,4}:title|text", "unsupported"),
        (b"_sc|Redis connection|2", "unsupported"),
        (b"a", "format"),
        (b"a|c", "format"),
        (b"a:1", "format"),
        (b"a:1|", "format"),
        (b":1|c", "name"),
        (b"a+b:1|c", "name"),
        ("é:1|c".encode(), "name"),
        (b"a" * 200 + b":1|c", "name"),
        (b"a:1|x", "type"),
        (b"a:1|C", "type"),
        (b"a:|c", "value"),
        (b"a:1:|c", "value"),
        (b"a:one|c", "value"),
        (b"a:nan|g", "value"),
        (b"a:inf|g", "value"),
        (b"a:1e999|g", "value"),
        (b"a:1_000|c", "value"),
        (b"a:0x10|c", "value"),
        ("a:\u0661|c".encode(), "value"),
        (b"a:" + b"9" * 2_401 + b"|c", "value"),
        (b"a:1e300|c|@1e-300", "value"),
        (b"a:|s", "value"),
        (b"a:" + b"x" * 4_097 + b"|s", "value"),
        (b"a:1|c|@", "rate"),
        (b"a:1|c|@0", "rate"),
        (b"a:1|c|@2", "rate"),
        (b"a:1|c|@-0.5", "rate"),
        (b"a:1|c|#x:1,x:2", "tag"),
        (b"a:1|c|#true:true,x,x:false", "tag"),
        (b"a:1|c|#a-b:1,a.b:2", "tag"),
        (b"a:1|c|#:1", "tag"),
        (b"a:1|c|#a+b", "tag"),
        (b"a:1|c|#" + b",".join([b"t%d" % i for i in range(33)]), "tag"),
        (b"a:1|c|#x:" + b"y" * 4_097, "tag"),
        (b"a:1|g|T", "timestamp"),
        (b"a:1|g|T-1", "timestamp"),
        (b"a:1|g|T1234567890123", "timestamp"),
        (b"a:1|c|?", "field"),
        (b"a:1|c|", "field"),
    ],
)
def test_why_a_line_says_nothing(line: bytes, reason: str) -> None:
    """Each way for a line to be wrong has its reason."""
    assert parse_line(line, MOST) == Malformed(reason)


@pytest.mark.parametrize(
    ("line", "auto", "statsd", "dogstatsd"),
    [
        (b"a:-5|g", True, True, False),
        (b"a:+5|g|#x:1|T1", True, True, False),
        (b"a:-5|g|#x:1|c:ci-1", False, True, False),
        (b"a:-5|g|e:it-false,cn-x", False, True, False),
        (b"a:-5|g|card:none", False, True, False),
        (b"a:5|g", False, False, False),
    ],
)
def test_a_sign_is_a_step_where_the_dialect_has_steps(line: bytes, auto: bool, statsd: bool, dogstatsd: bool) -> None:
    """A sign is StatsD's step, and DogStatsD's value below zero; a line with a field of Datadog's clients is theirs."""
    found = [parse_line(line, MOST, dialect) for dialect in get_args(Dialect)]
    assert [it.relative for it in found if isinstance(it, Line)] == [(auto,), (statsd,), (dogstatsd,)]
    assert get_args(Dialect) == DIALECTS


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (b"foo:1|c:200|ms", [b"foo:1|c", b"foo:200|ms"]),
        (b"foo:1|c|@0.1:+2|g:x:y|s|#a:b|T5", [b"foo:1|c|@0.1|#a:b|T5", b"foo:+2|g|#a:b|T5", b"foo:x:y|s|#a:b|T5"]),
        (b"foo:1|c:2|c|@0.5", [b"foo:1|c", b"foo:2|c|@0.5"]),
        (b"foo:1:2|c:3|c|c:ci-1", [b"foo:1:2|c|c:ci-1", b"foo:3|c|c:ci-1"]),
        (b"foo:1|c:", [b"foo:1|c", b"foo:"]),
        (b"foo:1|c|c:ci-1", None),
        (b"foo:1|c|#a:1|c:2", None),
        (b"foo:1|x:2|c", None),
        (b"foo", None),
        (b"foo:1|c" + b":1|c" * 101, None),
    ],
)
def test_lines_that_are_joined(line: bytes, parts: list[bytes] | None) -> None:
    """Samples of one name can be joined by colons, each with its type and rate; the fields behind the last are of all."""
    assert joined_lines(line) == (parts or [line])


def test_lines_within_the_limits_of_agents() -> None:
    """Lines as long as those that clients pack for Datadog's agent, and a name of many parts, are read."""
    packed = b"a.b:" + b":".join([b"123.45"] * 1_165) + b"|d|@0.5|#x:1"
    assert len(packed) <= 8_192
    assert len(read(packed).values) == 1_165
    assert read(b"a." * 99 + b"a:1|c").name == "a_" * 99 + "a"


def test_time_is_linear_in_the_length() -> None:
    """A line of eight times the length takes no more than a few times as long, whatever it is made of."""
    for part in (b":1", b":9.75", b"|c", b",a:b", b"|#a", b"|T1", b":" + b"9" * 500, b"#", b":-1e300", b":0.1"):
        for head in (b"a:1", b"a:1|c|#a", b"a:1|ms|@0.3", b"@0.7|c|a:1"):
            times = []
            for size in (8_192, 65_536):
                line = head + part * (size // len(part))
                times.append(
                    min(
                        timeit.repeat(
                            lambda line=line: (parse_line(line, 10**6), joined_lines(line)),
                            number=1,
                            repeat=3,
                            timer=thread_time,
                        )
                    )
                )
            assert times[1] < 40 * times[0] + 0.05, (head, part, times)


@pytest.mark.parametrize("line", [b"", b" ", b"\r", b"\t \x0b"])
def test_a_blank_line_is_nothing(line: bytes) -> None:
    """A blank line is no sample and no error."""
    assert parse_line(line, MOST) is None


PARTS = st.sampled_from(
    [
        b"a",
        b"a.b",
        b":",
        b"|",
        b"c",
        b"g",
        b"ms",
        b"h",
        b"s",
        b"@",
        b"0.1",
        b"#",
        b",",
        b"T",
        b"1",
        b"-",
        b"+",
        b"c:",
        b"e:",
        b"card:",
        b"d",
        b"env:prod",
        b"1e9",
        b"\xff",
        b"\0",
    ]
)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=10_000 if LONG else 50)
@given(st.binary(max_size=300) | st.lists(PARTS, max_size=30).map(b"".join), st.sampled_from(get_args(Dialect)))
@example(b"_e{", "auto")
@example(b"a:1|c|@" + b"0" * 400 + b".1", "auto")
@example(b"a:1|c|@1e-999", "auto")
@example(b"a:1|ms|@1e-320", "auto")
def test_any_bytes_are_read_or_refused(line: bytes, dialect: Dialect) -> None:
    """Any line is read or refused without an exception: with Prometheus names and finite numbers, or a known reason."""
    found = parse_line(line, MOST, dialect)
    assert all(joined_lines(part) == [part] or part.count(b":") > 1 for part in joined_lines(line))
    if isinstance(found, Malformed):
        assert found.reason in REASONS
    elif found is not None:
        assert NAME.match(found.name)
        assert all(NAME.match(name) for name, _ in found.tags)
        assert bool(found.values) is (found.type != "set")
        assert [*found.tags] == sorted({*found.tags})
        assert 1 <= found.weight < inf
        assert dialect != "dogstatsd" or not any(found.relative)


@given(
    value=st.integers(-(10**20), 10**20),
    tenths=st.integers(1, 10),
    tags=st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.from_regex(r"[^,|\s]{0,8}", fullmatch=True), max_size=5
    ),
)
def test_a_counter_is_its_value_by_its_rate(value: int, tenths: int, tags: dict[str, str]) -> None:
    """A counter is exactly its value divided by its rate, if that is whole, and keeps its tags in any order."""
    line = f"n:{value}|c|@{tenths / 10}|#" + ",".join(f"{name}:{text}" for name, text in tags.items())
    found = read(line.encode())
    whole, rest = divmod(value * 10, tenths)
    assert found.values[0] == (value * 10 / tenths if rest else whole)
    assert dict(found.tags) == tags


def test_names_that_are_none() -> None:
    """An empty name, a long one, or one of other characters is refused."""
    assert [prometheus_name(name) for name in ("", "a" * 200, "a{b}", "a\n", "1", "-")] == [
        None,
        None,
        None,
        None,
        "_1",
        "_",
    ]
