"""Offsets of agents' topics: which events are done, and when their offsets are committed, always after a flush."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiokafka import TopicPartition
from aiokafka.errors import KafkaError
from aiokafka.structs import OffsetAndMetadata
from faust.transport.consumer import Consumer as BaseConsumer
from faust.types import TP, EventT

from pipeline.adapters.faust.app import _Consumer, _ConsumerThread, _Transport

_DONE_INTERVAL_S = 0.005

PRIVATE: Mapping[type, frozenset[str]] = {
    BaseConsumer: frozenset(
        {
            "ack",
            "force_commit",
            "track_message",
            "commit_and_end_transactions",
            "on_partitions_revoked",
            "stop_flow",
            "_commit",
        }
    ),
    _ConsumerThread: frozenset({"_commit", "_ensure_consumer", "call_thread", "seek_to_committed"}),
}
"""See `agents.PRIVATE`."""


class _OffsetsThread(_ConsumerThread):
    async def seek_to_committed(self) -> Mapping[TP, int]:
        """Seek agents' topics to their committed offsets, or else to their beginning: prefetched events may be gone."""
        consumer = self._ensure_consumer()
        places = [TopicPartition(*tp) for tp in self.consumer._not_ours(self.assignment())]
        offsets: Mapping[TP, int] = await self.call_thread(consumer.seek_to_committed, *places)
        fresh = [place for place in places if not offsets[place]]
        if fresh and self.app.conf.consumer_auto_offset_reset == "earliest":
            await self.call_thread(consumer.seek_to_beginning, *fresh)
        return offsets

    async def _commit(self, offsets: Mapping[TP, int]) -> bool:
        """Commit offsets; return whether that succeeded. An error is never a reason to end: the next attempt, or owner,
        repeats it.
        """
        held = self.assignment()
        wanted = {TopicPartition(*tp): OffsetAndMetadata(offset, "") for tp, offset in offsets.items() if tp in held}
        self.tp_last_committed_at.update(dict.fromkeys(offsets, self.loop.time()))
        try:
            await self._ensure_consumer().commit(wanted)
        except KafkaError as error:
            self.app.note_uncommitted(repr(error))
            return False
        return True


class _PartitionOffsets:
    """One partition in one generation: which of the events that were read are not done yet."""

    def __init__(self) -> None:
        self.under_way: set[int] = set()
        self.next_offset = 0
        self.committed = -1

    @property
    def done_offset(self) -> int:
        """Offset below which everything is done."""
        return min(self.under_way, default=self.next_offset)


class _OffsetsConsumer(_Consumer):
    """Keeps its own account of done events. Faust's account takes the event after an offset that does not exist for done,
    and commits beyond one event that is not done.
    """

    def __init__(self, transport: Any, callback: Callable[[Any], Awaitable[None]], *arguments: Any, **options: Any) -> None:
        async def read(message: Any) -> None:
            self._note_read(message)
            await callback(message)

        super().__init__(transport, read, *arguments, **options)
        self._lock = threading.Lock()
        """Events may be acknowledged by any thread."""
        self._readings: dict[TP, _PartitionOffsets] = {}
        self.settling = False
        """True while agents may begin nothing new."""

    def _new_consumer_thread(self) -> _OffsetsThread:
        return _OffsetsThread(self, loop=self.loop, beacon=self.beacon)

    def _note_read(self, message: Any) -> None:
        if not self.flow_active or message.generation_id != self.app.consumer_generation_id:
            return  # partitions have moved since the fetch: no agent here will get it
        if self.app.topics.acks_enabled_for(message.topic):
            with self._lock:
                reading = self._readings.setdefault(message.tp, _PartitionOffsets())
                reading.under_way.add(message.offset)
                reading.next_offset = message.offset + 1

    def ack(self, message: Any) -> bool:
        """Note that an event is done."""
        with self._lock:
            if message.acked:
                return False
            message.acked = True
            self._unacked_messages.discard(message)
            if message.generation_id == self.app.consumer_generation_id and message.tp in self._readings:
                self._readings[message.tp].under_way.discard(message.offset)
                self._n_acked += 1
        return True

    def keep(self, message: Any) -> None:
        """Note that an event is not done after all."""
        with self._lock:
            if message.tp in self._readings:
                self._readings[message.tp].under_way.add(message.offset)

    def _done_offsets(self) -> dict[TP, int]:
        with self._lock:
            return {tp: it.done_offset for tp, it in self._readings.items() if it.done_offset > it.committed}

    async def force_commit(self, topics: Any = None, start_new_transaction: bool = True) -> bool:
        """Commit the offsets of all topics; return whether that succeeded. `commit` allows one call at a time."""
        readings, offsets = self._readings, self._done_offsets()
        if not offsets or self.app.settled or not await self.app.flushed() or readings is not self._readings:
            return False
        if not await self._commit(offsets):
            return False
        for tp, offset in offsets.items():
            readings[tp].committed = offset
        return True

    async def settle(self, timeout_s: float) -> None:
        """See `AgentsApp.settle`."""
        self.settling = True  # agents drop events that they have not begun; copies for the other agents are dropped below
        self.stop_flow()
        for queue in self.app.flow_control._queues:
            begun = [it for it in queue._queue if isinstance(it, EventT) and it.message.tracked]  # by another agent
            queue._queue.clear()
            queue._queue.extend(begun)
        until_s = self.loop.time() + timeout_s / 2
        while self._unacked_messages and self.loop.time() < until_s:  # noqa: ASYNC110 # Faust has no event for it
            await asyncio.sleep(_DONE_INTERVAL_S)
        if left := len(self._unacked_messages):
            self.app.note_uncommitted(f"{left} events are still under way; who has the partitions next reads them again")
        self.app.flow_control.suspend()  # with no pause in which an agent could begin another
        self.app.flow_control.clear()
        try:
            async with asyncio.timeout(timeout_s / 2):
                await self.commit()
                await self.commit()  # the first may have waited for one that was under way already, and done nothing
        except TimeoutError:
            self.app.note_uncommitted("not flushed in time; who has the partitions next reads again what was not committed")

    async def on_partitions_revoked(self, revoked: set[TP]) -> None:
        """Settle and forget the revoked partitions. The group waits for this."""
        if self._not_ours(revoked) and not self.app.settled:
            await self.settle(self.app.ours.revoke_timeout_s)
        self._readings = {}
        await super().on_partitions_revoked(revoked)
        self.settling = self.app.leaving

    async def commit_and_end_transactions(self) -> None:
        """Do nothing: `settle` has committed."""

    async def _add_gap(self, tp: TP, offset_from: int, offset_to: int) -> None:
        """Do nothing: the account of this class has no gaps. An await between fetch and `read` would let partitions move."""


class Transport(_Transport):
    """Faust's transport, with this account of offsets."""

    Consumer = _OffsetsConsumer
