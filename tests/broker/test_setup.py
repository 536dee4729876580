"""Wrong setups: each command says what to do, in time, with the right exit code; and nothing is lost."""

from __future__ import annotations

import csv
import http.server
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, NewPartitions

from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.kafka.errors import LastError
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.metadata import Metadata
from pipeline.adapters.kafka.options import parse_url
from pipeline.errors import Invalid, PipelineError, StoreAhead, Unavailable
from pipeline.settings import KafkaSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from tests.broker.drive import Role, server, wait_exit, worker
from tests.broker.inside import folding, sums, wait_folded, worker_at
from tests.broker.kafka import App, admin_client, create_topics, new_app
from tests.support import NO_LISTENER, pipeline, wait_until

IN_TIME_S = 30.0
"""Longest that a command may take on a busy machine when it was given 1 s."""
QUICK = ("--set", "kafka_timeout_ms=1000")


@pytest.fixture
def own(app: App) -> App:
    """An app on the broker that all tests share."""
    return app


@contextmanager
def nobody(how: str, free_port: int) -> Iterator[str]:
    """Yield host:port where no broker is."""
    if how == "unknown":
        yield "no-such-host.invalid:9092"
    elif how == "refused":
        yield f"127.0.0.1:{free_port}"
    elif how == "silent":
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            listening.listen(64)
            yield f"127.0.0.1:{listening.getsockname()[1]}"
    else:
        site = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
        site.RequestHandlerClass.log_message = lambda *_: None  # type: ignore[assignment]
        thread = threading.Thread(target=site.serve_forever)
        thread.start()
        yield f"127.0.0.1:{site.server_address[1]}"
        site.shutdown()
        site.server_close()
        thread.join(10)


WHY = {"refused": NO_LISTENER, "unknown": "no-such-host.invalid", "silent": "", "http": ""}


@pytest.mark.parametrize(
    "how", ["refused", "unknown", *(pytest.param(it, marks=pytest.mark.long) for it in ("silent", "http"))]
)
def test_no_broker(how: str, free_port: int) -> None:
    """`connect` and `flush` fail in time, and say which address was tried, why it failed, and what to check."""
    with nobody(how, free_port) as address:
        started_s = time.monotonic()
        log = KafkaLog(parse_url(f"kafka://{address}"), KafkaSettings(kafka_timeout_ms=1_500), SystemClock())
        with pytest.raises(Unavailable) as refused:
            log.connect([DELTAS])
        log.close()
        publisher = Publisher(f"kafka://{address}")
        publisher.sum("v").add()
        with pytest.raises(Unavailable) as unacknowledged:
            publisher.close(timeout_s=2.5)
        assert time.monotonic() - started_s < IN_TIME_S
    for error in (refused, unacknowledged):
        assert f"no broker answers at {address} (" in str(error.value)
        assert WHY[how] in str(error.value).partition(" (")[2], "the reason is librdkafka's; it names what was looked up"
        assert "check the address, the broker, its advertised.listeners, and security.protocol" in str(error.value)


def commands(url: str, tmp_path: Path, *flags: str) -> dict[str, Callable[[], tuple[int, str]]]:
    """Return every command that takes a broker, each with a folder of its own where it needs one."""

    def run(*arguments: str) -> tuple[int, str]:
        done = pipeline(*arguments, *flags, timeout_s=IN_TIME_S)
        return done.returncode, done.stderr

    def role(name: str, *more: str) -> Callable[[], tuple[int, str]]:
        data = tmp_path / f"{name}{len(more)}"
        return lambda: run(name, *more, "--from", url, "--data", str(data), "--port", "0")

    rows = tmp_path / "rows.csv"
    rows.write_text("a\n1\n")
    stores = tmp_path / "stores"
    with DataDir(stores, with_log=False):
        pass
    return {
        "worker": role("worker"),
        "serve": role("serve", "--ingest"),
        "verify": lambda: run("verify", "--from", url, "--data", str(stores)),
        "publish": lambda: run("publish", "v", str(rows), "--to", url, "--timeout-ms", "1500"),
        "topics": lambda: run("topics", "plan", "--to", url),
    }


def all_of(calls: dict[str, Callable[[], tuple[int, str]]]) -> dict[str, tuple[int, str]]:
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(calls, pool.map(lambda call: call(), calls.values()), strict=True))


def test_every_command_without_a_broker(free_port: int, tmp_path: Path) -> None:
    """Each command ends with 1 and a last line with the error; librdkafka's own line, one an attempt, is shown once."""
    for name, (code, said) in all_of(commands(f"kafka://127.0.0.1:{free_port}/shop", tmp_path, *QUICK)).items():
        assert code == 1, (name, said)
        last = said.splitlines()[-1]
        assert last.startswith("pipeline: "), (name, said)
        assert f"127.0.0.1:{free_port}" in last
        assert NO_LISTENER in last
        assert said.count("FAIL [") <= 1, (name, said)


def test_readers_are_of_http() -> None:
    """`get` reads from servers: a broker's address is refused, with what is needed."""
    done = pipeline("get", "v", "--from", "kafka://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "it looks like http://host:8080" in done.stderr


@pytest.mark.parametrize("missing", [(DELTAS, CHANGELOG, DEAD_LETTERS), (CHANGELOG,), (DEAD_LETTERS,)])
def test_topics_are_missing(own: App, tmp_path: Path, missing: tuple[str, ...]) -> None:
    """Missing topics are exit code 2 at once, with the command that makes them; `topics plan` succeeds and names them."""
    if DELTAS not in missing:
        create_topics(own.bootstrap, own.app)
        admin = admin_client(own.bootstrap)
        for gone in admin.delete_topics([own.topic(name) for name in missing], operation_timeout=30).values():
            gone.result(30)
        wait_until(lambda: own.topic(missing[0]) not in admin.list_topics(timeout=10).topics, "it is gone")
    calls = commands(own.url, tmp_path)
    needed = ["publish"] if DELTAS in missing else ["worker", "serve"] + ["verify"] * (missing != (DEAD_LETTERS,))
    for name, (code, said) in all_of({name: calls[name] for name in needed}).items():
        assert code == 2, (name, said)
        assert f"there is no topic {own.topic(missing[0])} at {own.bootstrap}" in said, name
        assert f"pipeline topics apply --to {own.url}" in said, name
    planned = pipeline("topics", "plan", "--to", own.url)
    assert planned.returncode == 0
    created = {name for name in (DELTAS, CHANGELOG, DEAD_LETTERS) if f"create  {own.topic(name)}  " in planned.stdout}
    assert created == {*missing}


def test_partition_counts_that_differ(own: App, tmp_path: Path) -> None:
    """No role starts; deltas that are published meanwhile count once the named command has corrected the topics."""
    create_topics(own.bootstrap, own.app, 1)
    admin = admin_client(own.bootstrap)
    admin.create_partitions([NewPartitions(own.topic(DELTAS), 3)])[own.topic(DELTAS)].result(30)
    wait_until(lambda: len(admin.list_topics(timeout=10).topics[own.topic(DELTAS)].partitions) == 3, "it has grown")
    with Publisher(own.url) as publisher:
        for n in range(30):
            publisher.sum("v", labels=("n",)).add(n=str(n))
    calls = commands(own.url, tmp_path)
    for name, (code, said) in all_of({name: calls[name] for name in ("worker", "serve", "verify")}).items():
        assert code == 2, (name, said)
        assert f"{own.topic(DELTAS)} 3, {own.topic(CHANGELOG)} 1" in said
        assert f"pipeline topics plan --to {own.url}" in said
    assert pipeline("topics", "apply", "--to", own.url, "--partitions", "3").returncode == 0
    with folding(own, tmp_path / "w") as role:
        wait_folded(role)
        stores = {number: it.store for number, it in role.partitions.items()}
        assert sums(stores, "v") == {(str(n),): 1 for n in range(30)}


def test_a_transaction_timeout_above_the_brokers(own: App, tmp_path: Path) -> None:
    """A timeout above the broker's is exit code 2, as starting again does not help, and both settings are named."""
    create_topics(own.bootstrap, own.app, 1)
    code, said = commands(own.url, tmp_path, "--set", "transaction_timeout_ms=1000000")["worker"]()
    assert code == 2, said
    assert "lower transaction_timeout_ms, or raise transaction.max.timeout.ms" in said.splitlines()[-1]


def test_batches_fit_the_topic(own: App, tmp_path: Path) -> None:
    """Batches are cut to the topic's limit; after it is lowered at most one is refused, with advice, and then they fit."""
    create_topics(own.bootstrap, own.app, 1, deltas={"max.message.bytes": "20000"})
    admin = admin_client(own.bootstrap)
    with Publisher(own.url, flush_interval_ms=60_000) as publisher:
        view = publisher.sum("v", labels=("n",))
        for n in range(2_000):
            view.add(n=f"{n:040}")
        publisher.flush()
        assert publisher.stats()["batches"] > 3
        lower(admin, own.topic(DELTAS), "5000")
        for _ in range(2):
            for n in range(2_000):
                view.add(n=f"{hash((n, 7)):040x}")
            said = ""
            try:
                publisher.flush()
            except PipelineError as error:
                said = str(error)
            assert not said or "raise max.message.bytes" in said
        assert not said, "batches are still as large as before"


def lower(admin: object, topic: str, size: str) -> None:
    from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

    entry = ConfigEntry("max.message.bytes", size, incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
    admin.incremental_alter_configs([resource])[resource].result(30)  # type: ignore[attr-defined]


def test_an_entry_that_the_changelog_does_not_take(own: App, tmp_path: Path) -> None:
    """A worker whose entry is too large ends and names topic and setting; once the setting is raised, everything counts."""
    create_topics(own.bootstrap, own.app, 1, changelog={"max.message.bytes": "1000"})
    wide = "".join(chr(0x4E00 + n) for n in range(1_200))
    with Publisher(own.url) as publisher:
        publisher.sum("v", labels=("n",)).add(7, n=wide)
        publisher.sum("v", labels=("n",)).add(8, n="a")
    errors: list[BaseException] = []
    role = worker_at(own, tmp_path / "w", errors=errors)
    role.start()
    wait_until(lambda: errors, "its end")
    role.stop()
    assert isinstance(errors[0], Invalid)
    assert f"write to {own.topic(CHANGELOG)}-0: Message size too large (MSG_SIZE_TOO_LARGE): raise max.message" in str(
        errors[0]
    )
    lower(admin_client(own.bootstrap), own.topic(CHANGELOG), "1000000")
    with folding(own, tmp_path / "w") as role:
        wait_folded(role)
        assert sums({0: role.partitions[0].store}, "v") == {(wide,): 7, ("a",): 8}


@pytest.mark.parametrize("policy", ["delete", "compact,delete"])
def test_a_changelog_that_deletes_state(own: App, tmp_path: Path, policy: str) -> None:
    """Neither worker nor server starts on such a changelog: after its retention series would be gone."""
    create_topics(own.bootstrap, own.app, 1)
    resource = ConfigResource(ConfigResource.Type.TOPIC, own.topic(CHANGELOG))
    resource.add_incremental_config(ConfigEntry("cleanup.policy", policy, incremental_operation=AlterConfigOpType.SET))
    admin = admin_client(own.bootstrap)
    for future in admin.incremental_alter_configs([resource]).values():
        future.result(30)
    for role in ("worker", "serve"):
        done = pipeline(role, "--from", own.url, "--data", str(tmp_path / role), "--port", "0")
        assert done.returncode == 2
        assert f"{own.topic(CHANGELOG)} has cleanup.policy={policy}, which deletes committed state" in done.stderr
        assert f"pipeline topics plan --to {own.url}" in done.stderr


def test_a_limit_that_nobody_told_is_not_remembered(free_port: int, own: App) -> None:
    """A topic's limit is a careful guess while no broker answers, and is asked for again the next time."""
    create_topics(own.bootstrap, own.app, 1)
    asked = iter([parse_url(f"kafka://127.0.0.1:{free_port}"), parse_url(own.url)])
    metadata = Metadata(next(asked), {}, lambda *_: pytest.fail("not asked"), LastError(), SystemClock(), refresh_s=1)
    guessed = metadata.message_bytes_max(DELTAS, 0.5)
    metadata._address = next(asked)
    assert guessed < 1_000_000 < metadata.message_bytes_max(DELTAS, 30)


def delete(own: App, name: str) -> None:
    admin = admin_client(own.bootstrap)
    admin.delete_topics([own.topic(name)], operation_timeout=30)[own.topic(name)].result(30)
    wait_until(lambda: own.topic(name) not in admin.list_topics(timeout=10).topics, "it is gone")


def make_anew(own: App, name: str) -> None:
    delete(own, name)
    applied = pipeline("topics", "apply", "--to", own.url, "--partitions", "1")
    assert applied.returncode == 0, applied.stderr


def publish(own: App, key: str, value: int) -> None:
    with Publisher(own.url) as publisher:
        publisher.sum("v", labels=("key",)).add(value, key=key)


def wait_for(role: Role, expected: dict[str, int]) -> None:
    with Reader(role.url) as reader:

        def found() -> dict[str, int]:
            try:
                return {series.labels["key"]: series.value for series in reader.get("v").series}
            except PipelineError:
                return {}

        wait_until(lambda: found() == expected, f"{expected}; {role.tail()}", 60)


@pytest.mark.long
def test_a_publisher_keeps_what_has_no_topic(own: App, tmp_path: Path) -> None:
    """A publisher whose topic is deleted says so, waits, and sends once there is a topic again."""
    create_topics(own.bootstrap, own.app, 1)
    with Publisher(own.url, request_timeout_ms=2_000) as publisher:
        cell = publisher.sum("v", labels=("key",)).labels("a")
        cell.add(1)
        publisher.flush(timeout_s=30)
        delete(own, DELTAS)
        cell.add(2)
        with pytest.raises(Unavailable, match="pipeline topics apply"):
            publisher.flush(timeout_s=5)
        assert publisher.stats()["rejected"] == 0
        assert pipeline("topics", "apply", "--to", own.url, "--partitions", "1").returncode == 0
        publisher.flush(timeout_s=60)
    with folding(own, tmp_path / "w") as role:
        wait_folded(role)
        assert sums({0: role.partitions[0].store}, "v") == {("a",): 2}


def test_deltas_made_anew_under_a_running_worker(own: App, tmp_path: Path) -> None:
    """A worker whose deltas are made anew exits with 4 until `--accept-loss`; then old and new records count."""
    create_topics(own.bootstrap, own.app, 1)
    publish(own, "a", 1)
    with worker(own, tmp_path / "w") as role, server(own, tmp_path / "s") as reads:
        wait_for(reads, {"a": 1})
        make_anew(own, DELTAS)
        publish(own, "b", 10)
        assert wait_exit(role, 60) == 4
        role.kill()
        role.start(wait_ready=False)
        assert wait_exit(role, 60) == 4
        assert "made anew" in role.tail()
        assert "start with --accept-loss to go on without them" in role.tail()
        with worker(own, tmp_path / "w", "--accept-loss"):
            wait_for(reads, {"a": 1, "b": 10})


def test_a_folder_of_another_app(own: App, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A worker refuses a nameless folder with another app's stores; with --accept-loss it keeps the stores aside."""
    other = new_app(own.bootstrap)
    for app in (own, other):
        create_topics(app.bootstrap, app.app, 1)
        with Publisher(app.url) as publisher:
            publisher.sum("v", labels=("app",)).add(app=app.app)
    caplog.set_level(logging.WARNING)
    for number, app in enumerate((own, other, own)):
        if number:
            with pytest.raises(StoreAhead, match=r"of another changelog, .*--accept-loss"), folding(app, tmp_path / "w"):
                pass
        with folding(app, tmp_path / "w", accept_loss=True) as role:
            wait_folded(role)
            assert sums({0: role.partitions[0].store}, "v") == {(app.app,): 1}
        (tmp_path / "w" / "APP").unlink()
    assert len([*(tmp_path / "w" / "stores").glob("0.lost-*")]) == 2
    assert caplog.text.count("the store is kept as ") == 2


def test_rows_of_any_time(own: App, tmp_path: Path) -> None:
    """Among values a day ahead, if allowed, and a day behind the newest wins, and staleness is that of the log."""
    create_topics(own.bootstrap, own.app, 1)
    now_ms, day_ms = time.time_ns() // 1_000_000, 86_400_000
    rows = tmp_path / "rows.csv"
    with rows.open("w") as file:
        out = csv.writer(file)
        out.writerow(["s", "v", "at"])
        out.writerows([["ahead", 1, now_ms + day_ms], ["ahead", 2, now_ms], ["behind", 3, now_ms - day_ms]])
    publish_rows = ("publish", "price", "--kind=last", "--value=v", "--ts=at", "--labels=s", str(rows), "--to", own.url)
    refused = pipeline(*publish_rows)
    assert refused.returncode == 1
    assert f"{now_ms + day_ms} is too far ahead of now" in refused.stderr
    far = ("--set", f"ts_ahead_max_ms={2 * day_ms}")
    sent = pipeline(*publish_rows, *far)
    assert sent.returncode == 0, sent.stderr
    token = sent.stdout.split()[-1]
    with worker(own, tmp_path / "w", *far), server(own, tmp_path / "s") as reads:
        done = pipeline("get", "price", "--after", token, "--max-staleness-ms", "5000", "--from", reads.url)
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert [line.split() for line in lines[1:3]] == [["ahead", "1"], ["behind", "3"]]
        assert int(lines[-1].split("at most ")[1].split(" ms")[0].replace(",", "")) <= 5_000
