"""Progress of any number of restores on standard error."""

from __future__ import annotations

import pytest
from rich.console import Console

from pipeline.cli import console
from pipeline.cli.bars import RestoreBars
from pipeline.worker.restore import RestoreProgress


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("closed", ["done", "closed", "both"])
def test_a_partition_is_restored_again(monkeypatch: pytest.MonkeyPatch, closed: str, *, terminal: bool) -> None:
    """A partition has a bar again after its first restore was done, or the bars were closed in the midst of it."""
    shown = Console(force_terminal=terminal, record=True, quiet=False, width=200)
    monkeypatch.setattr(console, "err", shown)
    bars = RestoreBars()
    for _ in range(3):
        for number in (0, 1):
            bars(RestoreProgress(number, 10, 90, 0.1))
        for number in (1, 0) if closed != "closed" else ():
            bars(RestoreProgress(number, 100, 0, 1.0, done=True))
        if closed != "done":
            bars.close()
    assert bars._progress is None
    text = shown.export_text()
    assert text.count("restored partition 0: 100 entries") == (0 if closed == "closed" else 3)


def test_a_traceback_has_no_values(capsys: pytest.CaptureFixture[str]) -> None:
    """A logged error shows its place, and no values of local variables, which may be secret."""
    import logging

    root = logging.getLogger()
    before = root.level, root.handlers[:]
    try:
        console.configure_logging("error")
        _fail("".join(("hunt", "er2")))
    finally:
        root.level, root.handlers[:] = before
    said = capsys.readouterr().err
    assert "ZeroDivisionError" in said
    assert "hunter2" not in said


def _fail(password: str) -> None:
    import logging

    try:
        1 / len(password[:0])
    except ZeroDivisionError:
        logging.getLogger("pipeline").exception("failed")
