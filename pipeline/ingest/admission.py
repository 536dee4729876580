"""What a gateway refuses at its door: whatever a task is certain to refuse, so that nothing accepted is a dead letter.

`Facts` is what this process knows of the tasks' state, from the stores that it answers reads from. It can lag behind, so a
gateway can be wrong in one direction only: what it takes may still be refused when another gateway was quicker.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Collection, Iterable, Mapping
from math import inf

from pipeline.core.codec import Received, RefusedGroup, check_group, receive_batch
from pipeline.core.letters import is_letter_producer
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Definition, definition_key, fingerprint, producer_id_of
from pipeline.core.sequence import EPOCH_STEP_MAX, Folded
from pipeline.errors import BadRecord, GroupsRefused
from pipeline.ports import Facts, KnownDefinitions

KEY_PREFIX = "key:"
"""What the producer ids of requests with an `Idempotency-Key` start with."""


class NoFacts:
    """Facts where there are none."""

    def definitions(self, partition: int) -> KnownDefinitions | None:
        """Return None."""
        return None

    def producer(self, partition: int, producer_id: str) -> Folded | None:
        """Return None."""
        return None


def is_reserved(producer_id: str) -> bool:
    """Whether only a gateway itself makes batches with this producer id."""
    return producer_id.startswith(KEY_PREFIX) or is_letter_producer(producer_id)


def check_owner(producer_id: str, secret: str) -> None:
    """Raise `BadRecord` unless whoever sends a batch of this producer has its secret.

    The id is a hash of the secret, so any gateway can tell, without a memory, also after a restart; and an id that was
    seen in a log or in a topic is of no use to anybody.
    """
    if is_reserved(producer_id):
        raise BadRecord("its producer id begins as those that only the server itself uses")
    if not hmac.compare_digest(producer_id_of(secret).encode(), producer_id.encode()):
        raise BadRecord("its producer id is not that of the secret in the header Pipeline-Producer")


def check_batch(value: bytes, now_ms: int, limits: TaskLimits, facts: Facts) -> tuple[Received, list[RefusedGroup]]:
    """A batch from outside, and which of its groups a task would refuse; `BadRecord` if it would refuse the whole."""
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


def refusal(number: int, refused: Iterable[RefusedGroup]) -> GroupsRefused:
    """The error that names the groups of a batch that can't be taken."""
    groups = sorted((it.index, it.view, it.reason) for it in refused)
    first = ", ".join(f"group {index} (view {view}): {reason}" for index, view, reason in groups[:3])
    more = f", and {len(groups) - 3} more groups" if len(groups) > 3 else ""
    return GroupsRefused(f"batch {number}: {first}{more}", groups, number)


class Rooms:
    """Room for definitions: a partition holds so many, and some are on their way to it. Safe from any thread."""

    def __init__(self, facts: Facts, views_max: int) -> None:
        self._facts = facts
        self._views_max = views_max
        self._lock = threading.Lock()
        self._coming: dict[int, dict[bytes, float]] = {}
        """By partition: definitions that were sent, each with the offset from which on the partition must have it."""

    def take(self, wanted: Mapping[int, Collection[Definition]]) -> dict[Definition, str]:
        """Take the room that definitions need in the partitions that they go to: those for which there is none, and why.

        For the others `sent` must follow, once it is known where they are in the log.
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
        """Definitions were sent to partitions; where, if it is known. Else their room is given back."""
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
