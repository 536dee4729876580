"""Refuse, at a gateway, everything that a task is certain to refuse, so that accepted deltas do not become dead letters.

`Facts` has what this process knows of the tasks' state, from the stores that it answers reads from. It can lag behind, so a
gateway can be wrong in one direction only: a batch that it takes may still be refused if another gateway was quicker.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Collection, Iterable, Mapping
from math import inf

from pipeline.core.codec import Received, RefusedGroup, check_group, receive_batch
from pipeline.core.grants import Bounds
from pipeline.core.letters import is_letter_producer
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Definition, Group, definition_key, fingerprint, parse_suffix, producer_id_of
from pipeline.core.sequence import EPOCH_STEP_MAX, Folded
from pipeline.errors import BadRecord, GroupsRefused
from pipeline.ports import Facts, KnownDefinitions

KEY_PREFIX = "key:"
"""Prefix of the producer ids of requests with an `Idempotency-Key`."""


class NoFacts:
    """Facts where there are none."""

    def definitions(self, partition: int) -> KnownDefinitions | None:
        """Return None."""
        return None

    def producer(self, partition: int, producer_id: str) -> Folded | None:
        """Return None."""
        return None

    def expired_before_ms(self, partition: int, definition: Definition) -> int:
        """Return 0."""
        return 0


def is_reserved(producer_id: str) -> bool:
    """Return whether only a gateway itself makes batches with this producer id."""
    return producer_id.startswith(KEY_PREFIX) or is_letter_producer(producer_id)


def check_owner(producer_id: str, secret: str) -> None:
    """Raise `BadRecord` unless the secret is that of the producer.

    The id is a hash of the secret, so any gateway can tell, without a memory, also after a restart; and an id that was
    seen in a log or in a topic is of no use without the secret.
    """
    if is_reserved(producer_id):
        raise BadRecord("its producer id begins as those that only the server itself uses")
    if not hmac.compare_digest(producer_id_of(secret).encode(), producer_id.encode()):
        raise BadRecord("its producer id is not that of the secret in the header Pipeline-Producer")


def check_batch(value: bytes, now_ms: int, limits: TaskLimits, facts: Facts) -> tuple[Received, list[RefusedGroup]]:
    """Decode a batch from outside; return it, and the groups that a task would refuse.

    Raises `BadRecord` if a task would refuse the whole batch.
    """
    received = receive_batch(value)
    batch = received.batch
    if batch.controls:
        raise BadRecord("it has control records, for which there are requests of their own")
    if batch.origin is not None:
        raise BadRecord("it stands for another batch, as only a dead letter that is replayed does")
    _check_producer(received, facts)
    refused = [*received.refused]
    for index, group in zip(received.indexes, batch.groups, strict=True):
        try:
            check_group(group, now_ms, ts_ahead_max_ms=limits.ts_ahead_max_ms)
        except BadRecord as error:
            refused.append(RefusedGroup(index, group.definition.view, str(error)))
    return received, refused


def _check_producer(received: Received, facts: Facts) -> None:
    batch = received.batch
    known = facts.producer(batch.partition, batch.producer_id)
    if known is None or known.has(batch.sequence):
        return
    name = fingerprint(batch.producer_id)
    if batch.epoch < known.epoch:
        raise BadRecord(f"stale epoch {batch.epoch}: epoch {known.epoch} of producer {name} was seen")
    if batch.epoch > known.epoch + EPOCH_STEP_MAX:
        raise BadRecord(f"epoch {batch.epoch} jumps: the epoch of producer {name} is {known.epoch}")


def groups_outside(received: Received, bounds: Bounds | None) -> list[RefusedGroup]:
    """Return the groups of a batch of which a series is outside the bounds of an access token."""
    if bounds is None:
        return []
    outside: list[RefusedGroup] = []
    for index, group in zip(received.indexes, received.batch.groups, strict=True):
        if reason := _outside(group, bounds):
            outside.append(RefusedGroup(index, group.definition.view, reason))
    return outside


def _outside(group: Group, bounds: Bounds) -> str:
    """Return why a group is outside the bounds; empty if it is within them."""
    view, names = group.definition.view, group.definition.labels
    if not bounds.has(group.definition):
        return bounds.refusal(view, {})
    if not bounds.labels:
        return ""
    try:
        rows = [parse_suffix(it)[1] for it in group.suffixes]
        refusals = (bounds.refusal(view, dict(zip(names, row, strict=True))) for row in rows)
        return next(filter(None, refusals), "")
    except (BadRecord, ValueError) as error:
        return f"view {view}: its series can't be read: {error}"


def refusal(number: int, refused: Iterable[RefusedGroup], kind: type[GroupsRefused] = GroupsRefused) -> GroupsRefused:
    """Return the error that names the groups of a batch that are refused."""
    groups = sorted((it.index, it.view, it.reason) for it in refused)
    first = ", ".join(f"group {index} (view {view}): {reason}" for index, view, reason in groups[:3])
    more = f", and {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return kind(f"batch {number}: {first}{more}", groups, number)


class Rooms:
    """Room for definitions in partitions, those included that are on their way there. Safe from any thread."""

    def __init__(self, facts: Facts, views_max: int) -> None:
        self._facts = facts
        self._views_max = views_max
        self._lock = threading.Lock()
        self._coming: dict[int, dict[bytes, float]] = {}
        """By partition: definitions that were sent, each with the offset from which on the tasks must know it."""

    def take(self, wanted: Mapping[int, Collection[Definition]]) -> dict[Definition, str]:
        """Reserve room for definitions in partitions; return those for which there is none, with the reason.

        For the others `sent` must be called once their place in the log is known.
        """
        refused: dict[Definition, str] = {}
        with self._lock:
            for partition, definitions in wanted.items():
                known = self._facts.definitions(partition)
                if known is None:
                    continue
                coming = self._coming.setdefault(partition, {})
                for key, next_offset in [*coming.items()]:
                    if next_offset <= known.next_offset:
                        del coming[key]
                count = len(known.keys) + len(coming)
                for definition in definitions:
                    key = definition_key(definition)
                    if key in known.keys or key in coming:
                        continue
                    if count >= self._views_max:
                        refused[definition] = (
                            f"view {definition.view}: partition {partition} has {self._views_max} definitions of views "
                            "already (views_max), and this would be another"
                        )
                    else:
                        coming[key] = inf
                        count += 1
        return refused

    def sent(self, wanted: Mapping[int, Collection[Definition]], next_offsets: Mapping[int, int]) -> None:
        """Take note of the offsets behind definitions that were sent, or give their room back in partitions without one."""
        with self._lock:
            for partition, definitions in wanted.items():
                coming = self._coming.get(partition, {})
                for definition in definitions:
                    key = definition_key(definition)
                    if coming.get(key) != inf:
                        continue
                    if partition in next_offsets:
                        coming[key] = next_offsets[partition]
                    else:
                        del coming[key]
