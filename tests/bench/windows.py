"""Cost of windows in the worker: folding deltas of windows, and deleting expired windows, beside folding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from zlib import crc32

from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, series_prefix, series_suffix
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.bench import data, table
from tests.bench.measure import Figure, Row, at_least_times, cpu_seconds
from tests.bench.windowed import record_windows
from tests.bench.worker import House, embedded

_UNIT = "entries per CPU s"
_WINDOW_MS = 60_000
_WINDOWS = 10
WINDOWED = Definition("sales_by_minute", "sum", ("product", "region"), window_s=60)
EXPIRING = Definition("sales_by_minute", "sum", ("product", "region"), window_s=60, retention_s=3_600)


def batches(
    rows: Sequence[tuple[int, int]], definition: Definition, partition_count: int, created_at_ms: int
) -> Iterator[bytes]:
    """Return batches of one delta for each row, which is the number of its labels and the start of its window."""
    prefix = series_prefix(definition)
    groups = [Group(definition, [], []) for _ in range(partition_count)]
    for i, start_ms in rows:
        suffix = series_suffix(data.labels(i), start_ms)
        group = groups[crc32(prefix + suffix) % partition_count]
        group.suffixes.append(suffix)
        group.states.append(data.value(i))
    for partition, group in enumerate(groups):
        for n, start in enumerate(range(0, len(group.suffixes), data.BATCH_ENTRIES)):
            end = start + data.BATCH_ENTRIES
            part = Group(definition, group.suffixes[start:end], group.states[start:end])
            producer_id = f"windows-{definition.retention_s}-{created_at_ms}"
            yield encode_batch(Batch(producer_id, 0, partition, n, n, created_at_ms, [part]))


def _publish(house: House, rows: Sequence[tuple[int, int]], definition: Definition, created_at_ms: int) -> None:
    for value in batches(rows, definition, house.partition_count, created_at_ms):
        (result,) = house.log.append([Message(DELTAS, int.from_bytes(value[5:9], "big"), None, value)], timeout_s=10)
        assert isinstance(result, int), result
    house.settle()


def fold_windows(quick: bool) -> list[Row]:
    """Fold deltas of windows, as many series as without windows: each new, and each ten times."""
    count = 20_000 if quick else 1_000_000
    rows = []
    for name, times in (("unique series", 1), ("each series ten times", 10)):
        labels = count // times // _WINDOWS
        rng, deltas = random.Random(1), []
        for _ in range(times):
            some = [(i, w * _WINDOW_MS) for i in range(labels) for w in range(_WINDOWS)]
            rng.shuffle(some)
            deltas += some
        with embedded() as made:
            _publish(made, deltas, WINDOWED, 0)
            seconds = cpu_seconds(made.work)
        with embedded() as made:
            made.publish(count, count // times)
            bare = cpu_seconds(made.work)
        rows.append(
            at_least_times(
                f"worker, windows, {name}",
                Figure(count / seconds, _UNIT),
                Figure(count / bare, _UNIT, "the same number of series without windows"),
                0.7,
            )
        )
    return rows


def expire(quick: bool) -> list[Row]:
    """Fold deltas of known series while as many entries are due to be deleted; against folding alone."""
    count = 20_000 if quick else 1_000_000
    seconds = {}
    for expires in (True, False):
        with embedded() as made:
            now_ms = made.clock.now_ms()
            start_ms = (now_ms - 7_200_000) // _WINDOW_MS * _WINDOW_MS
            old = [(i, start_ms) for i in range(count)]
            _publish(made, old, EXPIRING if expires else WINDOWED, start_ms)
            present_ms = now_ms // _WINDOW_MS * _WINDOW_MS
            _publish(made, [(i, present_ms) for i in range(count // 10)], WINDOWED, start_ms + 1)
            made.work()
            new = [(i % (count // 10), present_ms) for i in range(count)]
            random.Random(1).shuffle(new)
            _publish(made, new, WINDOWED, now_ms)
            if expires:
                _publish(made, [(0, present_ms)], EXPIRING, now_ms)
            seconds[expires] = cpu_seconds(made.work)
    return [
        at_least_times(
            "worker, while as many entries expire",
            Figure(count / seconds[True], _UNIT),
            Figure(count / seconds[False], _UNIT, "the same without a retention"),
            0.95,
        )
    ]


def windows(quick: bool) -> list[Row]:
    """Run all benchmarks of windows and histograms but those of reading, which are `query`."""
    return [*record_windows(quick), *table.histogram_rows(quick), *fold_windows(quick), *expire(quick)]
