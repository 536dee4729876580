"""From 4 to 7 partitions under load: no process is started again, nothing is replayed, every answer is exact."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from confluent_kafka.admin import NewPartitions

from pipeline import Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.writer import KafkaLogWriter
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Message
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from tests.broker.drive import Role, Sender, check, finish, loaded, records, server, worker
from tests.broker.kafka import App, admin_client, create_topics
from tests.broker.test_workers import status
from tests.support import pipeline, wait_until

BEFORE, AFTER = 4, 7


@pytest.mark.long
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
            wait_until(lambda role=role: _holding(role) == set(range(AFTER)), f"new partitions; {role.tail()}", 60)
        while sender.token.next_offsets.keys() != {*range(AFTER)}:
            sender.wait_round()
        wait_until(lambda: publisher.flush().next_offsets.keys() == {*range(AFTER)}, "the publisher to notice", 60)

        load = finish(publisher, loads)
        check(app, roles[1:], tmp_path, load=load, senders=[sender])
        for topic in (DELTAS, CHANGELOG):
            assert {record.partition() for record in records(app, topic)} == set(range(AFTER))
        assert [(role.program.process.pid, role.exit_code) for role in roles] == [(pid, None) for pid in pids]


def test_an_idle_log_takes_what_is_sealed_for_new_partitions(app: App) -> None:
    """A writer that knows of new partitions, from any call, appends to them at once; others once they ask anew.

    Until then, half a second after the last answer, they append nothing and say that the partition may come.
    """
    create_topics(app.bootstrap, app.app, BEFORE)
    settings, clock = KafkaSettings(metadata_refresh_ms=600_000), SystemClock()
    log = KafkaLog(parse_url(app.url), settings, clock)
    other = KafkaLogWriter(parse_url(app.url), {}, clock, timeout_ms=10_000, metadata_refresh_ms=600_000)
    try:
        for writer in (log, other):
            assert isinstance(writer.append([Message(DELTAS, 0, None, b"x")], timeout_s=10)[0], int)
        assert pipeline("topics", "apply", "--to", app.url, "--partitions", str(AFTER)).returncode == 0
        wait_until(lambda: len(log.end_offsets(DELTAS)) == AFTER, "new partitions")
        last = Message(DELTAS, AFTER - 1, None, b"x")
        assert log.append([last], timeout_s=10) == [1]
        wait_until(lambda: other.append([last], timeout_s=10) == [2], "a count that is not fresh any more")
        (refused,) = other.append([Message(DELTAS, AFTER, None, b"x")], timeout_s=10)
        assert isinstance(refused, Unavailable), "it may be there soon"
    finally:
        other.close()
        log.close()


def _holding(role: Role) -> set[int]:
    """Return the partitions of which something is folded or followed."""
    with Reader(role.url) as reader:
        return {it["partition"] for it in reader.status()["partitions"] if it.get("next_offset", 0) > 0}


@pytest.mark.timeout(120)
def test_members_grow_with_their_topics(app: App, tmp_path: Path) -> None:
    """The changelog grows first and deltas last: members take new partitions when both have them, and none ends."""
    create_topics(app.bootstrap, app.app, BEFORE)
    with ExitStack() as stack:
        roles = [stack.enter_context(worker(app, tmp_path / name, "--name", name)) for name in ("a", "b")]
        admin = admin_client(app.bootstrap)
        admin.create_partitions([NewPartitions(app.topic(CHANGELOG), AFTER)])[app.topic(CHANGELOG)].result(30)
        time.sleep(1.5)  # members look every 0.1 s
        assert pipeline("topics", "apply", "--to", app.url, "--partitions", str(AFTER)).returncode == 0

        def folded() -> list[int]:
            assert [role.exit_code for role in roles] == [None] * len(roles), "\n".join(role.tail() for role in roles)
            return sorted(it["partition"] for role in roles for it in status(role).get("partitions", []))

        wait_until(lambda: folded() == [*range(AFTER)], "the new partitions to be theirs", 60)
        log = KafkaLog(parse_url(app.url), KafkaSettings(), SystemClock())
        try:
            for number in range(AFTER):
                log.append([Message(DELTAS, number, None, b"no batch")], timeout_s=10)
            wait_until(lambda: folded() and sum(log.end_offsets(DEAD_LETTERS).values()) >= AFTER, "their dead letters", 60)
            folded()
        finally:
            log.close()


def test_an_idle_log_looks_for_a_partition_that_it_does_not_know(app: App) -> None:
    """A log whose metadata is older than a partition can read that partition's offsets and commit to it."""
    create_topics(app.bootstrap, app.app, BEFORE)
    log = KafkaLog(parse_url(app.url), KafkaSettings(metadata_refresh_ms=600_000), SystemClock())
    try:
        assert log.partition_count(CHANGELOG) == log.partition_count(DEAD_LETTERS) == BEFORE
        assert pipeline("topics", "apply", "--to", app.url, "--partitions", str(AFTER)).returncode == 0
        assert log.watermarks(CHANGELOG, AFTER - 1) == (0, 0)
        letter = Message(DEAD_LETTERS, AFTER - 1, None, b"x")
        assert log.transaction("t").commit([letter], timeout_s=10) == [1]
        with pytest.raises(Invalid):
            log.watermarks(CHANGELOG, AFTER)
    finally:
        log.close()
