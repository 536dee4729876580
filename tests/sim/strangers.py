"""Strangers, who may write to the log and should not: batches under a live producer's name, invented producers, noise."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pipeline.core.codec import encode_batch
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.sim.count import Sent
from tests.sim.entries import PRODUCER
from tests.sim.publishers import SimPublisher, batch_of

if TYPE_CHECKING:
    from tests.sim.world import World

WILD = (2**40, 2**53, 2**62, 2**63 - 2)
"""Numbers that no honest producer reaches."""


class Strangers:
    """Steps of strangers, one at a time. No step may cost anybody else a delta."""

    def __init__(self, world: World) -> None:
        self.world = world

    def step(self) -> None:
        """Do one of the things that strangers do."""
        self.world.rng.choice((self.jump, self.jump, self.sneak, self.overtake))()

    def _victim(self) -> tuple[SimPublisher, int] | None:
        """Return a publisher and a partition that has folded a batch of it, from where strangers have its id."""
        world, rng = self.world, self.world.rng
        publisher, partition = rng.choice(world.crowd.publishers), rng.randrange(world.partition_count)
        known = PRODUCER + publisher.producer_id.encode() in world.auditor.states[partition]
        return (publisher, partition) if known else None

    def jump(self) -> None:
        """Send a batch with a live producer's id and a floor or an epoch that can't be its own."""
        rng = self.world.rng
        if (victim := self._victim()) is None:
            return
        publisher, partition = victim
        sent = Sent(publisher.producer_id, publisher.outbox.epoch, partition, 0, 0, (), law="jump")
        wild = rng.choice(WILD)
        if rng.random() < 0.5:
            sent = replace(sent, sequence=wild, floor=wild - rng.randint(0, 1))
        else:
            sequence, floor = publisher.outbox.next_numbers(partition)
            sent = replace(sent, epoch=wild, sequence=rng.choice((sequence, wild)), floor=floor)
        self._send(sent, "a jump")

    def sneak(self) -> None:
        """Send a batch with a live producer's id and a sequence far ahead: folded or refused, it disturbs nobody."""
        world = self.world
        if (victim := self._victim()) is not None:
            publisher, partition = victim
            sequence = world.rng.choice(WILD) - world.rng.randint(0, 9)
            sent = Sent(publisher.producer_id, publisher.outbox.epoch, partition, sequence, 0, self._groups(), law="free")
            self._send(sent, "far ahead")

    def overtake(self) -> None:
        """Send other content under the number of a batch that is in the log already."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        oldest_ms = world.time.at_ms - world.settings.closed_producer_ttl_ms  # later its producer may be forgotten
        rows = reversed(world.auditor.rows[partition])
        first = {row.sent.identity: row for row in rows if row.sent and row.sent.partition == partition}
        known = [row.sent for row in first.values() if row.sent and not row.sent.law and row.true_ms > oldest_ms]
        if known:
            sent = rng.choice(known)
            self._send(replace(sent, groups=self._groups()), "again, and otherwise")

    def swarm(self) -> None:
        """Send as many invented producers, each with a batch or two and numbers of its own."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        for _ in range(rng.choice((10, 30, 100))):
            name = f"x{world.new_number()}"
            base = rng.choice((0, 0, 7, *WILD))
            epoch = rng.choice((0, 0, 3, *WILD))
            plain = base + epoch <= 10
            for sequence in range(base, base + rng.randint(1, 2)):
                floor = rng.choice((0, sequence))
                groups = self._groups() if rng.random() < 0.2 else ()
                law = "" if plain else "free"
                self._send(Sent(name, epoch, partition, sequence, floor, groups, law=law), "invented")

    def _groups(self) -> tuple:  # type: ignore[type-arg]
        publisher = self.world.crowd.new_life(f"y{self.world.new_number()}", self.world.crowd.some_views())
        return publisher.some_groups(1)

    def _send(self, sent: Sent, what: str) -> None:
        world = self.world
        value = encode_batch(batch_of(sent, world.time.at_ms))
        world.auditor.sealed(value, sent)
        offset = world.cluster.deliver(Message(DELTAS, sent.partition, None, value))
        numbers = sent.epoch, sent.sequence, sent.floor
        world.note(
            "a stranger's batch (%s) of %s %s comes in at %s-%s", what, sent.producer_id, numbers, sent.partition, offset
        )
        world.count(f"stranger: {what}")
