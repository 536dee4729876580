"""Workers and standbys of the simulator: the real `OwnedPartition` and `Follower`, one call at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pipeline.metrics as m
from pipeline.core.commit import Commit
from pipeline.core.record import Records
from pipeline.errors import (
    Discontinuous,
    Fenced,
    LogCorrupt,
    NotReady,
    PipelineError,
    RecordsLost,
    StoreAhead,
    StoreCorrupt,
    Unavailable,
)
from pipeline.ports import LogReader
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.follower import Follower, read_meta, read_position
from pipeline.worker.partition import OwnedPartition
from pipeline.worker.restore import check_restorable
from tests.sim.entries import FENCE, META, POSITION, PRODUCER, SERIES, Failure, compare
from tests.sim.faults import FaultyLog, FaultyStores, Machine, Process, SimulatedCrash
from tests.sim.logfaults import Noticed

if TYPE_CHECKING:
    from tests.sim.world import World


class Recorder:
    """A `metrics.Metrics` that keeps the counters."""

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}

    def inc(self, metric: m.Metric, amount: float = 1, *labels: object) -> None:
        self.counters[metric.name] = self.counters.get(metric.name, 0) + amount

    def set(self, metric: m.Metric, value: float, *labels: object) -> None:
        pass

    def observe(self, metric: m.Metric, value: float, *labels: object) -> None:
        pass

    def forget(self, partition: int) -> None:
        pass

    def of(self, metric: m.Metric) -> float:
        return self.counters.get(metric.name, 0)


class Worker:
    """One process with one partition, from its start to its death."""

    def __init__(self, world: World, partition: int, machine: Machine, settings: WorkerSettings) -> None:
        self.world = world
        self.number = partition
        self.machine = machine
        self.process = Process(f"worker {world.new_number()} ({partition} on {machine.name})", world.interrupt)
        self.metrics = Recorder()
        self.deposed = world.log_faults.some_deposed(partition)
        self.log = FaultyLog(
            world.cluster,
            self.process,
            fenced_others=lambda: world.owned(self),
            deposed=self.deposed,
            leaves_out_marker=lambda: world.log_faults.leaves_out_marker(partition),
        )
        self.part = OwnedPartition(
            partition,
            log=self.log,
            stores=FaultyStores(world.cluster, machine, self.process),
            clock=machine.clock,
            settings=settings,
            delete_retention_ms=world.delete_retention_ms,
            ask_lag_max_s=lambda: 1e9,  # nothing compacts a changelog with foreign records here
            metrics=self.metrics,
        )
        self.accept_loss = settings.accept_loss
        self.state = "starting"
        self.commit: Commit | None = None
        self.rebuild_due = False
        self._due = ""
        """Loss that the start of this worker must notice."""
        self._reader: LogReader | None = None
        self._start_offset = 0
        self._cursor = 0
        self._has_read = False
        """True once the first read, which finds out what the log has lost, is done."""

    @property
    def alive(self) -> bool:
        return self.process.alive

    @property
    def fenced(self) -> bool:
        """Return whether another worker has taken the partition over, even if this one does not know it."""
        return self.world.active[self.number] is not self

    def start(self) -> None:
        """Take the partition over and check what was restored."""
        world, number = self.world, self.number
        self.rebuild_due, excuses = world.rebuild_is_due(number, self.machine), world.excuses
        self._due = "" if self.fenced else world.log_faults.must_notice(number, self.machine)
        stop = not world.quiet and world.rng.random() < 0.02
        try:
            self.part.start(stopping=lambda: stop)
        except SimulatedCrash as error:
            world.crashed(self, str(error))
        except (Unavailable, NotReady) as error:
            self.end(f"start: {error}")
        except Fenced as error:
            if not self.fenced:
                raise
            self.end(f"start: {error}")
        except Discontinuous as error:
            self._displaced(f"start: {error}")
        except (RecordsLost, LogCorrupt) as error:
            self._notice_undone(error)
            if number in world.wounds:
                world.count(f"noticed: {self._due or 'what is gone was needed'}")
                raise Noticed(str(error)) from error
            if not self.fenced and (world.gap(number) == (0, 0) or self.accept_loss):
                raise Failure(f"nothing was lost, or the loss was accepted: {error}") from error
            world.accept_loss[number] = True
            world.count("loss noticed")
            self.end(f"start: {error}")
        except StoreCorrupt as error:
            is_sound = self.machine.disks[number].damage == ""
            if is_sound and (number in world.wounds or world.cluster.foreign[number]):
                world.count("noticed: no store can be restored")
                raise Noticed(str(error)) from error
            if not self.fenced and is_sound:
                raise Failure(f"the changelog restores no store: {error}") from error
            self.end(f"start: {error}")
        else:
            self._started(undisturbed=world.excuses == excuses)

    def _started(self, *, undisturbed: bool) -> None:
        world, number = self.world, self.number
        self.state = "idle"
        self._start_offset = self.part.task.next_offset
        self._reader = self.log.reader(DELTAS)
        self._assign(first=True)
        rebuilt = self.metrics.of(m.STORES_REBUILT)
        world.count("store rebuilt" if rebuilt else "store restored")
        if self.fenced:
            return
        if self.accept_loss and number in world.wounds:
            world.count("noticed: somebody goes on without what is gone")
            raise Noticed("the loss is accepted")
        still_due = world.log_faults.must_notice(number, self.machine)
        if self._due.startswith("its store") or (self._due and still_due):
            raise Failure(f"{self.process.name} starts, although {self._due}")
        excused = self.rebuild_due or world.clocks_off or world.cluster.foreign[number]
        if rebuilt and undisturbed and not excused:
            raise Failure(f"{self.process.name} rebuilt a store that was sound")
        if world.gap(number) != (0, 0):
            if not self.accept_loss:
                raise Failure(f"{self.process.name} did not notice that records {world.gap(number)} are gone")
            world.auditor.lost(number, *world.gap(number))
            world.accept_loss[number] = False
            world.count("loss accepted")
        elif self._start_offset not in (world.auditor.position(number), self._records_end()):
            raise Failure(f"starts at {self._start_offset}, not at position {world.auditor.position(number)}")
        if undisturbed:
            self._find_damage()
        self.audit()

    def _records_end(self) -> int:
        """Return the offset behind the last folded record; from there to the position the log held none."""
        return self.part.task.position.records_end_offset

    def audit(self) -> None:
        """Check that the store equals the changelog, and the changelog what the log calls for."""
        world, number = self.world, self.number
        disk = self.machine.disks[number]
        if disk.damage:
            return
        entries = dict(disk.entries())
        at = world.cluster.memory.partition(CHANGELOG, number)
        meta = read_meta(self.part.store)
        entries.pop(META, None)
        forged = world.cluster.forged[number]
        ours = (row.offset + 1 for row in reversed(at.rows) if row.offset not in forged and row.key != FENCE)
        whole = next(ours, 0) <= meta.changelog_next_offset <= at.end_offset
        if not whole or meta.between_boundaries:
            raise Failure(f"store {number}: {meta}, but the changelog ends at {at.end_offset}")
        compare(f"store {number} against its changelog", entries, world.replay(number))
        world.auditor.check_entries(number, entries)

    def _find_damage(self) -> None:
        """Check that a trusted store has no other damage than in entries that nothing has read yet: series and producers."""
        disk = self.machine.disks[self.number]
        entries, expected = disk.entries(), self.world.replay(self.number)
        wrong = [k for k in entries.keys() | expected.keys() if k != META and entries.get(k) != expected.get(k)]
        if disk.damage and not wrong:
            disk.healed()
        if any(key[:1] not in (SERIES, PRODUCER) for key in wrong):
            raise Failure(f"{self.process.name} started on a store with damage to {wrong}")

    # One step at a time

    def step(self) -> None:
        """Do what comes next, by chance."""
        rng, task = self.world.rng, self.part.task
        if self.state in ("starting", "preparing", "folding", "ending"):
            return
        if self.state == "committing":  # its commit is being made durable, further up the stack
            self.fold()
        elif self.state == "prepared":
            self.fold() if rng.random() < 0.5 and not task.full else self.make_durable()
        elif self.state == "durable":
            self.fold() if rng.random() < 0.3 and not task.full else self.finish()
        elif (task.dirty and (task.full or rng.random() < 0.4)) or self.needs_commit():
            self.prepare()
        else:
            self.fold()

    def needs_commit(self) -> bool:
        """Return whether this idle worker must commit, by what the log says of its changelog."""
        end_offset = self.world.cluster.stable(CHANGELOG, self.number).end_offset
        return self.part.needs_commit(end_offset, self.machine.clock.monotonic_s())

    def _assign(self, *, first: bool = False) -> None:
        """Read from the position on or, except for the first time, from before it: folded records are skipped."""
        world, (next_offset, leader_epoch) = self.world, self.part.resume()
        assert self._reader is not None
        if world.rng.random() < 0.3 and not first:
            start, _ = world.cluster.memory.watermarks(DELTAS, self.number)
            earlier = min(next_offset, max(start, next_offset - world.rng.randint(1, 10)))
            leader_epoch = leader_epoch if earlier == next_offset else -1
            next_offset = earlier
        self._cursor = next_offset
        self._reader.assign({self.number: next_offset}, {self.number: leader_epoch})

    def fold(self) -> int:
        """Read and fold some records, and return how many."""
        assert self._reader is not None
        if not self.world.quiet and self.world.rng.random() < 0.02 and self._has_read:
            self._assign()
        try:
            fetched = self._reader.poll(record_count_max=self.world.rng.randint(1, 8), bytes_max=2**20, timeout_s=0)
            self._has_read = True
        except Unavailable:
            return 0
        except (RecordsLost, LogCorrupt) as error:
            if self.part.pass_hole():
                self._assign(first=True)
                return 0
            self._notice_hole(error)
            folded_before = self._cursor < self.part.task.next_offset  # retention took what is only read again
            if not self.fenced and not folded_before and self.world.gap(self.number) == (0, 0):
                raise Failure(f"nothing was lost: {error}") from error
            self.end(str(error))
            return 0
        except SimulatedCrash as error:
            self.world.crashed(self, str(error))
            return 0
        for records in fetched:
            self._cursor = records.next_offset
            damage = self.machine.disks[self.number].damage
            state, self.state = self.state, "folding"
            try:
                self._fold(records)
                self.state = state
            except (RecordsLost, LogCorrupt) as error:
                self._notice_hole(error)
                raise
            except StoreCorrupt as error:
                if not damage:
                    raise Failure(f"a sound store was not trusted: {error}") from error
                self.end(f"fold: {error}")
                return 0
            except SimulatedCrash as error:
                self.world.crashed(self, str(error))
                return 0
            if self.part.task.next_offset < records.next_offset:  # an order filled the commit: the rest is read again
                self._cursor = self.part.task.next_offset
                self._reader.assign({self.number: self._cursor})
        return sum(len(records.offsets) for records in fetched)

    def _notice_hole(self, error: PipelineError) -> None:
        if self.number in self.world.wounds:
            self.world.count("noticed: what was read is gone")
            raise Noticed(str(error)) from error

    def _fold(self, records: Records) -> None:
        self.part.fold(records)
        self.world.note("%s folds %s", self.process.name, [*records.offsets])
        self.check_counts()

    def check_counts(self) -> None:
        if not self.fenced:
            task, commit = self.part.task, self.commit
            entries = zip(commit.keys, commit.values, strict=True) if commit else ()
            forgetting = [key[1:].decode() for key, value in entries if key[:1] == PRODUCER and value is None]
            self.world.auditor.check_counts(self.number, self._start_offset, task.next_offset, task.counts, forgetting)

    def prepare(self) -> None:
        self.state = "preparing"
        damage = self.machine.disks[self.number].damage
        try:
            self.commit = self.part.prepare()
        except SimulatedCrash as error:
            self.world.crashed(self, str(error))
        except StoreCorrupt as error:
            if not damage:
                raise Failure(f"a sound store was not trusted: {error}") from error
            self.end(f"prepare: {error}")
        else:
            self.state = "prepared"
            self.world.note("%s prepares position %s", self.process.name, self.commit.position.next_offset)

    def make_durable(self) -> None:
        world, commit = self.world, self.commit
        assert commit is not None
        self.state = "committing"
        disk = self.machine.disks[self.number]
        entries = disk.entries()
        try:
            self.part.make_durable(commit)
        except SimulatedCrash as error:
            world.crashed(self, str(error))
        except Fenced as error:
            if not self.fenced:
                raise
            if disk.entries() is not entries and not disk.damage:
                raise Failure(f"{self.process.name} was fenced, but wrote to its store") from error
            world.count("zombie fenced")
            self.end(str(error))
        except StoreAhead as error:
            self._notice_undone(error)
            raise
        except (Unavailable, StoreCorrupt) as error:
            self.end(f"commit: {error}")
        except Discontinuous as error:
            self._displaced(f"commit: {error}")
        else:
            self.state = "durable"
            world.note("%s made position %s durable", self.process.name, commit.position.next_offset)

    def _notice_undone(self, error: PipelineError) -> None:
        """End the history if a worker says that its store has a commit that the broker has aborted in the end."""
        if isinstance(error, StoreAhead) and self.number in self.world.cluster.undone:
            self.world.count("noticed: an acknowledged commit was aborted")
            raise Noticed(str(error)) from error

    def _displaced(self, why: str) -> None:
        """End the worker, whose commit was hindered again and again by foreign records."""
        if not self.world.cluster.foreign[self.number] and not self.fenced:
            raise Failure(f"nobody else writes to the changelog: {why}")
        self.end(why)

    def finish(self) -> None:
        assert self.commit is not None
        self.part.finish(self.commit)
        self.commit = None
        self.state = "idle"
        counts = self.part.task.counts
        for what, count in (("expired delta refused", counts.entries_expired), ("series expired", counts.series_expired)):
            self.world.stats[what] += bool(count)
        if self.metrics.of(m.BATCHES_DUPLICATE) != counts.batches_duplicate:
            raise Failure("the metric of duplicates is not the task's count")
        self.world.note("%s finishes, %s", self.process.name, counts)

    def stop(self) -> None:
        """Commit what is folded and let go, as on SIGTERM."""
        for _ in range(4):
            if not self.alive or (self.state == "idle" and not self.part.task.dirty):
                break
            {"idle": self.prepare, "prepared": self.make_durable, "durable": self.finish}[self.state]()
        if self.alive:
            self.end("stopped")

    def end(self, why: str) -> None:
        """End the process by itself: it lets go of its partition, and what it has not committed is gone."""
        self.world.note("%s ends: %s", self.process.name, why)
        self.world.count("worker ended")
        self.state = "ending"  # others act while a damaged store is destroyed
        try:
            self.part.close()
        except SimulatedCrash as error:
            self.world.crashed(self, str(error))
            return
        if self.machine.disks[self.number].opened_by is self.process:
            raise Failure(f"{self.process.name} has closed its partition, but not the store")
        self.process.alive = False
        self.world.left(self)


class Standby:
    """A follower on a machine without a worker for its partition: its store is at a commit boundary, or known not to be."""

    def __init__(self, world: World, partition: int, machine: Machine) -> None:
        self.world = world
        self.number = partition
        self.machine = machine
        self.process = Process(f"standby {world.new_number()} ({partition} on {machine.name})", world.interrupt)
        self._compactions = 0
        self._busy = False
        self._follower: Follower | None = None
        self._reader: LogReader | None = None

    def step(self) -> None:
        world = self.world
        if self._busy:
            return
        self._busy = True
        try:
            if self._follower is None:
                self._open()
                world.note("%s opens its store", self.process.name)
            assert self._follower is not None
            assert self._reader is not None
            for records in self._reader.poll(record_count_max=world.rng.randint(1, 5), bytes_max=2**24, timeout_s=0):
                self._follower.apply(records)
            self._check(self._follower)
        except SimulatedCrash as error:
            world.note("%s dies: %s", self.process.name, error)
            if self.process.alive:
                self.process.alive = False
                world.lose_writes(self.machine, self.number)
                world.standbys.pop(self.number)
        except Unavailable:
            pass
        except StoreCorrupt as error:
            world.note("%s makes its store anew: %s", self.process.name, error)
            world.count("standby made anew")
            self.close()
            self._follower = None
            self._destroy()
            if world.standbys.get(self.number) is self:
                world.standbys.pop(self.number)
        except PipelineError as error:
            if isinstance(error, StoreAhead) and self.number in world.cluster.markers_missing:
                self.close()  # the store was an owner's, whose last commit can't be read yet
                if world.standbys.get(self.number) is self:
                    world.standbys.pop(self.number)
                return
            if self.number not in world.wounds | world.cluster.undone:
                raise Failure(f"{self.process.name}: {error}") from error
            raise Noticed(str(error)) from error
        finally:
            self._busy = False

    def _destroy(self) -> None:
        """Delete the store, perhaps as the last act of the process."""
        world, process = self.world, Process("cleaner", self.world.interrupt)
        try:
            FaultyStores(world.cluster, self.machine, process).destroy(self.number)
        except SimulatedCrash as error:
            world.note("%s dies: %s", process.name, error)

    def _open(self) -> None:
        world, number = self.world, self.number
        stores, log = FaultyStores(world.cluster, self.machine, self.process), FaultyLog(world.cluster, self.process)
        try:
            store = stores.open(number)
            check_restorable(number, store, log, self.machine.clock, world.delete_retention_ms)
            read_position(store)
        except StoreCorrupt:
            self.close()
            stores.destroy(number)
            store = stores.open(number)
        self._follower = Follower(
            number,
            store,
            buffer_entries_max=world.settings.restore_buffer_entries_max,
            topic_id=log.topic_id(CHANGELOG),
            delete_retention_ms=world.delete_retention_ms,
        )
        self._reader = log.reader(CHANGELOG)
        self._reader.assign({number: self._follower.next_offset})

    def _check(self, follower: Follower) -> None:
        world, number = self.world, self.number
        end_offset = world.cluster.memory.watermarks(CHANGELOG, number).end_offset
        if follower.next_offset == end_offset:
            if not follower.at_boundary and not world.cluster.forged[number]:
                raise Failure(f"{self.process.name} has read the whole changelog, but is at no boundary")
            self._compactions = world.compactions[number]  # from here on it sees every commit whole
        disk = self.machine.disks[number]
        entries = dict(disk.entries())
        if disk.damage or not entries or self._compactions != world.compactions[number]:
            return
        if entries.pop(META) and not read_meta(disk.memory).between_boundaries:
            expected = world.auditor.boundaries[number][entries.get(POSITION, b"")]
            compare(f"{self.process.name} at a boundary", entries, expected)
            world.count("standby at a boundary")

    def close(self) -> None:
        """End the process by itself."""
        self.process.alive = False
