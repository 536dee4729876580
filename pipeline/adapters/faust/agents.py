"""Users' agents in a worker's app: what they record is in the log before the offsets of what they read are committed.

An event is done when its agent asks for the next one, or raises. Offsets of what is done are read first, then the publisher
is flushed, then those offsets are committed: whatever was recorded for an event up to there is acknowledged by then. If a
flush fails nothing is committed, and the next attempt commits what this one would have.

Agents run in Faust's loop, which also takes part in rebalances; heartbeats are aiokafka's, in a thread of its own.

Faust is corrected where it would lose an event: what an agent was cancelled at is not done; nor is what was taken out of a
queue while partitions move; nor the one that others overtook. Values that can't be decoded do not end the agent.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import faust
from faust.app.base import BootStrategy
from faust.exceptions import Skip
from faust.types import EventT
from mode import Service
from mode.supervisors import SupervisorStrategy
from mode.utils.futures import maybe_async

import pipeline.adapters.faust.offsets as offsets
import pipeline.metrics as m
from pipeline.adapters.faust.app import MemberApp
from pipeline.adapters.faust.changes import ChangesChannel
from pipeline.core.record import NAME
from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.metrics import NO_METRICS, Metrics

_log = logging.getLogger(__name__)
_COMMIT_INTERVAL_S = 1.0
_FLUSH_S = 10.0
_ROOM_INTERVAL_S = 0.02
_PRESSED_S = 10.0
"""How long an agent is given nothing because the publisher's buffer is half full: a buffer that does not get emptier by
waiting holds series that are in use."""
_COMPLAIN_S = 10.0
_RAISED, _UNDECODABLE = "raised", "undecodable"
_RESTARTS_MAX = 1e9
_WAKE_S = 0.001

PRIVATE: Mapping[type, frozenset[str]] = {
    faust.App: frozenset({"_producer_flush"}),
    faust.Agent: frozenset({"_execute_actor", "_new_supervisor", "_get_supervisor_strategy", "_replace_actor"}),
    Service: frozenset({"_crash"}),
    SupervisorStrategy: frozenset({"wakeup", "_supervisor"}),
    faust.Stream: frozenset(
        {
            "__aiter__",
            "ack",
            "_set_current_event",
            "_channel_stop_iteration",
            "enable_acks",
            "_enable_passive",
            "on_merge",
            "maybe_start",
            "stop",
        }
    ),
    faust.Channel: frozenset({"_clone_args", "__anext__"}),
    faust.Topic: frozenset({"on_key_decode_error", "on_value_decode_error"}),
    **offsets.PRIVATE,
}
"""What must exist, and mean what it does now; instance attributes are looked at while a worker runs."""


class _Boot(BootStrategy):
    enable_web = False


class AgentsApp(MemberApp):
    """A `faust.App` for agents; `pipeline.faust_app` makes one. It runs in a worker, once.

    `publisher` is the worker's. `on_error` says what becomes of an event at which an agent raises: "skip" logs and counts
    it, and goes on with the next; "stop" ends the worker with exit code 3, and it is read again when that is back.
    """

    BootStrategy = _Boot

    def __init__(self, publisher: Any, *, on_error: str = "skip", **options: Any) -> None:
        if on_error not in ("skip", "stop"):
            raise Invalid(f"on_error: skip or stop, got {on_error!r:.50}")
        self.publisher = publisher
        self.metrics: Metrics = NO_METRICS
        self._stops = on_error == "stop"
        self._flusher = ThreadPoolExecutor(2, thread_name_prefix="pipeline-agents-flush")
        self._complained_s = -_COMPLAIN_S
        self.leaving = False
        """Whether the last settling has begun: agents begin nothing new any more, whatever partitions come and go."""
        self._settled = False
        super().__init__(**{"broker_commit_interval": _COMMIT_INTERVAL_S, **options})

    def changes(self, view: str) -> ChangesChannel:
        """A view's changes, for one agent: each is a `Change(labels, old, new, window_start, partition, offset)`.

        `old` and `new` are answers. They come from the view's changelog, partition by partition in its order, for the
        partitions that this worker folds; each at least once, and a repeated one has the same partition and offset. A new
        agent gets all that the view holds first, with `old` None. Where a series lives in several partitions, a change is
        one of this partition's part. Several changes of a series come as one if compaction has merged them, and `old` can
        then be older than what was seen last, or None: only where an agent is further behind than the changelog's
        `min.compaction.lag.ms` (10 minutes).
        """
        if not NAME.match(view):
            raise Invalid(f"changes: {view!r:.100} is no view's name")
        return ChangesChannel(self, view=view)

    def changes_read(self) -> dict[str, ChangesChannel]:
        """The channels of changes that agents read, by the names of those."""
        found = {name: agent.channel for name, agent in self.agents.items() if isinstance(agent.channel, ChangesChannel)}
        for name, channel in found.items():
            if self.agents[name].concurrency != 1:
                raise Invalid(f"agent {name}: changes come in order, so concurrency is 1")
            if [*found.values()].count(channel) > 1:
                raise Invalid(f"agent {name} shares its changes with another: let each call app.changes({channel.view!r})")
        return found

    def Table(self, *_: Any, **__: Any) -> Any:
        """Refused."""
        raise Invalid("a worker keeps no tables of Faust's: publish to a view, app.publisher.sum(...), and read that")

    GlobalTable = SetTable = SetGlobalTable = Table

    def count_in(self, metrics: Metrics) -> None:
        """Where errors are counted from now on, and from 0: what begins at 1 hides its first from PromQL's `increase`."""
        self.metrics = metrics
        for topic, reason in itertools.product(self.topics_read(), (_RAISED, _UNDECODABLE)):
            metrics.inc(m.AGENT_ERRORS, 0, topic, reason)
        for channel in self.changes_read().values():
            metrics.inc(m.AGENT_ERRORS, 0, str(channel), _RAISED)

    def topics_read(self) -> dict[str, str]:
        """The topics of all agents, and one agent of each."""
        agents = [agent for agent in self.agents.values() if isinstance(agent.channel, faust.Topic)]
        return {topic: agent.name for agent in agents for topic in agent.get_topic_names()}

    async def settle(self, timeout_s: float) -> None:
        """Give agents nothing more; wait for what they are at, and commit: half of the time for each. The last commit."""
        self.leaving = True
        if self._consumer is not None:
            await self._consumer.settle(timeout_s)
        self._settled = True

    @property
    def settled(self) -> bool:
        """Whether nothing is committed any more."""
        return self._settled

    async def flushed(self) -> bool:
        """Flush the publisher; whether all that was recorded before the call is acknowledged."""
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self.loop.run_in_executor(self._flusher, self.publisher.flush, _FLUSH_S)
                await self.producer.flush()  # what agents sent to other topics
        except (PipelineError, TimeoutError) as error:
            self.put_off(error)
            return False
        return True

    def put_off(self, error: object) -> None:
        """Offsets are not committed now."""
        self.metrics.inc(m.AGENT_COMMITS_FAILED)
        if self.loop.time() - self._complained_s >= _COMPLAIN_S:
            self._complained_s = self.loop.time()
            _log.warning("agents' offsets are not committed yet: %s", error)

    async def _producer_flush(self, logger: Any) -> None:
        """Of what agents sent to other topics, which may be away for longer than Kafka's group waits for this."""
        try:
            async with asyncio.timeout(self.ours.revoke_timeout_s):
                await super()._producer_flush(logger)
        except TimeoutError:
            _log.warning("what agents sent is not acknowledged yet: it is not waited for")

    async def room(self) -> None:
        """Wait while the publisher's buffer is under pressure, so that recording does not block the loop."""
        until_s = self.loop.time() + _PRESSED_S
        while self.publisher.pressed and self.loop.time() < until_s:  # noqa: ASYNC110 # it is no event of this loop
            await asyncio.sleep(_ROOM_INTERVAL_S)

    def failed(self, what: str, topic: str, reason: str, error: BaseException) -> bool:
        """Log and count it; whether the event is done all the same."""
        self.metrics.inc(m.AGENT_ERRORS, 1, topic, reason)
        stops = self._stops or isinstance(error, BufferFull)
        done = "the worker ends, and it is read again" if stops else "it counts as done"
        where = "".join(traceback.format_tb(error.__traceback__, limit=-2)).rstrip()  # a whole one takes a second to print
        _log.error("%s: %r; %s\n%s", what, error, done, where)
        if stops:
            self.failure = Unavailable(f"{what}: {error!r}")
        return not stops


class _Agent(faust.Agent):
    def _new_supervisor(self) -> Any:
        """Faust's would end the program when an agent raises at over a hundred events a second."""
        options = {"replacement": self._replace_actor, "loop": self.loop, "beacon": self.beacon}
        return self._get_supervisor_strategy()(max_restarts=_RESTARTS_MAX, over=1.0, **options)

    async def _begin_again(self, aref: Any) -> None:
        """Wake the supervisor until it has: what wakes it while it is busy it forgets, and looks five seconds later."""
        while aref in self.supervisor._index and not self.supervisor.should_stop:
            self.supervisor.wakeup()
            await asyncio.sleep(_WAKE_S)

    async def _execute_actor(self, coro: Any, aref: Any) -> None:
        await super()._execute_actor(self._watched(coro, aref), aref)

    async def _watched(self, coro: Any, aref: Any) -> None:
        stream = aref.stream.get_active_stream()
        try:
            await coro
        except Exception as error:
            event, topic, where = stream.current_event, "", ""
            if event is not None and isinstance(self.channel, faust.Topic):
                message, topic = event.message, event.message.topic
                where = f" at {topic}-{message.partition} offset {message.offset}"
            elif isinstance(self.channel, ChangesChannel):
                topic = str(self.channel)
            if not self.app.failed(f"agent {self.name} failed{where}", topic, _RAISED, error):
                return  # and is not begun again: that would count as asking for the next event
            stream.raised = True
            if stream.iteration is not None:
                with suppress(RuntimeError):  # it is another task's
                    await stream.iteration.aclose()  # now, not when it is collected: that is what acknowledges the event
            stream.raised = False
            stream.let_go()
            aref._crash(error)  # as Faust would, without its account of it
            await self._begin_again(aref)
        else:
            if not (self.should_stop or stream.should_stop):
                self.app.failure = Unavailable(f"agent {self.name} returned: it would read nothing any more")


class _Stream(faust.Stream):
    raised = False
    """Whether the event that is under way counts as done although its agent did not ask for another."""

    iteration: AsyncGenerator[Any, None] | None = None
    """The one that was begun last."""

    broken: tuple[EventT, Any] | None = None
    """The event, and what sensors want to have back, at which a processor raised: its agent was never given it."""

    def __aiter__(self) -> AsyncIterator[Any]:
        self.iteration = self._iterate()
        self._active_agens.add(self.iteration)
        return self.iteration

    async def _iterate(self) -> AsyncGenerator[Any, None]:
        self._finalized = True
        started = await self.maybe_start()
        try:
            while not self.should_stop:
                acks = self.enable_acks
                event, value, state = await self._taken()
                skipped = value is self._skipped_value
                done = skipped
                try:
                    if not skipped:
                        self.events_total += 1
                        yield value
                        done = True
                finally:
                    self.current_event = None
                    if event is not None and (skipped or (acks and (done or self.raised))):
                        self._done(event, state)
        except StopAsyncIteration:
            return
        finally:
            self._channel_stop_iteration(self.channel)
            if started:
                await self.stop()
                self.service_reset()

    async def _taken(self) -> tuple[EventT | None, Any, Any]:
        """The next event, its value (`_skipped_value` if a filter said so), and what sensors want to have back."""
        self.let_go()  # its agent went on
        while True:
            await asyncio.sleep(0)
            await self.app.room()
            value = found = await self.channel.__anext__()
            event = state = None
            if isinstance(found, EventT):
                event, message = found, found.message
                moved = message.generation_id != self.app.consumer_generation_id
                if moved or not self.app.flow_control.is_active() or (self.app.consumer.settling and not message.tracked):
                    continue  # of before a rebalance: whoever has the partition reads it again
                if self.app.topics.acks_enabled_for(message.topic) and not message.tracked:
                    message.tracked = True
                    self.app.consumer.track_message(message)
                state = self._on_stream_event_in(message.tp, message.offset, self, event)
                value = event.value
            self._set_current_event(event)
            try:
                for processor in self._processors:
                    value = await maybe_async(processor(value))
                value = await self.on_merge(value)
            except Skip:
                value = self._skipped_value
            except Exception as error:
                self.broken = event and (event, state)
                if not self._passive or event is None or not self._excused(event, error):
                    raise
                value, self.broken = self._skipped_value, None
            if value is not None or event is not None:
                return event, value, state

    def _excused(self, event: EventT, error: Exception) -> bool:
        """What `take` and its like read for an agent, they read in the background: nobody else would hear of it."""
        it = event.message
        what = f"a filter of an agent failed at {it.topic}-{it.partition} offset {it.offset}"
        done: bool = self.app.failed(what, it.topic, _RAISED, error)
        return done

    async def ack(self, event: EventT) -> bool:
        """Of `take` and its like, when their agent asks for more or has raised: what ends the worker is not done."""
        return self.app.failure is None and bool(await super().ack(event))

    def let_go(self) -> None:
        """The event at which a processor raised is done."""
        broken, self.broken = self.broken, None
        if broken is not None:
            self._done(*broken)

    def _done(self, event: EventT, state: Any) -> None:
        last, message = event.ack(), event.message
        self._on_stream_event_out(message.tp, message.offset, self, event, state)
        if last:
            self._on_message_out(message.tp, message.offset, message)


class _Topic(faust.Topic):
    async def on_key_decode_error(self, exc: Exception, message: Any) -> None:
        """The message is acknowledged by now; nobody gets to see it."""
        self._undecodable("key", exc, message)

    async def on_value_decode_error(self, exc: Exception, message: Any) -> None:
        """The same."""
        self._undecodable("value", exc, message)

    def _undecodable(self, part: str, error: Exception, message: Any) -> None:
        what = f"the {part} of {message.topic}-{message.partition} offset {message.offset} can't be decoded"
        if not self.app.failed(what, message.topic, _UNDECODABLE, error):
            self.app.consumer.keep(message)


AgentsApp.Transport = offsets.Transport
AgentsApp.fixed = {
    **MemberApp.fixed,
    "Agent": _Agent,
    "Stream": _Stream,
    "Topic": _Topic,
    "broker_commit_every": 2**62,  # never by count: see `_add_gap`
}
