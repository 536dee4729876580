"""A Faust app that takes part in a group only to learn the assignment of partitions.

The app subscribes to the deltas topic and has a table on the changelog, so that Faust's assignor deals with actives and
standbys. `core.placement.place` decides which member gets which partition, because Faust's own way leaves members idle and
moves partitions to members without a copy. The partitions are paused in aiokafka before it can fetch from them, Faust's
recovery is replaced by one that does nothing, and no topic is created.

Private names of faust and aiokafka that this relies on are listed in `PRIVATE`, and checked by a test.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import faust
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.conn import AIOKafkaConnection, CloseReason
from aiokafka.consumer import AIOKafkaConsumer
from aiokafka.consumer.group_coordinator import GroupCoordinator
from aiokafka.errors import RequestTimedOutError
from aiokafka.protocol.group import HeartbeatRequest
from faust.app.base import BootStrategy
from faust.assignor.client_assignment import ClientMetadata
from faust.assignor.partition_assignor import PartitionAssignor
from faust.tables.manager import TableManager
from faust.tables.recovery import RebalanceAgain, Recovery, ServiceStopped
from faust.tables.table import Table
from faust.transport.consumer import Consumer as BaseConsumer
from faust.transport.drivers import aiokafka as driver
from faust.types import TP
from mode import Service
from mode.threads import WorkerThread
from yarl import URL

from pipeline.adapters.faust.member_metadata import (
    NOBODY,
    AppIdentity,
    as_topic_groups,
    elect,
    identity_of,
    name_and_url,
    standbys_key,
    warm_of,
)
from pipeline.adapters.faust.strangers import guard, unpacked
from pipeline.core.placement import MemberState, place
from pipeline.errors import Invalid, PipelineError
from pipeline.ports import Member

_log = logging.getLogger(__name__)
_faust_log = logging.getLogger("faust")
"""Logger of Faust's services, whose names would otherwise be derived from our classes."""
_TRIES = 3
"""Brokers, or attempts, that fit into a session."""
_AGAIN_S = 1.0

PRIVATE: Mapping[type, frozenset[str]] = {
    AIOKafkaClient: frozenset({"send", "_get_conn"}),
    AIOKafkaConnection: frozenset({"send", "close", "connected"}),
    AIOKafkaConsumer: frozenset({"pause", "seek", "paused"}),
    GroupCoordinator: frozenset(
        {"reset_generation", "check_errors", "coordinator_dead", "_perform_assignment", "_on_join_complete"}
    ),
    driver.Consumer: frozenset({"_new_consumer_thread", "verify_event_path", "perform_seek", "resume_partitions"}),
    driver.AIOKafkaConsumerThread: frozenset({"_create_consumer", "Worker"}),
    driver.Transport: frozenset({"Consumer"}),
    faust.App: frozenset(
        {"on_first_start", "BootStrategy", "consumer_generation_id", "on_partitions_revoked", "_conf", "_configure"}
    ),
    PartitionAssignor: frozenset(
        {
            "on_assignment",
            "assigned_actives",
            "assigned_standbys",
            "changelog_distribution",
            "_metadata",
            "_url",
            "_decompress",
        }
        | {
            "_update_member_urls",
            "_global_table_standby_assignments",
            "_get_changelog_distribution",
            "_protocol_assignments",
        }
    ),
    TableManager: frozenset({"on_start", "recovery", "_update_channels"}),
    Recovery: frozenset({"_restart_recovery", "_slurp_changelogs", "_resume_streams", "signal_recovery_start"}),
    Table: frozenset({"on_start", "on_rebalance", "persisted_offset"}),
    BaseConsumer: frozenset({"_drain_messages"}),
}
"""Private names on which this module relies. A test checks that they exist; instance attributes are checked at run time."""


@dataclass
class Ours:
    """State that the member's threads share."""

    deltas: str
    changelog: str
    on_assigned: Callable[[int], None]
    """Called with the generation, in Faust's thread."""
    format: int
    """Format that this program writes."""
    revoke_timeout_s: float = 3.0
    """Longest time for which agents may hold up a rebalance."""
    warm: frozenset[int] = frozenset()
    """Partitions with a caught-up copy, which the group learns at the next join."""
    announced_warm: frozenset[int] = frozenset()
    """Value of `warm` at the last join."""

    @property
    def identity(self) -> AppIdentity:
        """Identity that all members must share."""
        return AppIdentity(self.deltas, self.changelog, self.format)


_IDLE_COMMIT_INTERVAL_S = 3_600.0
_LOOK_INTERVAL_S = 5.0
"""Time between two looks of aiokafka at each partition that it might fetch from, apart from events that wake it; 0.2 by
default, which costs half a per cent of a core with 64 partitions that are all paused."""


class _Boot(BootStrategy):
    enable_kafka_producer = False
    enable_web = False


class MemberApp(faust.App):
    """A Faust app without folders in the working directory, and with our consumer."""

    logger = _faust_log

    BootStrategy = _Boot
    ours: Ours
    failure: PipelineError | None = None
    """Reason to end, apart from Faust's own."""

    fetches_nothing = True
    """True if all partitions that this app is assigned are paused."""
    Transport: type[driver.Transport]
    fixed: Mapping[str, Any] = {}
    """Faust settings of all members."""

    def __init__(self, **options: Any) -> None:
        self.given = options
        super().__init__("pipeline", **{**self.fixed, **options})

    def join(self, id: str, *, ours: Ours, loop: asyncio.AbstractEventLoop, **options: Any) -> None:
        """Set up membership in the group `id`, before `start`. Call it in the loop's thread.

        Raises `Invalid` if one of these options was given to the app, too.
        """
        if taken := sorted(self.given.keys() & (options.keys() | self.fixed.keys())):
            raise Invalid(f"faust_app({taken[0]}=...): `pipeline worker` decides that")
        self.loop = loop
        # Streams that get nothing have nothing to commit, and there is no use in looking after each of them.
        idle = {"broker_commit_interval": _IDLE_COMMIT_INTERVAL_S} if self.fetches_nothing else {}
        self._default_options = (id, {**idle, **self.fixed, **self.given, **options})
        self._conf = None  # settings that were looked at when a module was imported
        self.ours = ours
        self.transport = self.Transport(self.conf.broker_consumer, self)
        self.topics.add(self.topic(ours.deltas, acks=False))
        self.tables.add(_Changelog(self, name="pipeline", changelog_topic=self.topic(ours.changelog, acks=False)))

    async def settle(self, timeout_s: float) -> None:
        """Do nothing; the app of agents ends their work here, before the group is left."""

    @property
    def coordinator(self) -> Any:
        """aiokafka's group coordinator, or None. Other threads may read its attributes but not call its methods."""
        consumer = self.consumer._thread._consumer
        return None if consumer is None else consumer._coordinator

    def in_consumer_thread(self, call: Callable[[], object]) -> None:
        """Schedule a call in the consumer's thread."""
        self.consumer._thread.thread_loop.call_soon_threadsafe(call)

    def actives(self) -> frozenset[int]:
        """Return our active partitions, as of the last assignment."""
        return self._partitions(self.assignor.assigned_actives())

    def standbys(self) -> frozenset[int]:
        """Return our standby partitions, as of the last assignment."""
        return self._partitions(self.assignor.assigned_standbys())

    def _partitions(self, assigned: Iterable[TP]) -> frozenset[int]:
        return frozenset(it.partition for it in assigned if it.topic == self.ours.changelog)

    @property
    def rules(self) -> AppIdentity:
        """Identity of the group's app, as of the last assignment."""
        rules: AppIdentity = self.assignor.rules
        return rules

    def members(self) -> list[Member]:
        """Return all members, as of the last assignment."""
        changelog = self.ours.changelog
        return sorted(
            Member(*name_and_url(it), frozenset(has.get(changelog, ())), frozenset(has.get(standbys_key(changelog), ())))
            for it, has in dict(self.assignor.changelog_distribution).items()
        )

    def probe(self) -> None:
        """Raise the error that has ended the app. aiokafka would report its errors to a caller of `getmany`, which does not
        exist.
        """
        if self.failure is not None:
            raise self.failure
        if self.crashed:
            raise self.crash_reason or RuntimeError("Faust crashed without a reason")
        if self.should_stop:
            raise RuntimeError("Faust was stopped, by an agent perhaps")
        if self.coordinator is not None:
            task = self.coordinator._coordination_task
            if task.done() and not task.cancelled() and task.exception():
                raise task.exception()
            if self.coordinator._pending_exception is not None:
                raise self.coordinator._pending_exception

    def note_strangers(self, count: int) -> None:
        """Warn of members of the group that are no workers: they get no partitions."""
        if count:
            _log.warning("%d members of group %r are no workers: they get no partitions", count, self.conf.id)

    def fail(self, error: PipelineError) -> None:
        """End this member with an error."""
        self.failure = error

    async def on_first_start(self) -> None:
        """Create no folders."""


class _Changelog(Table):
    """A table for the assignor only: without a store, without a producer, without a topic of its own."""

    logger = _faust_log

    async def on_start(self) -> None:
        """Open no store."""

    def persisted_offset(self, tp: TP) -> int | None:
        """Return None: nothing is persisted."""
        return None

    async def on_rebalance(self, assigned: set[TP], revoked: set[TP], newly: set[TP], generation_id: int = 0) -> None:
        """Report the new assignment. Awaited before recovery."""
        self.app.ours.on_assigned(generation_id)


class _Tables(TableManager):
    logger = _faust_log
    _recovery: Recovery | None = None

    async def on_start(self) -> None:
        """Start as the base class does, but without its sleep of a second."""
        await self._update_channels()
        await self.recovery.start()

    @property
    def recovery(self) -> Recovery:
        if self._recovery is None:
            self._recovery = _Recovery(self.app, self, beacon=self.beacon, loop=self.loop)
        return self._recovery


class _Recovery(Recovery):
    """Restores nothing and reports success at once, so that agents of the same app go on."""

    logger = _faust_log

    @Service.task
    async def _restart_recovery(self) -> None:
        while not self.should_stop:
            if await self.wait_for_stopped(self.signal_recovery_start):
                break
            self.signal_recovery_start.clear()
            try:
                await self._resume_streams(self._generation_id)
            except RebalanceAgain:
                continue
            except ServiceStopped:
                break
            except Exception as error:  # the committed offsets of agents' topics can't be read, say
                self.log.warning("agents can't go on yet: %r", error)
                await self.sleep(_AGAIN_S)
                self.signal_recovery_start.set()

    @Service.task
    async def _slurp_changelogs(self) -> None:
        """Read nothing."""


class _Assignor(PartitionAssignor):
    """Assigns our partitions by `place`, and other topics as Faust does."""

    _states: Mapping[str, MemberState]
    """By member id, the state of each member that may stay."""
    rules: AppIdentity = NOBODY
    _former_url: str = ""
    """URL of a static member before its restart, under which it gets its former partitions."""

    @property
    def _url(self) -> URL:
        return URL(self._former_url) if self._former_url else super()._url

    @property
    def _metadata(self) -> ClientMetadata:
        metadata = super()._metadata
        ours = self.app.ours
        ours.announced_warm = ours.warm
        metadata.topic_groups = as_topic_groups(ours.identity, ours.announced_warm)
        return metadata

    def _update_member_urls(self, clients_metadata: Mapping[str, ClientMetadata]) -> None:
        """Read the metadata of all members. The leader's first step, and the only one that has them."""
        super()._update_member_urls(clients_metadata)
        identities = {member: identity_of(it.topic_groups) for member, it in clients_metadata.items()}
        counts: Counter[AppIdentity] = Counter()
        for member, it in clients_metadata.items():
            counts[identities[member]] += len(it.assignment.actives.get(identities[member].changelog, ()))
        self.rules = elect(counts, self.app.ours.identity)
        changelog = self.app.ours.changelog
        self._states = {
            member: MemberState(
                frozenset(it.assignment.actives.get(changelog, ())),
                frozenset(it.assignment.standbys.get(changelog, ())),
                warm_of(it.topic_groups),
            )
            for member, it in clients_metadata.items()
            if identities[member] == self.rules
        }

    def _global_table_standby_assignments(self, assignments: Any, partitions_by_topic: Mapping[str, int]) -> Any:
        """Place our partitions: the leader's last step before it sends the assignment."""
        ours = self.app.ours
        if not ours.identity.same_app(self.rules):
            self._states = {}  # another app's partitions are unknown here, and this member is about to leave
        for member in assignments.keys() - self._states.keys():
            assignments[member].actives, assignments[member].standbys = {}, {}
        topics = {ours.deltas, ours.changelog} & partitions_by_topic.keys()
        # Deltas grow last: until then new partitions of the changelog have nothing to fold.
        count = min((partitions_by_topic[topic] for topic in topics), default=0)
        for member, placed in place(count, self._states, self.replicas).items():
            for topic in topics:
                assignments[member].actives[topic] = sorted(placed.actives)
                assignments[member].standbys[topic] = sorted(placed.standbys)
        return super()._global_table_standby_assignments(assignments, partitions_by_topic)

    def _get_changelog_distribution(self, assignments: Any) -> Any:
        """Return the active and standby partitions of all members, which each member is told."""
        found = super()._get_changelog_distribution(assignments)
        changelog = self.app.ours.changelog
        for member, it in assignments.items():
            found[self._member_urls[member]][standbys_key(changelog)] = list(it.standbys.get(changelog, ()))
        return {self._member_urls[member]: found[self._member_urls[member]] for member in self._states}

    def _protocol_assignments(self, assignments: Any, changelogs: Any, topics: Any, groups: Mapping[str, int]) -> Any:
        """Add the group's identity to every assignment."""
        return super()._protocol_assignments(assignments, changelogs, topics, {**groups, **as_topic_groups(self.rules)})

    def on_assignment(self, assignment: Any) -> None:
        """Read the assignment and pause our partitions. aiokafka calls it in its thread before anything can fetch."""
        metadata = ClientMetadata.loads(unpacked(assignment.user_data))
        self.rules = identity_of(metadata.topic_groups)
        moved = metadata.url != str(self._url)
        self._former_url = metadata.url
        try:
            super().on_assignment(assignment)  # it demands the unchanged URL
        finally:
            self._former_url = ""
        if moved or self.rules.format < self.app.ours.format:
            self.app.coordinator.request_rejoin()  # so that the others hear of it
        consumer = self.app.consumer._thread._consumer
        for topic, partitions in assignment.assignment:
            if topic in (self.app.ours.deltas, self.app.ours.changelog):
                for partition in partitions:
                    consumer.pause(TopicPartition(topic, partition))
                    consumer.seek(TopicPartition(topic, partition), 0)  # any position spares asking the broker for one


class _Thread(WorkerThread):
    def __init__(self, service: Any, **options: Any) -> None:
        super().__init__(service, **options)
        self.daemon = True  # one that is held in a rebalance must not hold up the end of the process

    def run(self) -> None:
        """Ignore the error that ends the thread: it was reported to the app, and would only be printed here."""
        try:
            super().run()
        except Exception as error:
            _faust_log.debug("the consumer's thread ended: %r", error)


class _ConsumerThread(driver.AIOKafkaConsumerThread):
    logger = _faust_log
    Worker = _Thread

    async def on_start(self) -> None:
        """Connect with short time-outs."""
        await super().on_start()
        _shorten_timeouts(self._consumer._client, self.app.conf.broker_session_timeout / _TRIES)
        app = self.app
        if app.fetches_nothing:
            self._consumer._fetcher._fetcher_timeout = _LOOK_INTERVAL_S
        guard(self._consumer._coordinator, app.conf.id, app.note_strangers, app.fail)


def _shorten_timeouts(client: Any, timeout_s: float) -> None:
    """Drop a broker that does not answer in time, except while a member waits for others to join.

    A broker that stands still keeps its connections. aiokafka would wait for its answer to a heartbeat for as long as the
    slowest request may take, while the session that another broker coordinates by now runs out.
    """
    plain_get, plain_send = client._get_conn, client.send
    patient_s, client._request_timeout_ms = client._request_timeout_ms / 1000, round(timeout_s * 1000)

    async def get_conn(node_id: Any, *, group: Any = ConnectionGroup.DEFAULT, **options: Any) -> Any:
        connection = await plain_get(node_id, group=group, **options)
        if connection is not None:
            connection._request_timeout = patient_s if group == ConnectionGroup.COORDINATION else timeout_s
        return connection

    async def send(node_id: Any, request: Any, *, group: Any = ConnectionGroup.DEFAULT) -> Any:
        if not isinstance(request, HeartbeatRequest):
            return await plain_send(node_id, request, group=group)
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for, which can swallow that the heartbeats are cancelled
                return await plain_send(node_id, request, group=group)
        except TimeoutError:
            connection = client._conns.get((node_id, group))
            if connection is not None:
                connection.close(reason=CloseReason.CONNECTION_TIMEOUT)
            raise RequestTimedOutError() from None

    client._get_conn, client.send = get_conn, send


class _Consumer(driver.Consumer):
    logger = _faust_log

    def _new_consumer_thread(self) -> _ConsumerThread:
        return _ConsumerThread(self, loop=self.loop, beacon=self.beacon)

    def _not_ours(self, assigned: Iterable[TP]) -> set[TP]:
        return {tp for tp in assigned if tp.topic not in (self.app.ours.deltas, self.app.ours.changelog)}

    def resume_partitions(self, tps: Iterable[TP]) -> None:
        """Resume other partitions than ours."""
        super().resume_partitions(self._not_ours(tps))

    async def perform_seek(self) -> None:
        """Seek only if agents read topics: an outage would end the app otherwise."""
        if self._not_ours(self.assignment()):
            await super().perform_seek()

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Check other partitions than ours. Faust would report ours, which are not fetched, every few seconds."""
        if self._not_ours([tp]):
            super().verify_event_path(now, tp)


class _Transport(driver.Transport):
    Consumer = _Consumer


MemberApp.Transport = _Transport
MemberApp.fixed = {"TableManager": _Tables, "PartitionAssignor": _Assignor}
