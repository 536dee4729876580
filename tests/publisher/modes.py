"""The durabilities of a publisher, with the settings for each: a law that holds for one holds for all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.adapters.clock import SystemClock
from pipeline.ports import LogWriter
from pipeline.publisher.rescue import drain
from pipeline.publisher.spool.orphan import inspect
from pipeline.settings import PublisherSettings
from tests.publisher.support import FileLog, Views, fold

SPOOL = "a folder of the test's own"

MODES: Mapping[str, Mapping[str, Any]] = {
    "memory": {},
    "process": {"durability": "process", "spool_dir": SPOOL},
}
"""Settings by mode; a value of `SPOOL` stands for a folder of the test's own."""


def settings_of(mode: str, folder: Path) -> dict[str, Any]:
    """Return the keywords for a `Publisher` of this mode, whose spool, if it has one, is in `folder`."""
    return {name: str(folder / "spool") if value == SPOOL else value for name, value in MODES[mode].items()}


def send_spools(folder: Path, writer: LogWriter) -> None:
    """Send everything that processes which are gone have left in their spools, if any."""
    if folder.exists():
        [*drain(folder, writer, SystemClock(), PublisherSettings(), timeout_s=30)]


def kept_count(folder: Path) -> int:
    """Return the number of unacknowledged batches in the spools of a folder."""
    return sum(slot.batch_count for slot in inspect(folder))


def all_sent(path: Path) -> Views:
    """Return the totals of the `FileLog` at `path`, once everything in a spool beside it was sent without an error."""
    if (folder := path.parent / "spool").exists():
        for slot in drain(folder, FileLog(path), SystemClock(), PublisherSettings(), timeout_s=30):
            wrong = slot.error, slot.live, slot.report.bad_count, slot.report.corrupt
            assert not any(wrong), slot
        assert inspect(folder) == []
    found = fold(FileLog(path).read())
    assert not found.dead
    return found
