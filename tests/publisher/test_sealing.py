"""From merged deltas to batches: routed, cut to size, within what the codec reads, each series once."""

from __future__ import annotations

import random
from typing import Any
from zlib import crc32

import pytest

import pipeline.publisher.batching as sealing
from pipeline.core.codec import GROUP_COUNT_MAX, decode_batch, encode_drafted
from pipeline.core.record import Batch, Definition, series_prefix, series_suffix
from pipeline.core.sequence import Outbox, Sealed
from pipeline.publisher.batching import Pending

TEXTS = ["", "x", "ü" * 31, "x" * 200, "🎉" * 300, "x" * 5_000]
STATES: dict[str, list[Any]] = {
    "sum": [0, -1, 2.5, 2**63, -(2**300), 2**8_000, 1e308],
    "min": [0, 2.5, 2**64],
    "max": [-(2**70), 5e-324],
    "mean": [(2.5, 1), (2**40, 2**40), (-1, 2**64)],
    "last": [(2**53, 2**63 - 1, text) for text in TEXTS] + [(0, 0, None), (1, 1, True), (2, 1, 2**2_000), (3, 1, 1.5)],
}


def some_merged(rng: random.Random, count: int) -> list[Pending]:
    out = {}
    for _ in range(count):
        kind = rng.choice([*STATES])
        names = tuple(f"label_{i}" for i in range(rng.randrange(4)))
        view = Definition(f"{kind}_{len(names)}_{rng.randrange(5)}", kind, names)
        suffix = series_suffix([rng.choice([*TEXTS[:5], str(rng.random())]) for _ in names])
        out[view, suffix] = Pending(view, suffix, rng.choice(STATES[kind]))  # each series once
    return [*out.values()]


def numbered(view: Definition, states: list[Any]) -> list[Pending]:
    """Return a series for each state."""
    return [Pending(view, series_suffix([str(i)]), state) for i, state in enumerate(states)]


def sealed_from(items: list[Pending], outbox: Outbox, **kwargs: Any) -> list[Sealed]:
    drafts = sealing.drafts_of(items, **{"partition_count": 1, "batch_bytes_max": 4_096, **kwargs})
    return sealing.seal(drafts, outbox, now_ms=7)


@pytest.mark.parametrize("seed", range(20))
def test_batches_hold_everything_within_their_size(seed: int) -> None:
    """Decoded batches equal the input; none is over the limit, except one of a single series; small entries fill them."""
    rng = random.Random(seed)
    large = numbered(Definition("large", "last", ("a",)), [(1, 1, "x" * (60_000 if i == 5 else 10)) for i in range(10)])
    small = numbered(Definition("small", "sum", ("a",)), [0.5] * 3_000)
    items = [*some_merged(rng, 300), *large, *small]
    limit = rng.choice([1_024, 4_096, 50_000])
    outbox = Outbox("p" * 32, 0)
    folded: dict[tuple[Definition, bytes], Any] = {}
    sizes = []
    found = sealed_from(items, outbox, batch_bytes_max=limit, partition_count=3)
    for sealed in found:
        batch = decode_batch(sealed.value)
        assert len(sealed.value) <= limit or sealed.entry_count == 1
        assert (batch.partition, batch.sequence) == (sealed.partition, sealed.sequence)
        assert sealed.entry_count == sum(len(group.suffixes) for group in batch.groups)
        assert len({group.definition for group in batch.groups}) == len(batch.groups)
        sizes += [len(sealed.value)] * ({group.definition.view for group in batch.groups} == {"small"})
        for group in batch.groups:
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                assert crc32(series_prefix(group.definition) + suffix) % 3 == sealed.partition
                assert (group.definition, suffix) not in folded
                folded[group.definition, suffix] = state
    assert folded == {(item.definition, item.suffix): item.state for item in items}
    assert len(sizes) - sum(size > limit // 3 for size in sizes) <= 3  # the last of each partition
    for partition in range(3):
        assert [s.sequence for s in found if s.partition == partition] == [*range(outbox.next_sequences()[partition])]


def test_a_batch_has_no_more_views_than_the_codec_reads() -> None:
    """A batch is cut where a task would refuse it, however large it may be."""
    items = [Pending(Definition(f"v{i}", "sum"), series_suffix(()), 1) for i in range(GROUP_COUNT_MAX + 5)]
    found = sealed_from(items, Outbox("p", 0), batch_bytes_max=16_777_216)
    assert [len(decode_batch(sealed.value).groups) for sealed in found] == [GROUP_COUNT_MAX, 5]


def test_a_failure_in_the_middle_is_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failure the outbox is empty, and the next try uses the same numbers."""

    def broken(batch: Batch, groups: bytes) -> bytes:
        if batch.partition == 1:
            raise RuntimeError("cannot")
        return encode_drafted(batch, groups)

    monkeypatch.setattr(sealing, "encode_drafted", broken)
    outbox = Outbox("p", 0)
    with pytest.raises(RuntimeError):
        sealed_from(numbered(Definition("v", "sum", ("a",)), [1] * 30), outbox, partition_count=3)
    assert (len(outbox), outbox.bytes_total) == (0, 0)
