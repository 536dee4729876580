"""Real Kafka brokers as child processes: one (`Broker`) or several that replicate (`Cluster`), and topics on them."""

from __future__ import annotations

import base64
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn, Self

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from pipeline.adapters.kafka.errors import error_of, translate
from pipeline.errors import Unavailable
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS, Topic, load
from tests.broker.jars import Missing, jars, locked, need
from tests.support import wait_until

START_S = 60.0
"""Time that a start may take on a busy machine."""
STOP_S = 20.0
CLUSTER_ID = "cGlwZWxpbmUtdGVzdHMtMQ"
PORTS = range(20_000, 32_000)
"""Ports below the range of outgoing connections: a client that calls a dead broker's port can't be given that port."""

# Quick to start and small. SerialGC and one compiler: as few threads as a JVM can have.
JVM = ("-Xmx384m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData", "-Xshare:auto")
LOGGED = "-Dorg.apache.logging.log4j.level=WARN"

# The process group lives as long as its starter holds the other end of standard input: the subshell reads that, and the
# kernel closes it however the starter ends. `exec` gives the broker the shell's pid; while the subshell is in the group,
# no other process can get that number.
GUARDED = 'exec 3<&0 </dev/null; (read _ <&3 || kill -s KILL -- "-$$") & exec "$@" 3<&-'

SMALL = {
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "1000",
    "log.cleaner.backoff.ms": "200",
    "log.cleaner.dedupe.buffer.size": "16777216",
    "num.network.threads": "1",
    "num.io.threads": "2",
    "background.threads": "2",
    "num.recovery.threads.per.data.dir": "1",
    # A broker that was killed is let in again only when its former session has ended: 9 s by default.
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "300",
}


class Broker:
    """One broker and controller on 127.0.0.1; its process ends with its owner, however that ends.

    `start` again after `stop` or `kill`: same port, same data. `close` (or the end of the `with` block) also gives the
    port back. Reserve, start and close in one process; a forked child that outlives it would keep the broker running.

    `properties` are server properties that win over ours; "{port}" and "{controller_port}" in their values are filled in.
    `client` are librdkafka options that `start` needs to reach it, if not plain.
    """

    def __init__(
        self,
        folder: Path,
        properties: Mapping[str, str] | None = None,
        *,
        client: Mapping[str, str] | None = None,
        node: int = 1,
    ) -> None:
        self.node = node
        self.folder = folder
        self.log = folder / "broker.log"
        self.voters = ""
        """Controllers of the broker's cluster; empty: it is alone."""
        self._lib = jars()
        self._properties = dict(properties or {})
        self._client = dict(client or {})
        self._ports = (Port(), Port())
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Port for clients. Only the first `start` may change it, if another process took the port meanwhile."""
        return self._ports[0].number

    @property
    def bootstrap(self) -> str:
        """host:port."""
        return f"127.0.0.1:{self.port}"

    @property
    def controller(self) -> str:
        """host:port of the controller."""
        return f"127.0.0.1:{self._ports[1].number}"

    @property
    def pid(self) -> int:
        """Process id of the broker that was started last."""
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        """Return whether the process is there, paused or not."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the broker, and wait until it answers; after 60 s raise `RuntimeError` with the end of its log."""
        first = not (self.folder / "data").exists() and not self.voters
        while True:
            self.spawn()
            try:
                self.wait_ready()
                return
            except RuntimeError as error:
                if not first or "Address already in use" not in str(error):
                    raise
            for port in self._ports:
                port.close()
            self._ports = (Port(), Port())

    def spawn(self, *flags: str) -> None:
        """Start the process and don't wait. `flags` are of the JVM."""
        assert not self.running, "it runs already"
        data, conf = self.folder / "data", self.folder / "server.properties"
        checkpoint, archive = _prepared(self._lib) if not flags else (_formatted(self._lib), None)
        if not data.exists():
            data.mkdir(parents=True)
            shutil.copy(checkpoint, data)
            meta = {"version": 1, "cluster.id": CLUSTER_ID, "node.id": self.node, "directory.id": _directory_id()}
            (data / "meta.properties").write_text(_lines(meta))
        conf.write_text(_lines(self._settings(data)))
        if archive is not None:
            flags = (f"-XX:SharedArchiveFile={archive}",)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", GUARDED, "sh", *_java(self._lib), *flags, "kafka.Kafka", str(conf)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Wait until the broker answers and counts itself as alive; else end it in time and raise `RuntimeError`."""
        admin = admin_client(self.bootstrap, **self._client)
        deadline = time.monotonic() + START_S
        try:
            while self.running and time.monotonic() < deadline:
                try:
                    if self.node in admin.list_topics(timeout=0.5).brokers:
                        return
                except KafkaException:
                    time.sleep(0.02)
        except BaseException:
            self.kill()
            raise
        self.kill()
        raise RuntimeError(f"no Kafka at {self.bootstrap}: {self.tail()}")

    def stop(self) -> None:
        """Ask the broker to end in order, paused or not, and kill it if that takes long. May be called twice."""
        if self._process is not None and self.running:
            self._process.terminate()
            self.resume()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self.kill()

    def kill(self) -> None:
        """Kill the broker with kill -9, and wait. May be called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(STOP_S)
            assert self._process.stdin is not None
            self._process.stdin.close()

    def pause(self) -> None:
        """Send SIGSTOP, and wait until the broker stands still. The system goes on accepting connections for it."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def resume(self) -> None:
        """Send SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def close(self) -> None:
        """Kill the broker and give its ports back. May be called twice."""
        self.kill()
        for port in self._ports:
            port.close()

    def tail(self, size_bytes: int = 4000) -> str:
        """Return the end of the broker's output since its last start."""
        return self.log.read_text(errors="replace")[-size_bytes:]

    def _settings(self, data: Path) -> Mapping[str, object]:
        ports = {"{port}": str(self.port), "{controller_port}": str(self._ports[1].number)}
        given = dict(self._properties)
        for mark, number in ports.items():
            given = {name: value.replace(mark, number) for name, value in given.items()}
        return {
            "process.roles": "broker,controller",
            "node.id": self.node,
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{self.controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_PLAINTEXT:SASL_PLAINTEXT",
            "controller.quorum.voters": self.voters or f"{self.node}@{self.controller}",
            "log.dirs": data,
            **_replication(1),
            **SMALL,
            **given,
        }

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Cluster:
    """`count` brokers that replicate everything `count` times; writes need all in-sync ones, and all but one of them."""

    def __init__(self, folder: Path, count: int = 3, properties: Mapping[str, str] | None = None) -> None:
        given = {**_replication(count), **(properties or {})}
        self.brokers: Sequence[Broker] = [Broker(folder / str(n), given, node=n) for n in range(1, count + 1)]
        voters = ",".join(f"{it.node}@{it.controller}" for it in self.brokers)
        for it in self.brokers:
            it.voters = voters

    @property
    def bootstrap(self) -> str:
        """host:port of each broker, with commas."""
        return ",".join(it.bootstrap for it in self.brokers)

    def __enter__(self) -> Self:
        try:
            for it in self.brokers:
                it.spawn()
            for it in self.brokers:
                it.wait_ready()
            admin = admin_client(self.bootstrap)
            wait_until(lambda: len(admin.list_topics(timeout=5).brokers) == len(self.brokers), "a whole cluster")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for it in self.brokers:
            it.close()


@dataclass(frozen=True)
class App:
    """Names that no other test uses, on a broker. Tests make the topics that they need with `create_topics`."""

    bootstrap: str
    app: str

    @property
    def url(self) -> str:
        """kafka://host:port/app."""
        return f"kafka://{self.bootstrap}/{self.app}"

    def topic(self, name: str) -> str:
        """Return the full name of `deltas`, `changelog` or `dead-letters`."""
        return f"{self.app}.{name}"


def new_app(bootstrap: str) -> App:
    """Return an app that nobody has used."""
    return App(bootstrap, f"t{uuid.uuid4().hex[:10]}")


def create_topics(
    bootstrap: str,
    app: str = "",
    partitions: int = 4,
    *,
    deltas: Mapping[str, str] | None = None,
    changelog: Mapping[str, str] | None = None,
    dead_letters: Mapping[str, str] | None = None,
    client: Mapping[str, str] | None = None,
    only: Collection[str] = (DELTAS, CHANGELOG, DEAD_LETTERS),
) -> None:
    """Create the three topics, or `only` these, as topics/*.toml say, and return when every partition has a leader.

    The mappings are further topic settings, by Kafka's names; they win. `client` are librdkafka options.
    """
    given = {DELTAS: deltas, CHANGELOG: changelog, DEAD_LETTERS: dead_letters}
    wanted = [
        NewTopic(f"{app}.{name}" if app else name, partitions, config={**_topic_settings(topic), **(given[name] or {})})
        for name, topic in load().items()
        if name in only
    ]
    admin = admin_client(bootstrap, **(client or {}))  # named: one that is collected cancels what it was asked
    for made in admin.create_topics(wanted, operation_timeout=30, request_timeout=30).values():
        made.result(30)

    names = [it.topic for it in wanted]
    wait_until(lambda: leaders_answer(admin, names, partitions), f"topics of {app or 'no app'}")


def leaders_answer(admin: AdminClient, topics: Collection[str], partitions: int) -> bool:
    """Return whether each topic has this many partitions and the leader of each answers a request.

    A broker names itself as a leader in its metadata a moment before it acts as one: until then it answers
    NOT_LEADER_FOR_PARTITION.
    """
    known = admin.list_topics(timeout=10).topics
    for name in topics:
        if name not in known or len(known[name].partitions) != partitions:
            return False
    places = [TopicPartition(name, number) for name in topics for number in range(partitions)]
    futures = admin.list_offsets(dict.fromkeys(places, OffsetSpec.latest()), request_timeout=10)
    try:
        return all(future.result(11).offset >= 0 for future in futures.values())
    except KafkaException as exception:
        error = translate(error_of(exception), "offsets")
        if not isinstance(error, Unavailable):
            raise error from None
        return False


def delete_topics(bootstrap: str, app: str, *, only: Collection[str] = (DELTAS, CHANGELOG, DEAD_LETTERS)) -> None:
    """Delete the app's existing topics, or `only` these."""
    admin = admin_client(bootstrap)
    there = admin.list_topics(timeout=10).topics
    names = [name for name in (f"{app}.{topic}" for topic in only) if name in there]
    if names:
        for gone in admin.delete_topics(names, operation_timeout=30, request_timeout=30).values():
            gone.result(30)


def absent(reason: Missing) -> NoReturn:
    """Skip a test that can't have a broker, or fail it under PIPELINE_REQUIRE_KAFKA=1."""
    if os.environ.get("PIPELINE_REQUIRE_KAFKA") == "1":
        pytest.fail(str(reason))
    pytest.skip(str(reason))


class Port:
    """A port that nobody listens on, kept from other tests by a lock as long as this object or its process lives."""

    number: int

    def __init__(self) -> None:
        folder = Path(tempfile.gettempdir()) / f"pipeline-test-ports-{os.getuid()}"
        folder.mkdir(exist_ok=True)
        first = os.getpid() * 16 % len(PORTS)
        for number in (*PORTS[first:], *PORTS[:first]):
            lock: IO[str] = (folder / str(number)).open("w")
            if _locks(lock) and _listens(number):
                self.number = number
                self._lock = lock
                return
            lock.close()
        raise RuntimeError(f"no free port in {PORTS}")

    def close(self) -> None:
        self._lock.close()


def _locks(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def admin_client(bootstrap: str, **options: str) -> AdminClient:
    """Return a client that prints nothing and finds a restarted broker at once. Keep it until its futures are done."""
    quick: dict[str, Any] = {"reconnect.backoff.ms": 20, "reconnect.backoff.max.ms": 100}
    return AdminClient({"bootstrap.servers": bootstrap, "log_level": 0, "error_cb": lambda _: None, **quick, **options})


def _replication(count: int) -> dict[str, str]:
    in_sync = max(1, count - 1)
    return {
        "default.replication.factor": str(count),
        "min.insync.replicas": str(in_sync),
        "offsets.topic.replication.factor": str(count),
        "transaction.state.log.replication.factor": str(count),
        "transaction.state.log.min.isr": str(in_sync),
    }


def _topic_settings(topic: Topic) -> dict[str, str]:
    settings: dict[str, Any] = {"cleanup.policy": topic.cleanup_policy, **topic.kafka}
    if topic.cleanup_policy == "delete":
        settings["retention.ms"] = topic.retention_ms
    else:
        settings["delete.retention.ms"] = topic.delete_retention_ms
        settings["min.cleanable.dirty.ratio"] = topic.min_cleanable_dirty_ratio
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}


def _lines(values: Mapping[str, object]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _directory_id() -> str:
    """Return a UUID as Kafka writes them: base64 without padding. It may not begin with a dash."""
    return "p" + base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")[1:]


def _java(lib: Path) -> list[str]:
    # In a fixed order: the archive of classes holds for one class path only.
    path = ":".join(str(jar) for jar in sorted(lib.glob("*.jar")))
    return [need("java"), *JVM, LOGGED, "-cp", path]


def _formatted(lib: Path) -> Path:
    """Return the first snapshot of an empty cluster, the same for all."""
    checkpoint = lib.parent / "bootstrap.checkpoint"
    if not checkpoint.exists():
        with tempfile.TemporaryDirectory(dir=lib.parent) as scratch:
            conf = Path(scratch) / "server.properties"
            quorum = {"controller.listener.names": "C", "controller.quorum.voters": "1@127.0.0.1:1"}
            listeners = {"listeners": "C://127.0.0.1:1", "listener.security.protocol.map": "C:PLAINTEXT"}
            node = {"process.roles": "controller", "node.id": 1, "log.dirs": Path(scratch) / "data"}
            conf.write_text(_lines({**node, **quorum, **listeners}))
            command = [*_java(lib), "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(conf)]
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True, timeout=START_S)
            (Path(scratch) / "data" / checkpoint.name).rename(checkpoint)
    return checkpoint


def _prepared(lib: Path) -> tuple[Path, Path]:
    """Return the first snapshot, and an archive of loaded classes, which halves the time of a start. Both are made once."""
    archive = lib.parent / "classes.jsa"
    if not archive.exists():
        with locked(), tempfile.TemporaryDirectory(dir=lib.parent) as scratch:
            if not archive.exists():
                made = Path(scratch) / archive.name
                trial = Broker(Path(scratch) / "broker")
                try:
                    trial.spawn(f"-XX:ArchiveClassesAtExit={made}")
                    trial.wait_ready()
                    trial.stop()
                finally:
                    trial.close()
                if made.exists():  # without it a start is slow, no more
                    made.rename(archive)
    return _formatted(lib), archive
