"""Follows the changelog into stores that are only read: those of query servers and of standbys.

A store is served once it has reached an end of the changelog that was asked for after its reading began. Before that it can
be at a commit boundary and lack series all the same: compaction removes an older value of a key although the position
records between it and the newer one are still there. After that this can't happen, as long as the store is never further
behind than the compaction lag (`min.compaction.lag.ms`), because younger records remove nothing yet. So a store that was
away for longer is not served until it has caught up again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from functools import partial

from msgspec import UNSET

import pipeline.metrics as m
from pipeline.core.answer import PartitionStatus
from pipeline.core.record import Records
from pipeline.errors import NotReady, PipelineError, RecordsLost, StoreAhead, StoreCorrupt, Unavailable
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, Log, LogReader, ReadableStore, Store, Stores
from pipeline.settings import WorkerSettings
from pipeline.threads import POLL_INTERVAL_S, PeriodicThread
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import FETCH_BYTES_MAX, Follower
from pipeline.worker.replica import LagMax, Replica, ReplicaState
from pipeline.worker.restore import DamageHistory, RestoreProgress, StoreOpener, check_restorable

_log = logging.getLogger(__name__)
LAG_MAX_S = 300.0
"""Half of the `min.compaction.lag.ms` that `topics/` gives to the changelog, for logs that always have it."""
_ASK_LAG_S = 5.0
"""Seconds between two questions for the lag where an operator can change it: less than compaction takes to begin."""
_END_INTERVAL_S = 1.0
"""Seconds between two questions for the ends of the changelog and the topic's id; less where the lag is short."""
_COUNTED = (m.STORES_REBUILT, m.STORES_SET_ASIDE, m.RESTORE_ENTRIES)


class ReplicaLoop:
    """Keeps stores up to date in a thread of its own: of `partitions` (None: all) or, once `follow` was called, of those.

    While the log is away the stores stay as they are and can be read. `on_fatal` is called once, from the loop's thread,
    if the loop can't go on. `lag_max_s` must be well below the time for which the log compacts nothing; where an operator
    can change that time, `ask_lag_max_s` returns the bound, and is called again and again.
    """

    def __init__(
        self,
        *,
        log: Log,
        stores: Stores,
        clock: Clock,
        settings: WorkerSettings,
        delete_retention_ms: int,
        on_fatal: Callable[[BaseException], None],
        on_progress: Callable[[RestoreProgress], None] = lambda _: None,
        on_served: Callable[[], None] = lambda: None,
        metrics: Metrics = NO_METRICS,
        lag_max_s: float = LAG_MAX_S,
        ask_lag_max_s: LagMax | None = None,
        partitions: frozenset[int] | None = None,
    ) -> None:
        self._thread = PeriodicThread(
            "pipeline-replica",
            self.step,
            log=_log,
            clock=clock,
            metrics=metrics,
            outage_message="answers grow stale",
            on_unavailable=self._on_unavailable,
            on_fatal=on_fatal,
            fatal_message="following ends",
            on_end=self.close,
        )
        self._log = log
        self._opener = StoreOpener(stores, accept_loss=settings.accept_loss, metrics=metrics)
        self._clock = clock
        self._settings = settings
        self._delete_retention_ms = delete_retention_ms
        self._on_progress = on_progress
        self._on_served = on_served
        self._metrics = metrics
        self._lag_max_s = lag_max_s
        self._ask_lag_max_s = ask_lag_max_s
        self._next_ask_s = 0.0
        self._end_interval_s = min(_END_INTERVAL_S, lag_max_s / 10)
        self._topic_id = ""
        self._replicas: dict[int, Replica] = {}
        self._changed = threading.Condition()
        self._followed = partitions
        """Partitions to follow; None: all that there are."""
        self._claimed: set[int] = set()
        """Partitions whose stores are open here, or about to be opened or deleted."""
        self._needed = partitions or frozenset()
        """Partitions that must be readable before anything is answered."""
        self._readable: Mapping[int, ReadableStore] = {}
        self._reader: LogReader | None = None
        self._assigned = False
        self._ready = threading.Event()
        self._next_ends_s = 0.0
        self._damages = DamageHistory()
        self._undecided: dict[int, str] = {}
        """By partition, the reason why its store is neither served nor deleted."""
        self._trouble = ""
        """Last error since anything was read: librdkafka reports a missing permission only once."""

    # From any thread

    @property
    def ready(self) -> bool:
        """True if all stores can be read."""
        return bool(self._needed) and self._needed <= self._readable.keys()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until the stores can be read for the first time, or for so long."""
        return self._ready.wait(timeout_s)

    def stores(self) -> Mapping[int, ReadableStore]:
        """Return the stores that can be read, by partition. Raises `NotReady` while one of them is being restored.

        Call this again after reading: if a store is another object then, what was read of it may not be whole.
        """
        readable = self._readable
        if not self._needed or not self._needed <= readable.keys():
            if self._ask_lag_max_s is not None and self._ask_lag_max_s.why_not:
                raise NotReady(self._ask_lag_max_s.why_not)
            replicas = [*self._replicas.values()]
            remaining = sum(replica.remaining for replica in replicas if replica.state is ReplicaState.RESTORING)
            damaged = "; rebuilding what was damaged" if any(replica.damage for replica in replicas) else ""
            undecided = "".join(f"; {why}" for why in [*self._undecided.values()][:1])
            raise NotReady(f"restoring: about {remaining} changelog records to go{damaged}{undecided}{self._trouble}")
        return readable

    def distrust(self, partition: int, store: ReadableStore, error: StoreCorrupt) -> None:
        """Stop serving a partition's store, in which `error` was found, and rebuild it soon. Does not block.

        Does nothing if `store` is not served any more. Raises `LogCorrupt` if a rebuild has not helped before.
        """
        with self._changed:
            if self._readable.get(partition) is not store:
                return
            self._damages.note(partition, error)
            self._replicas[partition].distrust(str(error))  # not the error: it holds scans, and they hold the store's files
            self._readable = {number: it for number, it in self._readable.items() if number != partition}

    def follow(self, partitions: frozenset[int]) -> None:
        """Keep stores of these partitions and no others. None of the stores may be open elsewhere. Does not block."""
        with self._changed:
            self._followed = partitions
        self._next_ends_s = 0.0

    def take(self, partition: int, stopping: Callable[[], bool]) -> None:
        """Stop following a partition, and wait until its store is closed. Raises `NotReady` if `stopping` turns true before.

        The store then lacks only what was written since the last read, so that its restore has little to do.
        """
        with self._changed:
            if self._followed is not None:
                self._followed -= {partition}
            while partition in self._claimed:
                if stopping():
                    raise NotReady(f"partition {partition}: its store is open still")
                self._changed.wait(POLL_INTERVAL_S)

    def caught_up(self) -> frozenset[int]:
        """Return the partitions whose stores hold all that the changelog did a moment ago."""
        return frozenset(self._readable)

    def status(self) -> list[PartitionStatus]:
        """Return the status of each partition, without what the reader knows."""
        now_s = self._clock.monotonic_s()
        readable = self._readable
        return [
            PartitionStatus(
                partition=it.number,
                phase="following" if it.number in readable else "restoring",
                changelog_next_offset=it.follower.next_offset,
                changelog_remaining=it.remaining,
                restore=UNSET if it.number in readable else it.progress(now_s).status(),
            )
            for it in [*self._replicas.values()]
        ]

    def start(self) -> None:
        """Begin in a thread of its own."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """End; return whether the thread has ended in time. The stores stay open for reads that are under way."""
        return self._thread.stop(timeout_s)

    # The loop

    def close(self) -> None:
        """Close the reader."""
        reader, self._reader = self._reader, None
        self._assigned = False
        if reader is not None:
            reader.close()

    def _on_unavailable(self, error: Unavailable) -> None:
        self._trouble = f"; {error}"
        self._thread.outage.wait(error)

    def step(self) -> None:
        """Ask for the ends of the changelog if it is time to, read, apply."""
        self._rebuild_damaged()
        for replica in [*self._replicas.values()]:
            if not self._is_followed(replica.number):
                self._drop(replica)
        if self._followed is not None and not self._followed:
            self.close()
            self._thread.stopping.wait(POLL_INTERVAL_S)
            return
        reader = self._reader = self._reader or self._log.reader(CHANGELOG)
        if self._clock.monotonic_s() >= self._next_ends_s:
            try:
                self._ask_ends()
            except Unavailable as error:  # perhaps one partition only has no leader: the others are followed
                self._on_unavailable(error)
                self._next_ends_s = self._clock.monotonic_s() + self._end_interval_s
        if not self._assigned:
            reader.assign({number: replica.follower.next_offset for number, replica in self._replicas.items()})
            self._assigned = True
        fetch_count_max = self._settings.restore_fetch_count_max
        try:
            fetched = reader.poll(record_count_max=fetch_count_max, bytes_max=FETCH_BYTES_MAX, timeout_s=POLL_INTERVAL_S)
        except RecordsLost as error:
            _log.warning("%s", error)
            self._check_all(error)
            return
        if fetched:
            self._trouble = ""
        for records in fetched:
            self._apply(self._replicas[records.partition], records)
        now_s = self._clock.monotonic_s()
        for replica in [*self._replicas.values()]:
            self._note_progress(replica, now_s)

    def _apply(self, replica: Replica, records: Records) -> None:
        away_s = self._clock.monotonic_s() - replica.caught_up_s
        if replica.served is not None and away_s > self._lag_max_s:
            _log.warning("partition %d was %.0f s behind; it is not served until it has caught up", replica.number, away_s)
            self._publish(replica.hide)
        try:
            if away_s * 1000 > self._delete_retention_ms:
                raise StoreCorrupt(f"{away_s:.0f} s behind: tombstones that it needs may be gone")
            before = replica.follower.entries_total
            replica.follower.apply(records)
            self._metrics.inc(m.RESTORE_ENTRIES, replica.follower.entries_total - before, replica.number)
        except StoreCorrupt as error:
            self._rebuild(replica.number, error)
        except StoreAhead as error:
            self._found_ahead(replica, error)
        except Unavailable:
            self._drop(replica)  # this follower has lost what was read and not written: read it again
            raise

    def _rebuild_damaged(self) -> None:
        """Rebuild stores that readers found damaged. While the log is away they stay: they may be all that is left."""
        damaged = [replica for replica in self._replicas.values() if replica.state is ReplicaState.DAMAGED]
        if damaged:
            self._log.start_offsets(CHANGELOG)
        for replica in damaged:
            self._rebuild(replica.number, StoreCorrupt(replica.damage))

    def _note_progress(self, replica: Replica, now_s: float) -> None:
        caught_up, restoring = replica.catch_up(now_s, self._lag_max_s), replica.state is ReplicaState.RESTORING
        if caught_up and restoring and self._lag_max_s:
            self._publish(replica.serve)
            _log.info("partition %d can be read", replica.number)
            self._report(replica, now_s)
        elif restoring and replica.target is not None:
            replica.remaining = max(0, replica.target[1] - replica.follower.next_offset)
            self._report(replica, now_s)

    def _report(self, replica: Replica, now_s: float) -> None:
        self._metrics.set(m.RESTORE_REMAINING, replica.remaining, replica.number)
        self._on_progress(replica.progress(now_s))

    # What there is to follow

    def _ask_ends(self) -> None:
        """Ask for the ends of the changelog; notice new partitions, and a topic that was deleted and created again."""
        self._ask_lag()
        asked_s = self._clock.monotonic_s()
        topic_id = self._log.topic_id(CHANGELOG)
        ends = self._log.end_offsets(CHANGELOG)
        if self._topic_id and topic_id != self._topic_id:
            _log.warning("the changelog was made anew")
            for replica in [*self._replicas.values()]:
                self._drop(replica)
        self._topic_id = topic_id
        opened = [number for number in ends if number not in self._replicas and self._is_followed(number)]
        again_s = 0.0 if opened else self._end_interval_s
        for number in opened:
            if not self._claim(number):
                continue
            try:
                for metric in _COUNTED:  # exported from the start: a rise shows only from a value
                    self._metrics.inc(metric, 0, number)
                self._replicas = {**self._replicas, number: self._opener.open(number, partial(self._load, number))}
                self._assigned = False
                self._undecided.pop(number, None)
            except StoreAhead as error:
                self._wait_for_decision(number, error)
                again_s = self._end_interval_s
            except StoreCorrupt as error:  # also in a store that was just rebuilt
                self._opener.destroy(number, str(error))
                again_s = self._end_interval_s
            finally:
                if number not in self._replicas:
                    self._release(number)
        if not self._needed and self._followed is None:
            self._needed = frozenset(ends)
        for number, replica in [*self._replicas.items()]:
            if replica.follower.next_offset == ends.get(number):  # it had read so far before the ends were asked for
                self._settle(replica)
            if replica.target is None and replica.started_s <= asked_s and number in ends:
                replica.target = (asked_s, ends[number])
        # Stores that were just opened need an end that is asked for from now on: at once.
        self._next_ends_s = asked_s + again_s

    def _ask_lag(self) -> None:
        """Ask for the topic's compaction lag, and notice that it has changed."""
        now_s = self._clock.monotonic_s()
        if self._ask_lag_max_s is None or now_s < self._next_ask_s:
            return
        self._next_ask_s = now_s + _ASK_LAG_S
        lag_max_s = self._ask_lag_max_s()
        if lag_max_s == self._lag_max_s:
            return
        self._lag_max_s = lag_max_s
        if lag_max_s:
            self._end_interval_s = min(_END_INTERVAL_S, lag_max_s / 10)
            _log.info("partitions that are over %g s behind are not served: half of min.compaction.lag.ms", lag_max_s)
            return
        _log.error("nothing is served: %s", self._ask_lag_max_s.why_not)
        for replica in self._replicas.values():
            if replica.served is not None:
                self._publish(replica.hide)

    def _settle(self, replica: Replica) -> None:
        try:
            replica.follower.settle(replica.follower.next_offset)
        except StoreCorrupt as error:
            self._rebuild(replica.number, error)
        except StoreAhead as error:
            self._found_ahead(replica, error)

    def _found_ahead(self, replica: Replica, error: StoreAhead) -> None:
        """Drop a store that is ahead of a changelog that has gone on without the store's last commit."""
        self._drop(replica)
        if self._settings.accept_loss:
            self._opener.set_aside(replica.number, error)
            return
        self._wait_for_decision(replica.number, error)
        self._next_ends_s = self._clock.monotonic_s() + self._end_interval_s

    def _wait_for_decision(self, number: int, error: StoreAhead) -> None:
        """Leave a store alone that is ahead of the changelog. A broker that was cut off may report so for a while."""
        if self._undecided.get(number) != str(error):
            _log.error("%s; until then the partition is not served", error)
        self._undecided[number] = str(error)

    def _is_followed(self, number: int) -> bool:
        return self._followed is None or number in self._followed

    def _claim(self, number: int) -> bool:
        """Return whether a partition's store may be opened; `take` then waits for its release."""
        with self._changed:
            if not self._is_followed(number):
                return False
            self._claimed.add(number)
            return True

    def _release(self, number: int) -> None:
        with self._changed:
            self._claimed.discard(number)
            self._changed.notify_all()

    def _load(self, number: int, store: Store) -> Replica:
        start_offset = check_restorable(number, store, self._log, self._clock, self._delete_retention_ms)
        follower = Follower(
            number,
            store,
            buffer_entries_max=self._settings.restore_buffer_entries_max,
            topic_id=self._topic_id,
            on_between=lambda: self._publish(self._replicas[number].hide),
            metrics=self._metrics,
            delete_retention_ms=self._delete_retention_ms,
            start_offset=start_offset,
        )
        return Replica(number, store, follower, self._clock.monotonic_s())

    def _check_all(self, lost: RecordsLost) -> None:
        """Find the stores that can't be followed on, after the reader was out of range."""
        for number, replica in [*self._replicas.items()]:
            try:
                check_restorable(number, replica.store, self._log, self._clock, self._delete_retention_ms)
            except StoreAhead:
                self._drop(replica)  # opening it again finds that, too
            except StoreCorrupt as error:
                self._rebuild(number, error)
            else:
                start, end = self._log.watermarks(CHANGELOG, number)
                if start and not replica.follower.next_offset:
                    raise lost  # not even a new store can be restored from it
                if not start <= replica.follower.next_offset <= end:
                    self._drop(replica)  # the store is sound, but what was read beyond it is gone: open it again
        self._assigned = False

    def _rebuild(self, number: int, error: StoreCorrupt | StoreAhead) -> None:
        try:
            self._close_replica(self._replicas[number])
            self._opener.destroy(number, str(error))
        finally:
            self._release(number)

    def _drop(self, replica: Replica) -> None:
        """Close a replica; it is opened again soon if it is still followed."""
        try:
            self._close_replica(replica)
        finally:
            self._release(replica.number)

    def _close_replica(self, replica: Replica) -> None:
        self._publish(replica.hide)
        self._metrics.forget(replica.number)
        self._replicas = {number: it for number, it in self._replicas.items() if number != replica.number}
        self._assigned, self._next_ends_s = False, 0.0
        try:
            replica.store.close()
        except PipelineError as error:  # the next `open` finds out what is left of it
            _log.warning("partition %d: closing its store: %s", replica.number, error)

    def _publish(self, change: Callable[[], None]) -> None:
        """Change the state of a replica, and what readers see with it."""
        with self._changed:
            change()
            readable = {number: it.served for number, it in self._replicas.items() if it.served is not None}
            self._needed |= readable.keys()
            self._readable = readable
        if self.ready:
            self._ready.set()
        self._on_served()
