"""Workers with a name that are set up wrongly: one clear line, code 2 or 1, and no well set up worker is disturbed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.core.codec import FORMAT, encode_position
from pipeline.core.record import POSITION_KEY, Position, view_prefix
from pipeline.ports import Message, Transaction
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG
from tests.broker.drive import records, wait_exit, worker
from tests.broker.kafka import App, create_topics, new_app
from tests.broker.member import Inside, settled
from tests.support import pipeline, wait_until

PARTITIONS = 3
ALL = frozenset(range(PARTITIONS))
NEWER = FORMAT + 1


@pytest.fixture
def topics(app: App) -> App:
    """An app whose topics are there."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    return app


def run(app: App, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run a worker that is expected to end by itself."""
    return pipeline("worker", "--from", app.url, f"--data={data}", "--port=0", *more)


@contextmanager
def owner(app: App, number: int = 0) -> Iterator[Transaction]:
    """Yield the transaction of a partition's owner, who must still be able to commit at the end."""
    log = KafkaLog(parse_url(app.url), KafkaSettings(), SystemClock())
    with closing(log), closing(log.transaction(f"{app.app}-{number}")) as transaction:
        yield transaction
        transaction.commit([Message(CHANGELOG, number, b"k", b"v")], timeout_s=30)


def refused(done: subprocess.CompletedProcess[str], *said: str, code: int = 2) -> None:
    """Check that a process ended with one line on standard error: with 4 if a newer program is needed, else `code`."""
    assert done.returncode == (4 if any("the newer program" in text for text in said) else code), done.stderr
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last.startswith("pipeline: "), done.stderr
    for text in said:
        assert text in last
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_an_older_worker_joins(topics: App, tmp_path: Path) -> None:
    """An older worker names both formats and exits with 4, without a fence or a store; the newer keeps its partitions."""
    with Inside(topics, "new", format=NEWER) as newer, owner(topics):
        settled(newer, partitions=PARTITIONS)
        done = run(topics, tmp_path / "old", "--name", "old")
        refused(
            done,
            f"this program writes format {FORMAT}",
            f"group '{topics.app}'",
            f"writes format {NEWER}",
            "start the newer program",
        )
        assert not (tmp_path / "old" / "stores").exists()
        wait_until(lambda: newer.actives == ALL, "all to be the newer one's")
        assert not newer.failure
        assert [it.name for it in newer.membership.members()] == ["new"]


def test_a_newer_worker_joins(topics: App) -> None:
    """Older members end, leader or not, naming both formats; the newer gets all partitions."""
    with Inside(topics, "old", static=True) as old:
        settled(old, partitions=PARTITIONS)
        with Inside(topics, "older-too") as too:
            settled(old, too, partitions=PARTITIONS)
            with Inside(topics, "new", format=NEWER) as newer:
                settled(newer, partitions=PARTITIONS)
                for it in (old, too):
                    wait_until(lambda it=it: it.failure, "the older to be told")
                    assert it.failure.startswith(f"NewerFormat: this program writes format {FORMAT}"), it.failure
                    assert f"writes format {NEWER}" in it.failure
                    assert it.heard[-1].call == "failed", "and is given nothing behind that"
                wait_until(lambda: [it.name for it in newer.membership.members()] == ["new"], "the older to be gone")


def test_a_worker_that_is_joined_by_a_newer_one(topics: App, tmp_path: Path) -> None:
    """A worker that has folded for long ends with 4 when a newer one joins: starting it again can't help."""
    with worker(topics, tmp_path / "d", "--name=old") as role, Inside(topics, "new", format=NEWER):
        assert wait_exit(role, 30) == 4, role.tail()
        assert f"this program writes format {FORMAT}" in role.tail().splitlines()[-1]


def test_an_older_program_under_a_name_of_before(topics: App) -> None:
    """A static member that comes back older within its session is told apart by its former format."""
    with Inside(topics, "one", static=True, format=NEWER) as before:
        settled(before, partitions=PARTITIONS)
        before.stop(leave=False)
        with Inside(topics, "one", static=True) as after:
            wait_until(lambda: after.failure, "its end")
            assert f"writes format {FORMAT}" in after.failure
            assert not [it for it in after.heard if it.call == "assigned"]


@pytest.mark.parametrize("first", ["this", "other"])
def test_two_apps_of_one_name(topics: App, first: str) -> None:
    """The first of two apps of one name with different partition counts goes on; the other ends, naming both."""
    other = new_app(topics.bootstrap)
    create_topics(other.bootstrap, other.app, PARTITIONS + 2)
    theirs = {name: other.topic(name) for name in ("deltas", "changelog")}
    given = [({}, PARTITIONS, topics), (theirs, PARTITIONS + 2, other)]
    (mine, count, here), (yours, _, there) = given if first == "this" else given[::-1]
    with Inside(topics, "z", **mine) as one:
        settled(one, partitions=count)
        with Inside(topics, "a", **yours) as two:
            wait_until(lambda: two.failure, "its end")
            assert two.failure.startswith(f"Invalid: group '{topics.app}' is of another app"), two.failure
            assert here.topic("deltas") in two.failure
            assert there.topic("deltas") in two.failure
            assert not [it for it in two.heard if it.call == "assigned"]
            settled(one, partitions=count)
            assert not one.failure


def test_the_group_of_another_program(topics: App, tmp_path: Path) -> None:
    """A worker whose group has another program's consumer says so, and the consumer goes on."""
    options = {"bootstrap.servers": topics.bootstrap, "group.id": topics.app, "session.timeout.ms": 6_000}
    with closing(Consumer({**options, "log_level": 0})) as consumer:
        consumer.subscribe([topics.topic("deltas")])
        wait_until(lambda: consumer.poll(0.1) is None and consumer.assignment(), "its partitions")
        refused(run(topics, tmp_path / "d", "--name=one"), f"group {topics.app} is that of another program")
        consumer.poll(0.5)
        assert len(consumer.assignment()) == PARTITIONS


def test_a_changelog_that_lacks_a_partition(app: App, tmp_path: Path) -> None:
    """A worker with a name refuses a changelog that lacks a partition before it joins the group, and fences nobody."""
    create_topics(app.bootstrap, app.app, PARTITIONS, only=["deltas", "dead-letters"])
    create_topics(app.bootstrap, app.app, PARTITIONS - 1, only=["changelog"])
    with owner(app):
        done = run(app, tmp_path / "d", "--name=one")
        counts = f"{app.topic('deltas')} {PARTITIONS}", f"{app.topic('changelog')} {PARTITIONS - 1}"
        refused(done, "as many partitions as each other", *counts)
    done = pipeline("status", "--from", app.url)
    assert "has no members" in done.stderr


def test_a_newer_changelog(topics: App, tmp_path: Path) -> None:
    """A worker refuses a newer changelog, naming both formats, before it fences the owner, and leaves it as it is."""
    newest = bytes((NEWER,))
    position = newest + encode_position(Position(1, 1, 1))[1:]
    entries = [
        Message(CHANGELOG, 1, view_prefix("v") + b"x", newest + b"v"),
        Message(CHANGELOG, 1, POSITION_KEY, position),
    ]
    with owner(topics, 1) as newer:
        newer.commit(entries, timeout_s=30)
        done = run(topics, tmp_path / "d", "--name=one")
        refused(
            done, f"changelog-1: position: it has format {NEWER}, and this program reads {FORMAT}: start the newer program"
        )
        assert not (tmp_path / "d" / "stores").exists()
    assert len(records(topics, CHANGELOG)) == 3


def test_a_port_that_is_taken(topics: App, tmp_path: Path) -> None:
    """A port in use is named in the error, the worker does not join the group, and its folder is free again."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(topics, tmp_path / "d", "--name=one", f"--port={port}")
        refused(done, f"can't listen on 127.0.0.1:{port}: Address already in use; try --port")
    assert "has no members" in pipeline("status", "--from", topics.url).stderr
    with worker(topics, tmp_path / "d", "--name=one") as role:
        assert role.terminate() == 0, role.tail()


def test_directories(topics: App, tmp_path: Path) -> None:
    """A directory in use, or of another app, is refused and left as it is; the lock of a dead worker is no obstacle."""
    other = new_app(topics.bootstrap)
    create_topics(other.bootstrap, other.app, PARTITIONS)
    with worker(topics, tmp_path / "d", "--name=one") as role:
        refused(run(topics, tmp_path / "d", "--name=two"), f"is in use by process {role.program.process.pid}", code=1)
        role.program.signal(signal.SIGKILL)
        role.program.wait()
        assert (tmp_path / "d" / "LOCK").read_text() == f"{role.program.process.pid}\n"
        left = {path: path.stat().st_mtime_ns for path in (tmp_path / "d" / "stores").rglob("*")}
        assert left
        said = f"is that of app '{topics.app}', not of '{other.app}': give each its own"
        refused(run(other, tmp_path / "d", "--name=one"), said)
        refused(pipeline("serve", "--from", other.url, f"--data={tmp_path}/d", "--port=0"), said)
        refused(pipeline("verify", "--from", other.url, f"--data={tmp_path}/d"), said)
        assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d" / "stores").rglob("*")} == left
        role.start()
        assert role.terminate() == 0, role.tail()


def test_no_other_port_listens(topics: App, tmp_path: Path) -> None:
    """The worker's own port is the only one: Faust's web server, with its tables open to all, does not run."""
    with worker(topics, tmp_path / "d", "--name=one") as role:
        wait_until(lambda: "folding" in pipeline("status", "--from", topics.url).stdout, "a member that folds")
        process = psutil.Process(role.program.process.pid)
        listening = [it.laddr.port for it in process.net_connections("inet") if it.status == psutil.CONN_LISTEN]
        assert listening == [role.port]
        assert role.program.process.pid != os.getpid()
