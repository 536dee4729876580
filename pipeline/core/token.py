"""What a flush returns, so that a read can wait for it: how far each partition's log must be folded."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pipeline.errors import Invalid

_TOKEN = re.compile(r"([0-9]{1,9}-[0-9]{1,19}(\.[0-9]{1,9}-[0-9]{1,19})*)?\Z")
TOKEN_LENGTH_MAX = 32_768


class Token:
    """`next_offsets[partition]` covers everything that was acknowledged there. `str(token)` is URL-safe; empty: nothing.

    Tokens are values: equal by content, hashable, and never changed.
    """

    __slots__ = ("next_offsets",)

    def __init__(self, next_offsets: Mapping[int, int]) -> None:
        self.next_offsets: Mapping[int, int] = dict(sorted(next_offsets.items()))

    @classmethod
    def parse(cls, text: str) -> Token:
        """The inverse of `str(token)`; `Invalid` for anything else."""
        if len(text) > TOKEN_LENGTH_MAX or not _TOKEN.match(text):
            raise Invalid(f"not a token: {text[:60]!r}; it looks like 0-42.3-17 (partition-next_offset)")
        pairs = [part.split("-") for part in text.split(".")] if text else []
        token = cls({int(partition): int(next_offset) for partition, next_offset in pairs})
        if str(token) != text:
            raise Invalid(f"not a token: {text[:60]!r}; each partition once, in order, without leading zeros")
        return token

    def __or__(self, other: Token) -> Token:
        """The token that covers both."""
        merged = dict(self.next_offsets)
        for partition, next_offset in other.next_offsets.items():
            merged[partition] = max(next_offset, merged.get(partition, 0))
        return Token(merged)

    def __str__(self) -> str:
        return ".".join(f"{partition}-{next_offset}" for partition, next_offset in self.next_offsets.items())

    def __repr__(self) -> str:
        return f"Token({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Token) and self.next_offsets == other.next_offsets

    def __hash__(self) -> int:
        return hash(str(self))
