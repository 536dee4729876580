"""Parses StatsD lines, with DogStatsD's tags, packed values and timestamps.

    name:value[:value...]|type[|@rate][|#tag:value,flag...][|Tseconds][|c:container][|e:...][|card:...]

Types are `c` counter, `g` gauge, `ms` timer, `h` and `d` histogram, `s` set. Nothing here raises, whatever the bytes are;
the work is linear in the length of a line, which the caller limits.

The dialects differ in what a sign before a gauge's value means. In StatsD it makes a step from the value before; DogStatsD
has no steps, so there `-5` is a value below zero. `auto` takes a sign for a step, unless the line has a field that only
Datadog's clients send: `c:`, `e:` or `card:`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from math import isfinite
from typing import Literal, NamedTuple

import msgspec

from pipeline.core.kinds import INT_BITS_MAX
from pipeline.core.record import LABEL_COUNT_MAX, LABEL_VALUE_BYTES_MAX, NAME, NAME_BYTES_MAX

COUNTER, GAUGE, TIMER, HISTOGRAM, SET = "counter", "gauge", "timer", "histogram", "set"

Dialect = Literal["auto", "statsd", "dogstatsd"]

REASONS = ("line_long", "utf8", "unsupported", "format", "name", "type", "value", "rate", "tag", "timestamp", "field")
"""Reasons why a line can't be recorded."""

_TYPES = {"c": COUNTER, "g": GAUGE, "ms": TIMER, "h": HISTOGRAM, "d": HISTOGRAM, "s": SET}
_INT = re.compile(r"[+-]?[0-9]{1,2400}\Z", re.ASCII)
"""Text of an int that can be recorded."""
_FLOAT = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?\Z", re.ASCII)
_FLOAT_LENGTH_MAX = 400
_SECONDS = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_UNDERSCORED = str.maketrans(".-/ ", "____")
_FLAG = "true"
_JOINED = re.compile(rb"[^|]*\|(?:c|g|ms|h|d|s)(?:\|@[0-9.eE+-]*)?:")
"""A sample that another one follows."""
JOINED_MAX = 100
"""Most samples that one line may join."""
_CACHED_MAX = 4_096
_CACHED_LENGTH_MAX = 500


class Malformed(NamedTuple):
    """A line that can't be recorded, for one of `REASONS`."""

    reason: str


class Line(msgspec.Struct, frozen=True, gc=False):
    """A parsed line. `name` and the names of `tags` are Prometheus names; `source` is the name as it was sent."""

    source: str
    name: str
    type: str
    values: tuple[int | float, ...]
    """Values of the line; a counter's are divided by its sample rate already."""
    member: str = ""
    """Member of a set, which has no values."""
    relative: tuple[bool, ...] = ()
    """For each value of a gauge, whether it is added to the one before."""
    weight: int | float = 1
    """Number of observations for which each value of a timer or histogram stands; it need not be whole."""
    tags: tuple[tuple[str, str], ...] = ()
    """Ordered by name; no name stands twice."""
    ts_ms: int | None = None


def parse_line(line: bytes, line_bytes_max: int, dialect: Dialect = "auto") -> Line | Malformed | None:
    """Parse one line, without its line end; return None if it is blank."""
    if len(line) > line_bytes_max:
        return Malformed("line_long")
    try:
        text = line.decode().strip()
    except UnicodeDecodeError:
        return Malformed("utf8")
    if not text:
        return None
    if text.startswith(("_e{", "_sc|")):
        return Malformed("unsupported")
    head, _, rest = text.partition("|")
    source, colon, value_text = head.partition(":")
    name = prometheus_name(source)
    if not colon or not rest:
        return Malformed("format")
    if name is None:
        return Malformed("name")
    type_text, *fields = rest.split("|")
    type_ = _TYPES.get(type_text.strip())
    if type_ is None:
        return Malformed("type")
    read = _read_fields(fields)
    if isinstance(read, Malformed):
        return read
    has_steps = dialect == "statsd" or (dialect == "auto" and not read.is_datadog)
    return _line(source, name, type_, value_text, read, has_steps=has_steps)


def joined_lines(line: bytes) -> list[bytes]:
    """Return the lines that are joined as StatsD and Telegraf allow: `a:1|c:2|ms|#t` is `a:1|c|#t` and `a:2|ms|#t`."""
    name, _, rest = line.partition(b":")
    samples: list[bytes] = []
    start = 0
    while (found := _JOINED.match(rest, start)) and len(samples) < JOINED_MAX:
        samples.append(rest[start : found.end() - 1])
        start = found.end()
    if not samples or found:
        return [line]
    head, *fields = rest[start:].split(b"|")
    own = 2 if fields[1:] and fields[1].startswith(b"@") else 1
    common = b"".join([b"|" + field for field in fields[own:]])
    samples.append(b"|".join([head, *fields[:own]]))
    return [name + b":" + sample + common for sample in samples]


def prometheus_name(source: str) -> str | None:
    """Return `source` with dots, dashes, slashes and spaces as underscores; None if that is no name of a view or label."""
    return None if len(source) >= NAME_BYTES_MAX else _name(source)


@lru_cache(_CACHED_MAX)
def _name(source: str) -> str | None:
    name = source.translate(_UNDERSCORED)
    if name[:1].isdigit():
        name = f"_{name}"
    return name if NAME.match(name) else None


class _Fields(NamedTuple):
    rate: Fraction | None
    tags: tuple[tuple[str, str], ...]
    ts_ms: int | None
    is_datadog: bool
    """True if a field says who sent the line, which only Datadog's clients do."""


def _read_fields(fields: list[str]) -> _Fields | Malformed:
    rate: Fraction | None = None
    tags: tuple[tuple[str, str], ...] = ()
    ts_ms: int | None = None
    is_datadog = False
    for field in fields:
        field = field.strip()
        if field.startswith("@"):
            rate = _rate(field[1:])
            if rate is None:
                return Malformed("rate")
        elif field.startswith("#"):
            text = field[1:]
            read = _known_tags(text) if len(text) <= _CACHED_LENGTH_MAX else _tags(text)
            if read is None:
                return Malformed("tag")
            tags = read
        elif field.startswith("T"):
            if not _SECONDS.match(field, 1):
                return Malformed("timestamp")
            ts_ms = int(field[1:]) * 1_000
        elif field.startswith(("c:", "e:", "card:")):  # the sender, which is not recorded
            is_datadog = True
        else:
            return Malformed("field")
    return _Fields(rate, tags, ts_ms, is_datadog)


def _rate(text: str) -> Fraction | None:
    number = _number(text)
    if number is None or not 0 < number <= 1:
        return None
    return _exact(number)


def _exact(number: int | float) -> Fraction:
    """Return a number as it was written: 0.1 is a tenth."""
    return Fraction(number) if type(number) is int else Fraction(repr(number))


def _tags(text: str) -> tuple[tuple[str, str], ...] | None:
    """Return the tags; None if one has no name, is too long, or is there twice with different values.

    Clients that join the tags of all metrics with those of one send equal ones twice.
    """
    tags: dict[str, str] = {}
    for part in text.split(",") if text else ():
        if not part:
            continue
        tag, colon, value = part.partition(":")
        name = prometheus_name(tag)
        value = value if colon else _FLAG
        if name is None or tags.setdefault(name, value) != value:
            return None
        if len(tags) > LABEL_COUNT_MAX or len(value.encode()) > LABEL_VALUE_BYTES_MAX:
            return None
    return tuple(sorted(tags.items()))


_known_tags = lru_cache(_CACHED_MAX)(_tags)
"""`_tags` with a cache: clients send few different ones, again and again."""


def _number(text: str) -> int | float | None:
    if _INT.match(text):
        return int(text)
    if len(text) > _FLOAT_LENGTH_MAX or not _FLOAT.match(text):
        return None
    number = float(text)
    return number if isfinite(number) else None


def _line(source: str, name: str, type_: str, text: str, fields: _Fields, *, has_steps: bool) -> Line | Malformed:
    if type_ == SET:  # a member may have colons in it
        if not text or len(text.encode()) > LABEL_VALUE_BYTES_MAX:
            return Malformed("value")
        return Line(source, name, type_, (), text, tags=fields.tags, ts_ms=fields.ts_ms)
    parts = text.split(":")
    values: list[int | float] = []
    for part in parts:
        value = _number(part)
        if value is not None and type_ == COUNTER:
            value = _scaled(value, fields.rate)
        if value is None:
            return Malformed("value")
        values.append(value)
    relative = tuple([has_steps and part.startswith(("+", "-")) for part in parts]) if type_ == GAUGE else ()
    weight = _scaled(1, fields.rate) if type_ in (TIMER, HISTOGRAM) else 1
    if weight is None:
        return Malformed("rate")
    return Line(source, name, type_, tuple(values), "", relative, weight, fields.tags, fields.ts_ms)


def _scaled(value: int | float, rate: Fraction | None) -> int | float | None:
    """Return `value` divided by `rate`, an int if that is whole; None if no float can hold it."""
    if rate is None or rate == 1:
        return value
    scaled = _exact(value) / rate
    if scaled.denominator == 1 and (type(value) is int or abs(scaled) < 2**53):
        return scaled.numerator if scaled.numerator.bit_length() <= INT_BITS_MAX else None
    try:
        number = float(scaled)
    except OverflowError:
        return None
    return number if isfinite(number) else None
