"""Query strings of reads."""

from urllib.parse import parse_qsl, quote_plus

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.query import Matcher, Query
from pipeline.query.params import _pairs, parse_read
from pipeline.settings import QuerySettings
from tests.core import strategies as some


@given(st.text("ab=&;?é\0", max_size=20))
def test_plain_query_strings_are_read_as_any_other(text: str) -> None:
    """The shortcut for query strings without escapes reads what the standard library reads."""
    assert _pairs(text.encode(), 64) == parse_qsl(text, keep_blank_values=True)


@given(st.lists(st.tuples(some.names, st.sampled_from(["=", "!=", "!~"]), some.label_values), max_size=5), st.booleans())
def test_conditions_survive_a_url(conditions: list[tuple[str, str, str]], plain: bool) -> None:
    """Conditions with any values are read from a URL as they were written, with or without unneeded escapes."""
    texts = ["".join(condition) for condition in conditions]
    kept = plain and set("%+&").isdisjoint("".join(texts))
    query = "&".join(f"where={text if kept else quote_plus(text)}" for text in texts)
    asked = parse_read("v", query.encode(), QuerySettings())
    assert asked.query == Query("v", tuple(Matcher(*condition) for condition in parsed(conditions)))
    assert not asked.waits


def parsed(conditions: list[tuple[str, str, str]]) -> list[tuple[str, str, str]]:
    """Return the conditions as parsed: a value that begins with `~` turns an equality into a regular expression."""
    return [
        (label, "=~", value[1:]) if op == "=" and value.startswith("~") else (label, op, value)
        for label, op, value in conditions
    ]


def test_defaults_come_from_the_settings() -> None:
    """Limit and timeout default to the settings; neither can go beyond its own maximum."""
    settings = QuerySettings(limit_default=50, limit_max=20, timeout_ms_default=900, timeout_ms_max=500)
    asked = parse_read("v", b"", settings)
    assert (asked.query.limit, asked.timeout_ms) == (20, 500)
    asked = parse_read("v", b"limit=7&timeout_ms=8&top=9&max_staleness_ms=10&after=t~0-11", settings)
    assert (asked.query.limit, asked.timeout_ms, asked.query.top, asked.max_staleness_ms) == (7, 8, 9, 10)
    assert str(asked.after) == "t~0-11"
    assert asked.waits
