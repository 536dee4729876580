"""`pipeline spool`: spools of ended processes are shown, and sent once."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.conftest import Here
from tests.publisher.spool.support import Recorder
from tests.publisher.test_rescue import filled


def test_left_and_live(tmp_path: Path, here: Here) -> None:
    """Each slot has one line, with its unsent deltas; JSON has the same names as Python."""
    spool = filled(tmp_path / "s").spool
    spool.close()
    live = Recorder(tmp_path / "s", "q")
    shown = here("spool", "ls", str(tmp_path / "s"))
    assert shown.returncode == 0
    first, second, last = shown.stdout.splitlines()
    assert first.startswith("p  left  epoch 0  ")
    assert "; 1 batches (1 entries) unacknowledged; 6 deltas waiting in 1 series; oldest " in first
    assert second.startswith("q  live  epoch 0  ")
    assert last.startswith("1 live, 1 left, ")
    slots = json.loads(here("spool", "ls", str(tmp_path / "s"), "--json").stdout)["slots"]
    assert [(slot["slot"], slot["live"], slot["delta_count"]) for slot in slots] == [("p", False, 6), ("q", True, 0)]
    live.spool.close()


def test_drained(tmp_path: Path, here: Here) -> None:
    """Sent batches are gone from the spool; slots of living processes are left alone."""
    spool = filled(tmp_path / "s").spool
    spool.close()
    live = Recorder(tmp_path / "s", "q")
    live.add("a")
    done = here("spool", "drain", str(tmp_path / "s"), "--to", f"embedded:{tmp_path / 'log'}")
    assert done.returncode == 0, done
    assert done.stdout.splitlines() == ["p  2 batches acknowledged, 6 deltas were in none before", "q  live: not touched"]
    live.spool.close()
    done = here("spool", "drain", str(tmp_path / "s"), "--to", f"embedded:{tmp_path / 'log'}", "--json")
    assert [(slot["slot"], slot["batch_count"]) for slot in json.loads(done.stdout)["slots"]] == [("q", 1)]
    assert here("spool", "ls", str(tmp_path / "s")).stdout == "0 live, 0 left, 0 bytes\n"


def test_no_spool(tmp_path: Path, here: Here) -> None:
    """A missing folder is an error of the call, before any connection is made."""
    for arguments in (("ls", str(tmp_path)), ("drain", str(tmp_path), "--to", "kafka://127.0.0.1:1")):
        done = here("spool", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert "is no spool" in done.stderr
