"""The brokers that other tests rely on: what survives what, and that nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import ConfigResource, ResourceType

from tests.broker.jars import Missing, cache, jars
from tests.broker.kafka import App, Broker, Cluster, absent, admin_client, create_topics, delete_topics, new_app
from tests.support import ROOT, environment, wait_until

QUIET = {"log_level": 0, "error_cb": lambda _: None, "reconnect.backoff.max.ms": 200}


def producer(bootstrap: str, **options: str) -> Producer:
    return Producer({"bootstrap.servers": bootstrap, "acks": "all", **QUIET, **options})


def send(bootstrap: str, topic: str, value: bytes) -> None:
    """Produce one record, acknowledged."""
    errors: list[object] = []
    out = producer(bootstrap)
    out.produce(topic, value, partition=0, on_delivery=lambda error, _: errors.append(error))
    assert out.flush(30) == 0
    assert errors == [None]


def first(bootstrap: str, topic: str) -> bytes | None:
    """The first record of partition 0."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "unused", **QUIET})
    consumer.assign([TopicPartition(topic, 0, 0)])
    message = wait_until(lambda: (got := consumer.poll(1.0)) and not got.error() and got, "a record")
    consumer.close()
    value: bytes | None = message.value()
    return value


def alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has waited for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def in_group(group: int) -> list[int]:
    """The processes of a group that run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
            except ProcessLookupError:
                pass
    return found


def test_topics_are_as_described(app: App) -> None:
    """`create_topics` makes what topics/*.toml say, with the test's own settings on top; records come back."""
    create_topics(app.bootstrap, app.app, 2, changelog={"segment.bytes": "1048576"})
    admin = admin_client(app.bootstrap)
    resource = ConfigResource(ResourceType.TOPIC, app.topic("changelog"))
    settings = admin.describe_configs([resource])[resource].result(30)
    assert settings["cleanup.policy"].value == "compact"
    assert settings["segment.bytes"].value == "1048576"
    assert len(admin.list_topics(timeout=10).topics[app.topic("dead-letters")].partitions) == 2
    send(app.bootstrap, app.topic("deltas"), b"one")
    assert first(app.bootstrap, app.topic("deltas")) == b"one"
    delete_topics(app.bootstrap, app.app)
    wait_until(lambda: app.topic("deltas") not in admin.list_topics(timeout=10).topics, "topics gone")


def test_data_and_port_survive(broker: Broker) -> None:
    """After kill -9, and after an orderly stop, `start` brings back the same port and the same records."""
    bootstrap = broker.bootstrap
    create_topics(bootstrap, "a", 1)
    send(bootstrap, "a.deltas", b"kept")
    for end in (broker.kill, broker.stop):
        end()
        assert not broker.running
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", broker.port), 1)
        broker.start()
        assert broker.bootstrap == bootstrap
        assert first(bootstrap, "a.deltas") == b"kept"


def test_a_paused_broker_answers_nothing_until_resumed(broker: Broker) -> None:
    """SIGSTOP holds a record back; SIGCONT lets the same attempt through. `stop` ends a paused one, too."""
    create_topics(broker.bootstrap, "a", 1)
    out = producer(broker.bootstrap)
    out.produce("a.deltas", b"before")
    assert out.flush(30) == 0
    broker.pause()
    out.produce("a.deltas", b"during")
    assert out.flush(0.5) == 1
    broker.resume()
    assert out.flush(30) == 0
    broker.pause()
    broker.stop()
    wait_until(lambda: not in_group(broker.pid), "its processes to be gone")


OWNER = """
import sys
from pathlib import Path
from tests.broker.kafka import Broker
broker = Broker(Path(sys.argv[1]))
broker.start()
print(broker.pid, flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.parametrize("ends", ["killed", "forgets"])
def test_a_broker_ends_with_its_owner(tmp_path: Path, kafka_jars: Path, ends: str) -> None:
    """No process is left when the owner is killed -9, or ends without stopping its broker."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "kafka"), "wait" if ends == "killed" else "go"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        if ends == "killed":
            assert pid in in_group(pid)
            owner.send_signal(signal.SIGKILL)
        owner.wait(30)
    wait_until(lambda: not in_group(pid), "broker and its guard gone")


def test_ports_are_apart_and_a_stolen_one_is_replaced(tmp_path: Path, kafka_jars: Path) -> None:
    """Brokers never share a port, and one that was taken between choice and first start is chosen anew."""
    one, two = Broker(tmp_path / "1"), Broker(tmp_path / "2")
    try:
        stolen = one.port
        assert len({stolen, two.port, int(one.controller[10:]), int(two.controller[10:])}) == 4
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", stolen))
            thief.listen()
            one.start()
        assert one.port != stolen
        create_topics(one.bootstrap, "a", 1)
    finally:
        one.close()
        two.close()


def test_a_failed_start_says_why(tmp_path: Path, kafka_jars: Path) -> None:
    """A broker that ends during its start raises, with its own words."""
    broken = Broker(tmp_path / "kafka", {"num.io.threads": "none"})
    with pytest.raises(RuntimeError, match=r"num\.io\.threads"):
        broken.start()
    broken.close()


def test_users_and_permissions(tmp_path: Path, kafka_jars: Path) -> None:
    """Properties make a broker with passwords and an authorizer: no password, no answer; no permission, no write."""
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required"
    properties = {
        "listeners": "SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
        "advertised.listeners": "SASL_PLAINTEXT://127.0.0.1:{port}",
        "inter.broker.listener.name": "SASL_PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
            f'{plain} username="root" password="r" user_root="r" user_guest="g";'
        ),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:root;User:ANONYMOUS",
    }

    def login(name: str) -> dict[str, str]:
        return {
            "security.protocol": "SASL_PLAINTEXT",
            "sasl.mechanism": "PLAIN",
            "sasl.username": name,
            "sasl.password": name[0],
        }

    with Broker(tmp_path / "kafka", properties, client=login("root")) as own:
        create_topics(own.bootstrap, "a", 1, client=login("root"))
        assert denied(own.bootstrap, login("guest")) == "TOPIC_AUTHORIZATION_FAILED"
        assert denied(own.bootstrap, login("root")) is None
        with pytest.raises(KafkaException):
            admin_client(own.bootstrap).list_topics(timeout=1)


def denied(bootstrap: str, options: Mapping[str, str]) -> str | None:
    errors: list[str | None] = []
    out = producer(bootstrap, **options)
    out.produce("a.deltas", b"x", on_delivery=lambda error, _: errors.append(error.name() if error else None))
    assert out.flush(30) == 0
    return errors[0]


def test_a_cluster_outlives_one_of_its_brokers(tmp_path: Path, kafka_jars: Path) -> None:
    """With replication 3, records acknowledged before and after a broker's kill -9 are there; it can come back."""
    with Cluster(tmp_path, 3) as cluster:
        create_topics(cluster.bootstrap, "a", 1)
        send(cluster.bootstrap, "a.deltas", b"before")
        leader = admin_client(cluster.bootstrap).list_topics("a.deltas", timeout=10).topics["a.deltas"].partitions[0].leader
        lost = cluster.brokers[leader - 1]
        lost.kill()
        send(cluster.bootstrap, "a.deltas", b"after")
        assert first(cluster.bootstrap, "a.deltas") == b"before"
        lost.start()


@pytest.mark.parametrize("program", ["java", "mvn"])
def test_what_is_missing_is_named(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without java or mvn the reason says what to install: tests skip with it, or fail where a broker is required."""
    other = shutil.which("java")
    if program == "mvn":
        if other is None:
            pytest.skip("needs java")
        (tmp_path / "java").symlink_to(other)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Missing, match=rf"no {program}: apt-get install maven .*PIPELINE_TEST_KAFKA") as caught:
        jars()
    monkeypatch.delenv("PIPELINE_REQUIRE_KAFKA", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get"):
        absent(caught.value)
    monkeypatch.setenv("PIPELINE_REQUIRE_KAFKA", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get"):
        absent(caught.value)


MVN = """#!/bin/sh
echo run >>"$RUNS"
for argument; do case "$argument" in -DoutputDirectory=*) out="${argument#*=}";; esac; done
[ -n "$out" ] && mkdir -p "$out" && : >"$out/a.jar" && [ ! -e "$RUNS.fail" ] || { echo no network; exit 1; }
"""


def test_jars_are_fetched_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch that fails leaves nothing and says what mvn said; of several processes that need the jars, one fetches."""
    bin, runs = tmp_path / "bin", tmp_path / "runs"
    bin.mkdir()
    for name, text in (("mvn", MVN), ("java", "#!/bin/sh\n")):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNS", str(runs))
    failing = tmp_path / "runs.fail"
    failing.touch()
    with pytest.raises(Missing, match="no network"):
        jars()
    assert not cache().exists()
    failing.unlink()
    runs.unlink()
    script = "from tests.broker.jars import jars; print(jars())"
    several = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
        for _ in range(4)
    ]
    assert {process.communicate(timeout=60)[0].decode().strip() for process in several} == {str(cache() / "lib")}
    assert runs.read_text() == "run\n"
    assert (cache() / "lib" / "a.jar").exists()


def test_apps_do_not_meet() -> None:
    """Two apps have different names, topics and addresses."""
    one, two = new_app("h:1"), new_app("h:1")
    assert one.app != two.app
    assert one.url == f"kafka://h:1/{one.app}"
    assert one.topic("deltas") == f"{one.app}.deltas"
