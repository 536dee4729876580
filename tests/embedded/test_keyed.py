"""Requests with an `Idempotency-Key` on the embedded engine: a repeat counts once, also at the next engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter, push_to_gateway

from pipeline import Reader
from pipeline.adapters.clock import SystemClock
from pipeline.core.query import Query
from pipeline.core.record import Control
from pipeline.core.token import Token
from pipeline.errors import Unavailable
from pipeline.ports import Message, RawDelta, RequestKey
from pipeline.pushed import SavedTotals, SentIncreases
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings, QuerySettings, WorkerSettings
from tests.support import UpProcess, everything, wait_until

MANY = [RawDelta("v", "sum", {"n": str(number)}, 1) for number in range(3_000)]


@contextmanager
def running(data: Path, **query: Any) -> Iterator[Engine]:
    engine = Engine(
        LogSettings(data=str(data), partitions=4),
        worker_settings=WorkerSettings(commit_interval_ms=5),
        query_settings=QuerySettings(**query),
    )
    engine.start()
    try:
        assert engine.wait_ready(60)
        yield engine
    finally:
        assert engine.stop()


def key(name: str, path: str = "/v1/deltas") -> RequestKey:
    return RequestKey(path, name, sha256(name.encode()).digest())


def total(engine: Engine, view: str, token: Token) -> Any:
    """Return the sum of a view, once everything that the token covers is folded."""

    def folded() -> bool:
        return all(
            engine.partitions[number].task.position.next_offset >= offset for number, offset in token.next_offsets.items()
        )

    wait_until(folded, "the token is folded")
    answer = engine.reader.read(Query(view, by=()), deadline_s=SystemClock().monotonic_s() + 30)
    return sum(it.value for it in answer.series)


def cut(engine: Engine, kept_count: int) -> None:
    """Let the next append take so many batches, and then fail, as if the process was killed."""
    append = engine.log.append

    def part(messages: Sequence[Message], *, timeout_s: float) -> Any:
        engine.log.append = append  # type: ignore[method-assign]
        append(messages[:kept_count], timeout_s=timeout_s)
        return [Unavailable("cut")] * len(messages)

    engine.log.append = part  # type: ignore[method-assign]


def test_a_repeat_counts_once(tmp_path: Path) -> None:
    """A repeat counts once at the same engine, and after a restart, which folds nothing anew."""
    for _ in range(2):
        with running(tmp_path / "data") as engine:
            for _ in range(2):
                assert total(engine, "v", engine.ingest.deltas(MANY, key("k"))) == len(MANY)
                engine.ingest.fitting([RawDelta("pushed", "sum", {"n": "1"}, 1)], key("k", "/v1/openmetrics"))
    with running(tmp_path / "data") as engine:
        token = engine.ingest.deltas(MANY[:1], key("other"))
        assert (total(engine, "v", token), total(engine, "pushed", token)) == (len(MANY) + 1, 1)


@pytest.mark.parametrize("kept_count", [0, 1, 9])
def test_a_first_try_that_was_cut(tmp_path: Path, kept_count: int) -> None:
    """A first try of which nothing, a part, or all is in the log is completed by its repeat at the next engine."""
    with running(tmp_path / "data") as engine:
        cut(engine, kept_count)
        with pytest.raises(Unavailable):
            engine.ingest.deltas(MANY, key("k"))
    with running(tmp_path / "data") as engine:
        assert total(engine, "v", engine.ingest.deltas(MANY, key("k"))) == len(MANY)


def test_an_order_that_was_cut(tmp_path: Path) -> None:
    """An order that some partitions have is repeated where it is missing, and elsewhere removes nothing that came since."""
    with running(tmp_path / "data") as engine:
        total(engine, "v", engine.ingest.deltas(MANY))
        cut(engine, 2)
        reset = [Control("reset", "v", "", None)], key("order", "/v1/views/v/reset")
        with pytest.raises(Unavailable):
            engine.ingest.controls(*reset)
        assert total(engine, "v", engine.ingest.controls(*reset)) == 0
        engine.ingest.deltas(MANY)
        assert total(engine, "v", engine.ingest.controls(*reset)) == len(MANY)


def test_totals_belong_to_the_partitions_of_their_keys(tmp_path: Path) -> None:
    """Increases that may be sent already are not sent again where their key would come to another partition."""
    with running(tmp_path) as engine:
        assert engine.totals.load() is None
        sent = SentIncreases([RawDelta("v", "sum", {}, 1)], [1], key("once"), {}, 0)
        engine.totals.save({}, 5, sent)
        engine.totals.close()
    with running(tmp_path) as engine:
        assert engine.totals.load() == SavedTotals({}, 5, sent)
        engine.totals.close()
    with running(tmp_path, idempotent_partitions=2) as engine:
        assert engine.totals.load() is None
        engine.totals.close()


def test_totals_outlive_the_process(tmp_path: Path) -> None:
    """A job that pushes its totals before and after kill -9 of the server misses nothing, and nothing counts twice."""
    with UpProcess(tmp_path / "data", "--set", "partitions=1") as up:
        registry = CollectorRegistry()
        rows = Counter("rows", "x", registry=registry)
        rows.inc(5)
        push_to_gateway(up.url, "job", registry)
        up.kill()
        up.start()
        rows.inc()
        push_to_gateway(up.url, "job", registry)
        with Reader(up.url) as reader:
            assert reader.get("rows_total", by=[], after=everything(reader), timeout_ms=60_000).value() == 6
