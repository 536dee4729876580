"""Publishers that flood a partition: another one's writes are folded soon all the same."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.adapters.http import HttpLogWriter
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_suffix
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.attack.support import attacked, up_process

SERIES = 10_000
DELAY_S_MAX = 20.0
"""Longest time from write to read on a busy machine; without turns it is as long as the flood, and longer."""


def flood(url: str, secret: str, ends_s: float) -> int:
    """Send requests of 40,000 new series until a time; return the number of batches."""
    writer, producer_id, sequence = HttpLogWriter(url), producer_id_of(secret), 0
    writer.introduce(secret)
    definition = Definition("flood", "sum", ("x",))
    while time.monotonic() < ends_s:
        messages = []
        for _ in range(4):
            suffixes = [series_suffix((f"{secret}-{sequence}-{i}",)) for i in range(SERIES)]
            batch = Batch(
                producer_id, 0, 0, sequence, 0, time.time_ns() // 10**6, [Group(definition, suffixes, [1] * SERIES)]
            )
            messages.append(Message(DELTAS, 0, None, encode_batch(batch)))
            sequence += 1
        while time.monotonic() < ends_s and not all(isinstance(it, int) for it in writer.append(messages, timeout_s=20)):
            time.sleep(0.1)
    writer.close()
    return sequence


@pytest.mark.long
def test_two_flooding_publishers_keep_no_other_waiting(tmp_path: Path) -> None:
    """While two publishers write more than is folded, the delay of a third in the same partition is bounded."""
    with up_process(tmp_path / "data", env={"PIPELINE_PARTITIONS": "1"}) as up:
        with attacked(up) as bystander, ThreadPoolExecutor(2) as threads:
            ends_s = time.monotonic() + 30
            counts = [*threads.map(lambda secret: flood(up.url, secret, ends_s), ("one", "two"))]
        assert min(counts) > 4, counts
        bystander.check(grown_bytes_max=500_000_000, rounds_min=3)
        assert max(bystander.round_s) < DELAY_S_MAX, bystander
