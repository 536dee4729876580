"""Conditions on label values as functions of columns. Regular expressions are RE2's: linear time, bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import re2

from pipeline.core.query import Matcher
from pipeline.errors import Invalid

COMPILED_BYTES_MAX = 2**18
"""Memory of one compiled expression, of which re2 keeps the last 128; one that needs more is refused."""
REMEMBERED_MAX = 100_000
"""Label values whose match with an expression is remembered during a read."""
_CHECK_EVERY_BYTES = 16_384

Test = Callable[[Sequence[str]], list[bool]]
"""Returns for each value of a column whether it matches."""


def compile_matcher(matcher: Matcher, *, regex_bytes_max: int, check: Callable[[], None]) -> Test:
    """Return the test that `matcher` stands for. A regular expression must match the whole value; `.` is any character.

    `check` is called every few milliseconds to tens of milliseconds of matching, and may raise.
    Raises `Invalid` for an expression that is malformed, too long, or needs too much memory.
    """
    pattern = matcher.pattern
    if matcher.op == "=":
        return lambda column: [value == pattern for value in column]
    if matcher.op == "!=":
        return lambda column: [value != pattern for value in column]
    if len(pattern.encode()) > regex_bytes_max:
        raise Invalid(f"where {matcher.label}: a regular expression of over {regex_bytes_max} bytes")
    options = re2.Options()
    options.max_mem = COMPILED_BYTES_MAX
    options.never_capture = True
    options.dot_nl = True
    options.log_errors = False
    try:
        full_match = re2.compile(pattern, options).fullmatch
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise Invalid(f"where {matcher.label}: {pattern[:100]!r} is not a regular expression of RE2: {reason}") from None
    return _remembering(full_match, matcher.op == "=~", check)


def _remembering(full_match: Callable[[bytes], object], wanted: bool, check: Callable[[], None]) -> Test:
    known: dict[str, bool] = {}
    unchecked_bytes = 0

    def test(column: Sequence[str]) -> list[bool]:
        nonlocal unchecked_bytes
        if len(known) > REMEMBERED_MAX:
            known.clear()
        for value in set(column):
            if value in known:
                continue
            encoded = value.encode()
            known[value] = (full_match(encoded) is not None) is wanted
            unchecked_bytes += 64 + len(encoded)
            if unchecked_bytes > _CHECK_EVERY_BYTES:
                unchecked_bytes = 0
                check()
        return [known[value] for value in column]

    return test
