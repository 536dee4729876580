"""kill -9 of everything in random order, the broker included; then every answer is exact."""

from __future__ import annotations

import random
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.broker.drive import Sender, Supervised, check, finish, loaded, server, worker
from tests.broker.kafka import Broker, create_topics, new_app
from tests.support import wait_until

SEED = 7
KILLS_S = 20.0


@pytest.mark.long
@pytest.mark.timeout(150)
def test_everything_killed_in_random_order(broker: Broker, tmp_path: Path) -> None:
    """Publishers, worker, server and broker die in any order for a while; then every answer is exact."""
    rng = random.Random(SEED)
    own = new_app(broker.bootstrap)
    create_topics(own.bootstrap, own.app)
    with ExitStack() as stack:
        senders = [stack.enter_context(Sender(own, "s0", tmp_path))]
        roles = [worker(own, tmp_path / "worker"), server(own, tmp_path / "server")]
        supervised = [stack.enter_context(Supervised(stack.enter_context(role))) for role in roles]
        publisher, loads = stack.enter_context(loaded(own))
        senders[0].wait_round()
        deadline_s = time.monotonic() + KILLS_S
        killed = []
        while time.monotonic() < deadline_s or len({*killed}) < 4:
            victim = rng.choice(("sender", "worker", "server", "broker"))
            killed.append(victim)
            if victim == "sender":
                senders[-1].kill()
                senders.append(stack.enter_context(Sender(own, f"s{len(senders)}", tmp_path)))
            elif victim == "broker":
                broker.kill()
                broker.start()
            else:
                supervised[victim == "server"].kill()
            time.sleep(rng.uniform(0.1, 1.5))
        load = finish(publisher, loads)
        for one in supervised:
            wait_until(one.ready, f"{one.role.tail()}")
        senders[-1].wait_round()
        check(own, roles[1:], tmp_path, load=load, senders=senders)
        for one in supervised:  # 1: at its start it waited for the broker for as long as it does
            assert set(one.codes) <= {-9, 3, 1}, f"{one.codes}; {one.role.tail()}"
        assert sum(sender.acknowledged > 0 for sender in senders) > 1, killed
