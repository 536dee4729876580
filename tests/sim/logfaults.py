"""Faults of the log itself and of time: old leaders, foreign transactions, lost files, clocks that jump."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.follower import read_meta
from tests.sim.cluster import Deposed
from tests.sim.entries import POSITION
from tests.sim.faults import Machine

if TYPE_CHECKING:
    from tests.sim.world import World


class Noticed(BaseException):
    """A worker has said that the log lost records that were safe. People decide how to go on: the history ends."""


class LogFaults:
    """Troubles that a single node cannot detect by itself, one step at a time."""

    def __init__(self, world: World) -> None:
        self.world = world
        clocks = [*world.clocks.values()]
        self._wrong = world.rng.choice((*clocks, world.crowd.clocks[0]))
        """The only node of this history whose clock may be wrong: one wrong clock must do no harm."""
        self.last_markers: set[int] = set()
        """Partitions in which one more marker can be left out although nothing else goes wrong any more."""

    def jump_clock(self) -> None:
        """Make a clock wrong by hours or days from now on, or right again."""
        world, rng = self.world, self.world.rng
        clock = self._wrong
        clock.jump(rng)
        world.excuses += 1
        world.clocks_off = True
        world.note("the clock of %s is off by %s ms", clock.name, clock.off_ms)
        world.count("clock jumps" if clock.off_ms else "clock is right again")

    def some_deposed(self, partition: int) -> Deposed:
        """Return the leader that a new worker of a partition asks: the present one, or a deposed one."""
        world, rng = self.world, self.world.rng
        if "old end" not in world.switches or world.quiet or rng.random() < 0.5:
            return Deposed({}, 0)
        end_offset = rng.choice(world.cluster.ends[partition])
        world.note("whoever starts next asks a deposed leader: changelog-%s ends at %s", partition, end_offset)
        world.count("deposed leader")
        return Deposed({(CHANGELOG, partition): end_offset}, rng.randint(2, 40))

    def some_deposed_of_all(self) -> Deposed:
        """Return the leader that a server asks: the present one, or one deposed more recently than the compaction lag."""
        world, rng = self.world, self.world.rng
        if "old end" not in world.switches or world.quiet or rng.random() < 0.5:
            return Deposed({}, 0)
        partition = rng.randrange(world.partition_count)
        end_offset = world.cluster.ends[partition][-1]
        latest_ms = world.time.at_ms + world.compaction_lag_ms // 8
        world.note("a server asks a deposed leader: changelog-%s ends at %s", partition, end_offset)
        world.count("deposed leader of a server")
        return Deposed({(CHANGELOG, partition): end_offset}, 200, lambda: world.time.at_ms > latest_ms)

    def step_of_pins(self) -> None:
        """Open or end a foreign transaction."""
        self.world.rng.choice((self.pin, self.pin, self.unpin))()

    def pin(self) -> None:
        """Begin a foreign transaction and leave it open."""
        world, rng = self.world, self.world.rng
        topic, partition = rng.choice((DELTAS, CHANGELOG)), rng.randrange(world.partition_count)
        world.cluster.pin(topic, partition, rng.randint(1, 30))
        world.note("a foreign transaction opens on %s-%s", topic, partition)
        world.count(f"foreign transaction on {topic}")

    def unpin(self) -> None:
        """Abort a foreign transaction."""
        world = self.world
        if world.cluster.pins:
            at = world.rng.choice([*world.cluster.pins])
            world.cluster.unpin(*at)
            world.note("the foreign transaction on %s-%s ends", *at)

    def leaves_out_marker(self, partition: int) -> bool:
        """Return whether the broker leaves out the marker of a commit that it acknowledges."""
        world = self.world
        may = "markers" in world.switches and (not world.quiet or partition in self.last_markers)
        left_out = may and world.rng.random() < 0.2
        if left_out:
            self.last_markers.discard(partition)
            world.note("the marker of a commit to changelog-%s is left out", partition)
            world.count("marker left out")
        return left_out

    # Losses of what was safe

    def cut(self) -> None:
        """Kill everything, and lose the log's newest file, or one in the middle."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        if world.depth or partition in world.wounds or not world.auditor.position(partition):
            return
        world.nature.black_out()
        how = rng.choice(("both", "both", "changelog", "deltas", "middle"))
        if how in ("both", "changelog"):
            self._cut_changelog(partition)
        if how in ("both", "deltas"):
            self._cut_deltas(partition)
        if how == "middle":
            self._cut_middle(partition)

    def _cut_changelog(self, partition: int) -> None:
        """Lose the newest commits, which stores may hold."""
        world, rng = self.world, self.world.rng
        position, end_offset = rng.choice(world.cluster.cuts[partition])
        rows = world.cluster.memory.partition(CHANGELOG, partition).rows
        is_there = not end_offset or any(row.offset < end_offset and row.value == position for row in rows)
        if position == world.auditor.states[partition].get(POSITION, b"") or not is_there:
            return  # where compaction has taken the position, the partition begins anew, and says so if it can't
        if end_offset < world.cluster.superseding[partition]:
            return  # what superseded others is gone, and it is older than the compaction lag: nothing that is left can tell
        world.cluster.cut(CHANGELOG, partition, end_offset)
        world.auditor.rewound(partition, position)
        world.wounds.add(partition)
        world.note("changelog-%s lost its tail: it ends at %s", partition, end_offset)
        world.count("changelog cut")

    def _cut_deltas(self, partition: int) -> None:
        """Lose the newest records, of which some are folded."""
        world, rng = self.world, self.world.rng
        rows = world.cluster.memory.partition(DELTAS, partition).rows
        position = world.auditor.position(partition)
        folded = [row.offset for row in rows if row.offset < position]
        if folded:  # a log without the offsets behind the last of them, which held no record, has lost nothing
            keep = rng.randint(world.cluster.memory.watermarks(DELTAS, partition).start_offset, folded[-1])
            world.cluster.cut(DELTAS, partition, keep)
            world.auditor.cut(partition, keep)
            world.wounds.add(partition)
            world.note("deltas-%s lost its tail: it ends at %s", partition, keep)
            world.count("deltas cut")

    def _cut_middle(self, partition: int) -> None:
        """Lose records in the middle that are not folded yet, and keep those behind them."""
        world, rng = self.world, self.world.rng
        at = world.cluster.memory.partition(DELTAS, partition)
        position, end = world.auditor.position(partition), at.end_offset
        if position + 2 <= end and at.start_offset <= position:
            first = rng.randint(position, end - 2)
            last = rng.randint(first, end - 2)
            gone = [row.offset for row in at.rows if first <= row.offset <= last]
            if not gone:
                return  # offsets that held no record hold no less now
            at.rows = [row for row in at.rows if not first <= row.offset <= last]
            world.auditor.holed(partition, gone[0])
            world.wounds.add(partition)
            world.note("deltas-%s lost %s to %s", partition, first, last)
            world.count("deltas holed")

    def forge(self) -> None:
        """Write to the changelog as a stranger: noise, an entry of no known kind, or an entry that looks true."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        if partition in world.cluster.letters_missing:
            return  # an owner that takes the record for a marker can't know that its dead letters lack theirs
        state = world.auditor.states[partition]
        how = rng.choice(("no key", "noise", "entry", "entry", "tombstone", "position", "position"))
        key: bytes | None = None
        value: bytes | None = rng.randbytes(9)
        if how == "noise":
            key = rng.choice((b"", b"\x00\x00", b"\x02", b"k", b"\xff"))
        elif how == "position":
            key, value = POSITION, rng.choice([*world.auditor.boundaries[partition].values()]).get(POSITION, value)
        elif how != "no key":
            known = sorted(state.keys() - {POSITION})
            key = rng.choice(known or [b"k"])
            same_tag = [state[other] for other in known if other[:1] == key[:1]]
            value = None if how == "tombstone" else rng.choice(same_tag or [b""])
        world.cluster.forge(partition, key, value)
        world.note("somebody writes %r into changelog-%s: %s", key, partition, how)
        world.count(f"forged: {how}")

    def must_notice(self, partition: int, machine: Machine) -> str:
        """Return the loss that a start on this machine must notice; empty if its state can and must be exact."""
        world = self.world
        if partition not in world.wounds:
            return ""
        end_offset = world.cluster.memory.watermarks(CHANGELOG, partition).end_offset
        disk = machine.disks[partition]
        if not disk.damage and read_meta(disk.memory).changelog_next_offset > end_offset:
            return "its store is ahead of the changelog"
        if world.auditor.position(partition) > world.cluster.memory.watermarks(DELTAS, partition).end_offset:
            return "the position is beyond the end of deltas"
        return ""
