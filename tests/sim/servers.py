"""A query server of the simulator: the real `ReplicaLoop`, one step at a time, read from at every call that it makes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import reduce
from itertools import repeat
from math import inf
from typing import TYPE_CHECKING

from pipeline.core.codec import decode_definition, decode_states
from pipeline.core.kinds import KINDS
from pipeline.core.query import Matcher, Query
from pipeline.core.record import parse_suffix, series_prefix
from pipeline.errors import LogCorrupt, NotReady, PipelineError, StoreCorrupt, Unavailable
from pipeline.query.ends import LogEnds
from pipeline.query.reader import ViewReader
from pipeline.settings import QuerySettings
from pipeline.worker.follower import read_meta, read_position
from pipeline.worker.replicas import ReplicaLoop
from tests.sim.entries import DEFINITION, META, POSITION, Entries, Failure, compare
from tests.sim.faults import Disk, FaultyLog, FaultyStores, Machine, Process, SimulatedCrash
from tests.sim.logfaults import Noticed

if TYPE_CHECKING:
    from tests.sim.world import World

STEPS_MAX = 2_000
"""Limit to the steps of an unhindered server until everything can be read; far more than needed."""


class Server:
    """A machine that runs one query server after the other. Its readers see whole commits only."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.machine = Machine(world.clocks["Q"], world.partition_count)
        self._process = Process("no server yet", world.interrupt)
        self._loop: ReplicaLoop | None = None
        self._busy = False
        self._stalled = False
        self._was_readable = False
        self._checked: dict[int, Entries] = {}
        """Entries of each store when it was last found right."""

    def step(self) -> None:
        """Run a few rounds of the loop, in a new process if there is none."""
        world = self.world
        if self._busy or self._stalled:
            return
        self._busy = True
        try:
            for _ in range(world.rng.randint(1, 6)):
                self._step()
        finally:
            self._busy = False

    def _step(self) -> None:
        world = self.world
        loop = self._loop = self._loop or self._start()
        try:
            loop.step()
        except SimulatedCrash as error:
            self.crash(str(error))
        except Unavailable as error:
            world.note("%s: %s", self._process.name, error)
        except StoreCorrupt as error:
            if world.wounds:
                raise Noticed(str(error)) from error
            if not any(disk.damage for disk in self.machine.disks):  # the store was made anew, and that one rots too
                raise Failure(f"{self._process.name} can't make a store anew: {error}") from error
            self.stop()
        except LogCorrupt as error:
            if not world.wounds:
                raise Failure(f"{self._process.name} ends: {error!r}") from error
            raise Noticed(str(error)) from error
        except PipelineError as error:
            raise Failure(f"{self._process.name} ends: {error!r}") from error
        self.check()

    def _start(self) -> ReplicaLoop:
        world = self.world
        self._process = process = Process(f"server {world.new_number()}", self._interrupt)
        world.note("%s starts", process.name)
        return ReplicaLoop(
            log=FaultyLog(world.cluster, process, deposed=world.log_faults.some_deposed_of_all()),
            stores=FaultyStores(world.cluster, self.machine, process),
            clock=self.machine.clock,
            settings=replace(
                world.settings,
                restore_buffer_entries_max=world.rng.choice((3, 1_000, 1_000)),  # those that never hide for it, too
                restore_fetch_count_max=world.rng.randint(1, 4),
            ),
            delete_retention_ms=world.delete_retention_ms,
            on_fatal=lambda _: None,
            lag_max_s=world.compaction_lag_ms / 2_000,
        )

    def _interrupt(self, process: Process, where: str) -> None:
        """Read at every call of the loop, as a reader may come at any time."""
        if process is self._process:
            self.check()
        self.world.interrupt(process, where)

    def check(self) -> None:
        """Check that the readable stores are exactly at a commit boundary."""
        if self._loop is None:
            return
        world = self.world
        try:
            stores = self._loop.stores()
        except NotReady:
            if self._was_readable:
                world.count("server hides")
            self._was_readable = False
            return
        self._was_readable = True
        if len(stores) != world.partition_count:
            raise Failure(f"{self._process.name} answers from {[*stores]} only")
        for number in stores:
            disk = self.machine.disks[number]
            entries = disk.entries()
            if disk.damage or entries is self._checked.get(number):
                continue
            if read_meta(disk.memory).between_boundaries:
                raise Failure(f"{self._process.name} answers from partition {number} between boundaries")
            expected = world.auditor.boundaries[number][entries.get(POSITION, b"")]
            found = {key: value for key, value in entries.items() if key != META}
            compare(f"{self._process.name} at a boundary of partition {number}", found, expected)
            self._checked[number] = entries
            world.count("server at a boundary")

    def crash(self, why: str) -> None:
        """Kill the process; its stores may lose their newest writes."""
        if self._loop is not None:
            self.world.note("%s dies: %s", self._process.name, why)
            self._forget()
            for number in range(self.world.partition_count):
                self.world.lose_writes(self.machine, number)

    def stop(self) -> None:
        """Note that the process ended by itself."""
        if self._loop is not None:
            self.world.note("%s stops", self._process.name)
            self._forget()

    def _forget(self) -> None:
        self._process.alive = False
        self._loop = None
        self._was_readable = False
        self._checked = {}

    def fall_behind(self) -> None:
        """Stall while others go on, until their records are old enough for compaction, and compacted."""
        world = self.world
        if world.depth:
            return
        self._stalled = True
        world.depth += 1
        for _ in range(world.rng.randint(5, 25)):
            world.step()
        world.depth -= 1
        self._stalled = False
        world.nature.hold_up()
        world.count("server falls behind")
        self.step()

    def restart(self) -> None:
        """End the server in one way or the other, or replace its disk, too."""
        rng = self.world.rng
        if rng.random() < 0.5:
            self.stop()
        else:
            self.crash("chance")
        if rng.random() < 0.1:
            self.machine.disks[rng.randrange(self.world.partition_count)] = Disk()
            self.world.note("a store of the server is lost")

    def damage(self, partition: int, damage: str) -> None:
        """Damage bytes of a store so that its next open, or its next use, finds out."""
        self.machine.disks[partition].damage = damage
        self.world.note("store %s of Q is damaged: %s", partition, damage)
        self.world.count(f"damage of a server: {damage}")

    def finish(self) -> None:
        """Check that, with nothing in the way, everything can soon be read and is complete."""
        world = self.world
        for disk in self.machine.disks:
            if disk.damage:
                self.stop()  # what is damaged for a reader only is found when it is opened again
        for _ in range(STEPS_MAX):
            world.time.at_ms += 1
            self.step()
            if self._was_readable and all(
                read_position(self.machine.disks[number].memory).next_offset == world.auditor.position(number)
                for number in range(world.partition_count)
            ):
                self._check_answers()
                return
        if world.wounds and self._loop is not None and self._loop._undecided:
            raise Noticed("; ".join(self._loop._undecided.values()))
        if not any(world.cluster.forged):
            raise Failure(f"{self._process.name} never holds all that there is")

    def _check_answers(self) -> None:
        """Check that reads merge the entries of all partitions: of each view that has one definition, and neither windows
        nor a retention.
        """
        assert self._loop is not None
        ends = LogEnds(0.0, {}, {})
        reader = ViewReader(stores=self._loop.stores, ends=lambda: ends, clock=self.machine.clock, settings=QuerySettings())
        states = self.world.auditor.states
        definitions = {
            key: decode_definition(value).definition
            for entries in states
            for key, value in entries.items()
            if key[:1] == DEFINITION
        }
        names = Counter(it.view for it in definitions.values())
        for definition in definitions.values():
            if names[definition.view] > 1 or definition.window_s or definition.retention_s:
                continue
            kind, prefix = KINDS[definition.kind], series_prefix(definition)
            held: dict[bytes, list[bytes]] = {}
            for entries in states:
                for key in entries:
                    if key.startswith(prefix):
                        held.setdefault(key, []).append(entries[key])
            merged = {key: reduce(kind.merge, decode_states(kind, values)) for key, values in held.items()}
            expected = {parse_suffix(key[len(prefix) :])[1]: kind.answer(state) for key, state in merged.items()}
            answer = reader.read(Query(definition.view, limit=10**6), deadline_s=inf)
            found = {tuple(it.labels.values()): it.value for it in answer}
            self.world.stats["answer of several partitions"] += any(len(values) > 1 for values in held.values())
            for labels, value in expected.items():
                where = tuple(Matcher(*it) for it in zip(definition.labels, repeat("="), labels, strict=False))
                point = reader.point(Query(definition.view, where))
                if found.get(labels) != value or point is None or point.value() != value:
                    raise Failure(f"{definition} answers {found.get(labels)} and {point}, not {value}")
            if found.keys() != expected.keys():
                raise Failure(f"{definition} answers with {[*found]}, not {[*expected]}")
