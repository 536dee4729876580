"""Texts of metrics are read line by line, as prometheus_client reads them, in time linear in their length."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_plain

from pipeline.ingest.openmetrics import parse_pushed
from pipeline.ports import RawDelta
from tests.support import LONG

PLAIN = "text/plain; version=0.0.4"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
EXAMPLES = 10_000 if LONG else 60

TEXTS = st.lists(
    st.sampled_from(
        [
            "# TYPE a counter",
            "# TYPE a histogram",
            "a_total 1",
            'a_bucket{le="1"} 2',
            "# EOF",
            "a{",
            '"',
            "\\",
            "}",
            "1",
            " ",
            "\n",
            "# {",
            "=",
            "le",
            ",",
            "NaN",
            "1e5",
            "a_created 1",
            "\0",
            "é",
            "\x85",
            "\u2028",
        ]
    ),
    max_size=40,
).map("".join)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    TEXTS.map(str.encode) | st.binary(max_size=200),
    st.sampled_from([PLAIN, OPENMETRICS]),
    st.sampled_from([{}, {"job": "j"}]),
)
@example(b"# TYPE a\xe2\x80\xa8b counter", PLAIN, {})
@example(b'{"a"} 1', OPENMETRICS, {})
@example(b"# TYPE", PLAIN, {})
@example(b"# TYPE a b c d", OPENMETRICS, {})
@example(b"a 1\x85b 2", OPENMETRICS, {})
@example(b"# TYPE a counter\na_total 1\na_created 1e400\na_created 1e9\na_created nan", PLAIN, {"job": "j"})
@example(b"# TYPE %b counter\n%b_total 1" % (b"a" * 190, b"a" * 190), PLAIN, {"job": "j"})
def test_any_bytes_are_samples_or_refused(body: bytes, content_type: str, grouping: dict[str, str]) -> None:
    """Any bytes are read without an exception; each line is at most one sample, refused for a reason, or without content."""
    found = parse_pushed(body, content_type, 1_000, 8_192, grouping)
    assert all(delta.kind == "sum" for it in found.totals for delta in it.deltas)
    assert not grouping or all(delta.kind == "last" for delta in found.deltas)
    assert len(found.deltas) == len(found.lines) == len({*found.lines})
    lines = len(body.split(b"\n"))
    assert all(1 <= number <= lines for number in found.lines)
    assert all(1 <= it.line <= lines and it.reason and len(it.detail) <= 200 for it in found.refused)
    assert all(isinstance(delta, RawDelta) for delta in found.deltas)


def test_no_more_is_read_than_may_be_taken() -> None:
    """Parsing stops one sample, or one bad line, beyond the limit."""
    assert len(parse_pushed(b"a 1\n" * 1_000, PLAIN, 10, 8_192).deltas) == 11
    assert len(parse_pushed(b"a\n" * 1_000, PLAIN, 10, 8_192).refused) == 11
    assert not parse_pushed(b"a 1\nb\n" * 6, PLAIN, 10, 8_192).whole
    assert parse_pushed(b"a 1\nb\n" * 5, PLAIN, 10, 8_192).whole


def oracle(line: str, content_type: str) -> Any:
    """Return name, labels, value and time of a line, as prometheus_client reads it."""
    text = f"{line}\n# EOF\n"
    families = parse_openmetrics(text) if content_type == OPENMETRICS else parse_plain(line)
    ((sample,),) = [family.samples for family in families]
    ts_ms = None if sample.timestamp is None else round(float(sample.timestamp) * 1_000)
    return sample.name, dict(sample.labels), float(sample.value), ts_ms


NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,8}", fullmatch=True).filter(lambda it: it != "__name__")
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"), max_size=12)
VALUES = st.one_of(
    st.integers().map(str), st.floats(allow_nan=False).map(repr), st.sampled_from(["NaN", "+Inf", "-Inf", "1e3", ".5", "5."])
)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=EXAMPLES, deadline=None)
@given(
    NAMES,
    st.dictionaries(NAMES, TEXT, max_size=4),
    VALUES,
    st.none() | st.integers(0, 2**40),
    st.none() | st.text('ab# {}"\\=,1', max_size=20),
    st.sampled_from([PLAIN, OPENMETRICS]),
)
@example("a", {"b": "\\n\n"}, "1", None, '"} # {', PLAIN)
def test_samples_are_read_as_prometheus_client_reads_them(
    name: str, labels: dict[str, str], value: str, ts: int | None, exemplar: str | None, content_type: str
) -> None:
    """Names, escaped labels, values and times are the same; an exemplar never matters, whatever stands in it."""
    escaped = {it: text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"') for it, text in labels.items()}
    inner = ",".join([f'{it}="{text}"' for it, text in escaped.items()])
    line = f"{name}{{{inner}}} {value}" + (f" {ts}" if ts is not None else "")
    found = parse_pushed((line + (f" # {exemplar}" if exemplar is not None else "")).encode(), content_type, 10, 2**20)
    (delta,) = found.deltas
    was = oracle(line, content_type)
    assert (delta.view, delta.labels, delta.ts_ms) == (was[0], was[1], was[3])
    assert isinstance(delta.value, int | float)
    assert float(delta.value) == was[2] or math.isnan(was[2])


HOSTILE = {
    "quotes": b'a{"' + b'"' * 4_000,
    "braces": b"{" * 8_000,
    "escapes": b'a{x="' + b"\\" * 8_000,
    "exemplars": b"a 1" + b" # {" * 2_000,
    "commas": b"a{" + b"," * 8_000,
    "spaces": b"a" + b" " * 8_000 + b"x",
    "digits": b"a " + b"1" * 8_000,
    "blank": b" " * 8_000,
    "labels": b"a{" + b'x="",' * 1_600 + b"!",
    "type": b"# TYPE " + b"a" * 8_000,
    "types": b"#\tTYPE" * 1_000,
    "comments": b"#\n" * 4_000,
    "names": b"a_" * 4_000,
    "nothing": b"\n" * 8_000,
}


@pytest.mark.parametrize("kind", [*HOSTILE])
def test_the_time_is_linear(kind: str) -> None:
    """No line costs more CPU than its length allows: 1 s for 2 MB at most, refused or not."""
    body = (HOSTILE[kind] + b"\n") * 40
    start_s = time.thread_time()
    parse_pushed(body, OPENMETRICS, 100_000, 8_192)
    assert time.thread_time() - start_s < max(0.05, len(body) / 2e6)
