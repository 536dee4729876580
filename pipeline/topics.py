"""The three topics, described by `topics/*.toml` for every mode."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.errors import Invalid

DELTAS = "deltas"
CHANGELOG = "changelog"
DEAD_LETTERS = "dead-letters"


class Topic(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A topic. Times in ms; `cleanup_policy` is Kafka's: `delete` by age, or `compact` by key."""

    name: str
    partitions: int
    cleanup_policy: str
    retention_ms: int = -1
    """Age at which records of a `delete` topic are deleted; -1: never."""
    delete_retention_ms: int = 86_400_000
    """Time for which a `compact` topic keeps tombstones, so that followers can read them."""
    min_cleanable_dirty_ratio: float = 0.5
    """Share of records since the last compaction at which a `compact` topic is compacted again."""
    kafka: dict[str, Any] = {}
    """Further settings of the topic on a broker, by Kafka's names."""


def folder() -> Path:
    """Return the folder of the descriptions: inside the wheel, or at the top of a checkout."""
    here = Path(__file__).parent
    return here / "_topics" if (here / "_topics").is_dir() else here.parent / "topics"


def load(path: Path | None = None) -> Mapping[str, Topic]:
    """Return all topics by name; `Invalid` if a description is missing or wrong."""
    path = path or folder()
    topics = {}
    for name in (DELTAS, CHANGELOG, DEAD_LETTERS):
        try:
            topic = msgspec.convert(tomllib.loads((path / f"{name}.toml").read_text()), Topic)
        except (OSError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
            raise Invalid(f"topic {name}: {error}") from None
        if topic.name != name or topic.cleanup_policy not in ("delete", "compact") or not 1 <= topic.partitions <= 1_024:
            raise Invalid(f"topic {name}: name, cleanup_policy or partitions out of range in {path / f'{name}.toml'}")
        topics[name] = topic
    if topics[CHANGELOG].partitions != topics[DELTAS].partitions:
        raise Invalid("topics deltas and changelog need the same number of partitions")
    return topics
