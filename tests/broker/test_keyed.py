"""Requests with an `Idempotency-Key` on a real broker: cut tries, two servers, a topic that grows."""

from __future__ import annotations

import http.client
import json
from collections.abc import Sequence
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka.admin import NewPartitions

from pipeline import Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.errors import Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ports import Message, RequestKey
from pipeline.query.deltas import parse_deltas
from pipeline.settings import KafkaSettings, PublisherSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from tests.broker.drive import server, worker
from tests.broker.kafka import App, admin_client, create_topics

BODY = json.dumps([{"view": "v", "kind": "sum", "labels": {"n": str(number)}, "value": 1} for number in range(3_000)])


def post(url: str, key: str) -> str:
    """Return the token that a request with this key is answered with."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)
    with closing(connection):
        connection.request("POST", "/v1/deltas", BODY.encode(), {"Idempotency-Key": key, "Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
        assert response.status == 200, answer
        return str(answer["token"])


def try_in_part(app: App, key: str) -> None:
    """Make the same request at a gateway of this process that is cut off once the log has one batch of it."""
    log = KafkaLog(parse_url(app.url), KafkaSettings(), SystemClock())
    with closing(log):
        append = log.append

        def part(messages: Sequence[Message], *, timeout_s: float) -> Any:
            assert len(messages) > 1
            (offset,) = append(messages[:1], timeout_s=timeout_s)
            assert isinstance(offset, int)
            return [Unavailable("cut")] * len(messages)

        log.append = part  # type: ignore[method-assign]
        gateway = Gateway(log, SystemClock(), PublisherSettings(), lambda view, bounds: None)
        with pytest.raises(Unavailable, match="cut"):
            gateway.deltas(
                parse_deltas(BODY.encode(), "", 10_000), RequestKey("/v1/deltas", key, sha256(BODY.encode()).digest())
            )


@pytest.mark.timeout(180)
def test_a_repeat_counts_once(app: App, tmp_path: Path) -> None:
    """A repeat counts once at the same server, at another, after a try that was cut, and after the topics have grown."""
    create_topics(app.bootstrap, app.app, 2)
    with (
        worker(app, tmp_path / "worker"),
        server(app, tmp_path / "one", "--ingest") as one,
        server(app, tmp_path / "two", "--ingest") as two,
        Reader(two.url) as reader,
    ):
        try_in_part(app, "cut")
        for url in (one.url, one.url, two.url):
            token = post(url, "cut")
        assert reader.get("v", by=[], after=token, timeout_ms=60_000).value() == 3_000
        post(one.url, "grown")
        topics = [NewPartitions(app.topic(name), 4) for name in (CHANGELOG, DEAD_LETTERS, DELTAS)]
        admin = admin_client(app.bootstrap)  # one that nobody holds cancels what it was asked for
        for future in admin.create_partitions(topics).values():
            future.result()
        token = post(two.url, "grown")
        assert reader.get("v", by=[], after=token, timeout_ms=60_000).value() == 6_000
