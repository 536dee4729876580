"""The dead letters of a commit, as messages."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from pipeline.core.codec import decode_letter, encode_letter
from pipeline.ports import LogWriter, Message
from pipeline.topics import DEAD_LETTERS


def letter_messages(partition: int, letters: Iterable[tuple[bytes, bytes | None]], log: LogWriter) -> list[Message]:
    """The dead letters as messages; a letter that its topic can't take goes without the bytes of its record."""
    bytes_max = log.message_bytes_max(DEAD_LETTERS)
    messages = []
    for key, value in letters:
        if value is not None and len(value) > bytes_max:
            letter = decode_letter(value)
            left_out = f"left out: its {len(letter.value or b'')} bytes, too many for the dead-letter topic"
            value = encode_letter(msgspec.structs.replace(letter, reason=f"{letter.reason}; {left_out}", value=None))
        messages.append(Message(DEAD_LETTERS, partition, key, value))
    return messages
