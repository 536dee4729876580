"""The whole way on disk: fold, compact, lose the store, restore: equal, entry by entry."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from pipeline.adapters.rocks import RocksStores
from pipeline.core.record import STORE_META_KEY
from pipeline.topics import CHANGELOG, DELTAS
from tests.contracts.support import DAY_MS, EmbeddedLab, read
from tests.embedded.worker import WORKER_TOPICS, answer, entries, fold_all, new_partition, publish


@pytest.mark.parametrize("seed", range(3))
def test_a_lost_store_comes_back_equal(tmp_path: Path, seed: int) -> None:
    """A lost store is restored equal after any mix of commits, cleaning and restarts, however small the cleaner's passes."""
    rng = random.Random(seed)
    keys_max = rng.choice([1, 20, 100_000])
    lab = EmbeddedLab(tmp_path / "log", topics=WORKER_TOPICS, compaction_keys_max=keys_max)
    stores = RocksStores(tmp_path / "stores", lab.settings)
    partition = new_partition(lab, stores)
    expected: Counter[str] = Counter()
    sequence = 0
    for _ in range(12):
        batches = [
            {f"page-{rng.randrange(80)}": rng.randint(1, 9) for _ in range(rng.randint(1, 20))}
            for _ in range(rng.randint(1, 8))
        ]
        publish(lab.log, sequence, batches)
        sequence += len(batches)
        for batch in batches:
            expected.update(batch)
        lab.clock.at_ms += rng.choice([1, 1_000, DAY_MS // 2])
        fold_all(partition, lab, record_count_max=rng.randint(1, 4))
        assert answer(partition) == expected
        before = entries(partition)
        match rng.choice(["clean", "clean", "lose", "restart"]):
            case "clean":
                lab.clean()
            case "lose":
                partition.close()
                stores.destroy(0)
                partition = new_partition(lab, stores)
            case "restart":
                partition.close()
                stores.close()
                lab.reopen()
                partition = new_partition(lab, stores)
        assert entries(partition) == before
    lab.clean()
    assert len(read(lab.log, CHANGELOG, 0)) < 3 * len(entries(partition)), "nothing was compacted"
    partition.close()
    shutil.rmtree(tmp_path / "stores")
    partition = new_partition(lab, stores)
    assert entries(partition) == before
    assert answer(partition) == expected
    assert partition.task.next_offset == lab.log.watermarks(DELTAS, 0).end_offset
    partition.close()
    lab.embedded.close()


def test_a_store_that_was_left_behind_catches_up(tmp_path: Path) -> None:
    """A copy of an earlier store, as a crash leaves it, is brought to the end through a changelog compacted since."""
    lab = EmbeddedLab(tmp_path / "log", topics=WORKER_TOPICS, compaction_keys_max=7)
    stores = RocksStores(tmp_path / "stores", lab.settings)
    partition = new_partition(lab, stores)
    publish(lab.log, 0, [{f"page-{n}": 1, "all": 1} for n in range(30)])
    fold_all(partition, lab)
    partition.close()
    shutil.copytree(tmp_path / "stores", tmp_path / "earlier")
    partition = new_partition(lab, stores)
    publish(lab.log, 30, [{f"page-{n}": 1, "all": 1} for n in range(20, 60)])
    fold_all(partition, lab)
    expected = entries(partition)
    partition.close()
    lab.clean()
    stores.close()
    shutil.rmtree(tmp_path / "stores")
    (tmp_path / "earlier").rename(tmp_path / "stores")
    earlier = stores.open(0)
    assert {k: v for k, v in earlier.scan(b"", b"\xff\xff") if k != STORE_META_KEY} != expected
    earlier.close()
    partition = new_partition(lab, stores)
    assert entries(partition) == expected
    assert answer(partition)["all"] == 70
    partition.close()
    lab.embedded.close()
