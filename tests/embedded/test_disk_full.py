"""A full disk: a clear error, no acknowledged record is lost, none is there in part, and it goes on once there is room."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.adapters.datadir import DataDir
from pipeline.adapters.rocks import RocksStores
from pipeline.errors import NoSpace
from pipeline.settings import LogSettings
from tests.contracts.support import append, read
from tests.embedded.children import STORE_KEYS, open_log
from tests.embedded.support import Acknowledged, run_child


def check_said(said: list[str], reason: str, error: str = "Unavailable") -> Acknowledged:
    """Check the output of a child whose disk filled up: everything acknowledged is safe."""
    *acknowledgements, failed, again, readable = said[1:]
    assert failed.startswith(f"failed {error} log ")
    assert reason in failed
    assert failed.endswith("; restart to go on")
    assert again.startswith(f"again {error}")
    acknowledged = Acknowledged()
    assert acknowledged.note([line + "\n" for line in acknowledgements]) == len(acknowledgements) > 10
    # Once a write has failed the log takes no more, but what was acknowledged can still be read.
    assert readable == f"readable {len(acknowledged.values)}"
    return acknowledged


@pytest.mark.parametrize("file_bytes", [300_000, 1_500_000, 777_777])
def test_a_log_that_can_not_grow(tmp_path: Path, file_bytes: int) -> None:
    """The log refuses records if the write-ahead log, or a file of records, can't grow."""
    path = tmp_path / "log"
    check_said(run_child("starved", path, file_bytes, 3_000), "File too large").check(path)
    log = open_log(path)
    end = log.watermarks("events", 0).end_offset
    assert append(log, "events", 0, b"there is room again") == [end + 1]
    assert read(log, "events", 0)[-1].value == b"there is room again"
    log.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(path: Path) -> None:
    """Fill the disk."""
    with suppress(OSError), path.open("wb", buffering=0) as filler:
        while filler.write(bytes(4096)) == 4096:
            pass


def test_a_log_on_a_full_disk(small_disk: Path) -> None:
    """The error names the reason; with more room all acknowledged records are there, and appending goes on."""
    path = small_disk / "log"
    acknowledged = check_said(run_child("append", path, "", 3_000), "No space left on device", "NoSpace")
    fill(small_disk / "filler")
    with pytest.raises(NoSpace, match="No space left on device"):
        DataDir(small_disk / "data")
    with pytest.raises(NoSpace, match="No space left on device"):
        open_log(path)
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    acknowledged.check(path)
    log = open_log(path)
    append(log, "events", 0, b"there is room again")
    log.close()


def test_a_store_that_can_not_grow(tmp_path: Path) -> None:
    """A store that can not grow is Unavailable; after that it is in an earlier state, and can be written."""
    said = run_child("store", tmp_path, 100_000)
    assert said[-1].startswith("failed Unavailable store ")
    stores = RocksStores(tmp_path, LogSettings())
    store = stores.open(0)
    values = set(store.get(STORE_KEYS))
    assert len(values) == 1
    assert int(values.pop() or b"0") <= len(said)
    store.write([b"k"], [b"v"])
    stores.close()


def test_stores_that_can_not_be_made_durable(tmp_path: Path) -> None:
    """Closing such stores fails; the others are closed all the same, and one that is destroyed need not be closed first."""
    failed, closed = run_child("close_store", tmp_path)
    assert failed.startswith("failed Unavailable store ")
    assert closed == "closed all"
    stores = RocksStores(tmp_path, LogSettings())
    assert [stores.open(partition).get([b"k"]) for partition in range(3)] == [[None], [None], [b"v"]]
    assert stores.open(3).get(STORE_KEYS[:1]) == [None]
    stores.close()
