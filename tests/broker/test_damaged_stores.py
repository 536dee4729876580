"""Stores of a worker and of a query server that are damaged while both run, under load: answers stay exact."""

from __future__ import annotations

from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline import Publisher, Reader
from pipeline.errors import NotReady
from tests.broker.drive import server, worker
from tests.broker.kafka import App, create_topics
from tests.embedded.test_damaged_store import flip_everywhere
from tests.process.load import metric
from tests.support import wait_until

SERIES = 2_000
ROUNDS = 2
WAIT_S = 60.0


@pytest.mark.long
@pytest.mark.timeout(180)
def test_damaged_under_load(app: App, tmp_path: Path) -> None:
    """No process ends; the server answers nothing but 503 from a damaged store; every delta counts once."""
    create_topics(app.bootstrap, app.app, 2)
    with (
        worker(app, tmp_path / "worker") as role,
        server(app, tmp_path / "server") as reads,
        Publisher(app.url) as publisher,
        Reader(reads.url) as reader,
    ):
        view = publisher.sum("v", labels=("n",))

        def add(value: int) -> None:
            for n in range(SERIES):
                view.add(value, n=str(n))
            publisher.flush(WAIT_S)

        def total() -> object:
            try:
                return reader.get("v", by=(), after=publisher.flush(WAIT_S), timeout_ms=20_000).value()
            except NotReady:
                return None

        expected = 0
        for number in range(1, ROUNDS + 1):
            add(number)
            expected += number * SERIES
            wait_until(lambda want=expected: total() == want, f"{expected}; {role.tail()} {reads.tail()}", WAIT_S)  # type: ignore[misc]
            for it in (role, reads):
                assert it.terminate() == 0
                it.start()
            wait_until(lambda: total() is not None, "the server", WAIT_S)
            for folder in ("worker", "server"):
                for partition in range(2):
                    flip_everywhere(tmp_path / folder / "stores" / str(partition))
        add(100)
        expected += 100 * SERIES
        wait_until(lambda: total() == expected, f"{expected}; {role.tail()} {reads.tail()}", WAIT_S)
        assert metric(role.url, m.STORES_REBUILT) == 2
        assert metric(reads.url, m.STORES_REBUILT) <= 2
        assert (role.exit_code, reads.exit_code) == (None, None)
