"""Logins and permissions on a real broker: the least that the docs name suffices; a missing permission is named."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.plan import Wish
from pipeline.adapters.kafka.topics import TopicAdmin
from pipeline.adapters.kafka.writer import KafkaLogWriter
from pipeline.errors import Invalid, NotReady, Unavailable
from pipeline.ports import Message
from pipeline.roles.worker import ClusterWorker
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS, Topic, load
from tests.broker.drive import PUBLISHER, server, worker
from tests.broker.inside import folding, serving, sums, wait_folded, worker_at
from tests.broker.users import GROUP, ID, LEAST, LEAST_OF_COMMANDS, Own, flags, login, user
from tests.support import LONG, pipeline, wait_until

WAIT_S = 60.0


def folded(role: ClusterWorker) -> object:
    wait_folded(role)
    return sums({number: it.store for number, it in role.partitions.items()}, "v")[()]


@pytest.mark.long
def test_a_wrong_password(own: Own, tmp_path: Path) -> None:
    """Every command says that the login failed and what to check, ends with code 2, and does not wait for its time limit."""
    (tmp_path / "rows.csv").write_text("a\n1\n")
    with DataDir(tmp_path / "v", with_log=False):
        pass
    url = own.app.url
    commands = [
        ["publish", "v", str(tmp_path / "rows.csv"), "--to", url],
        ["worker", "--from", url, f"--data={tmp_path}/w", "--port=0"],
        ["serve", "--from", url, f"--data={tmp_path}/s", "--port=0", "--ingest"],
        ["verify", "--from", url, f"--data={tmp_path}/v"],
        ["topics", "apply", "--to", url],
    ]

    def run(command: list[str]) -> tuple[int, str, float]:
        started_s = time.monotonic()
        done = pipeline(*command, *flags("worker", "wrong"))
        return done.returncode, done.stderr, time.monotonic() - started_s

    with ThreadPoolExecutor(2) as pool:
        for command, (code, said, seconds) in zip(commands, pool.map(run, commands), strict=True):
            assert code == 2, (command, said)
            assert seconds < 20, command
            last = said.splitlines()[-1]
            assert last.startswith(f"pipeline: {url}: SASL authentication error: "), (command, said)
            assert last.endswith("Invalid username or password (_AUTHENTICATION): check sasl.* in the setting `kafka`")


@pytest.mark.timeout(120)
def test_the_least_permissions(own: Own, tmp_path: Path) -> None:
    """The permissions of LEAST suffice to make topics and to run all roles; a gateway needs WRITE on deltas, too."""
    for who, permissions in LEAST.items():
        own.grant(who, *permissions)
    own.grant("server", (DELTAS, "WRITE"))
    made = pipeline("topics", "apply", "--to", own.app.url, "--partitions", "2", *flags("operator"))
    assert made.returncode == 0, made.stderr
    with (
        worker(own.app, tmp_path / "worker", *flags("worker")) as role,
        server(own.app, tmp_path / "server", "--ingest", *flags("server")) as reads,
        Publisher(own.app.url, kafka=login("publisher"), **PUBLISHER) as direct,
        Publisher(reads.url) as gateway,
        Reader(reads.url) as reader,
    ):
        direct.sum("v").add(2)
        gateway.sum("v").add(3)
        token = direct.flush() | gateway.flush()
        assert reader.get("v", after=token).value() == 5
        for it in (role, reads):
            assert "is missing" not in it.program.stderr()


def test_a_publisher_may_not_write(own: Own, tmp_path: Path) -> None:
    """The publisher names the permission and keeps the batch, which counts once after the grant."""
    own.create_topics()
    own.grant("publisher", (DELTAS, "DESCRIBE"))
    with Publisher(own.app.url, kafka=login("publisher"), **PUBLISHER) as publisher:
        publisher.sum("v").add(7)
        refused(publisher, f"WRITE on topic {own.app.topic(DELTAS)} is missing")
        own.grant("publisher", *LEAST["publisher"])
        publisher.flush(timeout_s=WAIT_S)
        publisher.sum("v").add(1)
        publisher.flush(timeout_s=WAIT_S)
        own.revoke("publisher", *LEAST["publisher"], (DELTAS, "DESCRIBE"))
        publisher.sum("v").add(2)
        refused(publisher, "is missing")
        own.grant("publisher", *LEAST["publisher"])
    assert publisher.stats()["rejected"] == 0
    with folding(own.app, tmp_path / "w", kafka=user("admin")) as role:
        assert folded(role) == 10


def refused(publisher: Publisher, said: str) -> None:
    with pytest.raises(Unavailable) as error:
        publisher.flush(timeout_s=2)
    assert said in str(error.value)
    assert str(error.value).endswith(": grant it with kafka-acls")


def test_nothing_is_given_up_for_want_of_permission(own: Own) -> None:
    """A writer that may not even look at the topic returns errors that publishers try again, and none that they give up."""
    own.create_topics()
    writer = KafkaLogWriter(
        parse_url(own.app.url), login("publisher"), SystemClock(), timeout_ms=5_000, metadata_refresh_ms=100
    )
    (answer,) = writer.append([Message(DELTAS, 0, None, b"x")], timeout_s=5)
    writer.close()
    assert isinstance(answer, Unavailable)
    assert f"DESCRIBE on topic {own.app.topic(DELTAS)} is missing" in str(answer)


@pytest.mark.parametrize("lacks", sorted(LEAST["worker"]))
def test_a_worker_lacks(own: Own, tmp_path: Path, caplog: pytest.LogCaptureFixture, lacks: tuple[str, str]) -> None:
    """The worker names the missing permission; after the grant, it or the next worker counts every delta once."""
    own.create_topics()
    total = 1
    if lacks[0] == CHANGELOG:  # an empty one is not read
        own.publish()
        total += 1
        with folding(own.app, tmp_path / "w", kafka=user("admin")) as role:
            assert folded(role) == 1
    own.publish()
    if lacks[0] == DEAD_LETTERS:
        bad_record(own)
    own.grant("worker", *(LEAST["worker"] - {lacks}), *([] if lacks[0] == ID else [(lacks[0], "DESCRIBE")]))
    errors: list[BaseException] = []
    role = worker_at(own.app, tmp_path / "w2", errors=errors, kafka=user("worker"))
    try:
        role.start()
        where = "the transactional id" if lacks[0] == ID else "topic "
        missing = f"{lacks[1]} on {where}"
        wait_until(lambda: errors or missing in caplog.text, f"an error or {missing}", WAIT_S)
        said = str(errors[0]) if errors else caplog.text
        assert missing in said
        assert "grant it with kafka-acls" in said
        assert (own.app.app if lacks[0] == ID else own.app.topic(lacks[0])) in said
        own.grant("worker", lacks)
        if not errors:
            wait_until(lambda: role.wait_ready(0.05) or errors, "a worker that folds", WAIT_S)
            assert folded(role) == total
    finally:
        role.stop()
    with folding(own.app, tmp_path / "w3", kafka=user("worker")) as role:
        assert folded(role) == total


def bad_record(own: Own) -> None:
    writer = KafkaLogWriter(parse_url(own.app.url), login("admin"), SystemClock(), timeout_ms=9_000, metadata_refresh_ms=100)
    assert isinstance(writer.append([Message(DELTAS, 0, None, b"x")], timeout_s=9)[0], int)
    writer.close()


def test_a_worker_may_not_use_the_group(own: Own, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Missing access to the group is logged once and leaves out the mirrored positions only, which come after the grant."""
    own.create_topics()
    own.grant("worker", *LEAST["worker"])
    caplog.set_level(logging.DEBUG, "pipeline.worker")
    with folding(own.app, tmp_path / "w", kafka=user("worker"), mirror_interval_ms=50) as role:

        def said() -> list[logging.LogRecord]:
            return [
                it
                for it in caplog.records
                if "lag tools do not see" in it.getMessage() and "READ on the group" in it.getMessage()
            ]

        wait_until(lambda: len(said()) > 1, "two attempts to mirror", WAIT_S)
        own.publish()
        assert folded(role) == 1
        warnings = [it for it in caplog.records if it.levelno >= logging.WARNING and it.name.startswith("pipeline.worker")]
        assert warnings == said()[:1], [it.getMessage() for it in warnings]
        assert f"group {own.app.app}-position" in warnings[0].getMessage()
        assert "READ on the group is missing: grant it with kafka-acls" in warnings[0].getMessage()
        own.grant("worker", (GROUP, "READ"))
        attempts = len(said())
        own.publish()
        wait_until(lambda: role._mirror._mirrored, "positions to be mirrored", WAIT_S)
        assert len(said()) <= attempts + 1


def test_a_reader_may_not_use_the_group(own: Own) -> None:
    """A reader works without access to the group, which librdkafka looks up and no reader joins, also on an empty topic."""
    own.create_topics()
    own.grant("worker", *LEAST["worker"])
    log = KafkaLog(parse_url(own.app.url), KafkaSettings(**user("worker")), SystemClock())
    with closing(log), closing(log.reader(DELTAS)) as reader:
        reader.assign({0: 0})
        assert reader.poll(record_count_max=10, bytes_max=10_000, timeout_s=1.5) == []


def test_a_server_may_not_read(own: Own, tmp_path: Path) -> None:
    """The server is not ready and names the permission; after the grant it answers."""
    own.create_topics()
    own.publish(5)
    with folding(own.app, tmp_path / "w", kafka=user("admin")) as role:
        assert folded(role) == 5
    own.grant("server", *(LEAST["server"] - {(CHANGELOG, "READ")}), (CHANGELOG, "DESCRIBE"))
    with serving(own.app, tmp_path / "s", kafka=user("server"), ready=False) as role:

        def why() -> str:
            with pytest.raises(NotReady) as error:
                role.stores()
            return str(error.value)

        missing = f"READ on topic {own.app.topic(CHANGELOG)} is missing: grant it with kafka-acls"
        wait_until(lambda: missing in why(), "the reason", WAIT_S)
        assert not role.ready
        own.grant("server", (CHANGELOG, "READ"))
        wait_until(lambda: role.wait_ready(0.05), "an answer", WAIT_S)
        assert sums(role.stores(), "v") == {(): 5}


def test_each_permission_of_an_operator_is_named(own: Own) -> None:
    """An apply that lacks a permission changes nothing and names it; once all are granted it does its work."""
    flushing = {**load(), CHANGELOG: msgspec.structs.replace(load()[CHANGELOG], kafka={"flush.ms": 5})}

    def lacks(permission: str, described: Mapping[str, Topic]) -> bool:
        with pytest.raises(Invalid) as error:
            TopicAdmin(parse_url(own.app.url), login("operator"), described, SystemClock(), timeout_ms=10_000).apply(Wish(3))
        return f"grant {permission} on it with kafka-acls" in str(error.value)

    names = (DELTAS, CHANGELOG, DEAD_LETTERS)
    for permission, described in [
        ("DESCRIBE", load()),
        ("CREATE", load()),
        ("DESCRIBE_CONFIGS", flushing),
        ("ALTER_CONFIGS", flushing),
        ("ALTER", flushing),
    ]:
        wait_until(lambda p=permission, d=described: lacks(p, d), permission, WAIT_S)
        if permission == "CREATE":
            own.create_topics()
        else:
            own.grant("operator", *((name, permission) for name in names))
    admin = TopicAdmin(parse_url(own.app.url), login("operator"), flushing, SystemClock(), timeout_ms=30_000)
    wait_until(lambda: {it.setting for it in admin.plan(Wish(3)).changes} >= {"partitions", "flush.ms"}, "a plan", WAIT_S)


def test_topics_may_not_be_made(own: Own) -> None:
    """`topics apply` without the permission ends with code 2, changes nothing, and names the permission."""
    own.grant("operator", *(it for it in LEAST["operator"] if it[1] != "CREATE"))
    done = pipeline("topics", "apply", "--to", own.app.url, *flags("operator"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{own.app.url}: no permission to " in done.stderr
    assert "grant CREATE on it with kafka-acls" in done.stderr


@pytest.mark.timeout(180)
def test_each_command_needs_what_its_row_says(own: Own, tmp_path: Path) -> None:
    """Every command does its work with the permissions of its row in the docs, and no more."""
    own.create_topics()
    own.publish()
    bad_record(own)
    with folding(own.app, tmp_path / "w", kafka=user("admin")) as role:
        wait_until(lambda: role.log.high_watermarks(DEAD_LETTERS)[0], "a dead letter", WAIT_S)
        for command, options in {
            "inspect deltas": ("--from",),
            "inspect changelog": ("--from",),
            "dead-letters ls": ("--from",),
            "dead-letters replay": ("--yes", "--from"),
            "views ls": ("--from",),
            "views drop": ("v", "--yes", "--to"),
            "topics plan": ("--to",),
        }.items():
            needed = next(it for who, it in LEAST_OF_COMMANDS.items() if who.startswith(command))
            limited(
                own,
                (*command.split(), *options),
                needed,
                codes={"dead-letters replay": (0, 1), "topics plan": (0, 1)}.get(command, (0,)),
            )
    limited(own, ("verify", f"--data={tmp_path}/w", "--from"), LEAST_OF_COMMANDS["verify"])


def limited(own: Own, command: tuple[str, ...], needed: set[tuple[str, str]], codes: tuple[int, ...] = (0,)) -> None:
    """Run a command with these permissions; the long suite also runs it without any."""
    if LONG:
        refused = pipeline(*command, own.app.url, *flags("operator"), "--set=kafka_timeout_ms=3000")
        assert refused.returncode in (1, 2), (command, refused.stderr)
        assert "grant" in refused.stderr, (command, refused.stderr)
    own.grant("operator", *needed)
    done = pipeline(*command, own.app.url, *flags("operator"))
    assert done.returncode in codes, (command, done.stderr)
    assert "is missing" not in done.stderr + done.stdout, (command, done.stderr)
    own.revoke("operator", *needed)
