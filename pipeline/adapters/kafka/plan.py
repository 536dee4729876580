"""Compares the topics on a broker with their descriptions, and decides what to change and what to refuse. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import msgspec

from pipeline.errors import Invalid
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS, Topic

ORDER = (CHANGELOG, DEAD_LETTERS, DELTAS)
"""Order of changes: publishers use a new partition of deltas at once, and its worker needs it in the other two topics by
then."""
DEFAULT_REPLICATION = -1
"""Replication factor of new topics: the broker's default.replication.factor."""

Action = Literal["create", "alter", "keep", "warn", "refuse"]

PARTITIONS, REPLICATION, MIN_ISR = "partitions", "replication.factor", "min.insync.replicas"
_CLEANUP, _BYTES, _RETENTION, _RETENTION_BYTES = "cleanup.policy", "max.message.bytes", "retention.ms", "retention.bytes"
_OWN = (_CLEANUP, _RETENTION, "delete.retention.ms", "min.cleanable.dirty.ratio")
_MARGIN_BYTES = 65_536
"""Margin for what makes a dead letter larger than its record: the reason, and slightly worse compression."""


class Found(msgspec.Struct, frozen=True):
    """A topic as it is on the broker."""

    partition_count: int
    replication: tuple[int, ...]
    """Replica counts of its partitions, each once, ascending; several only after manual changes."""
    configs: Mapping[str, str]
    """All settings on the broker, including defaults, by Kafka's names."""


class Wish(msgspec.Struct, frozen=True):
    """Options of the command line that go beyond topics/*.toml."""

    partitions: int | None = None
    """None: the count in topics/*.toml, or that on the broker if it is larger."""
    replication_factor: int = DEFAULT_REPLICATION
    min_insync_replicas: int | None = None
    accept_loss: bool = False


class Step(msgspec.Struct, frozen=True):
    """One difference, or one remark."""

    topic: str
    """`deltas`, `changelog` or `dead-letters`, without the app."""
    setting: str
    """`partitions`, `replication.factor` or one of Kafka's settings."""
    found: str | None
    """Value on the broker; None if it has no such topic or setting."""
    wanted: str
    action: Action
    note: str = ""
    """Consequences in words; never empty for `refuse`."""


class Plan(msgspec.Struct, frozen=True):
    """All steps, in the order of `ORDER`."""

    steps: Sequence[Step]

    @property
    def refused(self) -> list[Step]:
        """Steps that are refused; if there are any, nothing is changed."""
        return [step for step in self.steps if step.action == "refuse"]

    @property
    def changes(self) -> list[Step]:
        """Steps to carry out."""
        return [step for step in self.steps if step.action in ("create", "alter")]


def describe(topic: Topic) -> dict[str, str]:
    """Return the settings of a topic by Kafka's names, in Kafka's spelling; `Invalid` if one is given twice."""
    own: dict[str, Any] = {_CLEANUP: topic.cleanup_policy}
    if topic.cleanup_policy == "delete":
        own[_RETENTION] = topic.retention_ms
    else:
        own["delete.retention.ms"] = topic.delete_retention_ms
        own["min.cleanable.dirty.ratio"] = topic.min_cleanable_dirty_ratio
    for name, value in topic.kafka.items():
        if name in _OWN:
            raise Invalid(f"topic {topic.name}: {name} is {name.replace('.', '_')} above [kafka]; leave it out there")
        if not isinstance(value, str | int | float):
            raise Invalid(f"topic {topic.name}: {name}: a text, a number, true or false is needed, got {value!r:.50}")
    return {name: _spelled(value) for name, value in (own | topic.kafka).items()}


def make_plan(topics: Mapping[str, Topic], found: Mapping[str, Found], wish: Wish, *, broker_count: int) -> Plan:
    """Compare described topics with those on the broker, `found`; `broker_count` is that of the cluster."""
    wanted = {name: describe(topics[name]) for name in ORDER}
    if wish.min_insync_replicas is not None:
        for configs in wanted.values():
            configs[MIN_ISR] = str(wish.min_insync_replicas)
    counts = _partition_counts(topics, found, wish)
    steps: list[Step] = []
    for name in ORDER:
        has = found.get(name)
        steps += _partitions(name, counts[name], topics[name].partitions, found, wish)
        steps += _replication(name, has, wish, broker_count)
        steps += _in_sync(name, has, wanted[name], wish)
        for setting, value in wanted[name].items():
            steps += _config(name, setting, value, has, wish)
    steps += _message_sizes(wanted, found)
    refused = {(step.topic, step.setting) for step in steps if step.action == "refuse"}
    return Plan([step for step in steps if step.action == "refuse" or (step.topic, step.setting) not in refused])


def _partition_counts(topics: Mapping[str, Topic], found: Mapping[str, Found], wish: Wish) -> dict[str, int]:
    pair = [found[name].partition_count for name in (DELTAS, CHANGELOG) if name in found]
    count = wish.partitions or max([topics[DELTAS].partitions, *pair])
    letters = found[DEAD_LETTERS].partition_count if DEAD_LETTERS in found else 0
    described = 0 if wish.partitions else topics[DEAD_LETTERS].partitions
    return {DELTAS: count, CHANGELOG: count, DEAD_LETTERS: max(count, letters, described)}


def _partitions(name: str, count: int, described: int, found: Mapping[str, Found], wish: Wish) -> Iterator[Step]:
    if name not in found:
        yield Step(name, PARTITIONS, None, str(count), "create", _missing(name, found))
        return
    has = found[name].partition_count
    step = Step(name, PARTITIONS, str(has), str(count), "alter")
    pair = {found[it].partition_count for it in (DELTAS, CHANGELOG) if it in found}
    if has > count:
        note = f"Kafka can't take partitions away: what is in the last {has - count} would be lost"
        yield _with(step, "refuse", note)
    elif has < count and name != DEAD_LETTERS and len(pair) == 2 and not wish.partitions and count > described:
        note = (
            f"changelog and deltas differ: deltas would be folded without their state; --partitions {count} evens them out"
        )
        yield _with(step, "refuse", note)
    elif has < count:
        yield step
    elif has > (wish.partitions or described):
        yield Step(
            name, PARTITIONS, str(has), str(wish.partitions or described), "keep", "more than is asked for does no harm"
        )


def _missing(name: str, found: Mapping[str, Found]) -> str:
    if name == CHANGELOG and DELTAS in found:
        return "deltas is there: all that it still has will be folded again"
    if name == DELTAS and CHANGELOG in found:
        return "changelog is there: if deltas was deleted, delete changelog too, for its positions are of the old one"
    return ""


def _replication(name: str, has: Found | None, wish: Wish, broker_count: int) -> Iterator[Step]:
    factor = wish.replication_factor
    text = "the broker's default" if factor == DEFAULT_REPLICATION else str(factor)
    if has is None:
        step = Step(name, REPLICATION, None, text, "create")
        note = f"more than there are brokers, {broker_count}: each has one replica of a partition at most"
        yield _with(step, "refuse", note) if factor > broker_count else step
    elif factor != DEFAULT_REPLICATION and has.replication != (factor,):
        shown = " or ".join(map(str, has.replication))
        yield Step(name, REPLICATION, shown, text, "refuse", "only kafka-reassign-partitions changes it once a topic exists")


def _in_sync(name: str, has: Found | None, wanted: Mapping[str, str], wish: Wish) -> Iterator[Step]:
    current = has.configs.get(MIN_ISR) if has else None
    value = wanted.get(MIN_ISR, current)
    if value is None or not value.isdecimal():
        return
    count = int(value)
    replicas = has.replication[0] if has else wish.replication_factor
    step = Step(name, MIN_ISR, current, value, "warn")
    if replicas == DEFAULT_REPLICATION:
        if count > 1:
            yield _with(step, "refuse", "how many replicas a new topic gets is not known: --replication-factor N")
    elif count > replicas:
        yield _with(step, "refuse", f"more than the replication factor, {replicas}: nothing could ever be written")
    elif count == 1 and replicas >= 3:
        yield _with(step, "warn", f"what is acknowledged may be on one of {replicas} replicas only: --min-insync-replicas 2")


def _config(name: str, setting: str, value: str, has: Found | None, wish: Wish) -> Iterator[Step]:
    current = None if has is None else has.configs.get(setting)
    step = Step(name, setting, current, value, "alter" if has else "create")
    policy = "compact" if name == CHANGELOG else "delete"
    if has is not None and current is None:
        yield _with(step, "refuse", "this broker knows no such setting")
    elif setting == _CLEANUP and not _equal(value, policy):
        lost = "state is deleted by age" if name == CHANGELOG else "records without a key are refused, others go unread"
        yield _with(step, "refuse", f"{name} must be {policy}, or {lost}")
    elif current is None:
        yield step
    elif not _equal(current, value):
        yield _altered(step, current, value, wish)


def _altered(step: Step, current: str, value: str, wish: Wish) -> Step:
    name, setting = step.topic, step.setting
    match name, setting:
        case "changelog", "cleanup.policy":
            return _with(step, "alter", "state that was deleted by age until now does not come back")
        case "deltas", "retention.ms" | "retention.bytes" if _shorter(current, value):
            note = "records that are not yet folded may be deleted"
            return (
                _with(step, "alter", note) if wish.accept_loss else _with(step, "refuse", f"{note}; --accept-loss allows it")
            )
        case "dead-letters", "retention.ms" | "retention.bytes" if _shorter(current, value):
            return _with(step, "alter", "older dead letters are deleted")
        case "changelog" | "dead-letters", "max.message.bytes" if _shorter(current, value):
            return _with(step, "keep", "more does no harm, and what deltas took under a higher limit must still fit")
        case "deltas", "max.message.bytes" if _shorter(current, value):
            return _with(step, "alter", "larger batches are refused from then on")
        case "changelog", "delete.retention.ms" | "min.compaction.lag.ms" if _shorter(current, value):
            return _with(step, "alter", "a follower that was away for longer than this rebuilds from the start")
    return step


def _message_sizes(wanted: Mapping[str, Mapping[str, str]], found: Mapping[str, Found]) -> Iterator[Step]:
    """Check that the other topics take whatever deltas takes: a record that fits nowhere would stop its partition."""
    sizes = {}
    for name in ORDER:
        has = found[name].configs.get(_BYTES) if name in found else None
        size = wanted[name].get(_BYTES) or has
        if size is None or not size.isdecimal():
            return
        kept = int(has) if name != DELTAS and has is not None and has.isdecimal() else 0
        sizes[name] = max(int(size), kept)
    least = sizes[DELTAS] + _MARGIN_BYTES
    for name in (CHANGELOG, DEAD_LETTERS):
        if sizes[name] < least:
            has = found[name].configs.get(_BYTES) if name in found else None
            note = (
                f"deltas takes {sizes[DELTAS]}: {_BYTES} of {name} must be at least {least}, or a record stops its partition"
            )
            yield Step(name, _BYTES, has, str(sizes[name]), "refuse", note)


def _with(step: Step, action: Action, note: str) -> Step:
    return msgspec.structs.replace(step, action=action, note=note)


def _spelled(value: str | float) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _shorter(current: str, value: str) -> bool:
    """Return whether `value` is a lower limit than `current`; -1 means unlimited."""
    try:
        now, then = int(current), int(value)
    except ValueError:
        return False  # the broker will report the error
    return then >= 0 and (now < 0 or then < now)


def _equal(one: str, other: str) -> bool:
    """Return whether values are equal: lists in any order, numbers in any spelling."""
    try:
        return float(one) == float(other)
    except ValueError:
        return {part.strip() for part in one.split(",")} == {part.strip() for part in other.split(",")}
