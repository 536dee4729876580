"""Every delta once: from many threads, through the log and the real task, against an independent count."""

import random
import threading
from collections import Counter

import pytest

from pipeline.errors import Unavailable
from tests.producer.support import (
    FaultyLog,
    fold,
    in_threads,
    memory_log,
    publisher,
    same,
    wait_until,
)


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
