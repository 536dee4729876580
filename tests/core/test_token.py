"""Tokens as text."""

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.token import TOKEN_LENGTH_MAX, Token, name_acknowledged
from pipeline.errors import Invalid

offsets = st.dictionaries(st.integers(0, 999_999_999), st.integers(0, 2**63 - 1), max_size=20)
topic_ids = st.text("0123456789abcxyzABCXYZ_-", min_size=1, max_size=64)
tokens = offsets.map(lambda next_offsets: Token(next_offsets, "one"))


@given(next_offsets=offsets, topic_id=topic_ids)
def test_tokens_come_back(next_offsets: dict[int, int], topic_id: str) -> None:
    """parse(str(token)) is the token; its text is URL-safe, and one and the same for equal tokens."""
    token = Token(next_offsets, topic_id)
    text = str(token)
    assert Token.parse(text) == token
    assert Token.parse(text).next_offsets == next_offsets
    assert quote(text, safe="") == text
    again = Token(dict(reversed(next_offsets.items())), topic_id)
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
    """Changing the numbers that a token was made from does not change it."""
    next_offsets = {1: 2}
    token = Token(next_offsets, "t")
    next_offsets[1] = 3
    assert str(token) == "t~1-2"


def test_a_token_names_the_topic_that_it_is_of() -> None:
    """Equal offsets of two topics are two tokens; offsets without a topic, or with a wrong id, are no token."""
    assert Token({0: 5}, "a") != Token({0: 5}, "b")
    assert Token({}, "a") == Token({}, "b") == Token()
    assert (str(Token()), Token.parse("")) == ("", Token())
    for topic_id in ("", "a b", "a~b", "a.b", "x" * 65, "\u00e9"):
        with pytest.raises(Invalid, match="names its topic"):
            Token({0: 5}, topic_id)


def test_tokens_of_two_topics_are_not_merged() -> None:
    """No read can wait for tokens of two topics: the error says why, and what to do."""
    with pytest.raises(Invalid, match=r"two topics, a and b: .* use each for a read of its own"):
        _ = Token({0: 5}, "a") | Token({1: 5}, "b")
    assert Token({0: 5}, "a") | Token() == Token() | Token({0: 5}, "a") == Token({0: 5}, "a")


@given(
    acknowledged=st.dictionaries(st.integers(0, 5), st.integers(1, 50)),
    ends=st.dictionaries(st.integers(0, 5), st.integers(0, 50)),
)
def test_what_two_topics_acknowledged(acknowledged: dict[int, int], ends: dict[int, int]) -> None:
    """Between two equal ids all acknowledgements are of that topic. Otherwise a read waits for everything that the new topic
    can have acknowledged, and for nothing that it does not hold.
    """
    assert name_acknowledged(acknowledged, "a", "a") == Token(acknowledged, "a")
    token = name_acknowledged(acknowledged, "a", "b", ends)
    assert token.topic_id in ("", "b")
    for partition, next_offset in acknowledged.items():
        of_the_new_one = next_offset <= ends.get(partition, 0)
        waited_for = token.next_offsets.get(partition, 0)
        assert waited_for == next_offset if of_the_new_one else waited_for <= ends.get(partition, 0)


@given(text=st.text("a~0123456789-.", max_size=12) | st.text(max_size=12))
def test_any_text_is_a_token_or_invalid(text: str) -> None:
    """`parse` accepts the texts that `str` makes and no others."""
    try:
        token = Token.parse(text)
    except Invalid:
        return
    assert str(token) == text


_FINE = ("t~0-42.3-17",)


@pytest.mark.parametrize(
    "text",
    [
        "0-42.3-17", "t~", "~0-1", "t~0-1~0-1", "t.0-1", "t u~0-1", "\u00e9~0-1", "x" * 65 + "~0-1",
        "0", "-", "0-", "-1", "0-1.", ".0-1", "0-1..1-2", "0-1 ", " 0-1", "0-1\n", "0-1,1-2", "0:1", "a-1", "0-1.0-2",
        "3-1.0-1", "00-1", "0-01", "0--1", "+0-1", "0-1_0",
        "0-\u0664", "\u0660-1", "0-\u00b2", "1234567890-1", "0-12345678901234567890", "null", "0-1.5-",
        "0-1" * TOKEN_LENGTH_MAX, "x" * 10**6,
    ],
    ids=lambda text: f"{text!r:.20}",
)  # fmt: skip
@pytest.mark.parametrize("topic", ["", "t~"], ids=["without", "with"])
def test_what_is_no_token(text: str, topic: str) -> None:
    """A wrong token, such as one of version 1, is `Invalid`, quoted in a short message with an example."""
    if (topic and "~" in text) or topic + text in _FINE:
        return
    with pytest.raises(Invalid, match="not a token") as caught:
        Token.parse(topic + text)
    assert len(str(caught.value)) < 200


def test_a_token_of_a_thousand_partitions_can_be_read() -> None:
    """The limit on a token's length holds every token of a topic with 1,024 partitions."""
    token = Token(dict.fromkeys(range(1_024), 2**63 - 1), "x" * 64)
    assert Token.parse(str(token)) == token
