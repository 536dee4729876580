"""Dead letters on a real broker: `pipeline dead-letters` by its URL, with workers that come, go and are killed."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, series_suffix
from pipeline.roles.worker import ClusterWorker
from tests.broker.inside import folding, sums, wait_folded
from tests.broker.kafka import App, create_topics, delete_topics
from tests.support import UpProcess, pipeline, wait_until

PARTITIONS = 2
GOOD, WRONG = Definition("good", "sum", ("n",)), Definition("wrong", "sum", ("n",))
SIZE_MAX = 16 * 2**20


def group(definition: Definition, *values: int) -> Group:
    """Return a group of series `0`, `1`... with these sums."""
    return Group(definition, [series_suffix((str(n),)) for n in range(len(values))], [*values])


def batch(sequence: int, *groups: Group, partition: int = 0, epoch: int = 0) -> bytes:
    """Return a sealed batch."""
    return encode_batch(Batch("p", epoch, partition, sequence, 0, 1_000, [*groups]))


def produce(app: App, *values: bytes, topic: str = "deltas", key: bytes | None = None, partition: int = 0) -> None:
    """Append records, in order."""
    producer = Producer({"bootstrap.servers": app.bootstrap, "enable.idempotence": True, "message.max.bytes": 20_000_000})
    errors: list[object] = []
    for value in values:
        producer.produce(
            app.topic(topic), value, key, partition, on_delivery=lambda error, _: errors.append(error) if error else None
        )
        producer.poll(0)
    assert producer.flush(60) == 0
    assert not errors, errors


@pytest.fixture
def app(app: App) -> App:
    """Create topics with room for large letters."""
    limits = {"max.message.bytes": str(SIZE_MAX)}
    create_topics(app.bootstrap, app.app, PARTITIONS, deltas=limits, dead_letters=limits)
    return app


def said(app: App, *arguments: str, code: int = 0) -> Any:
    """Return the JSON that a command prints."""
    done = pipeline("dead-letters", *arguments, "--from", app.url, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stdout)


@contextmanager
def settled(app: App, data: Path, **settings: Any) -> Iterator[ClusterWorker]:
    """Run a worker that has folded everything."""
    with folding(app, data, **settings) as worker:
        wait_folded(worker)
        yield worker


def total(worker: ClusterWorker, view: str) -> int:
    """Return the sum of a view, with everything folded."""
    wait_folded(worker)
    return sum(sums({number: it.store for number, it in worker.partitions.items()}, view).values())


def test_the_whole_story(app: App, tmp_path: Path) -> None:
    """Letters are listed, refused again, mended, replayed, replayed again: exact, and each is reported."""
    produce(app, batch(0, group(GOOD, 1, 2)), batch(1, group(GOOD, 3), group(WRONG, 10, 20)), b"no batch")
    produce(app, batch(0, group(GOOD, 4), partition=1), batch(1, group(WRONG, 30), partition=1), partition=1)
    with settled(app, tmp_path / "w", views_max=1) as worker:
        found = said(app, "ls")
        assert [(it["partition"], it["offset"], it["view"]) for it in found["letters"]] == [
            (0, 1, "wrong"), (0, 2, ""), (1, 1, "wrong"),
        ]  # fmt: skip
        assert said(app, "replay", "--view", "wrong", code=1)["counts"] == {"refused again": 2}
        assert said(app, "ls")["letter_count"] == 3
        assert total(worker, "good") == 10
    nobody = said(app, "replay", "--view", "wrong", "--partition", "1", "--timeout", "1", code=1)
    assert nobody["counts"] == {"unknown": 1}
    with settled(app, tmp_path / "w") as worker:
        assert total(worker, "wrong") == 30
        keys = [it["key"] for it in found["letters"] if it["view"]]
        both = said(app, "replay", *keys)
        assert both["counts"] == {"counted": 1, "counted before": 1}
        assert said(app, "replay", *keys)["counts"] == {"counted before": 2}
        assert said(app, "replay", code=1)["counts"] == {"not replayed": 1}
        assert (total(worker, "wrong"), total(worker, "good")) == (60, 10)
        shown = said(app, "show", found["letters"][1]["key"])
        assert shown["raw"] == b"no batch".hex()


@pytest.mark.long
def test_several_at_once_while_workers_are_killed(app: App, tmp_path: Path) -> None:
    """Three people replay 4,000 letters while the worker is killed again and again: each letter counts once."""
    count = 2_000
    for partition in range(PARTITIONS):
        produce(app, batch(0, group(GOOD, 1), partition=partition), partition=partition)
        produce(app, *(batch(n, group(WRONG, n), partition=partition) for n in range(1, count + 1)), partition=partition)
    with settled(app, tmp_path / "first", views_max=1):
        pass
    with UpProcess(tmp_path / "w", command=("worker", "--from", app.url)) as worker:
        codes: list[int] = []

        def replay() -> None:
            codes.append(pipeline("dead-letters", "replay", "--from", app.url, timeout_s=240).returncode)

        threads = [threading.Thread(target=replay) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(2):
            threads[0].join(1.5)
            worker.kill()
            worker.start()
        for thread in threads:
            thread.join()
        assert codes == [0, 0, 0]
        worker.kill()
    assert said(app, "ls")["letters"] == []
    with settled(app, tmp_path / "w") as last:
        assert total(last, "wrong") == PARTITIONS * count * (count + 1) // 2


@pytest.mark.long
def test_a_topic_made_anew_has_letters_of_its_own(app: App, tmp_path: Path) -> None:
    """A letter of deltas made anew counts, although one at the same partition and offset was replayed before."""
    for value in (10, 100):
        produce(
            app, batch(value, group(GOOD, 1)), batch(value + 1, group(Definition(f"wrong{value}", "sum", ("n",)), value))
        )
        with settled(app, tmp_path / "w", views_max=1, accept_loss=True):
            wait_until(lambda: said(app, "ls")["letters"], "a letter")
        with settled(app, tmp_path / "w") as worker:
            assert said(app, "replay")["counts"] == {"counted": 1}
            assert total(worker, f"wrong{value}") == value
        delete_topics(app.bootstrap, app.app, only=("deltas",))
        create_topics(app.bootstrap, app.app, PARTITIONS, only=("deltas",), deltas={"max.message.bytes": str(SIZE_MAX)})


@pytest.mark.long
def test_large_letters_and_records_of_strangers(app: App, tmp_path: Path) -> None:
    """Letters of many MB next to garbage, in one partition, are listed and replayed, and the garbage is only counted."""
    wide = Definition("wide", "sum", ("n",))
    large = Group(wide, [series_suffix((f"{n:06}" + "x" * 240,)) for n in range(40_000)], [1] * 40_000)
    produce(app, batch(0, group(GOOD, 1)), *(batch(n, large) for n in range(1, 4)))
    with settled(app, tmp_path / "w", views_max=1):
        for key in (None, b"", b"\xff", b"0-1", b"1-1-1"):
            produce(app, b"garbage", b"\x02garbage", topic="dead-letters", key=key)
    found = said(app, "ls")
    assert [it["series_count"] for it in found["letters"]] == [40_000] * 3
    assert found["foreign_count"] == 10
    with settled(app, tmp_path / "w") as worker:
        assert said(app, "replay")["counts"] == {"counted": 3}
        assert total(worker, "wide") == 120_000


def test_nothing_there_and_nobody_there(app: App) -> None:
    """Topics without a record are no error; a missing broker and missing topics are one, in one line."""
    assert said(app, "ls") == {"letters": [], "letter_count": 0, "bytes_total": 0, "foreign_count": 0}
    assert said(app, "replay")["outcomes"] == []
    for url in ("kafka://127.0.0.1:1", f"kafka://{app.bootstrap}/nobody"):
        gone = pipeline("dead-letters", "ls", "--from", url, "--set", "kafka_timeout_ms=2000")
        assert gone.returncode in (1, 2), gone.stderr
        assert gone.stderr.count("\n") == 1, gone.stderr
        assert gone.stdout == ""
