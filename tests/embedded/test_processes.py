"""Forks, and processes that end without closing anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.support import read
from tests.embedded.children import open_log
from tests.embedded.support import run_child


@pytest.mark.parametrize("how", ["exit", "close", "use"])
def test_a_forked_child_ends_and_harms_nothing(tmp_path: Path, how: str) -> None:
    """A forked child ends by itself, whatever it tries, even if a lock was held at the fork; its parent works on."""
    said = run_child("fork", tmp_path, how)
    assert said[-2:] == ["child ended 0", "parent fine"]
    if how == "use":
        assert len(said) == 5
        assert all("child Invalid an embedded log can't be used in a forked process" in line for line in said[:3])
    log = open_log(tmp_path / "log")
    assert [row.value for row in read(log, "events", 0)] == [b"before", b"after"]
    log.close()


def test_a_process_may_end_while_the_cleaner_works(tmp_path: Path) -> None:
    """A process that ends while the cleaner works loses nothing, and does not crash for a thread in RocksDB."""
    for _ in range(2):
        assert run_child("leave", tmp_path / "log") == ["left"]
    log = open_log(tmp_path / "log")
    for partition in range(4):
        table = {row.key: row.value for row in read(log, "table", partition)}
        assert table == {b"%d" % at: b"29" for at in range(partition, 2_000, 4)}
    log.close()
