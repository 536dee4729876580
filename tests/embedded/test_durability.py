"""Acknowledged records survive kill -9 at any moment, and no append is ever there in part."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.adapters.rocks import RocksStores
from pipeline.settings import LogSettings
from tests.embedded.children import STORE_KEYS
from tests.embedded.support import Acknowledged, child, kill_after, wait_for_line


@pytest.mark.parametrize(("how", "rounds"), [("", 6), ("fsync", 2)])
def test_the_log_survives_kill_9(tmp_path: Path, how: str, rounds: int) -> None:
    """In each round every acknowledged record is there under its offset, every transaction whole or not at all."""
    rng = random.Random(5)
    acknowledged = Acknowledged()
    count = 0
    for _ in range(rounds):
        with child("append", tmp_path / "log", how, rng.choice((10, 2_000))) as process:
            wait_for_line(process, "ready")
            count += acknowledged.note(kill_after(process, rng.uniform(0, 0.25)))
        acknowledged.check(tmp_path / "log")
    assert count > 20 * rounds, "they were killed before they did anything"


@pytest.mark.long
def test_a_store_survives_kill_9_as_it_once_was(tmp_path: Path) -> None:
    """A store may lose its newest writes, but only whole ones, and does not lose everything for ever."""
    rng = random.Random(6)
    kept = []
    for _ in range(5):
        with child("store", tmp_path, 0) as process:
            wait_for_line(process, "ready")
            said = kill_after(process, rng.uniform(0.05, 0.3))
        written = [int(line.split()[1]) for line in said if line.startswith("W") and line.endswith("\n")]
        stores = RocksStores(tmp_path, LogSettings())
        store = stores.open(0)
        values = set(store.get(STORE_KEYS))
        assert len(values) == 1, "a part of a write is there"
        assert {value for _, value in store.scan(b"", b"\xff")} == values - {None}
        (value,) = values
        kept.append(int(value or b"0"))
        assert kept[-1] <= max(written, default=0) + 1
        stores.close()
    assert kept == sorted(kept)
    assert kept[-1] > 0, "nothing was ever kept: the test tests nothing"
