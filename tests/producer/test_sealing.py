"""From merged deltas to batches: routed, cut to size, within what the codec reads, each series once."""

import random
from typing import Any
from zlib import crc32

import pytest

import pipeline.producer.sealing as sealing
from pipeline.core.codec import GROUP_COUNT_MAX, decode_batch, encode_batch
from pipeline.core.merge import KINDS
from pipeline.core.record import Batch, Definition, series_prefix, series_suffix
from pipeline.core.sequence import Outbox, Sealed
from pipeline.producer.sealing import Merged, Refused, long_bytes, runs_of, seal_runs
from tests.producer.support import FaultyLog, batches, fold, publisher

TEXTS = ["", "x", "ü" * 31, "x" * 200, "🎉" * 300, "x" * 5_000]
STATES: dict[str, list[Any]] = {
    "sum": [0, -1, 2.5, 2**63, -(2**300), 2**8_000, 1e308],
    "min": [0, 2.5, 2**64],
    "max": [-(2**70), 5e-324],
    "mean": [(2.5, 1), (2**4_000, 2**40), (-1, 2**64)],
    "last": [(2**53, text) for text in TEXTS] + [(0, None), (1, True), (2, 2**2_000), (3, 1.5)],
}


def merged(view: Definition, labels: tuple[str, ...], state: Any) -> Merged:
    suffix = series_suffix(labels)
    return Merged(view, suffix, crc32(series_prefix(view.view) + suffix), state)


def some_merged(rng: random.Random, count: int) -> list[Merged]:
    out = []
    for _ in range(count):
        kind = rng.choice([*STATES])
        names = tuple(f"label_{i}" for i in range(rng.randrange(4)))
        view = Definition(f"{kind}_{len(names)}_{rng.randrange(5)}", kind, names)
        out.append(merged(view, tuple(rng.choice(TEXTS[:5]) for _ in names), rng.choice(STATES[kind])))
    return out


def sealed_from(items: list[Merged], outbox: Outbox | None = None, **kwargs: Any) -> list[Sealed]:
    settings = {"partition_count": 3, "batch_bytes_max": 4_096, "now_ms": 7}
    outbox = Outbox("p", 0) if outbox is None else outbox
    return seal_runs(runs_of(items), outbox, **{**settings, **kwargs})  # type: ignore[arg-type]


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
                assert crc32(series_prefix(key[0]) + suffix) % 3 == sealed.partition
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
    items = [merged(view, (str(i),), (1, "x" * (60_000 if i == 5 else 10))) for i in range(10)]
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


def test_a_failure_in_the_middle_is_all_or_nothing_or_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a list for refusals nothing stays in the outbox; with one, the others are sealed, and no number is skipped."""

    def broken(batch: Batch) -> bytes:
        if batch.partition == 1:
            raise RuntimeError("cannot")
        return encode_batch(batch)

    monkeypatch.setattr(sealing, "encode_batch", broken)
    view = Definition("v", "sum", ("a",))
    items = [merged(view, (str(i),), 1) for i in range(30)]
    outbox = Outbox("p", 0)
    with pytest.raises(RuntimeError):
        sealed_from(items, outbox)
    assert len(outbox) == 0
    assert outbox.bytes_total == 0
    refused: list[Refused] = []
    found = sealed_from(items, Outbox("p", 0), refused=refused)
    assert {sealed.partition for sealed in found} == {0, 2}
    (loss,) = refused
    lost = [item for run in loss.runs for item in run.merged()]
    assert {item.crc % 3 for item in lost} == {1}
    assert str(loss.error) == "cannot"
    monkeypatch.undo()
    again = sealed_from(lost, Outbox("p", 0))
    assert [(sealed.partition, sealed.sequence) for sealed in again] == [(1, 0)]


def test_long_values_are_those_that_are_charged_by_length() -> None:
    """Numbers and short texts are free; long ones count their bytes in a batch, at most."""
    for value in (None, True, 0, 2**200, 2.5, "x" * 32, (5, "x" * 20), (2.5, 3)):
        assert long_bytes(value) == 0
    for value, size in ((2**800, 101), ("x" * 33, 33), ("ü" * 20, 40), ((2**41, "x" * 100), 106), ((2**800, 1), 102)):
        assert size <= long_bytes(value) <= 2 * size


def test_what_cannot_even_be_refused_is_not_sealed_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that runs out again while a refusal is noted: nothing stays in the outbox, so trying again doubles nothing."""

    def out_of_memory(*_: object) -> bytes:
        raise MemoryError

    def broken(batch: Batch) -> bytes:
        return out_of_memory() if batch.partition == 1 else encode_batch(batch)

    monkeypatch.setattr(sealing, "encode_batch", broken)
    monkeypatch.setattr(sealing._Draft, "runs", out_of_memory)
    outbox = Outbox("p", 0)
    items = [merged(Definition("v", "sum", ("a",)), (str(i),), 1) for i in range(30)]
    with pytest.raises(MemoryError):
        sealed_from(items, outbox, refused=[])
    assert len(outbox) == 0
