"""Requests over HTTP: all or nothing, with errors that say which delta or batch is wrong."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

import pipeline.metrics as m
import pipeline.publisher.batching as sealing
from pipeline.core.codec import encode_batch, encode_drafted
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_suffix
from pipeline.core.token import Token
from pipeline.errors import BadRecord, Invalid, PipelineError, Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ports import MESSAGE_BYTES_MAX, Message, RawDelta
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS
from tests.publisher.support import CLOCK, FaultyLog, Meter, batches, fold, hurried_threads, in_threads, publisher, same

SECRET = "of another"
OTHER = producer_id_of(SECRET)
KNOWN = {
    "known": Definition("known", "sum", ("product", "region")),
    "rising": Definition("rising", "sum", monotone=True),
}


def gateway(log: FaultyLog, meter: Meter | None = None, **settings: Any) -> Gateway:
    return Gateway(log, CLOCK, PublisherSettings(**settings), KNOWN.get, meter or Meter())


def delta(value: object = 1, view: str = "v", kind: str = "sum", ts_ms: int | None = None, **labels: str) -> RawDelta:
    return RawDelta(view, kind, labels, value, ts_ms)


def batch(partition: int = 0, sequence: int = 0, value: int = 1, labels: tuple[str, ...] = ("x",)) -> bytes:
    groups = [Group(Definition("b", "sum", ("a",)), [series_suffix(labels)], [value])]
    return encode_batch(Batch(OTHER, 0, partition, sequence, 0, 5, groups))


def test_deltas_are_merged_and_exact() -> None:
    """One request is one batch for each partition; ints beyond 64 bits stay exact; the token covers all of it."""
    log, meter = FaultyLog(), Meter()
    gate = gateway(log, meter)
    rng = random.Random(1)
    expected: Counter[tuple[str, ...]] = Counter()
    deltas = []
    for _ in range(1_000):
        value, label = rng.choice([1, -5, 2**64, -(2**90), 10**400]), str(rng.randrange(50))
        expected[label,] += value
        deltas.append(delta(value, a=label))
    deltas += [delta(float(i), "m", "mean") for i in range(4)] + [delta(i, "lo", "min") for i in (5, -3, 2.5)]
    deltas += [delta("old", "l", "last", ts_ms=5), delta("new", "l", "last", ts_ms=9), delta(None, "l", "last", ts_ms=7)]
    token = gate.deltas(deltas)
    assert len(log.attempts) == 1
    assert len(batches(log.log)) == 4
    assert token == Token(dict.fromkeys(range(4), 1), log.topic_id(DELTAS))
    views = fold(log.log)
    same(views.of("v"), expected)
    assert (views.of("m"), views.of("lo"), views.of("l")) == ({(): 1.5}, {(): -3}, {(): "new"})
    assert meter.of(m.DELTAS_INGESTED) == len(deltas)
    assert gate.deltas([]) == Token({})
    assert gate.batches([], "") == ([], Token())


def test_a_delta_without_a_timestamp_is_of_now() -> None:
    """A delta without a timestamp has the present time, by which `last` values are ordered."""
    log = FaultyLog()
    gate = gateway(log)
    gate.deltas([delta("first", "l", "last", ts_ms=CLOCK.now_ms() - 60_000), delta("second", "l", "last")])
    gate.deltas([delta("future", "l", "last", ts_ms=CLOCK.now_ms() + 60_000)])
    gate.deltas([delta("third", "l", "last")])
    assert fold(log.log).of("l") == {(): "future"}


def test_labels_follow_the_known_definition() -> None:
    """Labels are ordered by the known definition, whatever their order in the request."""
    log = FaultyLog()
    gate = gateway(log)
    gate.deltas([delta(1, "known", product="tea", region="eu"), delta(2, "known", region="eu", product="tea")])
    gate.deltas([delta(1, "new", b="2", a="1"), delta(2, "new", a="1", b="2")])
    views = fold(log.log)
    assert views.of("known") == {("tea", "eu"): 3}
    assert views.of("new") == {("1", "2"): 3}
    assert not views.dead


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (delta(float("nan")), "finite"),
        (delta(float("inf")), "finite"),
        (delta("1"), "number"),
        (delta(None), "number"),
        (delta([1]), "number"),
        (delta(2**9_000), "int of"),
        (delta(1, kind="median"), "unknown kind"),
        (delta(1, kind=None), "text"),  # type: ignore[arg-type]
        (delta(1, view=""), "view name"),
        (delta(1, view="a b"), "view name"),
        (delta(1, view=None), "text"),  # type: ignore[arg-type]
        (delta(1, view=["v"]), "text"),  # type: ignore[arg-type]
        (delta(1, "new", **{"a b": "x"}), "label name"),
        (delta(1, "new", a=5), "text expected, got int"),  # type: ignore[arg-type]
        (delta(1, "new", a=["x"]), "text expected"),  # type: ignore[arg-type]
        (delta(1, "new", a="x" * 2**20), "at most"),
        (delta(1, "new", a="\ud800"), "surrogate"),
        (RawDelta("new", "sum", ["a"], 1), "labels"),  # type: ignore[arg-type]
        (RawDelta("new", "sum", None, 1), "labels"),  # type: ignore[arg-type]
        (RawDelta("new", "sum", {1: "a"}, 1), "labels"),  # type: ignore[dict-item]
        (delta(1, "new", **{f"l{i}": "x" for i in range(40)}), "labels; at most"),
        (delta(1, "l", "last", ts_ms=-1), "ts_ms"),
        (delta(1, "l", "last", ts_ms="now"), "ts_ms"),  # type: ignore[arg-type]
        (RawDelta("new", "sum", {}, 1, None, "60"), "window_s"),  # type: ignore[arg-type]
        (delta(1, "l", "last", ts_ms=2**53), "ms ahead of now"),
        (delta(1, "l", "last", ts_ms=CLOCK.now_ms() + 40_000_000), "at most 3600000"),
        (RawDelta("new", "max", {}, 1, monotone=True), "a max cannot be monotone"),
        (RawDelta("new", "sum", {}, 1, monotone="yes"), "monotone is true or false"),  # type: ignore[arg-type]
        (RawDelta("new", "sum", {}, -1, monotone=True), "no negative number"),
        (RawDelta("rising", "sum", {}, -0.5), "no negative number"),
    ],
)
def test_one_bad_delta_refuses_all_and_is_named(bad: RawDelta, says: str) -> None:
    """One bad delta is `Invalid` with its number, and nothing is appended."""
    log = FaultyLog()
    gate = gateway(log)
    with pytest.raises(Invalid, match=says) as caught:
        gate.deltas([delta(1, "good", a="x"), delta(2, "good", a="y"), bad])
    assert str(caught.value).startswith("delta 2: ")
    assert len(str(caught.value)) < 600
    assert not log.attempts


def test_a_view_that_is_known_as_monotone_need_not_be_called_so() -> None:
    """A view is monotone by an earlier definition, request or delta; a new one by its own flag."""
    log = FaultyLog()
    gate = gateway(log)
    gate.deltas([delta(1, "rising"), RawDelta("new", "sum", {}, 2, monotone=True), delta(3, "new"), delta(-4, "plain")])
    gate.deltas([delta(5, "new"), RawDelta("rising", "sum", {}, 6, monotone=True)])
    gate.deltas([RawDelta("plain", "sum", {}, -1, monotone=False)])
    with pytest.raises(Invalid, match="no negative number"):
        gate.deltas([delta(-1, "new")])
    views = fold(log.log)
    assert [views.of(view) for view in ("rising", "new", "plain")] == [{(): 7}, {(): 10}, {(): -5}]
    definitions = {group.definition for batch in batches(log.log) for group in batch.groups}
    assert {d.view: d.monotone for d in definitions} == {"rising": True, "new": True, "plain": False}


def test_a_negative_batch_of_a_monotone_view_is_refused() -> None:
    """A negative batch is refused at the door, and nothing of the request is appended."""
    log = FaultyLog()
    bad = encode_batch(Batch(OTHER, 0, 0, 0, 0, 5, [Group(KNOWN["rising"], [series_suffix(())], [-1])]))
    with pytest.raises(BadRecord, match=r"batch 1: .*monotone"):
        gateway(log).batches([batch(), bad], SECRET)
    assert not log.attempts


def test_failed_appends_do_no_harm() -> None:
    """Failed appends use up sequences, which the floor passes: nothing piles up, and later requests are folded."""
    rng = random.Random(3)
    log = FaultyLog(lambda n, batch: rng.choice(["kept", Unavailable("away"), "unheard"]), partitions=1)
    gate = gateway(log)
    low = high = 0
    for _ in range(300):
        high += 1
        try:
            gate.deltas([delta(1)])
            low += 1
        except Unavailable:
            continue
    assert len(gate._outbox) == gate._outbox.bytes_total == 0
    assert 0 < low < high
    views = fold(log.log)
    assert low <= views.of("v")[()] <= high
    assert views.of("v")[()] == len(batches(log.log))
    assert not views.dead
    assert batches(log.log)[-1].floor == batches(log.log)[-1].sequence


def test_a_request_in_several_batches_that_fails_in_part_is_unsure() -> None:
    """A partial failure is `Unavailable`: some of the request may be in."""
    log = FaultyLog()
    log.fate = lambda n, batch: Invalid("too large") if batch.partition == 0 else "kept"
    gate = gateway(log)
    deltas = [delta(1, a=str(i)) for i in range(50)]
    with pytest.raises(Unavailable, match="1 of 4 batches"):
        gate.deltas(deltas)
    log.fate = lambda n, batch: Invalid("too large")
    with pytest.raises(Invalid, match="too large"):
        gate.deltas(deltas)
    log.away = True
    with pytest.raises(Unavailable):
        gate.deltas(deltas)
    assert len(gate._outbox) == 0


def test_what_cannot_be_encoded_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The outbox is empty after the failure, and the next request is folded."""
    log = FaultyLog()
    gate = gateway(log)

    def broken(value: Batch, groups: bytes) -> bytes:
        if value.partition == 2:
            raise RuntimeError("cannot")
        return encode_drafted(value, groups)

    monkeypatch.setattr(sealing, "encode_drafted", broken)
    deltas = [delta(1, a=str(i)) for i in range(50)]
    with pytest.raises(RuntimeError):
        gate.deltas(deltas)
    monkeypatch.undo()
    assert not log.attempts
    assert len(gate._outbox) == 0
    gate.deltas(deltas)
    assert fold(log.log).total("v") == 50


def test_requests_at_once_are_exact() -> None:
    """Threads share one producer; each request is folded once."""
    log = FaultyLog()
    meter = Meter()
    gate = gateway(log, meter)

    def work(i: int) -> None:
        for n in range(60):
            gate.deltas([delta(1, a=str(n % 7)), delta(i, "m", "max"), delta(2**70, "big")])

    with hurried_threads():
        in_threads(8, work)
    views = fold(log.log)
    assert views.total("v") == 480
    assert views.of("m") == {(): 7}
    assert views.of("big") == {(): 480 * 2**70}
    assert views.duplicates == 0
    assert not views.dead
    assert meter.of(m.DELTAS_INGESTED) == 480 * 3


# Batches


def test_batches_are_taken_as_they_are() -> None:
    """The bytes of batches are in the log unchanged and in order, and each gets the offset behind it."""
    log, meter = FaultyLog(), Meter()
    sent = [batch(0, 0), batch(1, 0), batch(0, 1), batch(0, 0)]
    next_offsets, token = gateway(log, meter).batches(sent, SECRET)
    assert next_offsets == [1, 1, 2, 3]
    assert token.topic_id == log.topic_id(DELTAS)
    assert token.next_offsets == {0: 3, 1: 1}
    assert log.attempts == [sent]
    views = fold(log.log)
    assert views.of("b") == {("x",): 3}
    assert views.duplicates == 1
    assert meter.of(m.BATCHES_INGESTED) == 4


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (b"", "version"),
        (b"\x01" + batch()[1:], "version"),
        (batch()[:20] + b"\x00" + batch()[21:], "checksum"),
        (batch()[:-1], "checksum"),
        (batch() + b"\x00", "checksum"),
        (bytes(200), "version"),
        (batch(labels=("x", "y")), "label values"),
        (batch(labels=("x" * 5_000,)), "over 4096 bytes"),
    ],
)
def test_one_bad_batch_refuses_all_and_is_named(bad: bytes, says: str) -> None:
    """One bad batch is `BadRecord` with its number, and nothing is appended."""
    log = FaultyLog()
    with pytest.raises(BadRecord, match=says) as caught:
        gateway(log).batches([batch(0, 0), bad, batch(0, 1)], SECRET)
    assert str(caught.value).startswith("batch 1: ")
    assert not log.attempts


def test_a_partition_that_is_not_known_yet() -> None:
    """A partition that the gateway does not know yet is `Unavailable`, and nothing is appended."""
    faulty = FaultyLog()
    with pytest.raises(Unavailable, match="batch 1: there is no partition 4 yet, of 4"):
        gateway(faulty).batches([batch(0, 0), batch(partition=4)], SECRET)
    assert not faulty.attempts


def test_batches_that_are_not_acknowledged_are_sent_again_by_their_publisher() -> None:
    """Batches are `Unavailable` if any may be tried again; `BadRecord` if the log will never take one."""
    log = FaultyLog()
    gate = gateway(log)
    sent = [batch(0, 0), batch(1, 0)]
    log.fate = lambda n, batch: Unavailable("away") if batch.partition else "kept"
    with pytest.raises(Unavailable, match="1 of 2 batches"):
        gate.batches(sent, SECRET)
    log.fate = lambda n, batch: Invalid("too large") if batch.partition else "kept"
    with pytest.raises(BadRecord, match="batch 1: too large"):
        gate.batches(sent, SECRET)
    log.fate = lambda n, batch: "kept"
    assert gate.batches(sent, SECRET)[0] == [3, 1]
    assert fold(log.log).of("b") == {("x",): 2}


def test_a_publisher_behind_a_gateway_is_exact() -> None:
    """A publisher whose log is a gateway loses nothing through failures, and a batch the log refuses costs itself only."""
    rng = random.Random(7)
    log = FaultyLog(lambda n, batch: rng.choice(["kept", "kept", "unheard", Unavailable("away")]))
    gate = gateway(log)

    class Wire:
        secret = ""

        def introduce(self, secret: str) -> None:
            self.secret = secret

        def dismiss(self, secret: str) -> None:
            """Do nothing: there is only one producer."""

        def message_bytes_max(self, topic: str) -> int:
            return MESSAGE_BYTES_MAX

        def partition_count(self, topic: str) -> int:
            return 4

        def topic_id(self, topic: str) -> str:
            return log.topic_id(topic)

        def high_watermarks(self, topic: str) -> Mapping[int, int]:
            return log.high_watermarks(topic)

        def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
            try:
                return [*gate.batches([message.value or b"" for message in messages], self.secret)[0]]
            except PipelineError as error:
                return [error] * len(messages)

        def close(self) -> None:
            pass

    with publisher(Wire(), flush_interval_ms=1) as pub:
        view = pub.sum("v", labels=("a",))
        for i in range(500):
            view.add(1, a=str(i % 11))
            if i % 50 == 0:
                pub.flush(20)
    views = fold(log.log)
    assert views.total("v") == 500
    assert views.duplicates > 0
    assert not views.dead


# What fits


def test_what_fits_is_taken_and_the_rest_is_told() -> None:
    """Refused deltas are named by index and reason; a delta may lack labels of its view, and an empty label is none."""
    log, meter = FaultyLog(), Meter()
    gate = gateway(log, meter)
    deltas = [
        delta(1, "known", region="eu"),
        delta(2, "known", product="tea", other=""),
        delta(8, "known", "max"),
        delta(float("nan"), "known"),
        delta(-1, "rising"),
        delta(1, "a b"),
        delta(1, region="x" * 5_000),
    ]
    token, refused = gate.fitting(deltas)
    assert [(it.line, it.reason) for it in refused] == [
        (3, "value"), (4, "value"), (5, "view"), (6, "labels"),
    ]  # fmt: skip
    assert all(it.detail for it in refused)
    assert token.next_offsets
    assert {labels: value for labels, value in fold(log.log).of("known").items() if labels} == {
        ("", "eu"): 1, ("tea", ""): 2,
    }  # fmt: skip
    assert meter.of(m.DELTAS_INGESTED) == 3
    assert gate.fitting([]) == (Token({}), [])
