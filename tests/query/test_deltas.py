"""Bodies of deltas that are long: cut into deltas, and decoded a part at a time, they mean what short ones mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import Invalid
from pipeline.query.deltas import DELTA_BYTES_MAX, WHOLE_BYTES_MAX, parse_deltas
from pipeline.query.problems import Refused
from tests.support import examples

TEXTS = st.text(st.sampled_from('ab{}[]",\\:\n\x00é\U0001f600'), max_size=6)
DELTAS = st.fixed_dictionaries(
    {"view": TEXTS, "kind": TEXTS, "value": st.none() | st.integers(-9, 9) | st.floats(0, 1) | TEXTS},
    optional={"labels": st.dictionaries(TEXTS, TEXTS, max_size=3), "ts_ms": st.integers(0, 9)},
)
BLANKS = st.text(st.sampled_from(" \t\r\n"), max_size=3)


def long_body(deltas: list[dict[str, Any]], blank: str = "", *, ascii_only: bool = True) -> bytes:
    """An array of these deltas that is longer than what is decoded in one call."""
    separator = f"{blank},{blank}"
    items = [json.dumps(it, ensure_ascii=ascii_only) for it in deltas]
    body = f"{blank}[{blank}{separator.join(items)}{blank}]{blank}"
    return (body + " " * (WHOLE_BYTES_MAX + 1 - len(body))).encode()


@settings(max_examples=examples(100))
@given(st.lists(DELTAS, max_size=8), BLANKS, st.booleans(), st.integers(1, 3))
def test_a_long_array_is_parsed_as_a_short_one(deltas: list[Any], blank: str, ascii_only: bool, times: int) -> None:
    """A long array has the deltas of the same array decoded at once, whatever stands in its texts."""
    body = long_body(deltas * times, blank, ascii_only=ascii_only)
    assert parse_deltas(body, "", 100) == parse_deltas(body.strip(), "", 100)
    assert len(parse_deltas(body, "", 100)) == len(deltas) * times


GOOD = {"view": "v", "kind": "sum", "value": 1}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("1", "a JSON object is needed, got an int"), ("[[]]", "a JSON object is needed, got an array"),
        ("{}", "'view' is missing"), ('{"view":"v","kind":"sum","value":1,"x":1}', "no field 'x'"),
        ('{"view":"v","kind":"sum","value":{"a":{}}}', "'value' must be"), ("nothing", "not a JSON object"),
        ('{"view":"v","kind":"sum","value":1,"labels":' + json.dumps({str(i): "" for i in range(33)}) + "}", "33 labels"),
        (json.dumps(GOOD | {"view": "v" * DELTA_BYTES_MAX}), f"over {DELTA_BYTES_MAX} bytes"),
    ],
    ids=range(8),
)  # fmt: skip
@pytest.mark.parametrize("place", [0, 1_700])
def test_what_is_wrong_in_a_long_array_is_named(wrong: str, said: str, place: int) -> None:
    """The number of the first delta that is wrong is said, with what is wrong, wherever it stands."""
    items = [json.dumps(GOOD)] * 2_000
    items.insert(place, wrong)
    with pytest.raises(Invalid, match=f"^delta {place}: .*{said}"):
        parse_deltas(f"[{','.join(items)}]".encode(), "", 10_000)


def test_a_long_array_ends_where_it_says() -> None:
    """An array without an end, or with something behind it, is none; too many deltas are counted before the rest is read."""
    body = long_body([GOOD] * 2_000)
    with pytest.raises(Invalid, match="not a JSON array: not JSON from byte"):
        parse_deltas(body + b"1", "", 10_000)
    with pytest.raises(Invalid, match="delta 1999: "):
        parse_deltas(body.rstrip()[:-1], "", 10_000)
    with pytest.raises(Refused, match="at most 1999"):
        parse_deltas(body, "", 1_999)
    assert len(parse_deltas(body, "", 2_000)) == 2_000
