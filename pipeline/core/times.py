"""Times and lengths of time as callers write them: ms since 1970, RFC 3339, datetimes; `90s`, `1h`, timedeltas."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from pipeline.errors import Invalid

TIME_MS_MAX = 253_402_300_800_000
"""Start of the year 10,000, in ms since 1970: every earlier time has a date in Python and in RFC 3339."""

_DIGITS = re.compile(r"[0-9]{1,16}")
_DATE_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}([.][0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
_LENGTH = re.compile(r"([0-9]{1,12})(s|m|h|d|w)?")
_UNITS_MS = {"w": 604_800_000, "d": 86_400_000, "h": 3_600_000, "m": 60_000, "s": 1_000}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MS = timedelta(milliseconds=1)

Time = int | str | datetime
"""Time of a caller: ms since 1970, RFC 3339, or a datetime with its zone."""
Length = int | str | timedelta
"""Length of time of a caller: seconds, a text such as `90s`, or a timedelta."""


def datetime_ms(at: datetime) -> int:
    """Return a datetime with its zone in ms since 1970, rounded down."""
    return (at - _EPOCH) // _MS


def time_ms(name: str, time: Time) -> int:
    """Return a time in ms since 1970, rounded down. Raises `Invalid`, naming the parameter, for anything but a `Time`."""
    if isinstance(time, datetime):
        if time.tzinfo is None:
            raise Invalid(f"{name}: a datetime without a time zone; write for example datetime.now(UTC)")
        found = datetime_ms(time)
    elif isinstance(time, str):
        found = _parsed_ms(name, time)
    elif type(time) is int:
        found = time
    else:
        raise Invalid(f"{name}: ms since 1970, a datetime with its time zone, or RFC 3339 is needed, got {time!r:.50}")
    if not 0 <= found <= TIME_MS_MAX:
        raise Invalid(f"{name}: a time from 1970 to the year 9999 is needed, got {time!s:.50}")
    return found


def _parsed_ms(name: str, text: str) -> int:
    if _DIGITS.fullmatch(text):
        return int(text)
    if _DATE_TIME.fullmatch(text):
        try:
            return datetime_ms(datetime.fromisoformat(text.upper()))
        except (ValueError, OverflowError):  # no such day, or no such zone
            pass
    raise Invalid(f"{name}: ms since 1970 or RFC 3339, such as 2030-01-31T08:00:00Z, is needed, got {text[:50]!r}")


def length_ms(name: str, length: Length) -> int:
    """Return a length of time above 0 in ms. Raises `Invalid`, naming the parameter, for anything but a `Length`."""
    found = 0
    if isinstance(length, timedelta):
        if length % timedelta(seconds=1):
            raise Invalid(f"{name}: whole seconds are needed, got {length}")
        found = length // _MS
    elif isinstance(length, str) and (match := _LENGTH.fullmatch(length)):
        found = int(match[1]) * _UNITS_MS[match[2] or "s"]
    elif type(length) is int:
        found = length * 1_000
    if not 0 < found <= TIME_MS_MAX:
        raise Invalid(f"{name}: a length above 0 is needed, in seconds or as 90s, 5m, 1h, 1d, 1w, got {length!s:.50}")
    return found


def length_text(ms: int) -> str:
    """Return a length of time in its largest unit without a remainder: `90s`, `1h`; in ms if it has no whole seconds."""
    for unit, unit_ms in _UNITS_MS.items():
        if ms % unit_ms == 0:
            return f"{ms // unit_ms}{unit}"
    return f"{ms}ms"


def time_text(ms: int) -> str:
    """Return a time in ms since 1970 as RFC 3339, in UTC."""
    try:
        return (_EPOCH + ms * _MS).isoformat(timespec="milliseconds" if ms % 1_000 else "seconds").replace("+00:00", "Z")
    except OverflowError:
        return f"{ms} ms"
