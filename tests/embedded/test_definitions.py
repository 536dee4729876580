"""Definitions never conflict on the embedded engine: acknowledged deltas count, whatever else is sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.core.codec import encode_batch
from pipeline.core.query import Query
from pipeline.core.record import Batch, Control, Definition, Group, producer_id_of
from pipeline.core.token import Token
from pipeline.errors import GroupsRefused, Invalid, NotFound
from pipeline.ingest.gateway import Gateway
from pipeline.ports import RawDelta
from pipeline.publisher.client import BasePublisher
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings, PublisherSettings, WorkerSettings
from pipeline.topics import DEAD_LETTERS
from tests.support import wait_until

VIEWS_MAX = 50


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    worker = WorkerSettings(commit_interval_ms=5, views_max=VIEWS_MAX)
    made = Engine(LogSettings(data=str(tmp_path / "data"), partitions=4), worker_settings=worker)
    made.start()
    try:
        assert made.wait_ready(60)
        yield made
    finally:
        assert made.stop()


def delta(view: str, value: Any = 1, kind: str = "sum", **labels: str) -> RawDelta:
    return RawDelta(view, kind, labels, value)


def rows(engine: Engine, view: str, token: Token, **query: Any) -> dict[tuple[str, ...], Any]:
    """Return the series of a view, once everything that the token covers is folded."""

    def folded() -> bool:
        return all(
            engine.partitions[number].task.position.next_offset >= offset for number, offset in token.next_offsets.items()
        )

    wait_until(folded, "the token is folded")
    answer = engine.reader.read(Query(view, **query), deadline_s=SystemClock().monotonic_s() + 30)
    return {tuple(it.labels.values()): it.value for it in answer.series}


def letters(engine: Engine) -> int:
    return sum(it.end_offset for it in [engine.log.watermarks(DEAD_LETTERS, number) for number in range(4)])


def other_gateway(engine: Engine) -> Gateway:
    """Return a second gateway on the same log, which knows nothing of views."""
    return Gateway(engine.log, SystemClock(), PublisherSettings(), {}.get)


class _Shared:
    """The engine's log, for a publisher that would close it."""

    def __init__(self, engine: Engine) -> None:
        log = engine.log
        self.append, self.partition_count, self.message_bytes_max = log.append, log.partition_count, log.message_bytes_max
        self.topic_id, self.high_watermarks = log.topic_id, log.high_watermarks

    def close(self) -> None:
        """Leave the log open: the engine closes it."""


def test_a_view_that_is_known_otherwise_costs_no_other(engine: Engine) -> None:
    """All 800 deltas are read, although the same batches have a view that the server knows with other labels."""
    token = engine.ingest.deltas([delta("orders", 1, region="eu")])
    rows(engine, "orders", token)
    pub = BasePublisher(_Shared(engine), SystemClock(), PublisherSettings(flush_interval_ms=3_600_000))
    paid, orders = pub.sum("paid", labels=("by",)), pub.last("orders", labels=("product",))
    for i in range(800):
        paid.add(1, by=str(i % 40))
        orders.set(i, product=str(i % 40))
        if i % 100 == 99:
            token = pub.flush(30)
    assert pub.stats()["rejected"] == 0
    assert rows(engine, "paid", token, by=()) == {(): 800}
    assert rows(engine, "orders", token) == {("eu",): 1}  # what was there first answers
    assert len(rows(engine, "orders", token, kind="last")) == 40
    pub.close()
    assert letters(engine) == 0


def test_two_gateways_with_different_first_labels(engine: Engine) -> None:
    """All 16 deltas that both gateways have accepted are counted, and those that went with them."""
    other = other_gateway(engine)
    token = Token()
    for i in range(8):
        token |= engine.ingest.deltas([delta("metric", 1, host=str(i)), delta("innocent")])
        token |= other.deltas([delta("metric", 1, zone=str(i)), delta("innocent")])
        pushed, refused = other.fitting([delta("pushed", 1, a=str(i))])
        again, refused_too = engine.ingest.fitting([delta("pushed", 1, b=str(i))])
        assert not refused
        assert not refused_too
        token |= pushed | again
    assert rows(engine, "metric", token, by=()) == {(): 16}
    assert rows(engine, "innocent", token) == {(): 16}
    assert rows(engine, "pushed", token, by=()) == {(): 16}
    assert letters(engine) == 0


def test_definitions_are_read_merged(engine: Engine) -> None:
    """`orders(region)` and `orders(region, product)` are one view, in which a missing label is empty."""
    token = engine.ingest.deltas([delta("orders", 1, region="eu"), delta("orders", 2, region="us")])
    token |= other_gateway(engine).deltas([delta("orders", 10, region="eu", product="tea")])
    assert rows(engine, "orders", token) == {("", "eu"): 1, ("", "us"): 2, ("tea", "eu"): 10}
    assert rows(engine, "orders", token, by=("region",)) == {("eu",): 11, ("us",): 2}


def test_empty_views_use_nothing_up(engine: Engine) -> None:
    """10,000 empty views in a request are refused at the door, as is a view without room, before it has a token."""
    groups = [Group(Definition(f"empty{i}", "sum"), [], []) for i in range(10_000)]
    secret = "of a stranger"
    batch = encode_batch(Batch(producer_id_of(secret), 0, 0, 0, 0, 1, groups))
    with pytest.raises(GroupsRefused, match=r"batch 0: group 0 \(view empty0\).*and 9997 more groups"):
        engine.ingest.batches([batch], secret)
    token = Token()
    refused: list[str] = []
    for i in range(8 * VIEWS_MAX):
        try:
            token |= engine.ingest.deltas([delta(f"view{i}")])
        except Invalid as error:
            refused.append(str(error))
    taken = 8 * VIEWS_MAX - len(refused)
    assert all("views_max" in said for said in refused)
    assert VIEWS_MAX <= taken <= 4 * VIEWS_MAX
    assert rows(engine, "view0", token) == {(): 1}
    assert letters(engine) == 0
    token = engine.ingest.controls([Control("drop", f"view{i}") for i in range(8 * VIEWS_MAX)])
    with pytest.raises(NotFound):
        rows(engine, "view0", token)
    rows_after = engine.ingest.deltas([delta("room", a=str(i)) for i in range(40)])
    assert rows(engine, "room", token | rows_after, by=()) == {(): 40}
    assert letters(engine) == 0
