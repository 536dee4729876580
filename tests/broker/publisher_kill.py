"""Publishers that are killed, as `tests.process.publisher_kill` has them, on real Kafka, which is killed too."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from tests.broker.drive import Supervised, server, worker
from tests.broker.kafka import Broker, create_topics, new_app
from tests.process.publisher_kill import Killer, Killing
from tests.support import wait_until


def on_kafka(folder: Path, seed: int, rounds: int, broker: Broker | None = None) -> Killing:
    """Run the rounds with a broker of their own, which is killed once in ten rounds, a worker and a query server."""
    with ExitStack() as stack:
        if broker is None:
            broker = stack.enter_context(Broker(folder / "kafka"))
        own = new_app(broker.bootstrap)
        create_topics(own.bootstrap, own.app)
        roles = [worker(own, folder / "worker"), server(own, folder / "server")]
        supervised = [stack.enter_context(Supervised(stack.enter_context(role))) for role in roles]
        killer = Killer(own.url, folder, seed, metadata_refresh_ms=100)

        def disturb(number: int) -> None:
            if number % 25 == 10:
                broker.kill()
                broker.start()

        killer.run(rounds, disturb)
        killer.drain()
        for one in supervised:
            wait_until(one.ready, f"{one.role.tail()}", 60)
        return killer.check(roles[1].url)
