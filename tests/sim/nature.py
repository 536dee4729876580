"""Accidents of the log, the stores and the time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.topics import CHANGELOG, DELTAS
from tests.sim.faults import Disk, Machine

if TYPE_CHECKING:
    from tests.sim.world import World


class Nature:
    """Retention, compaction, rot, loss, power cuts and long pauses, one step at a time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._tombstones: list[dict[int, int]] = [{} for _ in range(world.partition_count)]
        """Times until which the tombstones that compaction has come across are kept, by offset."""
        self._young_ms = 0
        """Time that the present publishers have lived through pauses."""

    def truncate(self) -> None:
        """Delete records that are folded for good, as retention does."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        start, _ = world.cluster.memory.watermarks(DELTAS, partition)
        position = world.auditor.position(partition)
        if start < position:
            start = rng.randint(start, position)
            world.cluster.memory.truncate(DELTAS, partition, start)
            world.note("retention: deltas-%s starts at %s", partition, start)
            world.count("retention")

    def lose_records(self) -> None:
        """Delete records that are not folded yet, as retention may."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        _, end = world.cluster.memory.watermarks(DELTAS, partition)
        if end > world.auditor.position(partition):
            start = rng.randint(world.auditor.position(partition) + 1, end)
            world.cluster.memory.truncate(DELTAS, partition, start)
            world.cluster.acknowledge(partition, start)
            world.note("loss: deltas-%s starts at %s", partition, start)
            world.count("loss by retention")

    def compact(self) -> None:
        world = self.world
        self._compact(world.rng.randrange(world.partition_count))

    def _compact(self, partition: int) -> None:
        """Remove superseded entries; a tombstone stays for `delete_retention_ms` after compaction first came across it.

        Records younger than the compaction lag stay, and nothing is removed because of them.
        """
        world, rng = self.world, self.world.rng
        if world.cluster.forged[partition]:
            return  # a forgery would supersede what is true, and nobody could tell any more
        memory, known = world.cluster.memory, self._tombstones[partition]
        rows = memory.partition(CHANGELOG, partition).rows
        end = min(memory.watermarks(CHANGELOG, partition).end_offset, world.cluster.markers_missing.get(partition, 2**62))
        young_ms = world.time.at_ms - world.compaction_lag_ms
        young = min(next((row.offset for row in rows if row.at_ms > young_ms), end), end)
        end = young
        if rng.random() < 0.7:
            end = rng.randint(0, end)
        kept = (r.offset for r in rows if r.value is None and known.get(r.offset, world.time.at_ms) >= world.time.at_ms)
        drop_end = min(end, next(kept, end))
        before = sum(row.value is None for row in rows)
        world.cluster.superseding[partition] = max(world.cluster.superseding[partition], young)
        memory.compact(CHANGELOG, partition, drop_end, drop_tombstones=True, young_offset=young)
        world.stats["tombstones dropped"] += before - sum(
            row.value is None for row in memory.partition(CHANGELOG, partition).rows
        )
        memory.compact(CHANGELOG, partition, end, young_offset=young)
        for row in memory.partition(CHANGELOG, partition).rows:
            if row.value is None and row.offset < end:
                known.setdefault(row.offset, world.time.at_ms + world.delete_retention_ms)
        world.compactions[partition] += 1
        world.note("changelog-%s is compacted up to %s", partition, end)
        world.count("compaction")

    def hold_up(self) -> None:
        """Let time pass, in which only the log's cleaner works, until all records are old enough for compaction."""
        world = self.world
        world.time.at_ms += int(world.compaction_lag_ms * world.rng.uniform(0.3, 1.5))
        world.note("a hold-up")
        world.count("hold-up")
        for partition in range(world.partition_count):
            self._compact(partition)

    def pass_time(self) -> None:
        """Let some seconds pass, so that windows end and expire."""
        world = self.world
        world.time.at_ms += world.rng.choice((300, 1_000, 1_000, 2_500, 8_000))
        world.note("some seconds pass")

    def _some_disk(self) -> tuple[Machine, int, Disk]:
        world, rng = self.world, self.world.rng
        machine, partition = rng.choice(world.machines), rng.randrange(world.partition_count)
        return machine, partition, machine.disks[partition]

    def damage_store(self) -> None:
        """Damage bytes of a store. A standby notices when it is opened again."""
        world, rng = self.world, self.world.rng
        if rng.random() < 0.4:
            world.server.damage(rng.randrange(world.partition_count), rng.choice(("open", "read")))
            return
        machine, partition, disk = self._some_disk()
        if not disk.entries():
            return
        damage = rng.choice(("open", "read", "bytes", "bytes"))
        if damage == "bytes":
            keys = sorted(disk.entries())
            key = rng.choice(rng.choice((keys, [keys[0], keys[-1]])))
            value = disk.entries()[key]
            disk.garble(key, rng.choice((value[:-1], b"", b"\x07", b"\x01\xc1")))
        else:
            disk.damage = damage
        standby = world.standbys.get(partition)
        if standby is not None and standby.machine is machine:
            world.standbys.pop(partition).close()
        world.excuses += 1
        world.note("store %s of %s is damaged: %s", partition, machine.name, damage)
        world.count(f"damage: {damage}")

    def lose_store(self) -> None:
        """Replace a disk."""
        world = self.world
        machine, partition, disk = self._some_disk()
        for worker in [w for w in [*world.zombies, *world.active] if w and w.process is disk.opened_by]:
            world.crashed(worker, "its disk is gone")
        standby = world.standbys.get(partition)
        if standby is not None and standby.machine is machine:
            world.standbys.pop(partition).close()
        machine.disks[partition] = Disk()
        world.note("store %s of %s is lost", partition, machine.name)
        world.count("store lost")

    def go_to_sleep(self) -> None:
        """Let much time pass: longer than tombstones are kept, or even so long that all producers are forgotten."""
        world, rng = self.world, self.world.rng
        if world.depth:
            return
        for standby in world.standbys.values():
            standby.close()
        world.standbys.clear()
        if rng.random() < 0.5:
            world.server.stop()
        for partition in range(world.partition_count):
            self._compact(partition)
        ttl_ms = world.settings.producer_ttl_ms
        if rng.random() < 0.5 or self._young_ms > ttl_ms / 2:
            crowd = world.crowd
            # A stranger that has the id of somebody who is forgotten can take it over; only that ids are secret prevents it.
            outliving = 0.0 if "strangers" in world.switches else 0.3
            crowd.publishers = [
                p.outlived() if rng.random() < outliving else crowd.new_publisher() for p in crowd.publishers
            ]
            crowd.zombies, crowd.network = [], []
            self._young_ms = 0
            world.time.at_ms += ttl_ms + 1
            world.note("producers sleep so long that they are forgotten; new ones take the place of most")
            world.count("producers expire")
        else:
            asleep_ms = rng.choice((world.delete_retention_ms // 2, world.delete_retention_ms + 1))
            self._young_ms += asleep_ms
            world.time.at_ms += asleep_ms
            world.crowd.forget_old_copies()
            world.note("nothing happens for %s ms", asleep_ms)
            world.count("sleep")
        for partition in range(world.partition_count):
            self._compact(partition)

    def black_out(self) -> None:
        """Cut the power: everything that runs dies at once, and the log loses a tail that nobody knows to be safe."""
        world = self.world
        world.note("black-out")
        world.count("black-out")
        for worker in [*world.zombies, *world.active]:
            if worker is not None:
                world.crashed(worker, "black-out")
        for partition, standby in [*world.standbys.items()]:
            standby.process.alive = False
            world.lose_writes(standby.machine, partition)
        world.standbys.clear()
        world.server.crash("black-out")
        for partition in range(world.partition_count):
            torn = world.cluster.tear(partition, world.rng)
            world.note("%s records of partition %s are torn off", torn, partition)
            world.stats["torn tail"] += torn > 0
