"""Tokens, which a flush returns so that a read can wait for what was flushed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.errors import Invalid

_TOPIC_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_TOKEN = re.compile(r"([A-Za-z0-9_-]{1,64})~([0-9]{1,9}-[0-9]{1,19}(?:\.[0-9]{1,9}-[0-9]{1,19})*)\Z")
_LOOKS = "it looks like o4nZqS2fQ6e~0-42.3-17 (topic~partition-next_offset)"
TOKEN_LENGTH_MAX = 32_768


class Token:
    """A place in a topic: `next_offsets[partition]` covers everything that was acknowledged there.

    `topic_id` tells the topic from every other, also from one of its name that was made anew (`ports.LogWriter.topic_id`).
    A token without offsets stands for nothing, and is the empty text. `str(token)` is URL-safe. Tokens are values: equal by
    content, hashable, and never changed.
    """

    __slots__ = ("next_offsets", "topic_id")

    def __init__(self, next_offsets: Mapping[int, int] | None = None, topic_id: str = "") -> None:
        self.next_offsets: Mapping[int, int] = dict(sorted((next_offsets or {}).items()))
        self.topic_id = topic_id if self.next_offsets else ""
        if self.next_offsets and not _TOPIC_ID.match(topic_id):
            raise Invalid(f"a token names its topic with up to 64 letters, digits, - and _, not with {topic_id[:100]!r}")

    @classmethod
    def parse(cls, text: str) -> Token:
        """Return the token whose `str` is `text`. Raises `Invalid` if there is none."""
        if not text:
            return cls()
        match = _TOKEN.match(text) if len(text) <= TOKEN_LENGTH_MAX else None
        if match is None:
            raise Invalid(f"not a token: {text[:60]!r}; {_LOOKS}")
        pairs = [part.split("-") for part in match[2].split(".")]
        token = cls({int(partition): int(next_offset) for partition, next_offset in pairs}, match[1])
        if str(token) != text:
            raise Invalid(f"not a token: {text[:60]!r}; each partition once, in order, without leading zeros")
        return token

    def __or__(self, other: Token) -> Token:
        """Return the token that covers both. Raises `Invalid` for two topics, which no read can wait for at once."""
        if not self.next_offsets or not other.next_offsets:
            return self if self.next_offsets else other
        if self.topic_id != other.topic_id:
            raise Invalid(
                f"these tokens are of two topics, {self.topic_id} and {other.topic_id}: of two apps or clusters, or of a "
                "topic that was made anew in between; use each for a read of its own"
            )
        merged = dict(self.next_offsets)
        for partition, next_offset in other.next_offsets.items():
            merged[partition] = max(next_offset, merged.get(partition, 0))
        return Token(merged, self.topic_id)

    def __str__(self) -> str:
        if not self.next_offsets:
            return ""
        return f"{self.topic_id}~" + ".".join(f"{partition}-{offset}" for partition, offset in self.next_offsets.items())

    def __repr__(self) -> str:
        return f"Token({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and self.topic_id == other.topic_id and self.next_offsets == other.next_offsets

    def __hash__(self) -> int:
        return hash(str(self))


def name_acknowledged(
    next_offsets: Mapping[int, int], before: str, after: str, high_watermarks: Mapping[int, int] | None = None
) -> Token:
    """Return the token of what a log acknowledged while the id of its topic changed from `before` to `after`.

    A log acknowledges with offsets only. No id is used twice, so between two equal ids all offsets are of that topic.
    Between two different ids they can be of either; then the `high_watermarks` of the present topic bound those that can be
    of it: a read that waits up to there has all that the topic acknowledged, and waits for nothing that is not there.
    """
    if before == after:
        return Token(next_offsets, after)
    ends = high_watermarks or {}
    bounded = {partition: min(next_offset, ends.get(partition, 0)) for partition, next_offset in next_offsets.items()}
    return Token({partition: next_offset for partition, next_offset in bounded.items() if next_offset}, after)
