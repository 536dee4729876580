"""Texts from outside as a person may read them: what could control a terminal, or forge a line of a log, is spelled out."""

from __future__ import annotations

import re

_NOT_ASCII = re.compile(r"[^\x20-\x7e]+")


def printable(text: str) -> str:
    """Return a text without control characters, changes of direction, and characters that can't be seen, as escapes."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """Return the same of several lines, which stay lines."""
    return "\n".join(map(printable, text.split("\n")))


def printable_json(body: bytes) -> bytes:
    """Return the same JSON document, with escapes for characters in its texts that are not printable."""
    return _NOT_ASCII.sub(_escaped, body.decode(errors="backslashreplace")).encode()


def _escaped(found: re.Match[str]) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else _units(c) for c in found[0])


def _units(character: str) -> str:
    """Return a character as JSON's escapes, two for one beyond 16 bits."""
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[i] << 8 | units[i + 1]:04x}" for i in range(0, len(units), 2))
