"""Loss ends the command with exit code 4, nothing is deleted, and `--accept-loss` goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

import pipeline.errors as errors
import pipeline.topics as topics
from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.log import EmbeddedLog, checkpoint_path
from pipeline.errors import Exit, PipelineError, Unavailable, exit_code
from pipeline.ports import Message
from pipeline.settings import LogSettings
from pipeline.topics import DEAD_LETTERS
from tests.cli.conftest import Here
from tests.embedded.test_disk_full import fill
from tests.support import Program, UpProcess, everything, pipeline, wait_until

CODES: dict[str, tuple[Exit, Exit]] = {
    "PipelineError": (Exit.FAILED, Exit.RESTART),
    "Unavailable": (Exit.FAILED, Exit.RESTART),
    "NoSpace": (Exit.DECIDE, Exit.DECIDE),
    "BufferFull": (Exit.FAILED, Exit.RESTART),
    "Fenced": (Exit.RESTART, Exit.RESTART),
    "StoreCorrupt": (Exit.FAILED, Exit.RESTART),
    "Unreadable": (Exit.FAILED, Exit.RESTART),
    "LogCorrupt": (Exit.DECIDE, Exit.DECIDE),
    "BadRecord": (Exit.FAILED, Exit.RESTART),
    "GroupsRefused": (Exit.FAILED, Exit.RESTART),
    "GroupsForbidden": (Exit.FAILED, Exit.RESTART),
    "Displaced": (Exit.FAILED, Exit.RESTART),
    "Discontinuous": (Exit.FAILED, Exit.RESTART),
    "NotReady": (Exit.FAILED, Exit.RESTART),
    "Invalid": (Exit.USAGE, Exit.USAGE),
    "NotFound": (Exit.USAGE, Exit.USAGE),
    "Unauthenticated": (Exit.USAGE, Exit.USAGE),
    "Forbidden": (Exit.USAGE, Exit.USAGE),
    "OtherTopic": (Exit.USAGE, Exit.USAGE),
    "CursorGone": (Exit.USAGE, Exit.USAGE),
    "NewerFormat": (Exit.DECIDE, Exit.DECIDE),
    "RecordsLost": (Exit.DECIDE, Exit.DECIDE),
    "StoreAhead": (Exit.DECIDE, Exit.DECIDE),
    "Stalled": (Exit.RESTART, Exit.RESTART),
    "IllegalTransition": (Exit.FAILED, Exit.RESTART),
}
"""Exit codes for each error: at the start or in a command, and in a process that was running."""


def test_every_error_has_an_exit_code() -> None:
    """Every error has an exit code, so that somebody has to decide whether a restart can help with a new one."""
    kinds = {name: it for name, it in vars(errors).items() if isinstance(it, type) and issubclass(it, PipelineError)}
    made = {name: kind("") for name, kind in kinds.items()}
    assert {name: (exit_code(it), exit_code(it, started=True)) for name, it in made.items()} == CODES


def test_what_is_wrong_later_is_not_the_call() -> None:
    """After a setting that was fine at the start, or an unknown error, a new start finds out more."""
    assert exit_code(errors.Invalid(), started=True, ready=True) == Exit.RESTART
    assert exit_code(ZeroDivisionError(), started=True) == Exit.RESTART
    assert exit_code(errors.NoSpace(), started=True, ready=True) == Exit.DECIDE


def test_what_was_decided_need_not_be_decided_again() -> None:
    """With `accept_loss` a restart goes on without records lost at run time; a loss that no start accepts stays one."""
    for error in (errors.LogCorrupt(), errors.RecordsLost()):
        assert exit_code(error, started=True, ready=True, decided=True) == Exit.RESTART
        assert exit_code(error, started=True, decided=True) == Exit.DECIDE
    assert exit_code(errors.NoSpace(), started=True, ready=True, decided=True) == Exit.DECIDE


def record(up: UpProcess, count: int) -> None:
    with Publisher(up.url) as publisher:
        view = publisher.sum("v", labels=("n",))
        for number in range(count):
            view.add(1, n=str(number))
        publisher.flush()


def total(up: UpProcess) -> float:
    with Reader(up.url) as reader:
        return float(reader.get("v", by=(), after=everything(reader), timeout_ms=30_000).value())


def refused(data: Path, *says: str, options: tuple[str, ...] = ()) -> None:
    """Check that the server does not start, twice, with exit code 4."""
    for _ in range(2):
        done = pipeline("up", "--data", str(data), "--port", "0", *options)
        assert done.returncode == 4, done.stderr
        for text in says:
            assert text in done.stderr
        assert "Traceback" not in done.stderr


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data directory after a run that recorded 40, a restart, and a kill after 100 more."""
    data = tmp_path / "data"
    for count in (40, 100):
        with UpProcess(data) as up:
            record(up, count)
            assert total(up) == {40: 40, 100: 140}[count]
            up.kill()
    return data


def test_the_newest_file_of_the_log_is_gone(data: Path) -> None:
    """The error has the number of lost records; nothing is deleted. With --accept-loss the rest counts, files are kept."""
    newest = max((data / "log").glob("*.log"))
    newest.unlink()
    refused(data, "records are gone: ", "start with --accept-loss")
    stores = {path.name for path in (data / "stores").iterdir()}
    with UpProcess(data, "--accept-loss") as up:
        assert total(up) == 40
        record(up, 5)
        assert total(up) == 45
        with Reader(up.url) as reader:
            assert reader.status()["ready"]
    assert [*data.glob("log.lost-*")]
    assert {path.name for path in (data / "stores").iterdir() if ".lost-" not in path.name} == stores
    with UpProcess(data) as up:
        assert total(up) == 45


def test_stores_that_are_ahead_are_kept(data: Path) -> None:
    """An older copy of the whole log is detected by the stores, which are ahead of it and are kept."""
    with UpProcess(data) as up:
        assert total(up) == 140
        up.kill()
    backup = data.with_name("backup")
    shutil.copytree(data / "log", backup)
    shutil.copy(checkpoint_path(data / "log"), checkpoint_path(backup))
    with UpProcess(data) as up:
        record(up, 60)
        assert total(up) == 200
        assert up.terminate() == 0, "so that the stores are durable"
    shutil.rmtree(data / "log")
    shutil.copytree(backup, data / "log")
    shutil.copy(checkpoint_path(backup), checkpoint_path(data / "log"))
    refused(data, "the store has the changelog up to", "--accept-loss to keep the store aside")
    done = pipeline("verify", "--data", str(data))
    assert (done.returncode, "Keep everything as it is" in done.stdout) == (1, True), done.stdout
    with UpProcess(data, "--accept-loss") as up:
        assert total(up) == 140
    kept = [*(data / "stores").glob("*.lost-*")]
    assert kept
    assert all("the store has the changelog up to" in (path / "WHY-ASIDE").read_text() for path in kept)


def test_a_log_that_is_gone(data: Path) -> None:
    """A log that is gone is not made anew: the stores are the last copy, so a person must decide."""
    shutil.rmtree(data / "log")
    refused(data, "its log is gone", options=("--accept-loss",))


def test_a_newer_data_directory(data: Path) -> None:
    """A program that is too old says so, with the exit code after which no supervisor restarts it."""
    (data / "VERSION").write_text("3\n")
    refused(data, "has version 3; this program reads 2")


def test_verify_reads_all_of_the_log(data: Path) -> None:
    """`verify` finds a broken block that no start reads."""
    with DataDir(data) as folder:
        log = EmbeddedLog(folder.log, topics.load(), LogSettings(data=str(data)), SystemClock())
        log.append([Message(DEAD_LETTERS, 0, None, random.Random(1).randbytes(200_000)) for _ in range(20)], timeout_s=9)
        log.flush()
        log.close()
    done = pipeline("verify", "--data", str(data), "--json")
    assert (done.returncode, json.loads(done.stdout)["log"]) == (0, ""), done
    table = max((data / "log").glob("*.sst"), key=lambda path: path.stat().st_size)
    text = bytearray(table.read_bytes())
    text[len(text) // 2] ^= 1
    table.write_bytes(text)
    done = pipeline("verify", "--data", str(data), "--json")
    assert done.returncode == 1, done.stderr
    assert "Corruption" in json.loads(done.stdout)["log"]
    done = pipeline("verify", "--data", str(data))
    assert "Keep everything as it is" in done.stdout


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A full disk is exit code 4, as a restart makes no room. Once there is room, everything acknowledged is there."""
    disk = tmp_path / "data"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m,mode=700", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        with UpProcess(disk) as up:
            record(up, 100)
            fill(disk / "filler")
            with suppress(Unavailable), Publisher(up.url, close_timeout_ms=100) as publisher:
                while up.program.process.poll() is None:
                    publisher.last("text").set("x" * 50_000)
                    with suppress(PipelineError):
                        publisher.flush(timeout_s=0.5)
            assert up.program.wait(60) == 4
        refused(disk, "No space left on device")
        (disk / "filler").unlink()
        with UpProcess(disk) as up:
            assert total(up) == 100
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("arguments", [("--port", "0"), ("--prot", "0"), ("--port", "0", "--set", "what=1")])
def test_a_supervisor_that_does_not_look(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """With PIPELINE_HOLD a process that would end with 2 or 4 releases everything, says so, and waits to be stopped."""
    data = tmp_path / "data"
    DataDir(data).close()
    (data / "VERSION").write_text("3\n")
    code = 4 if arguments == ("--port", "0") else 2
    with Program("up", "--data", str(data), *arguments, stderr=tmp_path / "stderr", env={"PIPELINE_HOLD": "1"}) as program:
        wait_until(lambda: f"exit code {code}: to start again can't help" in program.stderr(), "it to wait", 60)
        assert program.process.poll() is None
        (data / "VERSION").write_text("2\n")
        DataDir(data).close()
        program.signal(signal.SIGTERM)
        assert program.wait(30) == code


def test_what_a_start_again_helps_is_not_held(here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Exit code 1 ends the process, as a restart helps."""
    monkeypatch.setenv("PIPELINE_HOLD", "1")
    with DataDir(tmp_path):
        assert here("up", "--data", str(tmp_path)).returncode == 1
    assert os.environ["PIPELINE_HOLD"] == "1"
