"""Answers of very many series: few are made at once, a part at a time, so that other requests are answered meanwhile."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import tests.bench.data as data
from pipeline.adapters.http import HttpLogWriter
from pipeline.core.token import Token
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.attack.support import Reply, attacked, request
from tests.support import UpProcess


def publish(up: UpProcess, series_count: int) -> None:
    """Publish every series once, and wait until all can be read."""
    writer = HttpLogWriter(up.url)
    writer.introduce(data.SECRET)
    offsets: dict[int, int] = {}
    for partition, value in data.batches(series_count, series_count, writer.partition_count(DELTAS)):
        (result,) = writer.append([Message(DELTAS, partition, None, value)], timeout_s=60)
        assert isinstance(result, int), result
        offsets[partition] = result
    token = Token(offsets, writer.topic_id(DELTAS))
    writer.close()
    path = f"/v1/views/{data.VIEW.view}?by=&after={token}&timeout_ms=60000"
    assert request(up.port, "GET", path, timeout_s=90).status == 200


@pytest.mark.parametrize(
    ("series_count", "count"), [(51_000, 4), pytest.param(1_000_000, 8, marks=[pytest.mark.long, pytest.mark.timeout(900)])]
)
def test_large_answers_leave_time_for_others(up: UpProcess, series_count: int, count: int) -> None:
    """While large answers are made, each another one, others write and read their writes; all large ones come, too."""
    publish(up, series_count)

    def ask(number: int) -> Reply:
        path = f"/v1/views/{data.VIEW.view}?limit={series_count - number}&timeout_ms=60000"
        return request(up.port, "GET", path, timeout_s=120)

    with attacked(up) as bystander, ThreadPoolExecutor(count) as threads:
        time.sleep(0.3)
        replies = [*threads.map(ask, range(count))]
    right = [reply for number, reply in enumerate(replies) if reply.status == 200]
    assert right
    assert {reply.status for reply in replies} <= {200, 503}
    assert len(right[0].json()["series"]) >= series_count - count
    assert not [it for it in bystander.failures if "health" in it], bystander
    bystander.check(grown_bytes_max=200_000_000 + 1_200 * series_count, rounds_min=2)
