"""What the shells need from the outside world. Every port has at least two adapters and one contract suite.

Offsets are Kafka's: they rise within a partition, can have holes, and every `next_offset` and `end_offset` is exclusive.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple, Protocol, runtime_checkable

import msgspec

from pipeline.core.record import Control, Records
from pipeline.core.sequence import Folded
from pipeline.core.token import Token
from pipeline.errors import Discontinuous, Displaced, PipelineError

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


Begins = Mapping[tuple[str, int], int]
"""By topic and partition, the offset at which a commit has to begin."""
NO_BEGINS: Begins = MappingProxyType({})
NO_EPOCHS: Mapping[int, int] = MappingProxyType({})


class LogReader(Protocol):
    """A cursor over partitions of one topic. Owned by one thread at a time; sees committed records only."""

    def assign(self, next_offsets: Mapping[int, int], leader_epochs: Mapping[int, int] = NO_EPOCHS) -> None:
        """Read these partitions, and no others, from these offsets on.

        `leader_epochs` are those of the last records that were read below the offsets, where they are known: on a log that
        has them, `poll` then raises `RecordsLost` if the offset belongs to records that are not in the log any more.
        """
        ...

    def poll(self, *, record_count_max: int, bytes_max: int, timeout_s: float) -> list[Records]:
        """What is there beyond the cursor, waiting up to `timeout_s` for the first record; the cursor moves on.

        Returns about as much as the limits say, at least one record if there is one, an empty list after the timeout.
        Raises `RecordsLost` if a cursor is below the log's start or in a history that is gone, `Unavailable` if the log is
        away, `Discontinuous` if what comes next stands below the cursor, `LogCorrupt` if records are missing that nothing
        can have removed.
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

    def topic_id(self, topic: str) -> str:
        """What tells a topic from every other, also from one of its name that was made anew: up to 64 of `A-Za-z0-9_-`.

        An id is never used twice. The log is asked at each call, and what it answers is at least as new as any offset that
        `append` had returned before the call. Raises `Unavailable` if the log is away.
        """
        ...

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        """The offset behind everything that the topic has acknowledged, by partition; of the topic that is there now.

        Nothing that `append` returned, and that is of this topic, is beyond it. Open transactions don't hold it down.
        It is beyond the last stable offset while somebody's transaction is open there: what was acknowledged behind the
        beginning of that transaction can't be read yet. Lag and staleness are measured against it.
        """
        ...

    def close(self) -> None:
        """Give back connections. Unacknowledged messages may be lost."""
        ...


@runtime_checkable
class Resting(Protocol):
    """A log writer that has threads, and can do without."""

    def rest(self) -> bool:
        """End them until the next call, giving back connections; return whether they have ended."""
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
        """How many offsets the end of a transaction takes in each partition that it wrote to: 1 in Kafka, or none."""
        ...

    def commit(self, messages: Sequence[Message], *, timeout_s: float, begins: Begins = NO_BEGINS) -> list[int]:
        """Append all messages in one transaction; the `next_offset` behind each.

        `begins` says where in a partition the first of its messages has to stand, the others following without a gap. If
        that can't be, nothing is committed: `Discontinuous` if the partition ends before it, else `Displaced`, after which
        another commit can be tried.

        When it returns they are durable. Readers see them then or a moment later, a new owner of the id in any case.

        All or nothing: after an error none of them is or will become visible, unless the error is `Unavailable`, after which
        all or none are. Raises `Fenced`, or `Unavailable` if it could not be decided in time.
        """
        ...

    def close(self) -> None:
        """Give back what the transaction holds."""
        ...


def check_begins(begins: Begins, found: Mapping[tuple[str, int], int]) -> None:
    """Raise `Discontinuous` or `Displaced` unless a transaction begins where it has to; `found` says where it would."""
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
        """The partition's offsets now. Its end is the last stable offset: everything below it is decided and readable."""
        ...

    def end_offsets(self, topic: str) -> Mapping[int, int]:
        """The last stable offset of every partition that the topic has now: what readers can reach."""
        ...

    def start_offsets(self, topic: str) -> Mapping[int, int]:
        """The start offset of every partition that the topic has now."""
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

    def set_aside(self, partition: int, reason: str) -> str:
        """Keep a partition's store, which must be there and closed, under another name; where it is now.

        `open` makes a new one then. For a store that holds what its changelog does not: it is the only copy.
        """
        ...

    def close(self) -> None:
        """Close every open store."""
        ...


class Clock(Protocol):
    """Time and identity, so that tests and the simulator can make their own."""

    def now_ms(self) -> int:
        """Wall clock: milliseconds since 1970."""
        ...

    def rising_ns(self) -> int:
        """Nanoseconds since 1970, about: in one process it never falls, even when the wall clock is set back."""
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


class RequestKey(NamedTuple):
    """What makes a repeat of a request known: the client's word for it, and what it is about."""

    path: str
    key: str
    digest: bytes
    """Of the body: a request with the same key and another body is another request."""


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


class Orders(Protocol):
    """Who puts orders into the log. Safe from any thread; blocks until the log has acknowledged them."""

    def controls(self, controls: Sequence[Control], key: RequestKey | None = None) -> Token:
        """Append orders to every partition, so that each carries them out once, in this order, between two batches.

        Raises `Invalid` if one is none; `Unavailable` if some partitions may not have them. With a `key` a repeat is carried
        out once in each partition, also in those that came meanwhile.
        """
        ...


class Ingest(Orders, Protocol):
    """Where an HTTP server puts what it is sent. Safe from any thread; blocks until the log has acknowledged."""

    def deltas(self, deltas: Sequence[RawDelta], key: RequestKey | None = None) -> Token:
        """Accept all deltas. Raises `Invalid`, saying which one is wrong and why: none is accepted. Raises `Unavailable` if
        unsure: any of them may be. With a `key`, a repeat counts once.
        """
        ...

    def fitting(self, deltas: Sequence[RawDelta], key: RequestKey | None = None) -> tuple[Token, list[Refusal]]:
        """Accept those deltas that can be; the others, by index as `line`. Raises `Unavailable` as `deltas` does.

        Here, as in Prometheus, an empty label is none: a delta may lack labels that its view has.
        """
        ...

    def batches(self, batches: Sequence[bytes], secret: str) -> tuple[list[int], Token]:
        """Accept a publisher's sealed batches: the `next_offset` that covers each, and the token that covers all. `secret`
        proves that their producer id is the publisher's own; see `core.record.producer_id_of`.

        Raises `BadRecord`, saying which batch is wrong and why, and `GroupsRefused` if it is some groups only that can't be
        taken; then none of the batches is. Raises `Unavailable` if unsure. Any of the others may be accepted:
        send the same bytes again.
        """
        ...


class KnownDefinitions(NamedTuple):
    """The definitions that a partition has, by their keys, as of an offset of its log."""

    next_offset: int
    keys: Collection[bytes]


class Facts(Protocol):
    """What this process knows of the tasks' state, which can lag behind. Safe from any thread; None: it knows nothing."""

    def definitions(self, partition: int) -> KnownDefinitions | None:
        """The definitions of a partition."""
        ...

    def producer(self, partition: int, producer_id: str) -> Folded | None:
        """What a partition has folded of a producer."""
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
