"""kill -9 of publishers and workers on a real broker: every answer stays exact."""

from __future__ import annotations

import random
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

import pipeline.metrics as m
from tests.broker.drive import Sender, check, finish, loaded, server, worker
from tests.broker.kafka import App, create_topics
from tests.process.load import SERIES, metric

SEED = 4
SENDERS = 3
SENDER_KILLS = 4
WORKER_KILLS = 10


@pytest.mark.long
@pytest.mark.timeout(120)
def test_publishers_killed_while_they_send(app: App, tmp_path: Path) -> None:
    """Acknowledged deltas of killed publishers count once, others once or not at all."""
    rng = random.Random(SEED)
    create_topics(app.bootstrap, app.app)
    with ExitStack() as stack:
        roles = [worker(app, tmp_path / "worker"), server(app, tmp_path / "server")]
        senders: list[Sender] = []
        for number in range(SENDERS):
            senders.append(stack.enter_context(Sender(app, f"first{number}", tmp_path)))
        for role in roles:
            stack.enter_context(role)
        for kill in range(SENDER_KILLS):
            running = senders[-SENDERS:]
            for sender in running:
                sender.wait_round()
            if kill < SENDER_KILLS - 1:  # before these die, so that somebody sends at any time
                senders += [stack.enter_context(Sender(app, f"s{kill}-{n}", tmp_path)) for n in range(SENDERS)]
            for sender in running:
                time.sleep(rng.uniform(0.05, 0.3))
                sender.kill()
        assert min(sender.acknowledged for sender in senders) > 0
        assert sum(sender.acknowledged for sender in senders) > 10 * len(senders)
        check(app, roles[1:], tmp_path, senders=senders)


@pytest.mark.long
@pytest.mark.timeout(150)
def test_worker_killed_at_random(app: App, tmp_path: Path) -> None:
    """Answers are exact and nothing is a duplicate after kills under load, during a start, and once with the stores gone."""
    rng = random.Random(SEED)
    create_topics(app.bootstrap, app.app)
    with (
        worker(app, tmp_path / "worker") as role,
        server(app, tmp_path / "server") as reads,
        Sender(app, "s", tmp_path) as sender,
    ):
        sender.wait_round()
        with loaded(app) as (publisher, loads):
            for kill in range(WORKER_KILLS):
                if kill % 3 == 2:  # before it is ready, perhaps before it has fenced its last life
                    time.sleep(rng.uniform(0.3, 1.5))
                else:
                    if kill:
                        role.wait_ready()
                    time.sleep(rng.uniform(0.05, 0.5))
                    assert metric(role.url, m.BATCHES_DUPLICATE) == 0, "nobody sent anything twice"
                assert role.exit_code is None, role.tail()
                role.kill()
                if kill == WORKER_KILLS // 2:
                    shutil.rmtree(role.data / "stores")
                role.start(wait_ready=False)
            role.wait_ready()
            load = finish(publisher, loads)
            assert publisher.stats()["deltas"] == sum(it.delta_count for it in loads)
        assert min(map(len, load[1].values())) == 2 * SERIES
        check(app, [reads], tmp_path, load=load, senders=[sender])
        counted = {it: metric(role.url, it) for it in (m.BATCHES_FOLDED, m.COMMITS, m.ENTRIES_COMMITTED)}
        assert min(counted.values()) > 0, counted
        refused = {it: metric(role.url, it) for it in (m.BATCHES_DUPLICATE, m.BATCHES_STALE, m.DEAD_LETTERS)}
        assert max(refused.values()) == 0, refused
