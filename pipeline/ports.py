"""What the shells need from the outside world. Every port has at least two adapters and one contract suite.

Offsets are Kafka's: they rise within a partition, can have holes, and every `next_offset` and `end_offset` is exclusive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from pipeline.core.record import Records
from pipeline.core.token import Token
from pipeline.errors import PipelineError

MESSAGE_BYTES_MAX = 16 * 2**20
"""Where a log has no limit of its own: beyond every limit of a batch."""


class Message(msgspec.Struct, frozen=True, gc=False):  # a commit has tens of thousands; these cost a fifth of tuples
    """What is appended: a record without its offset. A value of None is a tombstone on a compacted topic."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None


class Watermarks(NamedTuple):
    """The offsets that a partition holds: `start_offset` inclusive, `end_offset` exclusive."""

    start_offset: int
    end_offset: int


class LogReader(Protocol):
    """A cursor over partitions of one topic. Owned by one thread at a time; sees committed records only."""

    def assign(self, next_offsets: Mapping[int, int]) -> None:
        """Read these partitions, and no others, from these offsets on."""
        ...

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        """What is there beyond the cursor, waiting up to `timeout_s` for the first record; the cursor moves on.

        Returns about as much as the limits say, at least one record if there is one, an empty list after the timeout.
        Raises `RecordsLost` if a cursor is below the log's start, `Unavailable` if the log is away.
        """
        ...

    def close(self) -> None:
        """Give back what the cursor holds. It can't be used after that."""
        ...


class LogWriter(Protocol):
    """Appends records outside transactions: what publishers use. Safe from any thread."""

    def partition_count(self, topic: str) -> int:
        """How many partitions `topic` has now; it never falls."""
        ...

    def message_bytes_max(self, topic: str) -> int:
        """The largest value that `topic` takes; a larger one is `Invalid`. May ask the log when it is first called."""
        ...

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        """Append, and wait until each message would survive kill -9 of the log.

        Returns, message by message, the `next_offset` that covers it, or the error that kept it from being acknowledged;
        after `Unavailable` it may have been appended all the same, after `Invalid` it never was and never will be.
        Raises nothing but programming errors. Order within a partition is the order of `messages`, except across errors.
        """
        ...

    def close(self) -> None:
        """Give back connections. Unacknowledged messages may be lost."""
        ...


class Transaction(Protocol):
    """Writes of one transactional id, atomic over topics and partitions. Owned by one thread at a time.

    A new Transaction of the same id fences every older one: their next call raises `Fenced` (KIP-98).
    """

    def commit(self, messages: Sequence[Message], *, timeout_s: float) -> list[int]:
        """Append all messages in one transaction; the `next_offset` behind each.

        When it returns they are durable. Readers see them then or a moment later, a new owner of the id in any case.

        All or nothing: after an error none of them is or will become visible, unless the error is `Unavailable`, after which
        all or none are. Raises `Fenced`, or `Unavailable` if it could not be decided in time.
        """
        ...

    def close(self) -> None:
        """Give back what the transaction holds."""
        ...


class Log(LogWriter, Protocol):
    """A durable, partitioned log with transactions: Kafka, the embedded one, or the one in memory."""

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        """The partition's offsets now. Its end is the last stable offset: everything below is committed."""
        ...

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        """The end offset of every partition that the topic has now."""
        ...

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        """The start offset of every partition that the topic has now."""
        ...

    def topic_id(self, topic: str) -> str:
        """What tells a topic from one of the same name that was made anew; empty where that can't happen."""
        ...

    def reader(self, topic: str) -> LogReader:
        """A new cursor, with no partitions assigned."""
        ...

    def transaction(self, transactional_id: str) -> Transaction:
        """A new owner of `transactional_id`; older ones are fenced when this returns, their open writes discarded."""
        ...


class StoreView(Protocol):
    """A consistent, unchanging view of a store. Drop it soon: it holds files open, even beyond the store's `close`."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values of `keys` at one moment between two writes, in their order; None where there is none."""
        ...

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """All entries with `start <= key < end`, in the order of their keys. One scan of a view at a time."""
        ...


class ReadableStore(StoreView, Protocol):
    """What readers know of a store: it changes from one call to the next, unless they take a snapshot."""

    def snapshot(self) -> StoreView:
        """The store as it is now, between two writes. For scans; when a few keys are enough, `get` is much cheaper."""
        ...


class Store(ReadableStore, Protocol):
    """One partition's entries. One writer; any number of readers in other threads.

    It may lose its newest writes when the process dies, but only whole writes and newest first: after a crash it is
    exactly as it was after some earlier write. Raises `StoreCorrupt` when its bytes cannot be trusted.
    """

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """Set each key to its value (None: delete it), atomically: a crash leaves all or nothing of it."""
        ...

    def close(self) -> None:
        """Make everything durable and let go of the files."""
        ...


class Stores(Protocol):
    """The stores of one process, by partition."""

    def open(self, partition: int) -> Store:
        """Open, or create, a partition's store. `StoreCorrupt` if it can't be; `destroy` it then."""
        ...

    def destroy(self, partition: int) -> None:
        """Delete a partition's store, which must be closed."""
        ...

    def close(self) -> None:
        """Close every open store."""
        ...


class Clock(Protocol):
    """Time and identity, so that tests and the simulator can make their own."""

    def now_ms(self) -> int:
        """Wall clock: milliseconds since 1970."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def new_id(self) -> str:
        """An identifier that nothing else has ever had."""
        ...


class Member(NamedTuple):
    """One process of an app, as the group knows it."""

    name: str
    url: str
    """Where its status can be asked for; empty if nowhere."""
    actives: frozenset[int]
    standbys: frozenset[int] = frozenset()


class MembershipListener(Protocol):
    """What a membership tells its worker, one call at a time, from a thread of its own."""

    def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
        """These may be another's soon. Commit what can be committed within `timeout_s`, then return.

        The group waits meanwhile. Folding may go on: the next owner fences. Until the next `on_assigned` a fence is
        therefore how a partition is lost, not a reason to end; drop its overlay then, the next owner folds it again.
        """
        ...

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        """From now on these are ours, no others. What was ours and is not any more is another's already. Do not block."""
        ...

    def on_failed(self, error: PipelineError) -> None:
        """Membership has ended and will say no more: the partitions are going to others. `Fenced`: one has our name."""
        ...


class Membership(Protocol):
    """Says which partitions this process folds, and which it keeps warm."""

    def start(self, listener: MembershipListener) -> None:
        """Join; returns at once. The first thing the listener hears is `on_assigned`, or `on_failed`."""
        ...

    def stop(self, *, leave: bool, timeout_s: float) -> bool:
        """Revoke everything, then end; whether that was done in time. The listener hears nothing more. Twice is fine.

        With `leave` the partitions move at once. Without it a member that has a name of its own keeps its place for the
        session timeout, so that a restart within it moves nothing; one without leaves in any case.
        """
        ...

    def set_warm(self, partitions: frozenset[int]) -> None:
        """Of these we have caught-up copies. A member that has too few is given no others while their owners live."""
        ...

    def members(self) -> list[Member]:
        """All members as of the last assignment, ourselves among them; empty before that, or where nobody knows."""
        ...


class RawDelta(NamedTuple):
    """A delta as it comes from outside: nothing about it has been checked."""

    view: str
    kind: str
    labels: Mapping[str, str]
    value: object
    ts_ms: int | None = None
    window_s: int | None = None
    monotone: bool | None = None
    """None: as the view is known, or not monotone if it is new."""


class Refusal(NamedTuple):
    """What was left out of something that was taken in part: where it stood, from 1, and why."""

    line: int
    reason: str
    """One word, of few."""
    detail: str


class Pushed(NamedTuple):
    """What a text of metrics says."""

    deltas: Sequence[RawDelta]
    lines: Sequence[int]
    """Where each of them stood."""
    refused: Sequence[Refusal]
    whole: bool = True
    """False: it has more than may be taken at once, and was not read to its end."""


class Ingest(Protocol):
    """Where an HTTP server puts what it is sent. Safe from any thread; blocks until the log has acknowledged."""

    def deltas(self, deltas: Sequence[RawDelta]) -> Token:
        """Accept all deltas. Raises `Invalid`, saying which one is wrong and why: none is accepted. Raises `Unavailable` if
        unsure: any of them may be.
        """
        ...

    def fitting(self, deltas: Sequence[RawDelta]) -> tuple[Token, list[Refusal]]:
        """Accept those deltas that can be; the others, by index as `line`. Raises `Unavailable` as `deltas` does.

        Here, as in Prometheus, an empty label is none: a delta may lack labels that its view has.
        """
        ...

    def batches(self, batches: Sequence[bytes]) -> list[int]:
        """Accept a publisher's sealed batches: the `next_offset` that covers each.

        Raises `BadRecord`, saying which batch is wrong and why; `Unavailable` if unsure. Any of the others may be accepted:
        send the same bytes again.
        """
        ...


class LineSink(Protocol):
    """Where a socket puts what it hears, line by line. One thread at a time; nothing that is sent makes it raise."""

    def take(self, lines: Sequence[bytes], protocol: str) -> None:
        """Take lines in, without their line ends; blank ones are nothing."""
        ...

    def refuse(self, reason: str, protocol: str) -> None:
        """Count what was no line to be taken: a packet that is too long, a connection too many."""
        ...

    def tick(self) -> None:
        """Time has passed: called often, also when there is nothing to take."""
        ...
