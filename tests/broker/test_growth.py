"""From 4 to 7 partitions under load: nobody is started again, nothing is replayed, every answer is exact."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline import Reader
from pipeline.topics import CHANGELOG, DELTAS
from tests.broker.drive import Role, Sender, check, finish, loaded, records, server, worker
from tests.broker.kafka import App, create_topics
from tests.support import pipeline, wait_until

BEFORE, AFTER = 4, 7


@pytest.mark.timeout(120)
def test_growth_under_load(app: App, tmp_path: Path) -> None:
    """Publishers, worker and servers notice the new partitions by themselves, and the new partitions hold data."""
    create_topics(app.bootstrap, app.app, BEFORE)
    with ExitStack() as stack:
        roles = [worker(app, tmp_path / "worker"), *[server(app, tmp_path / f"server{n}") for n in range(2)]]
        for role in roles:
            stack.enter_context(role)
        pids = [role.program.process.pid for role in roles]
        sender = stack.enter_context(Sender(app, "grown", tmp_path))
        publisher, loads = stack.enter_context(loaded(app))
        sender.wait_round()
        publisher.flush()

        grown = pipeline("topics", "apply", "--to", app.url, "--partitions", str(AFTER))
        assert grown.returncode == 0, grown.stdout + grown.stderr
        for role in roles:
            wait_until(lambda role=role: _holding(role) == set(range(AFTER)), f"new partitions; {role.tail()}")
        time.sleep(0.3)

        load = finish(publisher, loads)
        assert set(load[0].next_offsets) == set(range(AFTER))
        assert set(sender.kill().next_offsets) == set(range(AFTER)), "the sender did not notice"
        check(app, roles[1:], tmp_path, load=load, senders=[sender])
        for topic in (DELTAS, CHANGELOG):
            assert {record.partition() for record in records(app, topic)} == set(range(AFTER))
        assert [(role.program.process.pid, role.exit_code) for role in roles] == [(pid, None) for pid in pids]


def _holding(role: Role) -> set[int]:
    """Partitions of which something is folded, or followed."""
    with Reader(role.url) as reader:
        return {it["partition"] for it in reader.status()["partitions"] if it.get("next_offset", 0) > 0}
