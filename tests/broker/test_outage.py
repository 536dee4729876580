"""The broker is stopped or killed: folding goes on by itself, and every answer is exact."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from pipeline import Publisher, Reader
from tests.broker.drive import PUBLISHER, Supervised, check, finish, loaded, server, worker
from tests.broker.kafka import App, Broker, create_topics, new_app
from tests.process.load import Retries
from tests.support import wait_until

STOP_S = 15.0
RESUME_S = 20.0


@pytest.fixture
def own(broker: Broker) -> App:
    """Topics on a broker that can be killed."""
    app = new_app(broker.bootstrap)
    create_topics(app.bootstrap, app.app)
    return app


@pytest.mark.timeout(150)
def test_broker_stopped_and_killed(broker: Broker, own: App, tmp_path: Path) -> None:
    """Within 20 s of the broker's return what is published can be read, and what was sent twice is counted once."""
    with worker(own, tmp_path / "worker", "--log-level=info") as role, server(own, tmp_path / "server") as reads:
        retries = Retries()
        with Supervised(role) as supervised, loaded(own, metrics=retries) as (publisher, loads):
            publisher.flush()
            for _ in range(2):
                broker.kill()
                broker.start()
                _folds_again(publisher, reads.url)
            broker.pause()
            time.sleep(STOP_S)
            broker.resume()
            _folds_again(publisher, reads.url)
            load = finish(publisher, loads)
            assert retries.count > 0, "no batch was in doubt: nothing is shown"
        check(own, [reads], tmp_path, load=load)
        assert set(supervised.codes) <= {3}, f"{supervised.codes}; {role.tail()}"


def _folds_again(publisher: Publisher, url: str) -> None:
    started_s = time.monotonic()
    token = publisher.flush(timeout_s=RESUME_S)
    with Reader(url) as reader:
        reader.get("sum", after=token, timeout_ms=int(RESUME_S * 1000))
    assert time.monotonic() - started_s < RESUME_S


@pytest.mark.timeout(120)
def test_answers_while_the_broker_is_away(broker: Broker, own: App, tmp_path: Path) -> None:
    """A server goes on answering; whatever an answer lacks was acknowledged no longer ago than its staleness."""
    with (
        worker(own, tmp_path / "worker") as role,
        server(own, tmp_path / "server") as reads,
        Publisher(own.url, **PUBLISHER) as publisher,
        Reader(reads.url) as reader,
    ):
        view = publisher.sum("seen")
        view.add(1)
        assert reader.get("seen", after=publisher.flush()).value() == 1
        role.program.signal(signal.SIGSTOP)
        view.add(1)
        publisher.flush()
        acknowledged_s = time.monotonic()
        before = _lacking(reader, acknowledged_s, 1.0)
        broker.pause()
        away = _lacking(reader, acknowledged_s, 3.0)
        assert away[-1] > away[0] + 2_500 > before[0] + 2_500, (before, away)
        broker.resume()
        role.program.signal(signal.SIGCONT)
        wait_until(lambda: reader.get("seen").value() == 2, "the server to go on")
        wait_until(lambda: (reader.get("seen").as_of.staleness_ms or 0) < 1_000, "staleness to fall again")


def _lacking(reader: Reader, acknowledged_s: float, for_s: float) -> list[int]:
    """Read for so long; the staleness of each answer, all of which lack what was acknowledged."""
    found = []
    deadline_s = time.monotonic() + for_s
    while (asked_s := time.monotonic()) < deadline_s:
        answer = reader.get("seen")
        assert answer.value() == 1
        stale_ms = answer.as_of.staleness_ms
        truth_ms = (asked_s - acknowledged_s) * 1000
        assert stale_ms is not None
        assert stale_ms >= int(truth_ms), f"staleness {stale_ms} ms, but what is missing is {truth_ms:.0f} ms old"
        found.append(stale_ms)
        time.sleep(0.02)
    return found
