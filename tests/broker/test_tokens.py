"""Tokens on a real broker: of a topic that was made anew, and of another app."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline import Publisher, Reader
from pipeline.errors import Invalid, OtherTopic
from pipeline.topics import DELTAS
from tests.broker.drive import server, wait_exit, worker
from tests.broker.kafka import App, create_topics, delete_topics
from tests.support import wait_until

AT_ONCE_S = 25.0
WAIT_S = 60.0


@pytest.mark.timeout(150)
def test_deltas_made_anew_under_publishers(app: App, tmp_path: Path) -> None:
    """The next flushes, direct and through a gateway, return tokens of the new topic, for which reads wait; earlier tokens
    are refused at once, whatever their offsets are.
    """
    create_topics(app.bootstrap, app.app, 1)
    with (
        server(app, tmp_path / "server", "--ingest") as reads,
        worker(app, tmp_path / "worker") as role,
        Publisher(app.url) as direct,
        Publisher(reads.url) as gateway,
        Reader(reads.url) as reader,
    ):
        both = direct, gateway
        cells = [publisher.sum("v").labels() for publisher in both]
        for _ in range(5):
            for publisher, cell in zip(both, cells, strict=True):
                cell.add(1)
                publisher.flush(WAIT_S)
        before = direct.flush(WAIT_S) | gateway.flush(WAIT_S)
        assert reader.get("v", after=before).value() == 10

        delete_topics(app.bootstrap, app.app, only=(DELTAS,))
        create_topics(app.bootstrap, app.app, 1, only=(DELTAS,))
        tokens = []
        for publisher, cell in zip(both, cells, strict=True):
            cell.add(1)
            tokens.append(publisher.flush(WAIT_S))
        after = tokens[0] | tokens[1]
        assert after.topic_id != before.topic_id
        assert after.next_offsets == {0: 2}

        def refused() -> bool:
            """Return whether the server has heard of the new topic; until then answers hold all that the token covers."""
            try:
                assert reader.get("v", after=before, timeout_ms=30_000).value() == 10
            except OtherTopic:
                return True
            return False

        wait_until(refused, "the server to hear of the new topic", WAIT_S)
        started_s = time.monotonic()
        with pytest.raises(OtherTopic, match="made anew"):
            reader.get("v", after=before, timeout_ms=30_000)
        assert time.monotonic() - started_s < AT_ONCE_S
        with pytest.raises(Invalid, match="two topics"):
            _ = before | after
        assert wait_exit(role, WAIT_S) == 4, role.tail()
        with worker(app, tmp_path / "worker", "--accept-loss"):
            assert reader.get("v", after=after, timeout_ms=30_000).value() == 12
