"""Drives a task as a worker does, with a dict for a store and a list for a log: the core alone, without ports."""

from collections.abc import Sequence
from typing import Any

from pipeline import native
from pipeline.core.codec import (
    DeadLetter,
    DefinitionEntry,
    decode_definition,
    decode_letter,
    decode_position,
    decode_states,
    encode_batch,
)
from pipeline.core.commit import Commit, Lookup
from pipeline.core.kinds import KINDS
from pipeline.core.limits import TaskLimits
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Batch,
    Control,
    Definition,
    Group,
    Origin,
    Records,
    definitions_prefix,
    parse_suffix,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.core.task import Task
from tests.core.strategies import records

NOW_MS = 5_000


def group(definition: Definition, deltas: dict[tuple[str, ...], Any]) -> Group:
    """Return a group with one delta for each series."""
    kind = KINDS[definition.kind]
    states = [kind.collect([kind.check(value)]) for value in deltas.values()]
    return Group(definition, [series_suffix(labels) for labels in deltas], states)


def batch(
    sequence: int,
    *groups: Group,
    producer_id: str = "p",
    epoch: int = 0,
    partition: int = 0,
    floor: int = 0,
    closing: bool = False,
    controls: Sequence[Control] = (),
    origin: Origin | None = None,
) -> bytes:
    """Return the bytes of a batch."""
    floor = min(floor, sequence)
    return encode_batch(Batch(producer_id, epoch, partition, sequence, floor, 0, [*groups], closing, [*controls], origin))


class Shell:
    """The log, the store, and a task between them."""

    def __init__(self, limits: TaskLimits | None = None, task_type: type[Task] = Task) -> None:
        self._task_type = task_type
        self.limits = limits or TaskLimits()
        self.log: list[bytes | None] = []
        self.store: dict[bytes, bytes] = {}
        self.dead_letters: dict[bytes, bytes] = {}
        self.lookup = Lookup([], [])
        self.now_ms = NOW_MS
        self.prepared: Commit
        self.restart()

    def restart(self, source_id: str = "") -> None:
        """Throw the task away, as a crash does, and start another one on what is committed."""
        self.task = self._task_type(0, self.limits, source_id, native.extension())
        found = self.store.get(POSITION_KEY)
        self.task.restored(
            NO_POSITION if found is None else decode_position(found),
            [value for key, value in sorted(self.store.items()) if key[:1] == TAG_DEFINITION],
        )

    def append(self, *values: bytes | None) -> None:
        self.log += values

    def fold(self, *values: bytes | None, count: int = 10**9) -> None:
        """Append values to the log, and fold up to `count` records that are there."""
        self.append(*values)
        start = self.task.next_offset
        end = min(start + count, len(self.log))
        self.hand_over(records({offset: self.log[offset] for offset in range(start, end)}, end))

    def hand_over(self, found: Records) -> None:
        """Hand the task records, with everything it needs from the store."""
        reading = self.task.read(found)
        self.task.fold(reading, [self.store.get(key) for key in reading.producer_keys], now_ms=self.now_ms)

    def hand_over_at(self, at_ms: int, *values: bytes) -> None:
        """Append values that the log accepted from `at_ms` on, and fold them; without any, an empty batch."""
        start = len(self.log)
        self.append(*(values or (encode_batch(Batch(f"tick-{start}", 0, 0, 0, 0, at_ms, [])),)))
        end = len(self.log)
        self.hand_over(records({i: self.log[i] for i in range(start, end)}, end, at_ms=at_ms - start))

    def sweep(self) -> None:
        """Let the task forget producers."""
        self.task.sweep(
            [(key, value) for key, value in sorted(self.store.items()) if key[:1] == TAG_PRODUCER], now_ms=self.now_ms
        )

    def refold(self) -> None:
        """Hand the task, once more, all records that it has read."""
        end = self.task.next_offset
        self.hand_over(records(dict(enumerate(self.log[:end])), end))

    def freeze(self) -> None:
        self.lookup = self.task.freeze()

    def prepare(self) -> None:
        found = [self.store.get(key) for key in self.lookup.keys]
        existing = [key for key in sorted(self.store) if key.startswith(tuple(self.lookup.prefixes))]
        swept: list[list[tuple[bytes, bytes]]] = []
        for sweep in self.lookup.sweeps:
            entries = [(key, value) for key, value in sorted(self.store.items()) if sweep.start <= key < sweep.end]
            swept.append(entries[: self.lookup.swept_max - sum(map(len, swept))])
        self.prepared = self.task.prepare_commit(found, existing, swept, now_ms=self.now_ms)

    def write(self) -> None:
        """Make the commit durable."""
        commit = self.prepared
        for key, value in zip(commit.keys, commit.values, strict=True):
            if value is None:
                self.store.pop(key, None)
            else:
                self.store[key] = value
        for key, value in commit.dead_letters:
            if value is None:
                self.dead_letters.pop(key, None)
            else:
                self.dead_letters[key] = value

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
        """Return the committed states of a view that has one definition, by label values."""
        return self.series_of(self.definition(view))

    def series_of(self, definition: Definition) -> dict[tuple[str, ...], Any]:
        """Return the committed states of a definition, by label values."""
        prefix = series_prefix(definition)
        found = {key: value for key, value in self.store.items() if key.startswith(prefix)}
        states = decode_states(KINDS[definition.kind], [*found.values()])
        return {parse_suffix(key.removeprefix(prefix))[1]: state for key, state in zip(found, states, strict=True)}

    def entries(self, view: str) -> list[DefinitionEntry]:
        prefix = definitions_prefix(view)
        return [decode_definition(value) for key, value in sorted(self.store.items()) if key.startswith(prefix)]

    def definition(self, view: str) -> Definition:
        (entry,) = self.entries(view)
        return entry.definition

    def series_count(self, view: str) -> int:
        (entry,) = self.entries(view)
        return entry.series_count

    def has_producer(self, producer_id: str) -> bool:
        return producer_key(producer_id) in self.store

    def letters(self) -> list[DeadLetter]:
        return [decode_letter(value) for value in self.dead_letters.values()]

    def reasons(self) -> list[str]:
        return [letter.reason for letter in self.letters()]

    def entry_count(self) -> int:
        return sum(key[:1] == TAG_SERIES for key in self.store)


def totals(shell: Shell, view: str = "v") -> Sequence[Any]:
    """Return the committed states of a view in the order of their labels."""
    return [state for _, state in sorted(shell.series(view).items())]
