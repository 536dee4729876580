"""A worker: alone, or one of many that share the partitions."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import pipeline.metrics as m
from pipeline.adapters.kafka.checks import CompactionLag
from pipeline.adapters.static_membership import StaticMembership
from pipeline.core.answer import MemberStatus, Status
from pipeline.errors import Invalid, LogCorrupt, PipelineError, StoreCorrupt
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Membership, ReadableStore
from pipeline.roles.kafka_role import TOPICS, KafkaRole, check_partitions
from pipeline.roles.member import ClusterMember
from pipeline.settings import KafkaSettings, LogSettings, PublisherSettings, WorkerSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.figures import partition_status
from pipeline.worker.lag import DeltasEnds, LagReporter
from pipeline.worker.loop import WorkerLoop
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.replicas import ReplicaLoop
from pipeline.worker.restore import RestoreProgress
from pipeline.worker.watchdog import AWAY_S, CALLS_OF_A_STEP, WAIT_S, Watchdog, observe

if TYPE_CHECKING:
    from pipeline.adapters.faust.agents import AgentsApp
    from pipeline.adapters.faust.security import Security
    from pipeline.roles.agents import Feeds

_log = logging.getLogger(__name__)
_STOP_S = 30.0
_PUBLISHER_STOP_S = 5.0
_STALLED_STOP_S = 2.0
"""Time for a loop that stands still: it will hardly stop."""
_SETTLE_S = 5.0
"""Time in which a member notices that a partition is not assigned to it after all, before it fences the owner."""


class ClusterWorker(KafkaRole):
    """Folds partitions of a Kafka log.

    Without a `name` it folds the listed partitions, or all, later ones too; a worker that is started later for a partition
    fences the earlier one. With a name it is a member of the group `app`, which shares the partitions and keeps standbys;
    with `static` too, a restart within `session_timeout_ms` moves nothing. `agents` run beside a worker with a name.

    `start` returns at once. `on_fatal` is called at most once, from any thread: stop then, and end the process with
    `errors.exit_code`. Raises `Unavailable` if no broker answers or another process has the data directory, `Invalid` if
    topics or settings are wrong.
    """

    def __init__(
        self,
        url: str,
        log_settings: LogSettings,
        *,
        kafka_settings: KafkaSettings | None = None,
        worker_settings: WorkerSettings | None = None,
        partitions: Sequence[int] | None = None,
        name: str = "",
        static: bool = True,
        agents: AgentsApp | None = None,
        publisher_settings: PublisherSettings | None = None,
        metrics: Metrics = NO_METRICS,
        on_fatal: Callable[[BaseException], None] = lambda _: None,
        on_progress: Callable[[RestoreProgress], None] = lambda _: None,
    ) -> None:
        if agents is not None and not name:
            raise Invalid("agents need a worker with a name: their topics are shared by a group")
        if name and partitions is not None:
            raise Invalid("a worker with a name is given its partitions by its group: leave the list out")
        self._kafka = kafka_settings or KafkaSettings()
        self._security: Security | None = None
        """Security settings of the membership; None without a name."""
        if name:
            from pipeline.adapters.faust.security import security_of

            self._security = security_of(self._kafka.kafka)  # refuses what it can't do before anything is opened
        publisher = publisher_settings or PublisherSettings()
        super().__init__(url, log_settings, self._kafka, publisher, on_fatal)
        self.url = ""
        """URL of this worker's status for other members; set it before `start`."""
        self._name, self._static = name, static
        self._worker = worker_settings or WorkerSettings()
        self._metrics = metrics
        self._on_progress = on_progress
        self._progress: dict[int, RestoreProgress] = {}
        self._listed = partitions
        self._member: ClusterMember | None = None
        try:
            check_partitions(partitions or (), self.partition_count)
            metrics.set(m.NATIVE_PRODUCE, self.log.produces_at_once())
            self._topic_ids = self._ask_topic_ids()
            self._agents = agents
            self._feeds: Feeds | None = None
            if agents is not None:
                self._bind_agents(agents, url, publisher, log_settings)
        except BaseException:
            self._close()
            raise
        self._standbys = self._new_standbys()
        self._loop = self._new_loop()
        self._mirror = self._new_mirror()
        self._watched = [self._mirror.thread]
        """Threads whose standstill nothing else would show."""
        self._watchdog = self._new_watchdog()

    def _bind_agents(self, agents: AgentsApp, url: str, settings: PublisherSettings, log_settings: LogSettings) -> None:
        from pipeline.roles.agents import Feeds, check_topics_read  # with Faust behind it

        check_topics_read(agents, self.log)
        agents.count_in(self._metrics)
        agents.publisher.bind(url, settings, self._kafka, self._metrics)
        self._feeds = Feeds(
            agents,
            log=self.log,
            data=self._data.path,
            log_settings=log_settings,
            clock=self.clock,
            partitions=lambda: self._loop.partitions,
            distrust=self._distrust,
            on_fatal=self._fail,
            metrics=self._metrics,
        )

    def _distrust(self, partition: int, store: ReadableStore, error: StoreCorrupt) -> None:
        self._loop.distrust(partition, store, error)  # a method, because the loop is made after the feeds

    def _new_standbys(self) -> ReplicaLoop:
        standbys = ReplicaLoop(
            log=self.log,
            stores=self._stores,
            clock=self.clock,
            settings=self._worker,
            delete_retention_ms=self._delete_retention_ms,
            on_fatal=self._fail,
            on_served=self._report_warm,
            metrics=self._metrics,
        )
        standbys.follow(frozenset())
        return standbys

    def _new_loop(self) -> WorkerLoop:
        return WorkerLoop(
            self._partition,
            log=self.log,
            clock=self.clock,
            settings=self._worker,
            on_fatal=self._fail,
            on_progress=self._note_progress,
            on_moved=self._report_warm,
            standbys=self._standbys,
            settle_s=_SETTLE_S if self._name else 0.0,
            transaction_timeout_ms=self._kafka.transaction_timeout_ms,
            metrics=self._metrics,
        )

    def _new_mirror(self) -> LagReporter:
        return LagReporter(
            self._positions,
            ends=self._ask_ends,
            start_offsets=partial(self.log.start_offsets, DELTAS),
            commit=self.log.mirror_positions,
            clock=self.clock,
            interval_ms=self._worker.mirror_interval_ms,
            ours=lambda: self._loop.partitions,
            bootstrap=self.log.address.bootstrap,
            topic=self.log.address.topic(DELTAS),
            metrics=self._metrics,
        )

    def _new_watchdog(self) -> Watchdog:
        return Watchdog(
            self._last_ends,
            lambda ends: observe(self._loop.partitions, ends, self._progress, self._loop.assigned),
            clock=self.clock,
            stall_timeout_ms=self._worker.stall_timeout_ms,
            commit_timeout_ms=self._worker.commit_timeout_ms,
            on_fatal=self._fail,
            threads=self._watched,
            silent_s=max(WAIT_S, CALLS_OF_A_STEP * self._kafka.kafka_timeout_ms / 1000),
            metrics=self._metrics,
        )

    def _partition(self, number: int) -> OwnedPartition:
        self._progress.pop(number, None)  # of an earlier assignment
        return OwnedPartition(
            number,
            log=self.log,
            stores=self._stores,
            clock=self.clock,
            settings=self._worker,
            delete_retention_ms=self._delete_retention_ms,
            app=self.log.address.app,
            name=self._name or socket.gethostname(),
            ask_lag_max_s=CompactionLag(self.log),
            metrics=self._metrics,
        )

    def _new_membership(self) -> Membership:
        if self._security is None:
            static = StaticMembership(
                lambda: min(self.log.partition_count(topic) for topic in TOPICS),
                self._listed,
                clock=self.clock,
                metrics=self._metrics,
            )
            self._watched.append(static.thread)
            return static
        from pipeline.adapters.faust.membership import FaustMembership  # heavy, and not every worker needs it

        address, worker = self.log.address, self._worker
        return FaustMembership(
            address.bootstrap,
            address.app,
            deltas=address.topic(DELTAS),
            changelog=address.topic(CHANGELOG),
            name=self._name,
            static=self._static,
            taken=partial(self.log.static_members, address.app),
            security=self._security,
            url=self.url,
            standby_count=worker.standby_count,
            session_timeout_ms=worker.session_timeout_ms,
            revoke_timeout_ms=worker.revoke_timeout_ms,
            metadata_refresh_ms=self._kafka.metadata_refresh_ms,
            app_of_agents=self._agents,
            metrics=self._metrics,
        )

    def _ask_topic_ids(self) -> Mapping[str, str]:
        return {topic: self.log.topic_id(topic) for topic in (DELTAS, CHANGELOG)}

    def _ask_ends(self) -> DeltasEnds:
        """Return the end offsets of deltas, after checks of the topics: the lag reporter calls it each second.

        A topic that was made anew, and has grown as long as the old one, shows only in its id. The ends of the changelog
        tell an owner that commits nothing what others have written to it, before compaction (see `CompactionLag`), and that
        its last commit can't be read.
        """
        for topic, topic_id in self._ask_topic_ids().items():
            if self._topic_ids[topic] != topic_id:
                error = LogCorrupt(
                    f"topic {self.log.address.topic(topic)} was made anew while this worker ran: start it again"
                )
                self._fail(error)
                raise error
        asked_s = self.clock.monotonic_s()
        if self._loop.wants_changelog_ends(asked_s):
            self._loop.note_changelog_ends(asked_s, self.log.end_offsets(CHANGELOG))
        stable_offsets = self.log.end_offsets(DELTAS)  # before the high watermarks, which must not be below
        return DeltasEnds(self.log.high_watermarks(DELTAS), stable_offsets)

    def _last_ends(self) -> tuple[float, Mapping[int, int]]:
        """Return end offsets for the watchdog, and when they were asked for; -1 and none while the log can't be read."""
        asked_s, ends = self._mirror.last_answer
        return (asked_s, ends) if asked_s - self._loop.away_s > AWAY_S else (-1.0, {})

    def _positions(self) -> dict[int, int]:
        return {number: it.task.position.next_offset for number, it in self._loop.partitions.items() if it.started}

    @property
    def partitions(self) -> Mapping[int, OwnedPartition]:
        """Partitions that this worker folds now, by number; see `WorkerLoop.partitions`."""
        return self._loop.partitions

    @property
    def ready(self) -> bool:
        """Return whether every partition of the first assignment is restored and folding."""
        return self._loop.ready

    def start(self) -> None:
        """Join the group; then fence, restore and fold the assigned partitions."""
        self._member = ClusterMember(
            self._new_membership(),
            self._loop,
            self._standbys,
            self._fail,
            revoke_timeout_s=self._worker.revoke_timeout_ms / 1000,
            feeds=self._feeds,
        )
        self._standbys.start()
        self._loop.start()
        self._mirror.start()
        if self._feeds is not None:
            self._feeds.start()
        self._member.join()
        self._watchdog.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until `ready`, at most `timeout_s`; return whether it is."""
        return self._loop.wait_ready(timeout_s)

    def stop(self) -> bool:
        """Commit what is folded, hand the partitions over, close everything; return whether it was done in time.

        Folding goes on until others have the partitions, or the group knows that this member has left. May be called twice.
        """
        self._watchdog.stop()
        self._mirror.stop()
        if self._member is not None:
            self._member.leave()
        if self._agents is not None:
            self._close_publisher(self._agents)
        fed = self._feeds is None or self._feeds.stop()  # before the stores, from which feeds read definitions
        done = self._loop.stop(_STALLED_STOP_S if self._watchdog.stalled else _STOP_S) and fed
        self.log.close()
        done = self._standbys.stop() and done
        if done:  # a thread that still works in RocksDB needs it open; the process is about to end anyway
            self._close()
        return done

    def _close_publisher(self, agents: AgentsApp) -> None:
        try:
            agents.publisher.close(timeout_s=_PUBLISHER_STOP_S)
        except PipelineError as error:  # the events are read again: their offsets are not committed
            _log.warning("deltas that agents recorded last are not acknowledged: %s", error)

    def status(self) -> Status:
        """Return what `/v1/status` shows."""
        ends = self._mirror.end_offsets
        members = [] if self._member is None else self._member.members()
        return Status(
            role="worker",
            app=self.log.address.app,
            name=self._name,
            at_ms=self.clock.now_ms(),
            ready=self.ready,
            fenced_count=self._loop.fenced_count,
            partition_count=self.log.partition_count(DELTAS),
            series_max=self._worker.series_max,
            partitions=[
                partition_status(partition, ends.get(number), self._progress.get(number))
                for number, partition in sorted(self._loop.partitions.items())
            ],
            standbys=sorted(self._standbys.status(), key=lambda it: it.partition),
            members=[MemberStatus(it.name, it.url, sorted(it.actives), sorted(it.standbys)) for it in members],
        )

    def _report_warm(self) -> None:
        if self._member is not None:
            self._member.report_warm()

    def _note_progress(self, progress: RestoreProgress) -> None:
        self._progress[progress.partition] = progress
        self._on_progress(progress)
