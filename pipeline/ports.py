"""Interfaces to the outside world. Every port has at least two adapters and one contract suite.

Offsets are Kafka's: they rise within a partition, can have holes, and every `next_offset` and `end_offset` is exclusive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import repeat
from types import MappingProxyType
from typing import NamedTuple, Protocol, overload, runtime_checkable

import msgspec

from pipeline.core.grants import Bounds
from pipeline.core.record import Control, Definition, Records
from pipeline.core.sequence import Folded
from pipeline.core.token import Token
from pipeline.errors import Discontinuous, Displaced, PipelineError

MESSAGE_BYTES_MAX = 16 * 2**20
"""Limit of a log without a limit of its own: beyond every limit of a batch."""


class Message(msgspec.Struct, frozen=True, gc=False):  # a commit has tens of thousands; these cost a fifth of tuples
    """A record to append. A value of None is a tombstone on a compacted topic."""

    topic: str
    partition: int
    key: bytes | None
    value: bytes | None


class MessageRun(Sequence[Message]):
    """Messages for one partition, as two columns: a commit has tens of thousands, which need not all be objects."""

    def __init__(self, topic: str, partition: int, keys: Sequence[bytes | None], values: Sequence[bytes | None]) -> None:
        if len(keys) != len(values):
            raise ValueError(f"{len(keys)} keys, but {len(values)} values")
        self.topic = topic
        self.partition = partition
        self.keys = keys
        self.values = values

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, number: int) -> Message: ...
    @overload
    def __getitem__(self, number: slice) -> MessageRun: ...
    def __getitem__(self, number: int | slice) -> Message | MessageRun:
        if isinstance(number, slice):
            return MessageRun(self.topic, self.partition, self.keys[number], self.values[number])
        return Message(self.topic, self.partition, self.keys[number], self.values[number])

    def __iter__(self) -> Iterator[Message]:
        return map(Message, repeat(self.topic), repeat(self.partition), self.keys, self.values)


class Watermarks(NamedTuple):
    """Range of offsets of a partition: `start_offset` inclusive, `end_offset` exclusive."""

    start_offset: int
    end_offset: int


Begins = Mapping[tuple[str, int], int]
"""By topic and partition, the offset at which a commit has to begin."""
NO_BEGINS: Begins = MappingProxyType({})
NO_EPOCHS: Mapping[int, int] = MappingProxyType({})


class LogReader(Protocol):
    """A cursor over partitions of one topic. Owned by one thread at a time; sees committed records only."""

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        """Read these partitions, and no others, from these offsets on.

        `leader_epochs` are those of the last records that were read below the offsets, where they are known. On a log that
        has leader epochs, `poll` then raises `RecordsLost` if those records are not in the log any more.
        """
        ...

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        """Return records from the cursors on, waiting up to `timeout_s` for the first one, and move the cursors.

        Returns about as much as the limits say, at least one record if there is one, an empty list after the timeout. Raises
        `RecordsLost` if a cursor is below the log's start or its leader epoch is gone, `Unavailable` if the log can't be
        reached, `Discontinuous` if a record below the cursor comes, `LogCorrupt` if records are missing that nothing can
        have removed.
        """
        ...

    def close(self) -> None:
        """Close the cursor, which can't be used after that."""
        ...


class LogWriter(Protocol):
    """Appends records outside transactions, as publishers do. Safe from any thread."""

    def partition_count(self, topic: str) -> int:
        """Return the present partition count of `topic`; it never falls."""
        ...

    def message_bytes_max(self, topic: str) -> int:
        """Return the size of the largest value that `topic` takes; a larger one is `Invalid`. The first call may ask the
        log.
        """
        ...

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        """Append, and wait until each message would survive kill -9 of the log.

        Returns, for each message, the `next_offset` that covers it, or the error that prevented its acknowledgement: after
        `Unavailable` it may have been appended all the same, after `Invalid` it never was and never will be. Raises nothing
        but programming errors. Order within a partition is the order of `messages`, except across errors.
        """
        ...

    def topic_id(self, topic: str) -> str:
        """Return an id that no other topic has, not even one of the same name: up to 64 of `A-Za-z0-9_-`.

        The log is asked at each call, and the answer is at least as new as any offset that `append` had returned before the
        call. Raises `Unavailable` if the log can't be reached.
        """
        ...

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        """Return, by partition, the offset after the last acknowledged record of the present topic.

        Every offset that `append` has returned for this topic is covered. While somebody's transaction is open in a
        partition, its high watermark is beyond the last stable offset: records after the beginning of the transaction are
        acknowledged but can't be read yet. Lag and staleness are measured against the high watermark.
        """
        ...

    def close(self) -> None:
        """Close connections. Unacknowledged messages may be lost."""
        ...


@runtime_checkable
class Resting(Protocol):
    """A log writer whose threads and connections can be given up while it is idle."""

    def rest(self) -> bool:
        """End threads and connections until the next call; return whether the threads have ended."""
        ...


@runtime_checkable
class ProvesProducers(Protocol):
    """A log writer that has to prove to a gateway whose batches it sends on.

    A producer is known by a secret that only it has, and by an id, made from the secret, that everybody may see. On Kafka
    the broker's permissions say who may write.
    """

    def introduce(self, secret: str) -> None:
        """Take note that batches of the producer with this secret will come."""
        ...

    def dismiss(self, secret: str) -> None:
        """Take note that no more of them will come."""
        ...


class Transaction(Protocol):
    """Writes of one transactional id, atomic over topics and partitions. Owned by one thread at a time.

    A new Transaction of the same id fences every older one: their next call raises `Fenced` (KIP-98).
    """

    @property
    def marker_count(self) -> int:
        """Offsets that the end of a transaction takes in each partition that it wrote to: 1 in Kafka, or none."""
        ...

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        """Append all messages in one transaction; return the `next_offset` after each.

        `begins` says where in a partition the first of its messages has to stand; the others follow without a gap. Otherwise
        nothing is committed, and `Discontinuous` is raised if the partition ends before that offset, else `Displaced`, after
        which another commit can be tried.

        When it returns the messages are durable. Readers see them at once or a moment later; a new owner of the id sees them
        at once.

        After an error none of the messages is or will become visible, unless the error is `Unavailable`, after which all or
        none are. Raises `Fenced`, or `Unavailable` if the outcome was not known in time.
        """
        ...

    def close(self) -> None:
        """Close the transaction's producer."""
        ...


def check_begins(begins: Begins, found: Mapping[tuple[str, int], int]) -> None:
    """Raise `Discontinuous` or `Displaced` unless `found`, the offsets at which a transaction would begin, are the expected
    ones.
    """
    for place, expected in begins.items():
        begin = found.get(place, expected)
        where = f"{place[0]}-{place[1]}"
        if begin < expected:
            raise Discontinuous(f"{where} went back from {expected} to {begin}: it was made anew or truncated")
        if begin > expected:
            raise Displaced(f"something else has written to {where}: a commit would begin at {begin}, not at {expected}")


class Log(LogWriter, Protocol):
    """A durable, partitioned log with transactions: Kafka, the embedded one, or the one in memory."""

    def watermarks(self, topic: str, partition: int) -> Watermarks:
        """Return the partition's offsets now. The end is the last stable offset: everything below it is decided and
        readable.
        """
        ...

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        """Return the last stable offset of every present partition, to which readers can read."""
        ...

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        """Return the start offset of every present partition."""
        ...

    def reader(self, topic: str) -> LogReader:
        """Return a new cursor, with no partitions assigned."""
        ...

    def transaction(self, transactional_id: str) -> Transaction:
        """Return a new owner of `transactional_id`. Older owners are fenced by then, their open transactions aborted."""
        ...


class StoreView(Protocol):
    """A consistent, unchanging view of a store. Drop it soon: it holds files open, even beyond the store's `close`."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the values of `keys`, all of one moment and in their order; None where there is no value."""
        ...

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Yield all entries with `start <= key < end`, in the order of keys. One scan of a view at a time."""
        ...


class ReadableStore(StoreView, Protocol):
    """A store as its readers see it. It can change between two calls; `snapshot` does not."""

    def snapshot(self) -> StoreView:
        """Return the store as it is now, between two writes, for scans. For a few keys `get` is much cheaper."""
        ...


class Store(ReadableStore, Protocol):
    """Entries of one partition. One writer; any number of readers in other threads.

    A store may lose its newest writes when the process dies, but only whole writes and newest first: after a crash it is
    exactly as it was after some earlier write. Raises `StoreCorrupt` when its bytes cannot be trusted.
    """

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        """Set each key to its value (None: delete it), atomically: a crash leaves all of it or nothing."""
        ...

    def close(self) -> None:
        """Make everything durable and close the files."""
        ...


class Stores(Protocol):
    """Stores of one process, by partition."""

    def open(self, partition: int) -> Store:
        """Open or create a partition's store. `StoreCorrupt` if that fails because of its bytes: `destroy` it then."""
        ...

    def destroy(self, partition: int) -> None:
        """Delete a partition's store, which must be closed."""
        ...

    def set_aside(self, partition: int, reason: str) -> str:
        """Rename a partition's store, which must exist and be closed, to keep it; return its new place.

        For a store with data that its changelog lacks: it is the only copy. `open` then makes a new one.
        """
        ...

    def close(self) -> None:
        """Close every open store."""
        ...


class Clock(Protocol):
    """Time and identifiers, so that tests and the simulator can supply their own."""

    def now_ms(self) -> int:
        """Wall clock: milliseconds since 1970."""
        ...

    def rising_ns(self) -> int:
        """Nanoseconds since 1970, approximately: within a process they never fall, even when the wall clock is set back."""
        ...

    def monotonic_s(self) -> float:
        """Seconds on a clock that never goes back."""
        ...

    def thread_cpu_s(self) -> float:
        """Seconds of CPU time that the calling thread has used."""
        ...

    def new_id(self) -> str:
        """Return an identifier that was never returned before, here or elsewhere."""
        ...


class Member(NamedTuple):
    """A process of an app, as its group knows it."""

    name: str
    url: str
    """URL of its status; empty if there is none."""
    actives: frozenset[int]
    standbys: frozenset[int] = frozenset()
    problem: str = ""
    """Reason why it is taken for no worker; empty for a worker."""


class MembershipListener(Protocol):
    """Receives the assignment from a membership: one call at a time, from a thread of its own."""

    def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
        """Commit what can be committed within `timeout_s`: another member may get these partitions soon.

        The group waits meanwhile. Folding may go on, because the next owner fences. Until the next `on_assigned` a fence is
        therefore no reason to end, but how a partition is lost; drop its overlay then, the next owner folds its records
        again.
        """
        ...

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        """Own these partitions from now on, and no others. Former ones belong to another member already. Must not block."""
        ...

    def on_failed(self, error: PipelineError) -> None:
        """End: membership is over, and other members get the partitions. `Fenced`: another process has our name."""
        ...


class Membership(Protocol):
    """Decides which partitions this process folds, and of which it keeps a copy."""

    def start(self, listener: MembershipListener) -> None:
        """Join the group; returns at once. The listener's first call is `on_assigned` or `on_failed`."""
        ...

    def stop(self, *, leave: bool, timeout_s: float) -> bool:
        """Revoke everything, then end; return whether that was done in time. The listener gets no further calls. Idempotent.

        With `leave` the partitions move at once. Without it a member with a name of its own keeps its place for the session
        timeout, so that a restart within it moves nothing; a member without a name leaves in any case.
        """
        ...

    def set_warm(self, partitions: frozenset[int]) -> None:
        """Tell the group of which partitions there is a caught-up copy. Only those are moved here from owners that are
        alive.
        """
        ...

    def members(self) -> list[Member]:
        """Return all members as of the last assignment, this one included; empty before it, or without a group."""
        ...


class RawDelta(NamedTuple):
    """A delta from outside, not validated in any way."""

    view: str
    kind: str
    labels: Mapping[str, str]
    value: object
    """Value that its kind takes, or a `Distribution` for a histogram."""
    ts_ms: int | None = None
    window_s: int | None = None
    monotone: bool | None = None
    """None: as the view is known, or not monotone if it is new; `window_s` and `retention_s` likewise, 0 if it is new."""
    retention_s: int | None = None
    spread: int | None = None
    """Partitions over which the view is spread; None: as many as the gateway's setting says."""


class RequestKey(NamedTuple):
    """Identifies a request and its repeats: the client's key, and the content."""

    path: str
    key: str
    digest: bytes
    """Digest of the body: the same key with another body is another request."""


class Refusal(NamedTuple):
    """An item that was left out of a request that was accepted in part: its number, from 1, and the reason."""

    line: int
    reason: str
    """One word out of a few."""
    detail: str


class Orders(Protocol):
    """Appends control records to the log. Safe from any thread; blocks until the log has acknowledged them."""

    def controls(self, controls: Sequence[Control], key: RequestKey | None = None) -> Token:
        """Append control records to every partition, so that each carries them out once, in this order, between two batches.

        Raises `Invalid` if one of them is invalid; `Unavailable` if some partitions may not have them. With a `key` a repeat
        is carried out once in each partition, also in partitions that were added meanwhile.
        """
        ...


Fitted = tuple[Token, list[Refusal]]
"""A token that covers what was accepted, and what was left out."""


class Ingest(Orders, Protocol):
    """Accepts deltas and batches for an HTTP server. Safe from any thread; blocks until the log has acknowledged them."""

    def deltas(self, deltas: Sequence[RawDelta], key: RequestKey | None = None, bounds: Bounds | None = None) -> Token:
        """Accept all deltas. Raises `Invalid`, saying which one is wrong and why, if none is accepted, and `Unavailable` if
        any of them may be. With a `key`, a repeat counts once. What a delta lacks it gets from definitions within `bounds`.
        """
        ...

    def fitting(self, deltas: Sequence[RawDelta], key: RequestKey | None = None, bounds: Bounds | None = None) -> Fitted:
        """Accept all valid deltas; return the others, by index as `line`. An empty label is none: deltas may lack some."""
        ...

    def batches(self, batches: Sequence[bytes], secret: str, bounds: Bounds | None = None) -> tuple[list[int], Token]:
        """Accept a publisher's batches; return the `next_offset` that covers each, and a token that covers all.

        `secret` proves that their producer id is the publisher's own; see `core.record.producer_id_of`. Raises `BadRecord`,
        saying which batch is wrong and why, or `GroupsRefused` if only some of its groups are wrong, `GroupsForbidden` if
        they are outside the `bounds` of the access token; then none of the batches is accepted. Raises `Unavailable` if any
        of them may be: send the same bytes again.
        """
        ...


class KnownDefinitions(NamedTuple):
    """Definitions of a partition by their keys, as of an offset of its log."""

    next_offset: int
    keys: Collection[bytes]


class Facts(Protocol):
    """Cached state of the tasks in this process, which can lag behind. Safe from any thread; None: unknown."""

    def definitions(self, partition: int) -> KnownDefinitions | None:
        """Return the definitions of a partition."""
        ...

    def producer(self, partition: int, producer_id: str) -> Folded | None:
        """Return which sequences of a producer a partition has folded."""
        ...

    def expired_before_ms(self, partition: int, definition: Definition) -> int:
        """Return the start of the oldest window of a definition that a partition keeps; 0: none has expired, or unknown."""
        ...


class LineSink(Protocol):
    """Receives lines from a socket. One thread at a time; no input makes it raise."""

    def take(self, lines: Sequence[bytes], protocol: str, sender: str | None = None) -> None:
        """Take lines of one sender, an address, without their line ends. Blank ones are ignored."""
        ...

    def refuse(self, reason: str, protocol: str) -> None:
        """Count rejected input: a packet that is too long, a connection too many."""
        ...

    def tick(self) -> None:
        """Do periodic work. Called often, also without input."""
        ...
