"""Requests with a key: a repeat counts once, whatever happened to the first try and wherever the repeat goes."""

import random
import threading
from hashlib import sha256
from typing import Any

import pytest

import pipeline.ingest.idempotency as keyed
from pipeline.core.codec import GROUP_COUNT_MAX, decode_batch
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Control, Definition
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ingest.idempotency import partition_of_request, producer_of_request
from pipeline.ports import KnownDefinitions, RawDelta, RequestKey
from pipeline.settings import PublisherSettings
from tests.publisher.support import CLOCK, FaultyLog, batches, fold, in_threads
from tests.support import LONG

AWAY = Unavailable("away")


def gateway(log: Any, known: dict[str, Definition] | None = None, **settings: Any) -> Gateway:
    """Return another server each time, which shares only the log."""
    partitions = settings.pop("idempotent_partitions", 1)
    return Gateway(log, CLOCK, PublisherSettings(**settings), (known or {}).get, idempotent_partitions=partitions)


GOLDEN_CUTS = (38, [10, 18, 27, 35, 43, 51, 59, 67], [553, 2181, 3809, 4282])
GOLDEN_PRODUCER = "key:05b5236732758bf3c4fb6eef57fde95e58b2d119cd6900e476591e13fa6bfbfe"
GOLDEN_PARTITIONS = [2, 1, 10, 202]


def key(name: str = "k", body: bytes = b"", path: str = "/v1/deltas") -> RequestKey:
    return RequestKey(path, name, sha256(body).digest())


def delta(value: Any = 1, view: str = "v", kind: str = "sum", **labels: str) -> RawDelta:
    return RawDelta(view, kind, labels, value)


MANY = [delta(1, a="x" * (i % 50) + str(i)) for i in range(6_000)]


def test_a_repeat_counts_once() -> None:
    """A repeat counts once at the same server and at others; another key, path or body is another request."""
    log = FaultyLog()
    for _ in range(2):
        gate = gateway(log)
        for _ in range(2):
            assert gate.deltas([delta(1, a="x"), delta(2, a="y")], key()).next_offsets
    assert fold(log.log).total("v") == 3
    gateway(log).deltas([delta(10, a="x")], key("other"))
    gateway(log).deltas([delta(100, a="x")], key(body=b"other"))
    gateway(log).deltas([delta(1_000, a="x")], key(path="/v1/openmetrics"))
    assert fold(log.log).total("v") == 1_113


def test_what_can_be_taken_later_only() -> None:
    """A push with a key is refused as a whole if a part of it could only be taken later: its repeat would omit that part."""
    log = FaultyLog()
    far_ms, pushed = CLOCK.now_ms() + 7_200_000, key(path="/v1/openmetrics")
    deltas = [delta(1, "m"), RawDelta("g", "last", {}, 1, far_ms)]
    with pytest.raises(Invalid, match=r"delta 1: .* ahead of now"):
        gateway(log).fitting(deltas, pushed)
    assert not log.attempts
    later = Gateway(log, CLOCK, PublisherSettings(), {}.get, limits=TaskLimits(ts_ahead_max_ms=10**9))
    assert later.fitting(deltas, pushed)[1] == []
    assert [it.line for it in gateway(log).fitting(deltas)[1]] == [1]
    full = Gateway(log, CLOCK, PublisherSettings(), {}.get, limits=TaskLimits(views_max=1), facts=Full())
    with pytest.raises(Invalid, match="views_max"):
        full.fitting([delta(1, "another")], pushed)


class Full:
    """Facts of partitions that have a definition."""

    def definitions(self, partition: int) -> KnownDefinitions:
        return KnownDefinitions(10**9, {b"one"})

    def producer(self, partition: int, producer_id: str) -> None:
        return None


def test_a_request_is_cut_by_what_it_says() -> None:
    """Every delta is in one part, in order; parts are bounded in deltas and bytes; invalid deltas are cut as well."""
    rng = random.Random(1)
    texts = ["", "x" * 5_000, "é" * 3_000, "\ud800"]
    large = [delta("t" * keyed.CHUNK_BYTES_MAX)] * 2
    deltas = large + [delta(rng.choice([1, 2**8_000, "t" * 60_000]), a=rng.choice(texts)) for _ in range(500)] + large
    deltas += [RawDelta(3, "sum", None, 1), RawDelta("v", "sum", {"a": 5}, 1)]  # type: ignore[arg-type,dict-item]
    deltas += [delta(1)] * 11_000
    parts = [*keyed.chunks(deltas)]
    assert [i for part in parts for i in part] == [*range(len(deltas))]
    assert all(parts)
    assert 1_000 < max(map(len, parts)) < GROUP_COUNT_MAX
    for part in parts:
        assert sum(map(keyed._size, [deltas[i] for i in part])) <= keyed.CHUNK_BYTES_MAX or len(part) == 1
    assert [*keyed.chunks([])] == []


def test_a_request_is_the_same_in_every_version() -> None:
    """Golden: the parts of requests, and the producers and partitions of their batches. Change `KEY_PREFIX` with them."""
    texts = ["", "a" * 300, "é" * 200, "x" * 70_000]
    deltas = [
        RawDelta(f"view_{i % 7}", "sum" if i % 3 else "last", {"region": texts[i % 4], "n": str(i)}, value)
        for i, value in enumerate([1, 2**8_000, -1.5, "t" * 40_000, "é" * 9_000, True, None] * 40)
    ]
    deltas += [RawDelta(3, "sum", None, 1), RawDelta("v", "sum", {"a": 5}, 1)]  # type: ignore[arg-type,dict-item]
    deltas += [delta(1)] * 4_000
    ends = [part.stop for part in keyed.chunks(deltas)]
    assert (len(ends), ends[:8], ends[-4:]) == GOLDEN_CUTS
    producer_id = producer_of_request(RequestKey("/v1/deltas", "a key", sha256(b"body").digest()))
    assert producer_id == GOLDEN_PRODUCER
    assert [partition_of_request(producer_id, count) for count in (5, 11, 64, 1_000)] == GOLDEN_PARTITIONS


def test_parts_fit_into_every_log() -> None:
    """The largest deltas make batches well below a megabyte, Kafka's default."""
    log = FaultyLog()
    labels = {f"{'l' * 190}{i}": "é" * 450 for i in range(30)}
    gateway(log).deltas([RawDelta(f"v{i}", "last", labels, "é" * 32_000) for i in range(20)], key())
    assert max(len(value) for attempt in log.attempts for value in attempt) < 600_000
    assert sum(len(group.suffixes) for batch in batches(log.log) for group in batch.groups) == 20


def test_the_key_is_no_secret_but_nobody_can_send_as_it() -> None:
    """A producer id that is made from a key is refused from outside, whatever the secret."""
    log = FaultyLog()
    gate = gateway(log)
    gate.deltas([delta()], key())
    (batch,) = log.attempts[0]
    assert decode_batch(batch).producer_id.startswith("key:")
    with pytest.raises(PipelineError, match="only the server itself"):
        gate.batches([batch], "anything")


@pytest.mark.parametrize("seed", range(6 if LONG else 2))
def test_a_first_try_that_was_cut(seed: int) -> None:
    """A repeat is exact if some batches of the first try are in, others unknown, and the server's definition differs.

    Meanwhile the topic grows. Some repeats come at once, to several servers.
    """
    rng = random.Random(seed)
    faults: list[PipelineError | str] = [*["kept"] * 6, "unheard", AWAY]
    log = FaultyLog(lambda n, batch: rng.choice(faults))
    log.partition_total = 1
    known = [{}, {"v": Definition("v", "sum", ("b", "c"), monotone=True)}, {"v": Definition("v", "max")}]
    done = False
    while not done:
        try:
            gateway(log, rng.choice(known), batch_bytes_max=rng.choice([1_024, 524_288])).deltas(MANY, key())
            done = True
        except Unavailable:
            log.partition_total = min(4, log.partition_total + 1)
    log.fate = lambda n, batch: "kept"
    in_threads(6, lambda i: gateway(log).deltas(MANY, key()))
    views = fold(log.log)
    assert len(batches(log.log)) > 1
    assert (views.total("v"), views.dead) == (len(MANY), [])
    assert views.duplicates >= 6 * len([*keyed.chunks(MANY)])


def test_metrics_that_are_pushed_twice() -> None:
    """A push counts once also when the second server knows other labels of the view, or has refused a sample."""
    log, pushed = FaultyLog(), key(path="/v1/openmetrics")
    deltas = [delta(1, "m", a="1"), delta("text", "m"), delta(2, "m", b="1", c="")]
    deltas += [delta(1, "m", a=str(i)) for i in range(5_000)]
    more = tuple(f"label_{i:02}_of_another_app" for i in range(20))
    gateway(log).fitting([delta(100, "m", zone="1", rack="2", host="3")])
    servers: list[dict[str, Definition]] = [
        {},
        {"m": Definition("m", "sum", ("z",))},
        {"m": Definition("m", "max", ("y",))},
        {"m": Definition("m", "sum", more)},
    ]
    for known in servers:
        _, refused = gateway(log, known).fitting(deltas, pushed)
        assert [it.line for it in refused] == [1]
    views = fold(log.log)
    assert views.total("m") == 5_103
    assert views.duplicates == 3 * len([*keyed.chunks(deltas)]) > 3


@pytest.mark.parametrize("what", ["deltas", "controls"])
def test_it_does_not_settle_what_others_have_under_way(what: str) -> None:
    """A batch without a key stays unsettled until it is in the log, whatever is sent with a key under the same sequence."""
    log = FaultyLog(partitions=1)
    gate = gateway(log)
    held, go_on, append = threading.Event(), threading.Event(), log.append

    def slow(messages: Any, *, timeout_s: float) -> Any:
        if threading.current_thread().name == "slow":
            held.set()
            assert go_on.wait(20)
        return append(messages, timeout_s=timeout_s)

    log.append = slow  # type: ignore[method-assign]
    thread = threading.Thread(target=gate.deltas, args=([delta(1, a="x")],), name="slow")
    thread.start()
    assert held.wait(20)
    if what == "deltas":
        gate.deltas([delta(10, "other", a="x")], key())
    else:
        gate.controls([Control("reset", "other", "", None)], key())
    gate.deltas([delta(100, a="x")])
    go_on.set()
    thread.join(20)
    assert fold(log.log).total("v") == 101


def test_requests_spread_over_the_first_partitions() -> None:
    """Requests go to the first `idempotent_partitions` partitions; until there are so many, nothing is taken."""
    log = FaultyLog()
    for number in range(60):
        gateway(log, idempotent_partitions=3).deltas([delta()], key(str(number)))
    assert {batch.partition for batch in batches(log.log)} == {0, 1, 2}
    log.partition_total = 1
    elsewhere = next(n for n in range(60) if partition_of_request(producer_of_request(key(str(n))), 3))
    with pytest.raises(Unavailable, match="idempotent_partitions goes beyond the 1 partitions"):
        gateway(log, idempotent_partitions=3).deltas([delta()], key(str(elsewhere)))
    assert fold(log.log).total("v") == 60
