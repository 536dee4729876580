"""Open files of RocksDB: they follow the limit of the process."""

from __future__ import annotations

import re
import resource
from pathlib import Path

import pytest

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.rocks import RocksStores
from pipeline.settings import LogSettings


@pytest.mark.parametrize(("limit", "count", "files"), [(0, 64, 256), (65_536, 16, 256), (1_024, 8, 48), (1_024, 64, 20)])
def test_stores_share_the_files_that_a_process_may_open(
    limit: int, count: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All stores and the log keep within half of `ulimit -n`; where that is too low for RocksDB the log says so."""
    soft = resource.RLIM_INFINITY if limit == 0 else limit
    monkeypatch.setattr(resource, "getrlimit", lambda _: (soft, soft))
    stores = RocksStores(tmp_path / "stores", LogSettings(), count=count)
    stores.open(0)
    stores.close()
    log = EmbeddedLog(tmp_path / "log", topics.load(), LogSettings(), SystemClock())
    log.close()
    of_store, of_log = (
        int(re.findall(r"max_open_files=(-?\d+)", next(folder.glob("OPTIONS-*")).read_text())[0])
        for folder in (tmp_path / "stores" / "0", tmp_path / "log")
    )
    assert of_store == files
    assert of_log == (limit // 16 or -1)
    too_few = f"{count} stores of RocksDB" in caplog.text
    assert too_few == (files == 20)
    assert limit == 0 or too_few or count * of_store + of_log <= limit // 2
