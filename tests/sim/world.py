"""The simulator: one seed is one history of publishers, a log, workers and everything that can happen to them.

    python -m tests.sim.world --seed 7 --trace      replays one history and prints its steps
    python -m tests.sim.world --seeds 5000          runs many, stops at the first that fails
    python -m tests.sim.world --only clocks,ties    with these troubles in every history, and none of the others

Single-threaded. All chance comes from one `Random(seed)`, all time from one true time that steps by hand and from clocks
that may differ from it; so a seed is a history, on every machine. While code under test runs, `World.interrupt` may kill it
or let others act at each call that it makes through a port. The `Auditor` watches all along.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from random import Random

from pipeline.errors import Unavailable
from pipeline.settings import WorkerSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from pipeline.worker.follower import read_meta, read_position
from pipeline.worker.lookups import PRODUCERS_SWEPT
from tests.sim.auditor import Auditor
from tests.sim.clocks import NodeClock, TrueTime
from tests.sim.cluster import Cluster
from tests.sim.count import Limits
from tests.sim.crowd import Crowd
from tests.sim.entries import FENCE, POSITION, PRODUCER, Entries, Failure, unpack
from tests.sim.faults import Machine, Process, SimulatedCrash
from tests.sim.logfaults import LogFaults, Noticed
from tests.sim.nature import Nature
from tests.sim.servers import Server
from tests.sim.strangers import Strangers
from tests.sim.workers import Standby, Worker

DEPTH_MAX = 2
STEPS_MAX = 10_000
"""Limit to the steps of one worker until everything is folded; far more than needed."""


SWITCHES = {
    "clocks": 0.2,
    "conflicts": 0.25,
    "ties": 0.3,
    "floats": 0.3,
    "orders": 0.2,
    "overflow": 0.15,
    "strangers": 0.2,
    "swarm": 0.15,
    "old end": 0.25,
    "pins": 0.2,
    "cuts": 0.1,
    "forgeries": 0.1,
    "windows": 0.4,
    "markers": 0.15,
}
"""Troubles that a history may have besides the usual ones, each with the share of histories that have it."""
SIMPLE = 0.3
"""Share of the histories that have none of these troubles."""


def some_switches(rng: Random) -> frozenset[str]:
    """Return the troubles of one history."""
    chosen = frozenset(name for name, share in SWITCHES.items() if rng.random() < share)
    return frozenset() if rng.random() < SIMPLE else chosen


class World:
    """One history: its log, publishers, workers and servers."""

    def __init__(self, seed: int, *, tracing: bool = False, switches: frozenset[str] | None = None) -> None:
        self.rng = rng = Random(seed)
        chosen = some_switches(rng)
        self.switches = chosen if switches is None else switches
        self.trace: list[str] = []
        self.stats: Counter[str] = Counter()
        self.time = TrueTime()
        self.clocks = {name: NodeClock(name, self.time) for name in ("log", "A", "B", "Q", "C")}
        self.clocks_off = False
        """True once a clock was wrong."""
        self.quiet = False
        """True once nothing goes wrong any more."""
        self.wounds: set[int] = set()
        """Partitions whose log has lost records that were safe."""
        self.excuses = 0
        """Number that rises with everything that may force a worker to rebuild a store."""
        self.depth = 0
        """Number of nested calls of the code under test during which others act."""
        self._tracing = tracing
        self._numbers = 0
        self.partition_count = rng.choice((2, 2, 3))
        self.delete_retention_ms = 1_000_000
        self.compaction_lag_ms = rng.choice((100, 400, 1_500))
        self.settings = WorkerSettings(
            overlay_entries_max=rng.randint(1, 20),
            cache_entries_max=rng.choice((0, rng.randint(0, 20), 100)),
            restore_buffer_entries_max=rng.randint(1, 10),
            restore_fetch_count_max=rng.randint(1, 7),
            producer_ttl_ms=10_000_000,
            closed_producer_ttl_ms=3_000_000,
            series_max=rng.randint(1, 4) if "overflow" in self.switches else 1_000_000,
            views_max=2 if rng.random() < 0.1 else 10_000,
            expired_entries_max=rng.randint(1, 6),
            producers_max=rng.randint(1, 6) if "swarm" in self.switches else 100_000,
        )
        limits = Limits(
            self.settings.views_max,
            self.settings.series_max,
            self.settings.producer_ttl_ms,
            self.settings.closed_producer_ttl_ms,
        )
        self.auditor = Auditor(self.partition_count, limits, self.time)
        topics = dict.fromkeys((DELTAS, CHANGELOG, DEAD_LETTERS), self.partition_count)
        self.cluster = Cluster(topics, self.time, self.clocks["log"], self.auditor)
        self.cluster.memory.marker_count = rng.choice((0, 1))
        self.machines = [Machine(self.clocks[name], self.partition_count) for name in "AB"]
        self.active: list[Worker | None] = [None] * self.partition_count
        self.zombies: list[Worker] = []
        self.standbys: dict[int, Standby] = {}
        self.accept_loss = [False] * self.partition_count
        self.compactions = [0] * self.partition_count
        self.server = Server(self)
        self.crowd = Crowd(self)
        self.nature = Nature(self)
        self.strangers = Strangers(self)
        self.log_faults = LogFaults(self)
        self.trouble = rng.choice((0.0, 0.3, 1.0, 1.0, 2.0))
        self._loss_by_retention = rng.random() < 0.06
        self._steps = self._weigh()

    def _weigh(self) -> list[Callable[[], None]]:
        """Return the weight of every kind of step: what is rare in one history is frequent in another."""
        rng, crowd, nature = self.rng, self.crowd, self.nature
        weights: dict[Callable[[], None], float] = {
            crowd.record: rng.uniform(5, 20),
            crowd.send: rng.uniform(8, 20),
            self.work: rng.uniform(20, 70),
            crowd.deliver_late: rng.uniform(0, 8),
            crowd.send_junk: rng.uniform(0, 4),
            crowd.crash_publisher: rng.uniform(0, 3),
            crowd.send_as_zombie: rng.uniform(0, 5),
            crowd.close_publisher: rng.uniform(0, 1.5),
            self.crash_worker: rng.uniform(0, 3),
            self.take_over: rng.uniform(0, 3),
            self.work_as_zombie: rng.uniform(2, 10),
            self.stop_worker: rng.uniform(0, 1),
            self.stand_by: rng.uniform(0, 15),
            self.server.step: rng.uniform(0, 12),
            self.server.fall_behind: rng.uniform(0, 6),
            self.server.restart: rng.uniform(0, 1),
            nature.truncate: rng.uniform(0, 4),
            nature.compact: rng.uniform(0, 8),
            nature.hold_up: rng.uniform(0, 1),
            nature.damage_store: rng.uniform(0, 1),
            nature.lose_store: rng.uniform(0, 1),
            nature.black_out: rng.uniform(0, 1),
            nature.go_to_sleep: rng.uniform(0, 2.5),
        }
        if self._loss_by_retention:
            weights[nature.lose_records] = 1.0
        for switch, (step, least, most) in self._troubles().items():
            if switch in self.switches:
                weights[step] = rng.uniform(least, most)
        return rng.choices([*weights], [*weights.values()], k=1_000)

    def _troubles(self) -> dict[str, tuple[Callable[[], None], float, float]]:
        """Return the step that each switch adds, and the limits of its weight."""
        return {
            "clocks": (self.log_faults.jump_clock, 1, 6),
            "strangers": (self.strangers.step, 1, 8),
            "swarm": (self._crowded, 0.5, 2),
            "orders": (self.crowd.order, 0.5, 4),
            "cuts": (self.log_faults.cut, 0.3, 1),
            "forgeries": (self.log_faults.forge, 1, 2),
            "pins": (self.log_faults.step_of_pins, 1, 6),
            "windows": (self.nature.pass_time, 1, 8),
        }

    def _crowded(self) -> None:
        self.rng.choice((self.crowd.job, self.crowd.job, self.crowd.job, self.strangers.swarm))()

    # Bookkeeping

    def note(self, text: str, *args: object) -> None:
        if self._tracing:
            self.trace.append("  " * self.depth + text % args)

    def count(self, what: str) -> None:
        self.stats[what] += 1

    def new_number(self) -> int:
        self._numbers += 1
        return self._numbers

    def replay(self, partition: int) -> Entries:
        """Return the entries in the changelog as it is now."""
        entries: Entries = {}
        forged = self.cluster.forged[partition]
        for row in self.cluster.memory.partition(CHANGELOG, partition).rows:
            if row.offset in forged or row.key == FENCE:
                continue
            assert row.key is not None
            if row.value is None:
                entries.pop(row.key, None)
            else:
                entries[row.key] = row.value
        return entries

    def gap(self, partition: int) -> tuple[int, int]:
        """Return the range of records that retention deleted before they were folded."""
        position, start = self.auditor.position(partition), self.cluster.memory.watermarks(DELTAS, partition)[0]
        return (position, start) if position < start else (0, 0)

    def rebuild_is_due(self, partition: int, machine: Machine) -> bool:
        """Return whether the store must be rebuilt: it is damaged, or was away for longer than tombstones are kept."""
        disk = machine.disks[partition]
        if disk.damage:
            return True
        meta, position = read_meta(disk.memory), read_position(disk.memory)
        end_offset = self.cluster.memory.watermarks(CHANGELOG, partition).end_offset
        newest = self.auditor.states[partition].get(POSITION)
        by_log_ms = unpack(newest)[2] - position.source_at_ms if newest and position.source_at_ms else 0
        if position.source_at_ms:  # by when the log takes in what is read now; a commit is later than its deltas
            by_log_ms = max(by_log_ms, self.clocks["log"].now_ms() - position.source_at_ms)
        away_ms = max(self.time.at_ms - position.committed_at_ms, by_log_ms)
        return 0 < meta.changelog_next_offset < end_offset and away_ms > self.delete_retention_ms

    def interrupt(self, process: Process, where: str) -> None:
        """Kill the process at a port, fail its call, let others act, or, mostly, do nothing."""
        if self.quiet:
            return
        roll = self.rng.random()
        rate = self.trouble * (0.002 if where in ("poll", "end offsets") else 0.015)
        if roll < rate:
            self.count(f"crash at {where}")
            raise SimulatedCrash(where)
        if roll < 2 * rate and where in ("poll", "end offsets", "commit: before", "commit: after"):
            self.count(f"unavailable at {where}")
            raise Unavailable(where)
        if roll > (0.97 if where in ("poll", "end offsets") else 0.8) and self.depth < DEPTH_MAX:
            self.count(f"others act at {where}")
            self.depth += 1
            try:
                for _ in range(self.rng.randint(1, 4)):
                    self.work_as_zombie() if self.zombies and self.rng.random() < 0.5 else self.step()
            finally:
                self.depth -= 1

    def lose_writes(self, machine: Machine, partition: int) -> None:
        """Let a store lose its newest writes, perhaps, as in a crash."""
        disk = machine.disks[partition]
        if self.rng.random() < 0.5 and not disk.damage:
            lost = disk.lose_writes(self.rng)
            self.note("store %s of %s loses %s writes", partition, machine.name, lost)
            self.stats["store rolled back"] += lost > 0

    def crashed(self, worker: Worker, why: str) -> None:
        """Note that the worker's process died. Nothing of it is left but its store."""
        if worker.alive:
            worker.process.alive = False
            self.note("%s crashes: %s", worker.process.name, why)
            self.lose_writes(worker.machine, worker.number)
        self.left(worker)

    def left(self, worker: Worker) -> None:
        if self.active[worker.number] is worker:
            self.active[worker.number] = None
        if worker in self.zombies:
            self.zombies.remove(worker)

    # Workers

    def work(self) -> None:
        partition = self.rng.randrange(self.partition_count)
        worker = self.active[partition]
        if worker is None:
            self.start(partition, self.rng.choice(self.machines))
        else:
            worker.step()

    def start(self, partition: int, machine: Machine) -> None:
        """Start a new worker. Earlier users of this machine's store are dead by then; elsewhere old owners may live on."""
        for zombie in [z for z in self.zombies if z.number == partition and z.machine is machine]:
            self.crashed(zombie, "its machine gets a new worker")
        standby = self.standbys.get(partition)
        if standby is not None and standby.machine is machine:
            self.standbys.pop(partition).close()
        settings = replace(self.settings, accept_loss=True) if self.accept_loss[partition] else self.settings
        self.active[partition] = worker = Worker(self, partition, machine, settings)
        self.note("%s starts", worker.process.name)
        worker.start()

    def owned(self, worker: Worker) -> None:
        """Note that the worker has fenced earlier owners, even one that was started after it."""
        other = self.active[worker.number]
        worker.rebuild_due |= self.rebuild_is_due(worker.number, worker.machine)
        if other is not worker:
            self.zombies.remove(worker)
            if other is not None:
                self.zombies.append(other)
            self.active[worker.number] = worker

    def crash_worker(self) -> None:
        worker = self.rng.choice(self.active)
        if worker is not None:
            self.crashed(worker, "chance")

    def stop_worker(self) -> None:
        worker = self.rng.choice(self.active)
        if worker is not None and worker.state in ("idle", "prepared", "durable"):
            worker.stop()

    def take_over(self) -> None:
        """Give the partition to another machine; the old owner may not know for long."""
        old = self.rng.choice(self.active)
        if old is not None:
            if self.rng.random() < 0.8:
                self.zombies.append(old)
                self.count("zombie")
            else:
                self.crashed(old, "its machine is gone")
            machine = next(machine for machine in self.machines if machine is not old.machine)
            self.start(old.number, machine)

    def work_as_zombie(self) -> None:
        if self.zombies:
            self.rng.choice(self.zombies).step()

    def stand_by(self) -> None:
        partition = self.rng.randrange(self.partition_count)
        standby = self.standbys.get(partition)
        if standby is None:
            workers = [*self.zombies, *(worker for worker in self.active if worker is not None)]
            taken = [worker.machine for worker in workers if worker.number == partition]
            free = [machine for machine in self.machines if machine not in taken]
            if not free:
                return
            standby = self.standbys[partition] = Standby(self, partition, self.rng.choice(free))
        standby.step()

    # All together

    def step(self) -> None:
        self.time.at_ms += self.rng.randint(0, 20)
        self.rng.choice(self._steps)()

    def run(self) -> None:
        """Let everything go wrong, then nothing, and check that every series is exact."""
        for _ in range(self.rng.randint(40, 210)):
            self.step()
        self.quiet = True
        self.note("peace")
        for clock in [*self.clocks.values(), *self.crowd.clocks]:
            clock.off_ms = 0
        for at in [*self.cluster.pins]:
            self.cluster.unpin(*at)
        self.crowd.send_all()
        self.log_faults.last_markers = {*range(self.partition_count)}
        for partition in range(self.partition_count):
            self._drain(partition, self.rng.choice(self.machines))
            self._fence_zombies(partition)
        self.log_faults.last_markers.clear()
        self.server.finish()
        fresh = Machine(self.clocks["C"], self.partition_count)
        for partition in range(self.partition_count):
            self._end(partition)
            self._drain(partition, fresh)
            self._outlive_producers(partition, fresh)
            letters = [row.key for row in self.cluster.memory.partition(DEAD_LETTERS, partition).rows]
            self.auditor.check_drained(partition, letters)
            self._end(partition)
            self.start(partition, self.rng.choice(self.machines))
            self._end(partition)

    def _outlive_producers(self, partition: int, machine: Machine) -> None:
        """Let so much time pass that every producer is forgotten, a few with each commit."""
        known = [key for key in self.auditor.states[partition] if key[:1] == PRODUCER]
        self.time.at_ms += self.settings.producer_ttl_ms + 1
        for _ in range(2 + len(known) // PRODUCERS_SWEPT):
            self.crowd.say_something(partition)
            self._drain(partition, machine)
        self._settle(partition)
        self.auditor.check_expired(partition, all_of_it=not self.clocks_off)
        if not self.clocks_off:  # else they are remembered for longer
            self.auditor.check_forgotten(partition, known)

    def _settle(self, partition: int) -> None:
        """Commit until an idle partition has nothing more to do."""
        worker = self.active[partition]
        assert worker is not None
        for _ in range(STEPS_MAX):
            if worker.state == "idle" and not worker.part.task.dirty:
                return
            {"idle": worker.prepare, "prepared": worker.make_durable, "durable": worker.finish}[worker.state]()
        raise Failure(f"partition {partition} never comes to rest")

    def _drain(self, partition: int, machine: Machine) -> None:
        """Fold everything that is there."""
        end_offset = self.cluster.memory.watermarks(DELTAS, partition).end_offset
        for _ in range(6):
            worker = self.active[partition]
            if worker is None:
                self.start(partition, machine)
                worker = self.active[partition]
            for _ in range(STEPS_MAX):
                if worker is None or not worker.alive or self.auditor.position(partition) >= end_offset:
                    break
                if worker.state == "idle" and worker.part.task.next_offset == end_offset:
                    worker.prepare()
                else:
                    worker.step()
            if worker is not None and worker.alive and worker.state == "prepared":  # deletes what has expired, perhaps
                worker.make_durable()
            if worker is not None and worker.alive and worker.state == "durable":
                worker.finish()
            if worker is not None and worker.alive and worker.state == "idle":
                self._write_marker(worker)
                if worker.alive:  # else the next marker was left out, too, and a start has to see to it
                    worker.audit()
                    return
        raise Failure(f"partition {partition} never comes to its end")

    def _write_marker(self, worker: Worker) -> None:
        """Let time pass, in which the worker sees to the marker of its last commit, if that is missing."""
        if worker.number in self.cluster.markers_missing:
            self.time.at_ms += 10_000
            if not worker.needs_commit():
                raise Failure(f"{worker.process.name} does not see that the marker of its commit is missing")
            worker.prepare()
            worker.make_durable()
            if worker.alive:
                worker.finish()

    def _fence_zombies(self, partition: int) -> None:
        for zombie in [z for z in self.zombies if z.number == partition]:
            for _ in range(50):
                if zombie.alive:
                    zombie.step()
            self.crashed(zombie, "the end")

    def _end(self, partition: int) -> None:
        worker = self.active[partition]
        if worker is not None:
            worker.stop()


@contextmanager
def no_logs() -> Iterator[None]:
    """Silence the logs: a worker that dies says so, and here thousands do."""
    logger = logging.getLogger("pipeline")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def run(seed: int, *, tracing: bool = False, switches: frozenset[str] | None = None) -> tuple[World, Exception | None]:
    """Run one history; return it and what went wrong in it. `switches` replaces the troubles that the seed would choose."""
    world = World(seed, tracing=tracing, switches=switches)
    try:
        with no_logs():
            world.run()
    except Noticed as noticed:
        world.note("the history ends: %s", noticed)
    except Exception as error:
        return world, error
    return world, None


def explain(seed: int, error: Exception, switches: frozenset[str] | None = None) -> str:
    """Run the history again and return its trace as text."""
    world, again = run(seed, tracing=True, switches=switches)
    trace = "\n".join(world.trace[-400:])
    same = "" if repr(again) == repr(error) else f"\nIt did not fail alike the second time: {again!r}"
    return f"seed {seed}: {error!r}{same}\npython -m tests.sim.world --seed {seed} --trace\n{trace}"


def check_seeds(seeds: range) -> Counter[str]:
    """Return how often each trouble came about; raise `Failure` with the trace of the first history that goes wrong."""
    stats: Counter[str] = Counter()
    for seed in seeds:
        world, error = run(seed)
        if error is not None:
            raise Failure(explain(seed, error)) from error
        stats += world.stats
    return stats


def main() -> int:
    """Run the command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, help="run this one history")
    parser.add_argument("--trace", action="store_true", help="print its steps")
    parser.add_argument("--seeds", type=int, default=2000, help="run so many histories (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="the first of them")
    parser.add_argument("--only", metavar="A,B", help=f"have just these troubles, of {', '.join(SWITCHES)}; empty: none")
    parser.add_argument("--digests", action="store_true", help="print what each history made durable, as a number")
    args = parser.parse_args()
    switches = None if args.only is None else frozenset(filter(None, args.only.split(",")))
    if switches is not None and not switches <= SWITCHES.keys():
        parser.error(f"--only: no such trouble: {', '.join(switches - SWITCHES.keys())}")
    stats: Counter[str] = Counter()
    seeds = [args.seed] if args.seed is not None else range(args.start, args.start + args.seeds)
    for seed in seeds:
        world, error = run(seed, tracing=args.trace, switches=switches)
        if error is not None:
            print("\n".join(world.trace) if args.trace else explain(seed, error, switches))
            print(f"seed {seed} fails: {error!r}", file=sys.stderr)
            return 1
        stats += world.stats
        if args.trace:
            print("\n".join(world.trace))
        if args.digests:
            print(seed, world.auditor.digest)
    for what, count in sorted(stats.items()):
        print(f"{count:9} {what}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
