"""Files on disk: nobody else may read them, and no link, pipe or folder in the place of one is followed or waited for."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import Publisher
from pipeline.adapters.datadir import DataDir
from pipeline.errors import Invalid, PipelineError
from pipeline.publisher.spool.database import NAME, SEAL
from pipeline.publisher.spool.orphan import Orphan, inspect
from pipeline.publisher.spool.slot import open_folder
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings
from tests.publisher.spool.support import Recorder, as_kill_leaves_it, end
from tests.support import UpProcess, wait_until

VICTIM = b"somebody else's\n"
Plant = Callable[[Path], None]


def link(path: Path) -> None:
    victim = path.parent / "victim"
    victim.write_bytes(VICTIM)
    path.symlink_to(victim)


def dangling(path: Path) -> None:
    path.symlink_to(path.parent / "victim")


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(".", os.O_RDONLY)
        os.chdir(path.parent)  # a socket's path is short
        try:
            bound.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


PLANTS: list[Plant] = [link, dangling, os.mkfifo, Path.mkdir, unix_socket]


@pytest.fixture(autouse=True)
def usual_umask() -> Iterator[None]:
    """The umask of most users: others may read."""
    before = os.umask(0o022)
    yield
    os.umask(before)


def open_to_others(*roots: Path) -> list[str]:
    """Return what group or others can get at, whatever the folders above allow."""
    found = [path for root in roots for path in (root, *root.rglob("*"))]
    return [f"{path} {path.lstat().st_mode:o}" for path in found if stat.S_IMODE(path.lstat().st_mode) & 0o077]


def test_everything_is_private(tmp_path: Path) -> None:
    """Data directory, log, stores and spool are open to nobody else, each file by its own mode."""
    with (
        UpProcess(tmp_path / "data", "--set=partitions=1") as up,
        Publisher(up.url, spool_dir=str(tmp_path / "spool"), durability="process") as publisher,
    ):
        publisher.sum("v").add(1)
        publisher.flush()
        assert not open_to_others(tmp_path / "data", tmp_path / "spool")
    assert (tmp_path / "data" / "log" / "CURRENT").exists()


def test_what_an_older_version_has_made_is_tightened(tmp_path: Path) -> None:
    """Folders that only this program makes lose the access of others; a folder that may be another's keeps its mode."""
    with DataDir(tmp_path / "data") as data:
        for folder in (data.log, data.stores):
            folder.mkdir(mode=0o755)
    data.path.chmod(0o750)
    DataDir(data.path).close()
    assert [stat.S_IMODE(it.stat().st_mode) for it in (data.path, data.log, data.stores)] == [0o750, 0o700, 0o700]


def check_untouched(folder: Path) -> None:
    """Fail if a planted link was written through."""
    victims = [*folder.rglob("victim")]
    assert all(it.read_bytes() == VICTIM for it in victims)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("name", ["VERSION", "LOCK", "APP", "VERSION.new"])
def test_a_data_directory(tmp_path: Path, name: str, plant: Plant) -> None:
    """A data directory with something else in place of a file is refused at once, with the path, and not written through."""
    data = tmp_path / "data"
    DataDir(data, with_log=False, app="" if name == "APP" else "a").close()
    (data / name).unlink(missing_ok=True)
    if name == "VERSION.new":
        (data / "VERSION").unlink()
        (data / "APP").unlink()
        (data / "LOCK").unlink()
    plant(data / name)
    if plant is link and name == "VERSION.new":
        (data / "victim").rename(tmp_path / "victim")
        (data / name).unlink()
        (data / name).symlink_to(tmp_path / "victim")
    with pytest.raises(Invalid, match=name):
        DataDir(data, with_log=False, app="a")
    if name in ("VERSION", "LOCK"):
        with pytest.raises(Invalid, match=f"{name}|not a data directory"):
            DataDir(data, with_log=False, read_only=True)
    check_untouched(tmp_path)


def began(settings: LogSettings) -> Engine:
    """Return an engine that folds, or raise why it can't."""
    failed: list[BaseException] = []
    engine = Engine(settings, on_fatal=failed.append)
    try:
        engine.start()
        wait_until(lambda: failed or engine.ready, "an engine", 20)
    except BaseException:
        engine.stop()
        raise
    if failed:
        engine.stop()
        raise failed[0]
    return engine


@pytest.mark.timeout(60)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_log_and_a_store(tmp_path: Path, plant: Plant) -> None:
    """RocksDB does not open a link or a pipe in place of its files."""
    settings = LogSettings(data=str(tmp_path / "data"), partitions=1)
    assert began(settings).stop()
    for name in ("log/CURRENT", "stores/0/CURRENT", "log/LOCK", "stores/0/IDENTITY"):
        path = tmp_path / "data" / name
        kept = path.read_bytes()
        path.unlink()
        plant(path)
        with pytest.raises(PipelineError, match=None if plant is Path.mkdir else f"{name} is no regular file"):
            began(settings).stop()
        check_untouched(tmp_path)
        path.rmdir() if plant is Path.mkdir else path.unlink()
        (path.parent / "victim").unlink(missing_ok=True)
        path.write_bytes(kept)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("plant", PLANTS)
def test_a_spool(tmp_path: Path, plant: Plant) -> None:
    """A spool with something else in place of a file is refused or reported, never waited for or written through."""
    recorder = Recorder(tmp_path / "spool")
    recorder.add("a")
    recorder.commit()
    recorder.add("b")
    ring = next(it.name for it in recorder.spool.path.glob("ring-*"))
    for number, name in enumerate(("LOCK", NAME, f"{NAME}-wal", SEAL, ring)):
        slot = as_kill_leaves_it(recorder.spool.path, tmp_path / f"copy{number}")
        (slot / name).unlink(missing_ok=True)
        plant(slot / name)
        inspect(slot.parent)
        with suppress(PipelineError):
            orphan = Orphan.claim(slot)
            assert orphan is None or orphan.report.corrupt, name
            if orphan is not None:
                orphan.release()
        check_untouched(tmp_path)
    end(recorder.spool)
    (tmp_path / "other").mkdir(mode=0o700)
    plant(tmp_path / "other" / "VERSION")
    for make in (True, False):
        with pytest.raises(PipelineError, match=r"VERSION|not empty"):
            open_folder(tmp_path / "other", 3, make=make)
    check_untouched(tmp_path)
