"""Every delta once: from many threads, through the log and the real task, against an independent count."""

import random
import threading
from collections import Counter

import pytest

from pipeline.errors import Unavailable
from tests.producer.support import (
    FaultyLog,
    batches,
    fold,
    hurried_threads,
    in_threads,
    memory_log,
    publisher,
    same,
    wait_until,
)


def test_64_threads_on_1000_shared_series_are_exact() -> None:
    """Threads share handles without locks, and no delta is lost or counted twice."""
    log = memory_log()
    with publisher(log, flush_interval_ms=2) as pub:
        revenue = pub.sum("revenue", labels=("region", "product"))
        cells = [revenue.labels(f"r{i % 10}", f"p{i}") for i in range(1000)]

        def work(i: int) -> None:
            for j in range(2_000):
                cells[(i * 31 + j) % 1000].add(1)

        with hurried_threads():
            in_threads(64, work)
    views = fold(log)
    expected = Counter((f"p{s}", f"r{s % 10}") for i in range(64) for s in [(i * 31 + j) % 1000 for j in range(2_000)])
    same(views.of("revenue"), expected)
    assert views.duplicates == 0
    assert not views.dead


@pytest.mark.parametrize("seed", range(4))
def test_all_kinds_from_many_threads_over_a_bad_log(seed: int) -> None:
    """What threads record, by handle and by label, survives failures before and after the append, in every kind."""
    rng = random.Random(seed)
    faulty = FaultyLog(lambda n, batch: rng.choices(["kept", "unheard", Unavailable("not appended")], [3, 1, 1])[0])
    total: Counter[tuple[str, ...]] = Counter()
    low: dict[tuple[str, ...], int] = {}
    high: dict[tuple[str, ...], int] = {}
    means: dict[tuple[str, ...], list[int]] = {}
    lock = threading.Lock()
    with publisher(faulty, flush_interval_ms=1, series_idle_ms=1) as pub:
        sums, least = pub.sum("s", labels=("a",)), pub.min("lo", labels=("a",))
        most, mean, last = pub.max("hi", labels=("a",)), pub.mean("avg", labels=("a",)), pub.last("l", labels=("a",))

        def work(i: int) -> None:
            mine = random.Random(seed * 100 + i)
            for j in range(400):
                label, value = str(mine.randrange(20)), mine.randint(-1000, 1000)
                key = (label,)
                if mine.random() < 0.5:
                    sums.add(value, a=label)
                else:
                    sums.labels(label).add(value)
                least.observe(value, a=label)
                most.observe(value, a=label)
                mean.observe(value, a=label)
                last.set(f"{label}-{i}-{j}", ts_ms=1_000_000 * (i + 1) + j, a=label)
                with lock:
                    total[key] += value
                    low[key] = min(value, low.get(key, value))
                    high[key] = max(value, high.get(key, value))
                    means.setdefault(key, []).append(value)
                if j % 100 == 99:
                    pub.flush(20)

        in_threads(6, work)
    views = fold(faulty.log)
    same(views.of("s"), total)
    same(views.of("lo"), low)
    same(views.of("hi"), high)
    same(views.of("avg"), {key: sum(values) / len(values) for key, values in means.items()})
    assert {key: text.split("-")[:2] for key, text in views.of("l").items()} == {
        (label,): [label, "5"] for (label,) in total
    }
    assert views.duplicates > 0, "the log was not bad enough"
    assert not views.dead


def test_buffers_of_ended_threads_are_flushed() -> None:
    """Nothing belongs to a thread: what one recorded before it ended is flushed, whether its handle lives or not."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=100_000)
    view = pub.sum("v", labels=("a",))
    kept = []

    def work() -> None:
        kept.append(view.labels("kept"))
        kept[0].add(3)
        view.labels("dropped").add(4)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    pub.flush()
    same(fold(log).of("v"), {("kept",): 3, ("dropped",): 4})
    pub.close()


def test_deltas_of_a_series_merge_before_they_leave() -> None:
    """A hundred thousand deltas of one series are one entry of one batch."""
    log = memory_log()
    with publisher(log, flush_interval_ms=100_000) as pub:
        cell = pub.sum("v").labels()
        for i in range(100_000):
            cell.add(i)
        pub.flush()
        assert pub.stats()["deltas"] == 100_000
        assert pub.stats()["batches"] == pub.stats()["entries"] == 1
    (batch,) = batches(log)
    assert batch.groups[0].states == [sum(range(100_000))]


def test_a_batch_that_is_full_is_sent_early() -> None:
    """New series that fill a batch do not wait for the interval."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=3_600_000, batch_bytes_max=10_000)
    view = pub.sum("v", labels=("a",))
    for i in range(1_000):
        view.labels(f"label value {i}").add(1)
    wait_until(lambda: pub.stats()["entries"] >= 500)
    pub.close()
    assert fold(log).total("v") == 1_000
