"""A query server serves only while the changelog's real compaction lag rules out states that never existed."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from pipeline import Publisher, Reader
from pipeline.errors import NotFound, NotReady
from pipeline.topics import CHANGELOG
from tests.broker.drive import PUBLISHER, server, worker
from tests.broker.inside import serving
from tests.broker.kafka import App, create_topics
from tests.broker.test_compaction import alter
from tests.support import pipeline, wait_until

LAG = "min.compaction.lag.ms"
PAUSE_S = 3.0


def refused(app: App, data: Path, *said: str) -> None:
    """Check that a server ends with code 2 and says why and how to set it right."""
    done = pipeline("serve", "--from", app.url, f"--data={data}", "--port=0")
    assert done.returncode == 2, done.stderr
    for text in (*said, f"pipeline topics apply --to {app.url}"):
        assert text in done.stderr


@pytest.mark.timeout(120)
def test_no_server_starts_where_it_could_answer_wrongly(app: App, tmp_path: Path) -> None:
    """Kafka's default lag 0, a lag too short to read in, and workers' timestamps are refused; `topics apply` mends each."""
    create_topics(app.bootstrap, app.app, 1, changelog={LAG: "0"})
    topic = app.topic(CHANGELOG)
    refused(app, tmp_path / "s", f"{topic} has {LAG}=0")
    alter(app.bootstrap, topic, {LAG: "500"})
    refused(app, tmp_path / "s", f"{topic} has {LAG}=500", "at least 2000")
    alter(app.bootstrap, topic, {LAG: "600000", "message.timestamp.type": "CreateTime"})
    refused(app, tmp_path / "s", f"{topic} has message.timestamp.type=CreateTime")
    alter(app.bootstrap, topic, {LAG: "0"})
    applied = pipeline("topics", "apply", "--to", app.url)
    assert applied.returncode == 0, applied.stderr
    with serving(app, tmp_path / "s"):
        pass
    with worker(app, tmp_path / "w"):
        pass  # whoever folds reads all before it does


@pytest.mark.long
@pytest.mark.timeout(150)
def test_a_lag_that_is_changed_is_noticed(app: App, tmp_path: Path) -> None:
    """A running server hides everything and says why while the lag is 0, and serves again without a restart."""
    create_topics(app.bootstrap, app.app, 1)
    with worker(app, tmp_path / "w"), server(app, tmp_path / "s") as role, Reader(role.url, timeout_s=5) as reader:
        with Publisher(app.url, **PUBLISHER) as publisher:
            publisher.sum("v").add(7)
            publisher.flush(timeout_s=30)

        def value() -> object:
            try:
                return reader.get("v", timeout_ms=200).value()
            except NotFound:
                return None
            except NotReady as error:
                return str(error)

        wait_until(lambda: value() == 7, "the answer", 60)
        alter(app.bootstrap, app.topic(CHANGELOG), {LAG: "0"})
        said = wait_until(lambda: next((it for it in [value()] if it != 7), None), "a refusal", 60)
        assert f"{LAG}=0" in str(said)
        assert reader.status()["ready"] is False
        assert "nothing is served" in role.program.stderr()
        alter(app.bootstrap, app.topic(CHANGELOG), {LAG: "600000"})
        wait_until(lambda: value() == 7, "the answer again", 60)


@pytest.mark.timeout(150)
def test_half_of_the_real_lag_is_what_counts(app: App, tmp_path: Path) -> None:
    """A server that stood still for longer than half of the real 4 s is hidden until it has caught up, long before 300 s."""
    create_topics(app.bootstrap, app.app, 1, changelog={LAG: "4000"})
    with (
        worker(app, tmp_path / "w"),
        server(app, tmp_path / "s", "--log-level=info") as role,
        Reader(role.url) as reader,
        Publisher(app.url, **PUBLISHER) as publisher,
    ):
        token = _add(publisher)
        wait_until(lambda: _value(reader, token) == 1, "the answer", 60)
        assert "over 2 s behind" in role.program.stderr()
        role.program.process.send_signal(signal.SIGSTOP)
        _add(publisher)
        time.sleep(PAUSE_S)
        role.program.process.send_signal(signal.SIGCONT)
        token = _add(publisher)
        wait_until(lambda: _value(reader, token) == 3, "the answer", 60)
        assert "it is not served until it has caught up" in role.program.stderr()


def _add(publisher: Publisher) -> str:
    publisher.sum("v").add(1)
    return str(publisher.flush(timeout_s=30))


def _value(reader: Reader, token: str) -> object:
    try:
        return reader.get("v", after=token).value()
    except (NotFound, NotReady):
        return None
