"""Servers of parts and one that merges them, as processes on a real broker."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline import Publisher, Reader
from pipeline.errors import Unavailable
from tests.broker.drive import PUBLISHER, server, worker
from tests.broker.kafka import App, create_topics
from tests.support import PROGRAM, Program

PARTITIONS = 4


@pytest.mark.timeout(150)
def test_parts_are_one_server(app: App, tmp_path: Path) -> None:
    """A spread series is whole through the merging server, also after a server is gone whose partitions another has."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with (
        ExitStack() as stack,
        worker(app, tmp_path / "worker"),
        server(app, tmp_path / "first", "--partitions", "0-1") as first,
        server(app, tmp_path / "second", "--partitions", "2,3") as second,
        server(app, tmp_path / "third", "--partitions", "1-3") as third,
        Publisher(app.url, **PUBLISHER) as publisher,
    ):
        hot = publisher.sum("hot", labels=("n",), spread=PARTITIONS)
        for _ in range(2 * PARTITIONS):
            hot.add(1, n="a")
            token = publisher.flush()
        urls = ",".join(it.url for it in (first, second, third))
        gatherer = Program("serve", "--gather", urls, "--port", "0", "--json", stderr=tmp_path / "gatherer")
        stack.callback(gatherer.kill)
        with Reader(json.loads(gatherer.read_line())["url"]) as reader, Reader(first.url) as part:
            total = 2 * PARTITIONS
            assert reader.get("hot", where={"n": "a"}, after=token, timeout_ms=20_000).value() == total
            assert part.get("hot", by=[]).as_of.missing_partitions == [2, 3]
            assert {it.name for it in (first.data / "stores").iterdir()} == {"0", "1"}
            second.kill()
            assert reader.get("hot", by=[], timeout_ms=20_000).value() == total
            first.kill()
            with pytest.raises(Unavailable, match=r"partitions 0 are missing"):
                reader.get("hot", by=[], timeout_ms=2_000)
            partial = reader.fetch("/v1/views/hot?by=&allow_partial=true").decode()
            assert '"missing_partitions":[0]' in partial


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--partitions", "0-4"), "there is no partition 4; topic deltas has 4"),
        pytest.param(("--partitions", "5-2"), "no partition is in it", marks=pytest.mark.long),
        pytest.param(("--partitions", "x"), "numbers and ranges are needed", marks=pytest.mark.long),
        (("--partitions", "0", "--ingest"), "a gateway checks what it takes against the state of all partitions"),
    ],
)
def test_a_list_of_partitions_that_makes_no_sense(app: App, tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    """Partitions that the topic does not have, and a gateway of a part, are a usage error before anything runs."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    command = [*PROGRAM, "serve", "--from", app.url, "--data", str(tmp_path / "s"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr
