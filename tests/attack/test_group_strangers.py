"""Strangers in the consumer group of the workers: their bytes stop no worker, are taken for no worker's, fill no memory."""

from __future__ import annotations

import asyncio
import json
import threading
import tracemalloc
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.abstract import AbstractPartitionAssignor
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

from pipeline import Publisher
from pipeline.adapters.faust import strangers
from pipeline.adapters.faust.group import _member
from pipeline.adapters.faust.member_metadata import warm_of
from pipeline.adapters.kafka.options import parse_url
from tests.broker.drive import PUBLISHER, worker
from tests.broker.kafka import App, create_topics
from tests.support import pipeline, wait_until

ADDRESS = parse_url("kafka://h:1/shop")
WORKER = {
    "assignment": {"actives": {"shop.deltas": [0, 2]}, "standbys": {"shop.changelog": [1]}},
    "url": "http://h:1/#one",
    "changelog_distribution": {},
    "external_topic_distribution": {},
    "topic_groups": {"format": 2},
}


STRANGE = ConsumerProtocolMemberMetadata(4, ["other"], b"{}").encode()


def packed(value: object) -> bytes:
    return zlib.compress(value if isinstance(value, bytes) else json.dumps(value).encode())


def wrong_documents() -> Iterator[bytes | None]:
    """Yield user data that no worker sends."""
    yield from (None, b"", b"\xff\xfe", b"null", b"[]", b"{", b"1e999", b"[" * 100_000, json.dumps("x" * 100).encode())
    for name in ("assignment", "url", "changelog_distribution"):
        for value in (None, 7, [], {"a": 1}, "\ud800", {"actives": {"shop.deltas": ["x"]}, "standbys": {}}):
            yield json.dumps({**WORKER, name: None if name == "url" and value == "\ud800" else value}).encode()
    for numbers in ([-1], [2**31], [1.5], {"0": 1}, "0", [[0]]):
        yield json.dumps({**WORKER, "assignment": {"actives": {"shop.deltas": numbers}, "standbys": {}}}).encode()
    yield json.dumps({**WORKER, "topic_groups": {"format": "newest"}}).encode()
    yield json.dumps({name: value for name, value in WORKER.items() if name != "assignment"}).encode()


def test_a_worker_is_understood() -> None:
    """A worker is listed with its name, URL and partitions, and one that waits for others without any."""
    data = json.dumps(WORKER).encode()
    metadata = ConsumerProtocolMemberMetadata(4, ["shop.deltas"], data).encode()
    assignment = ConsumerProtocolMemberAssignment(4, [], packed(WORKER)).encode()
    assert _member(ADDRESS, "", "shop-membership-one", "", metadata, assignment) == ("one", "http://h:1", {0, 2}, {1}, "")
    assert _member(ADDRESS, "", "shop-membership-one", "", b"", b"") == ("one", "", set(), set(), "")


@pytest.mark.parametrize("data", [*wrong_documents()], ids=lambda it: repr(it)[:40])
def test_a_stranger_is_no_worker(data: bytes | None) -> None:
    """A member with any other metadata is listed as a stranger without partitions."""
    metadata = ConsumerProtocolMemberMetadata(4, [], data).encode()
    assignment = ConsumerProtocolMemberAssignment(4, [], data and packed(data)).encode()
    raw = ConsumerProtocolMemberAssignment(4, [], data).encode()
    for given in (assignment, raw, data or b"", b"\0" * 9):
        found = _member(ADDRESS, "", "somebody", "", metadata, given)
        assert (found.name, found.url, found.actives, found.standbys) == ("somebody", "", set(), set())
        assert "a stranger" in found.problem
    assert "a stranger" in _member(ADDRESS, "", "somebody", "", b"\xff" * 20, b"").problem


def test_metadata_is_unpacked_within_bounds() -> None:
    """Metadata that grow a thousandfold when they are unpacked take no more memory than the bound."""
    bomb = ConsumerProtocolMemberAssignment(4, [], zlib.compress(b" " * 80_000_000)).encode()
    tracemalloc.start()
    try:
        assert _member(ADDRESS, "", "somebody", "", b"", bomb).actives == set()
        assert tracemalloc.get_traced_memory()[1] < 3 * strangers.METADATA_BYTES_MAX
    finally:
        tracemalloc.stop()
    assert warm_of({"warm:1": 1, "warm:x": 1, "warm:": 1, "warm:" + "9" * 5_000: 1, "warm:²": 1}) == {1}


class Garbage:
    """Bytes that a stranger says in place of metadata."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def encode(self) -> bytes:
        return self.data


@contextmanager
def stranger(app: App, data: bytes) -> Iterator[None]:
    """Have a consumer in the group that says `data` in place of metadata, until the context ends."""

    class Assignor(AbstractPartitionAssignor):
        name = "faust"
        version = 4

        @classmethod
        def metadata(cls, topics: Any) -> Any:
            return Garbage(data)

        @classmethod
        def assign(cls, cluster: Any, members: Mapping[str, Any]) -> Any:
            return dict.fromkeys(members, ConsumerProtocolMemberAssignment(4, [], b"{}"))

        @classmethod
        def on_assignment(cls, assignment: Any) -> None: ...

    async def stay() -> None:
        consumer = AIOKafkaConsumer(
            app.topic("deltas"),
            bootstrap_servers=app.bootstrap,
            group_id=app.app,
            client_id="\x1b[31mstranger\n",
            partition_assignment_strategy=[Assignor],
            session_timeout_ms=6_000,
            heartbeat_interval_ms=200,
        )
        task = asyncio.ensure_future(consumer.start())
        await asyncio.to_thread(ended.wait)
        task.cancel()
        await asyncio.wait([task])
        await consumer.stop()

    ended = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(stay()))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@pytest.mark.timeout(120)
def test_workers_go_on_beside_a_stranger(app: App, tmp_path: Path) -> None:
    """A worker that leads a group with a stranger folds on, and `status` lists the stranger as one, escaped."""
    create_topics(app.bootstrap, app.app, 2)
    with worker(app, tmp_path / "one", "--name", "one", session_timeout_ms=6_000) as role:
        with stranger(app, STRANGE):

            def listed() -> str:
                done = pipeline("status", "--from", app.url)
                return done.stdout if done.returncode == 0 and "a stranger" in done.stdout else ""

            said = wait_until(listed, "a stranger in the status", 60, seen=role.tail)
            assert "\x1b" not in said
            assert "\\x1b[31mstranger\\n" in said
            with Publisher(app.url, **PUBLISHER) as publisher:
                publisher.sum("v").add(1)

            def folded() -> bool:
                return "lag 0 records" in pipeline("status", "--from", app.url).stdout

            wait_until(folded, "the worker goes on", 60, seen=role.tail)
        assert role.exit_code is None
        assert "are no workers: they get no partitions" in role.program.stderr()
        assert "Traceback" not in role.program.stderr()


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_stranger_that_leads_is_not_followed(app: App, tmp_path: Path) -> None:
    """A worker whose group is led by a stranger ends with words, without partitions."""
    create_topics(app.bootstrap, app.app, 2)
    with stranger(app, STRANGE):
        wait_until(lambda: "a stranger" in pipeline("status", "--from", app.url).stdout, "the stranger's group", 60)
        done = pipeline("worker", "--from", app.url, f"--data={tmp_path}/one", "--name=one", "--port=0")
    assert done.returncode == 2, done
    assert f"group '{app.app}' is led by a program that is no worker" in done.stderr
    assert "Traceback" not in done.stderr
