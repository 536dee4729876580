"""Explains what is wrong with JSON input, in words that do not depend on the parser or its version."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

_NAMES: Mapping[type, str] = {
    dict: "an object", list: "an array", str: "a text", bool: "a bool", int: "an int", float: "a float", type(None): "null"
}  # fmt: skip
TOO_DEEP = "nested too deeply"
OUT_OF_RANGE = "a number out of range"


class _Unfit(Exception):
    """A number that is not JSON or out of range. The text says which."""


class Field(NamedTuple):
    """A field of an object: its requirement in words and as a predicate on the parsed value."""

    needs: str
    fits: Callable[[Any], bool]
    required: bool = True


def is_scalar(value: object) -> bool:
    """Return whether a value is neither an object nor an array."""
    return not isinstance(value, dict | list)


def utf8_error(error: UnicodeDecodeError) -> str:
    """Return which byte, counted from 0, is not UTF-8."""
    return f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start}"


def json_error(data: bytes) -> str:
    """Return why `data` is not one JSON value, with the byte at which that shows; empty if it is one."""
    return _parsed(data)[1]


def object_error(data: bytes, fields: Mapping[str, Field], *, others: bool) -> str:
    """Return why `data` is not a JSON object with these fields; empty if it is one. `others` allows further fields."""
    value, fault = _parsed(data)
    if fault:
        return fault
    if not isinstance(value, dict):
        return f"a JSON object is needed, got {_NAMES[type(value)]}"
    for name, field in fields.items():
        if name not in value:
            if field.required:
                return f"{name!r:.100} is missing"
        elif not field.fits(value[name]):
            return f"{name!r:.100} must be {field.needs}, got {_NAMES[type(value[name])]}"
    unknown = [] if others else [name for name in value if name not in fields]
    return f"there is no field {unknown[0]!r:.100}" if unknown else ""


def _parsed(data: bytes) -> tuple[Any, str]:
    """Return the parsed value, or what is wrong. Uses the standard library's parser, which reports positions as numbers."""
    try:
        text = data.decode().rstrip()  # an end that is missing is missed where the text ends, not behind blanks
    except UnicodeDecodeError as error:
        return None, utf8_error(error)
    try:
        value = json.loads(text, parse_constant=_no_constant, parse_float=_finite, parse_int=_whole)
        json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        return None, f"not JSON from byte {len(text[: error.pos].encode())} on"
    except _Unfit as error:
        return None, str(error)
    except RecursionError:
        return None, TOO_DEEP
    except UnicodeEncodeError:
        return None, "a text that is not valid Unicode (lone surrogate)"
    return value, ""


def _no_constant(name: str) -> Any:
    raise _Unfit(f"not JSON: {name}")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise _Unfit(OUT_OF_RANGE)
    return value


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:  # Python's own limit of digits
        raise _Unfit(OUT_OF_RANGE) from None
