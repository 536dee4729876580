"""All publishers of a history, the network between them and the log, and senders of junk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.core.sequence import Sealed
from pipeline.errors import Invalid
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.sim.clocks import NodeClock
from tests.sim.count import Order
from tests.sim.entries import View
from tests.sim.faults import FaultyLog, Process, SimulatedCrash
from tests.sim.publishers import SimPublisher, in_time, message_of, other_definition, some_views

if TYPE_CHECKING:
    from tests.sim.world import World


class Crowd:
    """Steps of publishers, one at a time."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.network: list[Message] = []
        """Messages that arrive late, some of them for the second time."""
        self.zombies: list[SimPublisher] = []
        """Publishers whose spool another process has opened without their knowing."""
        self._views = self._in_time(some_views(world.rng))
        self.clocks = [NodeClock(f"publishers {n}", world.time) for n in range(2)]
        """The machines that publishers run on, each with its clock."""
        self._closed: dict[bytes, int] = {}
        """Time at which each producer closed."""
        self.publishers = [self.new_publisher() for _ in range(world.rng.randint(1, 3))]

    # What happens

    def new_publisher(self) -> SimPublisher:
        world = self.world
        publisher = self.new_life(f"p{world.new_number()}", self.some_views())
        if world.rng.random() < 0.5:
            publisher.spool = {}
        return publisher

    def new_life(self, producer_id: str, views: list[View]) -> SimPublisher:
        """Start a process that publishes under this identity."""
        world = self.world
        return SimPublisher(
            producer_id,
            world.auditor,
            world.rng,
            views,
            world.partition_count,
            world.rng.choice(self.clocks),
            ties="ties" in world.switches,
            floats="floats" in world.switches,
        )

    def some_views(self) -> list[View]:
        """Return the views as one publisher defines them; in histories with conflicts others define them otherwise."""
        rng = self.world.rng
        if "conflicts" not in self.world.switches or rng.random() < 0.3:
            return self._views
        return [
            rng.choice(self._in_time([other_definition(rng, view)])) if rng.random() < 0.4 else view for view in self._views
        ]

    def _in_time(self, views: list[View]) -> list[View]:
        """Give some views windows or a retention, if the history has such; views that overflow get no retention."""
        world, rng = self.world, self.world.rng
        if "windows" not in world.switches:
            return views
        return [in_time(rng, it, expires="overflow" not in world.switches) if rng.random() < 0.8 else it for it in views]

    def send_all(self) -> None:
        """Deliver everything that was recorded."""
        world = self.world
        for message in self.network:
            world.cluster.deliver(message)
        for publisher in self.publishers:
            publisher.seal()
            while len(publisher.outbox):
                self.send_from(publisher)

    def record(self) -> None:
        world, rng = self.world, self.world.rng
        publisher = rng.choice(self.publishers)
        publisher.record(rng.randint(1, 6))
        if rng.random() < 0.7:
            world.note("%s seals %s", publisher.producer_id, [s[:2] for s in map(_brief, publisher.seal())])
        elif rng.random() < 0.1:
            world.note("%s seals a bad %s", publisher.producer_id, _brief(publisher.seal_bad()))

    def send(self) -> None:
        self.send_from(self.world.rng.choice(self.publishers))

    def send_as_zombie(self) -> None:
        """Send from a publisher that does not know that another process has opened its spool."""
        world, rng = self.world, self.world.rng
        if self.zombies:
            publisher = rng.choice(self.zombies)
            if rng.random() < 0.3:
                publisher.record(2)
                publisher.seal()
            world.count("zombie publisher sends")
            self.send_from(publisher)

    def send_from(self, publisher: SimPublisher) -> None:
        world, rng = self.world, self.world.rng
        pending = [*publisher.outbox.pending()]
        chosen = rng.sample(pending, min(len(pending), rng.randint(1, 6)))
        if rng.random() < 0.6:
            chosen.sort(key=_brief)
        log = FaultyLog(
            world.cluster,
            Process(publisher.producer_id, world.interrupt),
            fate=lambda message: self._fate(publisher, message),
        )
        try:
            results = log.append([message_of(sealed, publisher.producer_id) for sealed in chosen], timeout_s=0)
        except SimulatedCrash as error:
            self._restart_publisher(publisher, str(error))
            return
        for sealed, result in zip(chosen, results, strict=True):
            world.note("%s e%s sends %s: %s", publisher.producer_id, publisher.outbox.epoch, _brief(sealed), result)
            if isinstance(result, int | Invalid):
                publisher.acknowledge(sealed, accepted=isinstance(result, int))
        self.network += log.late

    def _fate(self, publisher: SimPublisher, message: Message) -> str:
        world, rng = self.world, self.world.rng
        fate = "in"
        if not world.quiet:
            rare = 0.02 * world.trouble
            fates = ("in", "unsure", "late", "gone", "crash before", "crash after")
            (fate,) = rng.choices(fates, (0.6, 0.1, 0.1, 0.1, rare, rare))
            if rng.random() < 0.15:
                self.network.append(message)  # a copy that comes in later, perhaps much later
            elif publisher.spool is None and rng.random() < 0.02 and message not in self.network:
                fate = "refused" if self._never_sent(message) else fate
        world.count(f"append: {fate}")
        return fate

    def _never_sent(self, message: Message) -> bool:
        return all(row.value != message.value for row in self.world.auditor.rows[message.partition])

    def job(self) -> None:
        """Run a short-lived process: it records a little, sends it, perhaps twice, and is never heard of again."""
        world, rng = self.world, self.world.rng
        publisher = self.new_life(f"j{world.new_number()}", self.some_views())
        last = rng.randint(0, 1)
        for turn in range(last + 1):
            publisher.record(rng.randint(1, 3))
            if turn == last and rng.random() < 0.7:
                self._close(publisher, publisher.seal(closing=True))
            else:
                self._deliver(publisher, publisher.seal())
        world.count("job")

    def say_something(self, partition: int) -> None:
        """Send a batch of a new producer, which shows the partition that time has passed."""
        publisher = self.new_life(f"z{self.world.new_number()}", self._views)
        self._deliver(publisher, [publisher.seal_for(partition)])

    def order(self) -> None:
        """Drop or reset a view, or one definition of it, while all others go on."""
        world, rng = self.world, self.world.rng
        view = rng.choice(self.some_views())
        kind = rng.choice(("", "", view.kind))
        labels = rng.choice((None, None, view.labels))
        order = Order(rng.choice(("drop", "reset")), view.name, kind, labels)
        admin = self.new_life(f"o{world.new_number()}", self.some_views())
        if rng.random() < 0.3:
            admin.record(2)
        self._deliver(admin, admin.seal_order(order))
        world.note("somebody orders %s", order)
        world.count(f"order: {order.action}")

    def _deliver(self, publisher: SimPublisher, batches: list[Sealed]) -> None:
        """Deliver all batches, and let copies of some arrive later."""
        world, rng = self.world, self.world.rng
        for sealed in batches:
            message = message_of(sealed, publisher.producer_id)
            world.cluster.acknowledge(sealed.partition, world.cluster.deliver(message) + 1)
            publisher.acknowledge(sealed, accepted=True)
            if rng.random() < 0.4:
                self.network.append(message)

    def forget_old_copies(self) -> None:
        """Discard late copies of batches, which never arrive so late that their closed producer is forgotten."""
        world = self.world
        oldest_ms = world.time.at_ms - world.settings.closed_producer_ttl_ms
        self.network = [m for m in self.network if self._closed.get(m.key or b"", world.time.at_ms) > oldest_ms]

    def deliver_late(self) -> None:
        world, rng = self.world, self.world.rng
        if self.network:
            i = rng.randrange(len(self.network))
            message = self.network[i] if rng.random() < 0.4 else self.network.pop(i)
            offset = world.cluster.deliver(message)
            world.note("a late message of %r comes in at %s-%s", message.key, message.partition, offset)
            world.count("late message")

    def close_publisher(self) -> None:
        """End a publisher without unacknowledged batches in order; another takes its place."""
        world, rng = self.world, self.world.rng
        i = rng.randrange(len(self.publishers))
        publisher = self.publishers[i]
        if len(publisher.outbox) == 0:
            publisher.record(rng.randint(1, 3))
            self._close(publisher, publisher.seal(closing=True))
            self.publishers[i] = self.new_publisher()
            world.note("publisher %s closes", publisher.producer_id)
            world.count("publisher closed")

    def _close(self, publisher: SimPublisher, batches: list[Sealed]) -> None:
        self._deliver(publisher, batches)
        self._closed[publisher.producer_id.encode()] = self.world.time.at_ms

    def crash_publisher(self) -> None:
        self._restart_publisher(self.world.rng.choice(self.publishers), "chance")

    def _restart_publisher(self, publisher: SimPublisher, why: str) -> None:
        world = self.world
        world.note("publisher %s crashes: %s", publisher.producer_id, why)
        if publisher in self.zombies:
            self.zombies.remove(publisher)
            return
        i = self.publishers.index(publisher)
        if publisher.spool is None:
            self.publishers[i] = self.new_publisher()
            world.count("publisher restarted")
        else:
            self.publishers[i] = publisher.reopened()
            world.count("spool reopened")
            if world.rng.random() < 0.4:
                self.zombies.append(publisher)
        world.note("publisher %s takes over", self.publishers[i].producer_id)

    def send_junk(self) -> None:
        """Send bytes that no partition may fold."""
        world, rng = self.world, self.world.rng
        partition = rng.randrange(world.partition_count)
        if rng.random() < 0.2:
            world.cluster.skip(DELTAS, partition)
            world.note("an offset of partition %s holds no record", partition)
            return
        real = [row.value for rows in world.auditor.rows for row in rows if row.sent and row.value]
        kind = rng.choice(("none", "noise", "cut", "version", "elsewhere", "flip")) if real else "noise"
        value: bytes | None = None
        if kind == "noise":
            value = rng.choice((b"", b"\x02")) + rng.randbytes(rng.randint(0, 30))
        elif kind != "none":
            value = rng.choice(real)
            assert value is not None
            if kind == "cut":
                value = value[: rng.randrange(len(value))]
            elif kind == "version":
                value = rng.choice((b"\x01", b"\x03")) + value[1:]
            elif kind == "flip":
                at = rng.randrange(len(value))
                value = value[:at] + bytes((value[at] ^ 1 << rng.randrange(8),)) + value[at + 1 :]
            elif int.from_bytes(value[5:9], "big") == partition:
                return
        offset = world.cluster.deliver(Message(DELTAS, partition, None, value))
        world.note("junk (%s) comes in at %s-%s", kind, partition, offset)
        world.count("junk")


def _brief(sealed: Sealed) -> tuple[int, int]:
    return sealed.partition, sealed.sequence
