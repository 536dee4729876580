"""Drives a task as a worker does, with a dict for a store and a list for a log. No ports: the core alone."""

from collections.abc import Sequence
from typing import Any

import msgspec

from pipeline.core.codec import decode_position, decode_states, decode_view, encode_batch
from pipeline.core.merge import KINDS
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Batch,
    Definition,
    Group,
    definition_key,
    labels_of,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.core.task import Commit, DeadLetter, Task, TaskLimits
from tests.core.strategies import records

NOW_MS = 5_000


def group(definition: Definition, deltas: dict[tuple[str, ...], Any]) -> Group:
    """One delta for each series."""
    kind = KINDS[definition.kind]
    states = [kind.collect([kind.check(value, 0)]) for value in deltas.values()]
    return Group(definition, [series_suffix(labels) for labels in deltas], states)


def batch(
    sequence: int, *groups: Group, producer_id: str = "p", epoch: int = 0, partition: int = 0, floor: int = 0
) -> bytes:
    """The bytes of a batch."""
    return encode_batch(Batch(producer_id, epoch, partition, sequence, min(floor, sequence), 0, [*groups]))


class Shell:
    """The log, the store, and a task between them."""

    def __init__(self, limits: TaskLimits | None = None) -> None:
        self.limits = limits or TaskLimits()
        self.log: list[bytes | None] = []
        self.store: dict[bytes, bytes] = {}
        self.dead_letters: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []
        self.prepared: Commit
        self.restart()

    def restart(self) -> None:
        """Throw the task away, as a crash does, and start another one on what is committed."""
        self.task = Task(0, self.limits)
        found = self.store.get(POSITION_KEY)
        self.task.restored(
            NO_POSITION if found is None else decode_position(found),
            [value for key, value in sorted(self.store.items()) if key[:1] == TAG_DEFINITION],
            [(key[1:].decode(), value) for key, value in sorted(self.store.items()) if key[:1] == TAG_PRODUCER],
        )

    def append(self, *values: bytes | None) -> None:
        self.log += values

    def fold(self, *values: bytes | None, count: int = 10**9) -> None:
        """Append values to the log, and fold up to `count` records that are there."""
        self.append(*values)
        start = self.task.next_offset
        end = min(start + count, len(self.log))
        self.task.fold(records({offset: self.log[offset] for offset in range(start, end)}, end))

    def refold(self) -> None:
        """Hand the task, once more, all records that it has read."""
        end = self.task.next_offset
        self.task.fold(records(dict(enumerate(self.log[:end])), end))

    def freeze(self) -> None:
        self.keys = self.task.freeze()

    def prepare(self) -> None:
        self.prepared = self.task.prepare_commit([self.store.get(key) for key in self.keys], now_ms=NOW_MS)

    def write(self) -> None:
        """The Commit becomes durable."""
        commit = self.prepared
        for key, value in zip(commit.keys, commit.values, strict=True):
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
        self.dead_letters.update(commit.dead_letters)

    def committed(self) -> None:
        self.write()
        self.task.committed()

    def commit(self) -> Commit:
        self.freeze()
        self.prepare()
        self.committed()
        return self.prepared

    # What is committed

    def series(self, view: str) -> dict[tuple[str, ...], Any]:
        """The committed states of a view, by label values."""
        prefix = series_prefix(view)
        found = {key: value for key, value in self.store.items() if key.startswith(prefix)}
        states = decode_states(KINDS[self.definition(view).kind], [*found.values()])
        return {labels_of(key, prefix): state for key, state in zip(found, states, strict=True)}

    def definition(self, view: str) -> Definition:
        return decode_view(self.store[definition_key(view)]).definition

    def series_count(self, view: str) -> int:
        return decode_view(self.store[definition_key(view)]).series_count

    def has_producer(self, producer_id: str) -> bool:
        return producer_key(producer_id) in self.store

    def letters(self) -> list[DeadLetter]:
        return [msgspec.msgpack.decode(value, type=DeadLetter) for value in self.dead_letters.values()]

    def reasons(self) -> list[str]:
        return [letter.reason for letter in self.letters()]

    def entry_count(self) -> int:
        return sum(key[:1] == TAG_SERIES for key in self.store)


def totals(shell: Shell, view: str = "v") -> Sequence[Any]:
    """The committed states of a view in the order of their labels."""
    return [state for _, state in sorted(shell.series(view).items())]
