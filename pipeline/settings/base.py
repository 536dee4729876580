"""Groups of settings: how a setting is declared, and how its value is checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal, get_args

from pipeline.errors import Invalid
from pipeline.secret import Secret, with_secrets

OnFull = Literal["block", "raise", "drop_newest"]
Durability = Literal["memory", "process", "disk"]
ON_FULL: tuple[str, ...] = get_args(OnFull)
DURABILITY: tuple[str, ...] = get_args(Durability)
DIALECTS = ("auto", "statsd", "dogstatsd")


def setting(default: Any, doc: str, *, least: int | None = None, most: int | None = None) -> Any:
    """Return the field of a setting: its default, its meaning, and the bounds of a number."""
    metadata = {"doc": doc, "least": least, "most": most}
    if isinstance(default, Mapping):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(item: Field[Any]) -> Any:
    """Return the default of a setting."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def check_value(item: Field[Any], value: object) -> None:
    """Raise `Invalid` if a setting can't have this value."""
    default, least, most = default_of(item), item.metadata["least"], item.metadata["most"]
    if isinstance(default, int) and not isinstance(default, bool):
        if not isinstance(value, int) or isinstance(value, bool):
            raise Invalid(f"{item.name}: a whole number is needed, got {value!r:.50}")
        if (least is not None and value < least) or (most is not None and value > most):
            raise Invalid(f"{item.name}: {value} is outside {least} to {'any' if most is None else most}")
    elif isinstance(default, Secret | Mapping):  # the value may hold a secret, so it is not shown
        needed = (str, Secret) if isinstance(default, Secret) else (Mapping,)
        if not isinstance(value, needed):
            words = "a table of options" if Mapping in needed else "a text"
            raise Invalid(f"{item.name}: {words} is needed, got {type(value).__name__}")
    elif not isinstance(value, type(default)):
        raise Invalid(f"{item.name}: {type(default).__name__} expected, got {value!r:.50}")
    known = _CHOICES.get(item.name)
    if known and value not in known:
        raise Invalid(f"{item.name}: {', '.join(known[:-1])} or {known[-1]}, got {value!r:.50}")


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "on_full": ON_FULL,
    "durability": DURABILITY,
    "ingest_dialect": DIALECTS,
    "ingest_timers": ("means", "histogram"),
    "ingest_sets": ("members", "distinct"),
}


@dataclass(frozen=True)
class Checked:
    """Base of a group of settings, whose values are checked when it is made."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            check_value(item, value)
            if isinstance(value, Mapping):
                object.__setattr__(self, item.name, with_secrets(value))
            elif isinstance(default_of(item), Secret):
                object.__setattr__(self, item.name, Secret(value))
