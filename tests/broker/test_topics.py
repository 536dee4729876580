"""`pipeline topics` on a real broker: topics made, refusals that change nothing, and concurrent calls."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    ConfigResource,
    NewPartitions,
    ResourceType,
)

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.plan import ORDER, Wish, describe
from pipeline.adapters.kafka.topics import Applied, TopicAdmin
from pipeline.errors import Invalid, Unavailable
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS, Topic, load
from tests.broker.kafka import App, Broker, admin_client, create_topics
from tests.support import pipeline, wait_until

TOPICS = load()


def topics(name: str, **kafka: Any) -> dict[str, Topic]:
    """Return the descriptions with further settings of one; `_` in names is `.`."""
    own = {setting.replace("_", "."): value for setting, value in kafka.items()}
    return {**TOPICS, name: msgspec.structs.replace(TOPICS[name], kafka={**TOPICS[name].kafka, **own})}


def admin(
    url: str,
    described: Mapping[str, Topic] = TOPICS,
    *,
    user: Mapping[str, str] | None = None,
    timeout_ms: int = 30_000,
) -> TopicAdmin:
    return TopicAdmin(parse_url(url), user or {}, described, SystemClock(), timeout_ms=timeout_ms)


def apply(url: str, described: Mapping[str, Topic] = TOPICS, **wish: Any) -> Applied:
    return admin(url, described).apply(Wish(**wish))


def on_broker(app: App) -> dict[str, tuple[int, dict[str, str]]]:
    """Return partitions and settings of the existing topics, as another client sees them."""
    client = admin_client(app.bootstrap)
    known = client.list_topics(timeout=10).topics
    there = {name: app.topic(name) for name in ORDER if app.topic(name) in known}
    if not there:
        return {}
    futures = client.describe_configs([ConfigResource(ResourceType.TOPIC, name) for name in there.values()])
    configs = {
        resource.name: {it.name: it.value for it in future.result(10).values()} for resource, future in futures.items()
    }
    return {name: (len(known[full].partitions), configs[full]) for name, full in there.items()}


def counts(app: App) -> dict[str, int]:
    return {name: count for name, (count, _) in on_broker(app).items()}


def test_plan_apply_plan(app: App) -> None:
    """Plan changes nothing; apply makes what the descriptions say; then there is nothing to do, for plan and apply alike."""
    to = ("--to", app.url)
    planned = pipeline("topics", "plan", *to)
    assert (planned.returncode, planned.stderr) == (0, "")
    assert f"create  {app.topic(DELTAS)}  retention.ms: broker missing, wanted 604800000\n" in planned.stdout
    assert on_broker(app) == {}
    applied = pipeline("topics", "apply", *to)
    assert (applied.returncode, applied.stderr) == (0, "")
    assert applied.stdout == planned.stdout.replace("to apply", "applied")
    made = on_broker(app)
    assert [*made] == [*ORDER]
    for name, (count, configs) in made.items():
        assert count == TOPICS[name].partitions
        assert describe(TOPICS[name]).items() <= configs.items()
    for command in ("plan", "apply"):
        done = pipeline("topics", command, *to)
        assert (done.returncode, done.stdout, done.stderr) == (0, "nothing to do\n", "")


def test_json(app: App) -> None:
    """`--json` prints one document: the address, each step with all that the line says, and the same exit codes."""
    apply(app.url)
    done = pipeline("topics", "plan", "--to", app.url, "--partitions", "3", "--json")
    assert done.returncode == 1
    shown = json.loads(done.stdout)
    assert {key: shown[key] for key in ("to", "summary")} == {
        "to": app.url,
        "summary": "2 refused: apply would change nothing",
    }
    first = shown["steps"][0]
    assert first.pop("note")
    assert first == {
        "action": "refuse",
        "topic": app.topic(CHANGELOG),
        "setting": "partitions",
        "found": "4",
        "wanted": "3",
    }
    done = pipeline("topics", "apply", "--to", app.url, "--partitions", "3", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["summary"] == "2 refused: nothing was changed"
    done = pipeline("topics", "apply", "--to", app.url, "--partitions", "5", "--json")
    assert done.returncode == 0
    assert [(it["action"], it["topic"], it["wanted"]) for it in json.loads(done.stdout)["steps"]] == [
        ("alter", app.topic(name), "5") for name in ORDER
    ]


@pytest.mark.parametrize(
    ("wish", "setting"),
    [
        ({"partitions": 3}, "partitions"),
        ({"replication_factor": 2}, "replication.factor"),
        ({"min_insync_replicas": 2}, "min.insync.replicas"),
        ({}, "retention.ms"),
    ],
)
def test_one_refusal_and_nothing_is_changed(app: App, wish: dict[str, int], setting: str) -> None:
    """A refused setting leaves everything as it was, even what would be safe by itself."""
    create_topics(app.bootstrap, app.app, deltas={"retention.ms": "999999999"}, changelog={"segment.ms": "5000000"})
    before = on_broker(app)
    applied = apply(app.url, accept_loss=setting != "retention.ms", **wish)
    assert {it.setting for it in applied.plan.refused} == {setting}
    assert applied.plan.changes
    assert applied.done == []
    assert on_broker(app) == before


@pytest.mark.parametrize("name", ORDER)
def test_what_the_broker_refuses_changes_nothing_either(app: App, name: str) -> None:
    """A value that only the broker knows to be wrong is found before anything is made, or altered."""
    wrong = topics(name, segment_bytes="much")
    with pytest.raises(Invalid, match=r"segment\.bytes.*nothing was changed"):
        apply(app.url, wrong)
    assert on_broker(app) == {}
    create_topics(app.bootstrap, app.app, changelog={"segment.ms": "5000000"}, deltas={"segment.ms": "5000000"})
    before = on_broker(app)
    with pytest.raises(Invalid, match=r"segment\.bytes.*nothing was changed"):
        apply(app.url, wrong, partitions=5)
    assert on_broker(app) == before


def test_retention(app: App) -> None:
    """`apply` raises retention, lowers it only with --accept-loss, and leaves unnamed settings alone."""
    create_topics(app.bootstrap, app.app, deltas={"retention.ms": "1000", "flush.ms": "77"})
    assert [(it.topic, it.setting, it.found) for it in apply(app.url).done] == [(DELTAS, "retention.ms", "1000")]
    assert on_broker(app)[DELTAS][1]["retention.ms"] == "604800000"
    shorter = {**TOPICS, DELTAS: msgspec.structs.replace(TOPICS[DELTAS], retention_ms=2000)}
    assert apply(app.url, shorter).plan.refused
    assert on_broker(app)[DELTAS][1]["retention.ms"] == "604800000"
    assert apply(app.url, shorter, accept_loss=True).done
    configs = on_broker(app)[DELTAS][1]
    assert (configs["retention.ms"], configs["flush.ms"]) == ("2000", "77")


def test_growth_under_load(app: App) -> None:
    """Deltas grow from 4 to 7 while a producer writes to every partition, and never have one that the other topics lack."""
    apply(app.url)
    stop = threading.Event()
    watching = admin_client(app.bootstrap)
    lacking: list[tuple[int, int, int]] = []
    errors: list[object] = []
    written = [0] * 7

    def count(client: Any, name: str) -> int:
        return len(client.list_topics(app.topic(name), timeout=10).topics[app.topic(name)].partitions)

    def write() -> None:
        producer = Producer({"bootstrap.servers": app.bootstrap, "linger.ms": 0, "log_level": 0})
        while not stop.is_set():
            seen = count(producer, DELTAS)
            others = count(watching, CHANGELOG), count(watching, DEAD_LETTERS)
            if min(others) < seen:
                lacking.append((seen, *others))
            for partition in range(seen):
                producer.produce(
                    app.topic(DELTAS), b"x", partition=partition, on_delivery=lambda error, _: error and errors.append(error)
                )
                written[partition] += 1
            producer.flush(10)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_until(lambda: written[3], "a first record in each of 4")
        applied = apply(app.url, partitions=7)
        assert [(it.topic, it.wanted) for it in applied.done] == [(name, "7") for name in ORDER]
        assert set(counts(app).values()) == {7}
        wait_until(lambda: written[6], "a first record in each of 7")
    finally:
        stop.set()
        writer.join(30)
    assert (lacking, errors) == ([], [])


def test_an_interrupted_growth_goes_on(app: App) -> None:
    """A repeated call finishes a growth of which only changelog is done; a call that names no number is refused."""
    create_topics(app.bootstrap, app.app)
    client = admin_client(app.bootstrap)
    client.create_partitions([NewPartitions(app.topic(CHANGELOG), 7)])[app.topic(CHANGELOG)].result(10)
    wait_until(lambda: counts(app)[CHANGELOG] == 7, "a grown changelog")
    assert [it.topic for it in apply(app.url).plan.refused] == [DELTAS]
    assert counts(app) == {CHANGELOG: 7, DEAD_LETTERS: 4, DELTAS: 4}
    apply(app.url, partitions=7)
    assert set(counts(app).values()) == {7}


def test_several_at_once(app: App) -> None:
    """Concurrent calls all succeed, whether they create topics or add partitions."""
    for partitions in (None, 6):
        start, ended = threading.Barrier(4), list[Applied]()

        def run(start: threading.Barrier = start, ended: list[Applied] = ended, count: int | None = partitions) -> None:
            own = admin(app.url)
            start.wait(10)
            ended.append(own.apply(Wish(count)))

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(ended) == 4
        assert not any(it.plan.steps for it in ended if partitions is None)
        assert any(it.done for it in ended)
        assert set(counts(app).values()) == {partitions or 4}


def test_a_broker_that_stands_still(broker: Broker) -> None:
    """Plan and apply end at their deadline, and name the broker; when it is back they succeed."""
    url = f"kafka://{broker.bootstrap}/shop"
    apply(url)
    for call in (TopicAdmin.plan, TopicAdmin.apply):
        own = admin(url, timeout_ms=700)
        broker.pause()
        started_s = time.monotonic()
        with pytest.raises(Unavailable, match=rf"{url}: .*700 ms"):
            call(own, Wish(partitions=5))
        assert time.monotonic() - started_s < 25
        broker.resume()
    assert [it.topic for it in apply(url, partitions=6).done] == [*ORDER]
