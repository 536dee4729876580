"""The broker is stopped or killed: folding goes on by itself, and every answer is exact."""

from __future__ import annotations

import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline import NotReady, Publisher, Reader
from tests.broker.drive import PUBLISHER, Sender, Supervised, check, conditions, finish, loaded, server, worker
from tests.broker.kafka import App, Broker, create_topics, new_app
from tests.process.load import metric
from tests.support import wait_until

STOP_S = 15.0
SHORT_STOP_S = 3.0
"""Longer than publishers wait for an answer."""
STOPS_MAX = 6
KILLS = 2
RESUME_S = 20.0
RETURN_S = 60.0
AWAY_S = 3.0
FRESH_MS = 1_000


@pytest.fixture
def own(broker: Broker) -> App:
    """Topics on a broker that can be killed."""
    app = new_app(broker.bootstrap)
    create_topics(app.bootstrap, app.app)
    return app


@pytest.mark.long
@pytest.mark.timeout(150)
def test_broker_stopped_and_killed(broker: Broker, own: App, tmp_path: Path) -> None:
    """Within 20 s of the broker's return published deltas can be read, and those that were sent twice count once.

    The worker may wait for the broker, or end with code 3 and be started again by its supervisor: no person is needed.
    """
    with (
        worker(own, tmp_path / "worker", "--log-level=info") as role,
        server(own, tmp_path / "server") as reads,
        Sender(own, "s", tmp_path) as sender,
    ):
        sender.wait_round()
        with Supervised(role) as supervised, loaded(own) as (publisher, loads):
            _stop(broker, STOP_S)
            _folds_again(publisher, reads.url)
            for _ in range(KILLS):
                broker.kill()
                broker.start()
                _folds_again(publisher, reads.url)
            doubled = 0.0
            for _ in range(STOPS_MAX):  # until some batch was appended, but not acknowledged in time
                if doubled := metric(role.url, m.BATCHES_DUPLICATE):
                    break
                _stop(broker, SHORT_STOP_S)
                _folds_again(publisher, reads.url)
            load = finish(publisher, loads)
        check(own, [reads], tmp_path, load=load, senders=[sender])
        assert doubled, "no batch was appended twice: nothing is shown"
        assert set(supervised.codes) <= {3}, f"{supervised.codes}; {role.tail()}"


def _stop(broker: Broker, for_s: float) -> None:
    broker.pause()
    time.sleep(for_s)
    broker.resume()


def _folds_again(publisher: Publisher, url: str) -> None:
    started_s = time.monotonic()
    token = publisher.flush(timeout_s=RESUME_S)
    with Reader(url) as reader:
        reader.get("sum", after=token, timeout_ms=int(RESUME_S * 1000))
    assert time.monotonic() - started_s < RESUME_S


@pytest.mark.timeout(120)
def test_what_is_missing_is_no_older_than_the_staleness(broker: Broker, own: App, tmp_path: Path) -> None:
    """Deltas that an answer lacks were acknowledged no longer ago than its staleness, also while the broker is stopped."""
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
        _old(reader, acknowledged_s, 1.0)
        broker.pause()
        _old(reader, acknowledged_s, 3.0)
        broker.resume()
        role.program.signal(signal.SIGCONT)
        both = conditions(role, reads)
        wait_until(lambda: reader.get("seen").value() == 2, "the server to go on", RETURN_S, seen=both)
        wait_until(lambda: reader.get("seen").as_of.staleness_ms < FRESH_MS, "fresh answers again", RETURN_S, seen=both)


@pytest.mark.long
@pytest.mark.timeout(150)
def test_answers_while_the_broker_is_away(broker: Broker, own: App, tmp_path: Path) -> None:
    """Answers during an outage are as stale as it is long, or 503 under a lower limit; later answers are fresh."""
    with (
        worker(own, tmp_path / "worker") as role,
        server(own, tmp_path / "server") as reads,
        Publisher(own.url, **PUBLISHER) as publisher,
        Reader(reads.url) as reader,
        Supervised(role) as supervised,
    ):
        view = publisher.sum("seen")
        view.add(1)
        token = publisher.flush()
        wait_until(lambda: reader.get("seen", after=token).as_of.staleness_ms < FRESH_MS, "a fresh answer", RETURN_S)
        broker.kill()
        away_s = time.monotonic()
        _old(reader, away_s, AWAY_S)
        assert _status(f"{reads.url}/v1/views/seen") == 200
        assert _status(f"{reads.url}/v1/views/seen?max_staleness_ms={FRESH_MS}&timeout_ms=100") == 503
        with pytest.raises(NotReady, match=f"max_staleness_ms={FRESH_MS}"):
            reader.get("seen", max_staleness_ms=FRESH_MS, timeout_ms=100)
        view.add(1)
        broker.start()
        token = publisher.flush(timeout_s=RETURN_S)
        assert reader.get("seen", after=token, timeout_ms=60_000).value() == 2
        assert reader.get("seen", max_staleness_ms=FRESH_MS, timeout_ms=60_000).as_of.staleness_ms <= FRESH_MS
        assert reads.exit_code is None, reads.tail()
        assert set(supervised.codes) <= {3}, f"{supervised.codes}; {role.tail()}"


def _old(reader: Reader, since_s: float, for_s: float) -> None:
    """Read for so long, and check that each answer is the old one and at least as stale as it must be."""
    deadline_s = time.monotonic() + for_s
    while (asked_s := time.monotonic()) < deadline_s:
        answer = reader.get("seen")
        assert answer.value() == 1
        stale_ms, truth_ms = answer.as_of.staleness_ms, int((asked_s - since_s) * 1000)
        assert stale_ms is not None
        assert stale_ms >= truth_ms, f"staleness {stale_ms} ms, but what may be missing is {truth_ms} ms old"
        time.sleep(0.02)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
