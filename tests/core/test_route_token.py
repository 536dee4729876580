"""Tokens, and where series go."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.record import series_prefix, series_suffix
from pipeline.core.route import route
from pipeline.core.token import TOKEN_LENGTH_MAX, Token
from pipeline.errors import Invalid

offsets = st.dictionaries(st.integers(0, 999_999_999), st.integers(0, 2**63 - 1), max_size=20)
tokens = offsets.map(Token)


@given(next_offsets=offsets)
def test_tokens_come_back(next_offsets: dict[int, int]) -> None:
    """parse(str(token)) is the token; its text is URL-safe, and one and the same for equal tokens."""
    token = Token(next_offsets)
    text = str(token)
    assert Token.parse(text) == token
    assert Token.parse(text).next_offsets == next_offsets
    assert not set(text) - set("0123456789-.")
    again = Token(dict(reversed(next_offsets.items())))
    assert (again, hash(again), str(again)) == (token, hash(token), text)
    assert token != next_offsets


@given(a=tokens, b=tokens, c=tokens)
def test_either_token(a: Token, b: Token, c: Token) -> None:
    """`|` covers both: commutative, associative, idempotent, with the empty token as identity; nothing is changed."""
    before = str(a), str(b)
    assert a | b == b | a
    assert (a | b) | c == a | (b | c)
    assert a | a == a == a | Token({})
    assert (str(a), str(b)) == before
    for partition, next_offset in (a | b).next_offsets.items():
        assert next_offset == max(t.next_offsets.get(partition, 0) for t in (a, b))


def test_a_token_keeps_its_own_numbers() -> None:
    """Changing what a token was made from does not change it."""
    next_offsets = {1: 2}
    token = Token(next_offsets)
    next_offsets[1] = 3
    assert str(token) == "1-2"


@given(text=st.text("0123456789-.", max_size=12) | st.text(max_size=12))
def test_any_text_is_a_token_or_invalid(text: str) -> None:
    """`parse` takes what `str` makes and nothing else."""
    try:
        token = Token.parse(text)
    except Invalid:
        return
    assert str(token) == text


@pytest.mark.parametrize(
    "text",
    [
        "0", "-", "0-", "-1", "0-1.", ".0-1", "0-1..1-2", "0-1 ", " 0-1", "0-1\n", "0-1,1-2", "0:1", "a-1", "0-1.0-2",
        "3-1.0-1", "00-1", "0-01", "0--1", "+0-1", "0-1_0",
        "0-\u0664", "\u0660-1", "0-\u00b2", "1234567890-1", "0-12345678901234567890", "null", "0-1.5-",
        "0-1" * TOKEN_LENGTH_MAX, "x" * 10**6,
    ],
    ids=lambda text: f"{text!r:.20}",
)  # fmt: skip
def test_what_is_no_token(text: str) -> None:
    """A wrong token is `Invalid`, quoted in a short message that shows what one looks like."""
    with pytest.raises(Invalid, match="not a token") as caught:
        Token.parse(text)
    assert len(str(caught.value)) < 200


def test_a_token_of_a_thousand_partitions_can_be_read() -> None:
    """The limit on a token's length holds every token of a topic with 1,024 partitions."""
    token = Token(dict.fromkeys(range(1_024), 2**63 - 1))
    assert Token.parse(str(token)) == token


@pytest.mark.parametrize(
    ("key", "crc"),
    [(b"", 0), (b"a", 0xE8B7BE43), (b"123456789", 0xCBF43926), (b"The quick brown fox jumps over the lazy dog", 0x414FA339)],
)
def test_route_is_crc32(key: bytes, crc: int) -> None:
    """The partition is the standard CRC-32 modulo their count, as librdkafka's `consistent` partitioner has it."""
    for partition_count in (1, 2, 4, 7, 1_000):
        assert route(key, partition_count) == crc % partition_count


def test_route_balances() -> None:
    """Series of one view spread over all partitions within a few percent."""
    prefix = series_prefix("v")
    load = Counter(route(prefix + series_suffix((f"user-{i}",)), 8) for i in range(8_000))
    assert len(load) == 8
    assert max(load.values()) < 1.2 * 1_000
