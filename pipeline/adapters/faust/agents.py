"""Users' agents in a worker: the deltas that they record are in the log before the offsets of what they read are committed.

An event is done when its agent asks for the next one, or raises. The offsets of done events are noted, then the publisher is
flushed, then those offsets are committed, so that all deltas recorded for these events are acknowledged by then. If a flush
fails nothing is committed, and the next attempt commits these offsets, too.

Agents run in Faust's event loop, which also takes part in rebalances; heartbeats are aiokafka's, in a thread of its own.

Faust would lose events in some cases, which are corrected here. These events are not done: one at which an agent was
cancelled, one that was taken out of a queue while partitions move, and one that later events overtook. Values that can't be
decoded do not end the agent.
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
"""Longest time for which an agent gets no events because the publisher's buffer is half full. A buffer that stays full for
longer holds series that are in use."""
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
"""Private names of Faust on which this module relies. A test checks that they exist; instance attributes are checked at run
time."""


class _AgentsBoot(BootStrategy):
    enable_web = False


class AgentsApp(MemberApp):
    """A `faust.App` for agents; `pipeline.faust_app` makes one. It runs in a worker, once.

    `publisher` is the worker's. `on_error` decides about an event at which an agent raises: "skip" logs and counts it and
    goes on with the next; "stop" ends the worker with exit code 3, and the event is read again after a restart.
    """

    BootStrategy = _AgentsBoot
    fetches_nothing = False

    def __init__(self, publisher: Any, *, on_error: str = "skip", **options: Any) -> None:
        if on_error not in ("skip", "stop"):
            raise Invalid(f"on_error: skip or stop, got {on_error!r:.50}")
        self.publisher = publisher
        self.metrics: Metrics = NO_METRICS
        self._stops = on_error == "stop"
        self._flusher = ThreadPoolExecutor(2, thread_name_prefix="pipeline-agents-flush")
        self._complained_s = -_COMPLAIN_S
        self.leaving = False
        """True once the last `settle` has begun: agents begin nothing new, whatever partitions come and go."""
        self._settled = False
        super().__init__(**{"broker_commit_interval": _COMMIT_INTERVAL_S, **options})

    def changes(self, view: str) -> ChangesChannel:
        """Return a channel of a view's changes for one agent: `Change(labels, old, new, window_start, partition, offset)`.

        `old` and `new` are answers. Changes come from the view's changelog, in order within a partition, for the partitions
        that this worker folds. Each comes at least once; a repeated one has the same partition and offset. A new agent first
        gets everything that the view holds, with `old` None. Where a series lives in several partitions, a change concerns
        one partition's part. An agent that is further behind than the changelog's `min.compaction.lag.ms` (10 minutes) can
        get several changes of a series as one, whose `old` is then older than the last `new`, or None.
        """
        if not NAME.match(view):
            raise Invalid(f"changes: {view!r:.100} is no view's name")
        return ChangesChannel(self, view=view)

    def changes_read(self) -> dict[str, ChangesChannel]:
        """Return the channels of changes by the name of the agent that reads them."""
        found = {name: agent.channel for name, agent in self.agents.items() if isinstance(agent.channel, ChangesChannel)}
        for name, channel in found.items():
            if self.agents[name].concurrency != 1:
                raise Invalid(f"agent {name}: changes come in order, so concurrency is 1")
            if [*found.values()].count(channel) > 1:
                raise Invalid(f"agent {name} shares its changes with another: let each call app.changes({channel.view!r})")
        return found

    def Table(self, *_: Any, **__: Any) -> Any:
        """Raise `Invalid`: tables of Faust are not supported."""
        raise Invalid("a worker keeps no tables of Faust's: publish to a view, app.publisher.sum(...), and read that")

    GlobalTable = SetTable = SetGlobalTable = Table

    def count_in(self, metrics: Metrics) -> None:
        """Count errors in `metrics` from now on. Each counter begins at 0: PromQL's `increase` needs a first value."""
        self.metrics = metrics
        for topic, reason in itertools.product(self.topics_read(), (_RAISED, _UNDECODABLE)):
            metrics.inc(m.AGENT_ERRORS, 0, topic, reason)
        for channel in self.changes_read().values():
            metrics.inc(m.AGENT_ERRORS, 0, str(channel), _RAISED)

    def topics_read(self) -> dict[str, str]:
        """Return the topics of all agents, each with the name of one of its agents."""
        agents = [agent for agent in self.agents.values() if isinstance(agent.channel, faust.Topic)]
        return {topic: agent.name for agent in agents for topic in agent.get_topic_names()}

    async def settle(self, timeout_s: float) -> None:
        """Give agents no more events, wait for the present ones, and commit for the last time: half of the time for each."""
        self.leaving = True
        if self._consumer is not None:
            await self._consumer.settle(timeout_s)
        self._settled = True

    @property
    def settled(self) -> bool:
        """True once nothing is committed any more."""
        return self._settled

    async def flushed(self) -> bool:
        """Flush the publisher; return whether everything that was recorded before the call is acknowledged."""
        try:
            async with asyncio.timeout(_FLUSH_S):
                await self.loop.run_in_executor(self._flusher, self.publisher.flush, _FLUSH_S)
                await self.producer.flush()  # what agents sent to other topics
        except (PipelineError, TimeoutError) as error:
            self.note_uncommitted(error)
            return False
        return True

    def note_uncommitted(self, error: object) -> None:
        """Count and log that offsets are not committed now."""
        self.metrics.inc(m.AGENT_COMMITS_FAILED)
        if self.loop.time() - self._complained_s >= _COMPLAIN_S:
            self._complained_s = self.loop.time()
            _log.warning("agents' offsets are not committed yet: %s", error)

    async def _producer_flush(self, logger: Any) -> None:
        """Flush what agents sent to other topics, but no longer than a rebalance may be held up."""
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
        """Log and count an error; return whether its event counts as done."""
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
        """Return a supervisor without Faust's limit on restarts, which ends the program at 100 errors a second."""
        options = {"replacement": self._replace_actor, "loop": self.loop, "beacon": self.beacon}
        return self._get_supervisor_strategy()(max_restarts=_RESTARTS_MAX, over=1.0, **options)

    async def _begin_again(self, aref: Any) -> None:
        """Wake the supervisor until it restarts the agent: while it is busy it forgets a wake-up, and looks five seconds
        later.
        """
        while aref in self.supervisor._index and not self.supervisor.should_stop:
            self.supervisor.wakeup()
            await asyncio.sleep(_WAKE_S)

    async def _execute_actor(self, coro: Any, aref: Any) -> None:
        await super()._execute_actor(self._report_failure(coro, aref), aref)

    async def _report_failure(self, coro: Any, aref: Any) -> None:
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
                    await stream.iteration.aclose()  # now, not when it is garbage-collected: this acknowledges the event
            stream.raised = False
            stream.release()
            aref._crash(error)  # as Faust would, without its account of it
            await self._begin_again(aref)
        else:
            if not (self.should_stop or stream.should_stop):
                self.app.failure = Unavailable(f"agent {self.name} returned: it would read nothing any more")


class _Stream(faust.Stream):
    raised = False
    """True if the present event counts as done although its agent did not ask for the next."""

    iteration: AsyncGenerator[Any, None] | None = None
    """The iteration that was begun last."""

    broken: tuple[EventT, Any] | None = None
    """The event at which a processor raised, before its agent got it, and the state of sensors."""

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
        """Return the next event, its value (`_skipped_value` if a filter dropped it), and the state of sensors."""
        self.release()  # its agent went on
        while True:
            await asyncio.sleep(0)
            await self.app.room()
            value = found = await self.channel.__anext__()
            event = state = None
            if isinstance(found, EventT):
                event, message = found, found.message
                moved = message.generation_id != self.app.consumer_generation_id
                if moved or not self.app.flow_control.is_active() or (self.app.consumer.settling and not message.tracked):
                    continue  # from before a rebalance: the new owner of the partition reads it again
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
        """Report an error of a filter in the background reading of `take` and similar; return whether the event is done."""
        it = event.message
        what = f"a filter of an agent failed at {it.topic}-{it.partition} offset {it.offset}"
        done: bool = self.app.failed(what, it.topic, _RAISED, error)
        return done

    async def ack(self, event: EventT) -> bool:
        """Acknowledge an event for `take` and similar, unless an error is about to end the worker."""
        return self.app.failure is None and bool(await super().ack(event))

    def release(self) -> None:
        """Count the event at which a processor raised as done."""
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
        """Report a key that can't be decoded. The message is acknowledged by now, and no agent sees it."""
        self._undecodable("key", exc, message)

    async def on_value_decode_error(self, exc: Exception, message: Any) -> None:
        """Report a value that can't be decoded. The message is acknowledged by now, and no agent sees it."""
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
