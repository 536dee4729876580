"""From merged deltas to batches: routed, cut to size, within what the codec reads, each series once."""

import random
from typing import Any
from zlib import crc32

import pytest

import pipeline.publisher.batching as sealing
from pipeline.core.codec import GROUP_COUNT_MAX, decode_batch, encode_drafted
from pipeline.core.kinds import KINDS
from pipeline.core.record import Batch, Definition, series_prefix, series_suffix
from pipeline.core.sequence import Outbox, Sealed
from pipeline.publisher.batching import Pending, seal
from tests.producer.support import FaultyLog, batches, fold, publisher

TEXTS = ["", "x", "ü" * 31, "x" * 200, "🎉" * 300, "x" * 5_000]
STATES: dict[str, list[Any]] = {
    "sum": [0, -1, 2.5, 2**63, -(2**300), 2**8_000, 1e308],
    "min": [0, 2.5, 2**64],
    "max": [-(2**70), 5e-324],
    "mean": [(2.5, 1), (2**40, 2**40), (-1, 2**64)],
    "last": [(2**53, 2**63 - 1, text) for text in TEXTS] + [(0, 0, None), (1, 1, True), (2, 1, 2**2_000), (3, 1, 1.5)],
}


def merged(view: Definition, labels: tuple[str, ...], state: Any) -> Pending:
    return Pending(view, series_suffix(labels), state)


def some_merged(rng: random.Random, count: int) -> list[Pending]:
    out = {}
    for _ in range(count):
        kind = rng.choice([*STATES])
        names = tuple(f"label_{i}" for i in range(rng.randrange(4)))
        view = Definition(f"{kind}_{len(names)}_{rng.randrange(5)}", kind, names)
        item = merged(view, tuple(rng.choice([*TEXTS[:5], str(rng.random())]) for _ in names), rng.choice(STATES[kind]))
        out[item.definition, item.suffix] = item  # each series once
    return [*out.values()]


def sealed_from(items: list[Pending], outbox: Outbox | None = None, **kwargs: Any) -> list[Sealed]:
    settings = {"partition_count": 3, "batch_bytes_max": 4_096, "now_ms": 7}
    outbox = Outbox("p", 0) if outbox is None else outbox
    return seal(items, outbox, **{**settings, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_everything_within_their_size(seed: int) -> None:
    """Decoded again they merge to what went in; none is over the limit, but one of a single series; few are half empty."""
    rng = random.Random(seed)
    items = some_merged(rng, 300)
    limit = rng.choice([1_024, 4_096, 50_000])
    outbox = Outbox("p" * 32, 0)
    found = sealed_from(items, outbox, batch_bytes_max=limit)
    states: dict[tuple[str, bytes], Any] = {}
    for item in items:
        key = item.definition.view, item.suffix
        kind = KINDS[item.definition.kind]
        states[key] = kind.merge(states[key], item.state) if key in states else item.state
    folded: dict[tuple[str, bytes], Any] = {}
    for sealed in found:
        batch = decode_batch(sealed.value)
        assert len(sealed.value) <= limit or sealed.entry_count == 1
        assert (batch.partition, batch.sequence) == (sealed.partition, sealed.sequence)
        assert sealed.entry_count == sum(len(group.suffixes) for group in batch.groups)
        assert len({group.definition for group in batch.groups}) == len(batch.groups)
        for group in batch.groups:
            assert len(set(group.suffixes)) == len(group.suffixes)
            kind = KINDS[group.definition.kind]
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                key = group.definition.view, suffix
                assert crc32(series_prefix(group.definition) + suffix) % 3 == sealed.partition
                folded[key] = kind.merge(folded[key], state) if key in folded else state
    assert {k: pytest.approx(v) if type(v) is float else v for k, v in states.items()} == folded
    for partition in range(3):
        assert [s.sequence for s in found if s.partition == partition] == [*range(outbox.next_sequences().get(partition, 0))]


def test_batches_are_filled() -> None:
    """Small entries fill a batch to more than half of its limit."""
    view = Definition("v", "sum", ("a",))
    found = sealed_from([merged(view, (str(i),), 0.5) for i in range(3_000)], batch_bytes_max=4_096)
    assert len(found) > 10
    full = [sealed for sealed in found if sealed.sequence < 3]
    assert all(len(sealed.value) > 1_500 for sealed in full)


def test_one_large_series_goes_alone() -> None:
    """A series beyond the limit gets a batch to itself, and its neighbours keep to theirs."""
    view = Definition("v", "last", ("a",))
    items = [merged(view, (str(i),), (1, 1, "x" * (60_000 if i == 5 else 10))) for i in range(10)]
    found = sealed_from(items, partition_count=1, batch_bytes_max=1_024)
    large = [sealed for sealed in found if len(sealed.value) > 1_024]
    assert [sealed.entry_count for sealed in large] == [1]
    assert sum(sealed.entry_count for sealed in found) == 10


def test_a_batch_has_no_more_views_than_the_codec_reads() -> None:
    """However large a batch may be, it is cut where a task would refuse it."""
    count = GROUP_COUNT_MAX + 5
    items = [merged(Definition(f"v{i}", "sum"), (), 1) for i in range(count)]
    found = sealed_from(items, partition_count=1, batch_bytes_max=16_777_216)
    decoded = [decode_batch(sealed.value) for sealed in found]
    assert [len(batch.groups) for batch in decoded] == [GROUP_COUNT_MAX, 5]


def test_a_publisher_keeps_to_batch_bytes_max() -> None:
    """From recording to the log."""
    log = FaultyLog()
    with publisher(log, flush_interval_ms=3_600_000, batch_bytes_max=2_048) as pub:
        view = pub.last("v", labels=("a", "b"))
        for i in range(300):
            view.set("ü" * (i % 300), 1, a=str(i), b="x" * (i % 50))
    assert max(len(value) for attempt in log.attempts for value in attempt) <= 2_048
    assert len(batches(log.log)) > 50
    views = fold(log.log)
    assert len(views.answers) == 300
    assert not views.dead


def test_a_failure_in_the_middle_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stays in the outbox, and the next try uses the same numbers."""

    def broken(batch: Batch, groups: bytes) -> bytes:
        if batch.partition == 1:
            raise RuntimeError("cannot")
        return encode_drafted(batch, groups)

    monkeypatch.setattr(sealing, "encode_drafted", broken)
    view = Definition("v", "sum", ("a",))
    items = [merged(view, (str(i),), 1) for i in range(30)]
    outbox = Outbox("p", 0)
    with pytest.raises(RuntimeError):
        sealed_from(items, outbox)
    assert (len(outbox), outbox.bytes_total) == (0, 0)
