"""One process at a time owns a state folder, and other folders are refused."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.adapters.datadir import DataDir
from pipeline.errors import Invalid, LogCorrupt, NewerFormat, Unavailable
from tests.contracts.support import until
from tests.embedded.support import child, run_child, wait_for_line


def test_a_new_folder_becomes_a_data_directory(tmp_path: Path) -> None:
    """The folder is made with its parents, can be opened again, and a relative path is made absolute at once."""
    for _ in range(2):
        with DataDir(tmp_path / "a" / "b") as data:
            assert data.path.is_absolute()
            assert {entry.name for entry in data.path.iterdir()} == {"LOCK", "VERSION"}
            data.log.mkdir(exist_ok=True)
            data.log.rmdir()


def test_the_same_process_is_refused_too(tmp_path: Path) -> None:
    """A second owner in this process is refused, and changes nothing for the first."""
    with DataDir(tmp_path):
        for _ in range(2):
            with pytest.raises(Unavailable, match=f"in use by process {os.getpid()}"):
                DataDir(tmp_path)
    DataDir(tmp_path).close()


def test_another_process_is_refused_by_name_until_it_is_killed(tmp_path: Path) -> None:
    """The message names the owner's pid; kill -9 frees the folder at once."""
    with child("hold", tmp_path) as process:
        pid = wait_for_line(process, "ready").split()[1]
        with pytest.raises(Unavailable, match=f"{tmp_path} is in use by process {pid}"):
            DataDir(tmp_path)
        process.kill()
        process.wait()
        DataDir(tmp_path).close()


def test_a_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A child that outlives its parent does not keep the data directory, although it inherits the lock."""
    with child("hold_and_fork", tmp_path) as process:
        wait_for_line(process, "ready")
        process.send_signal(signal.SIGKILL)
        process.wait()
        DataDir(tmp_path).close()


def test_an_owner_that_ends_in_good_order_frees_it(tmp_path: Path) -> None:
    """Leaving the `with` block frees the folder."""
    with child("hold", tmp_path) as process:
        wait_for_line(process, "ready")
        assert process.stdin is not None
        process.stdin.close()
        process.stdin = None
        process.wait()
        DataDir(tmp_path).close()


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    """A folder without VERSION but with other files is refused, and nothing is written but the lock."""
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(Invalid, match="neither empty nor a data directory"):
        DataDir(tmp_path)
    assert not (tmp_path / "VERSION").exists()


@pytest.mark.parametrize("version", [b"1\n", b"3\n", b"", b"\xff\xfe", b"1.0\n", b"x" * 1000])
def test_another_version_is_refused(tmp_path: Path, version: bytes) -> None:
    """A data directory of another version is not read."""
    (tmp_path / "VERSION").write_bytes(version)
    error = NewerFormat if version == b"3\n" else Invalid
    with pytest.raises(error, match=r"has version .*; this program reads 2"):
        DataDir(tmp_path)
    assert (tmp_path / "VERSION").read_bytes() == version


def test_a_crash_while_it_is_made_is_no_obstacle(tmp_path: Path) -> None:
    """VERSION is there whole or not at all, and remains of an attempt are no foreign file."""
    (tmp_path / "LOCK").touch()
    (tmp_path / "VERSION.new").touch()
    with DataDir(tmp_path):
        assert (tmp_path / "VERSION").read_text() == "2\n"


def test_stores_without_their_log_are_not_thrown_away(tmp_path: Path) -> None:
    """A log that is gone is not made anew: the stores are the last copy, so a person must decide."""
    with DataDir(tmp_path) as data:
        data.log.mkdir()
        (data.stores / "0").mkdir(parents=True)
    DataDir(tmp_path).close()
    (tmp_path / "log").rmdir()
    with pytest.raises(LogCorrupt, match="its log is gone"):
        DataDir(tmp_path)
    (tmp_path / "stores" / "0").rmdir()
    (tmp_path / "stores").rmdir()
    DataDir(tmp_path).close()


def test_the_folder_of_another_app_is_left_alone(tmp_path: Path) -> None:
    """A folder of another app is refused with both names: its stores would be rebuilt. One that names no app is accepted."""
    with DataDir(tmp_path, with_log=False) as data:
        (data.stores / "0").mkdir(parents=True)
    with DataDir(tmp_path, with_log=False, app="shop"):
        assert (tmp_path / "APP").read_text() == "shop\n"
    with pytest.raises(Invalid, match="is that of app 'shop', not of 'bank': give each its own"):
        DataDir(tmp_path, with_log=False, app="bank")
    assert (tmp_path / "APP").read_text() == "shop\n"
    assert (tmp_path / "stores" / "0").is_dir()
    DataDir(tmp_path, with_log=False, app="shop").close()
    with DataDir(tmp_path, with_log=False) as data:
        data.check_app("shop")
        with pytest.raises(Invalid, match="is that of app 'shop'"):
            data.check_app("bank")


@pytest.mark.parametrize("name", ["file", "file/below", "file/below/it"])
def test_a_file_is_no_folder(tmp_path: Path, name: str) -> None:
    """A file, or a path below a file, is refused as a folder."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(Invalid, match=r"data directory .*file.*: .*(File exists|Not a directory)"):
        DataDir(tmp_path / name)
    assert (tmp_path / "file").read_text() == "x"


@pytest.fixture
def public_path() -> Iterator[Path]:
    """A folder that anybody can look into."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path
        for folder in path.rglob("*"):
            if folder.is_dir():
                folder.chmod(0o755)


@pytest.mark.parametrize("kind", ["datadir", "log", "store"])
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_folder_that_can_not_be_written_is_invalid(public_path: Path, kind: str, existing: bool) -> None:
    """A folder, empty or not, that can't be written is Invalid, with the path and the reason; so is a file in it."""
    if existing:
        with child("fork", public_path, "exit") as process:  # makes a data directory with everything in it
            process.communicate(timeout=60)
        assert (public_path / "log" / "CURRENT").exists()
    folders = {"datadir": public_path, "log": public_path / "log", "store": public_path / "stores" / "0"}
    if not existing:
        for path in (public_path / "log", public_path / "stores"):
            path.mkdir()
    for path in public_path.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    public_path.chmod(0o555)
    opened = folders[kind] if kind != "store" else public_path / "stores"
    (said,) = run_child("refused", kind, opened)
    assert said.startswith("refused Invalid")
    assert str(folders[kind]) in said
    assert "ermission denied" in said


def test_closing_twice_is_fine(tmp_path: Path) -> None:
    """Closing twice frees the folder, too."""
    data = DataDir(tmp_path)
    data.close()
    data.close()
    until(lambda: DataDir(tmp_path).close() is None)


def test_folders_of_the_two_modes_are_not_mixed(tmp_path: Path) -> None:
    """A folder with an embedded log takes no stores of a broker's log, and one with such stores no embedded log."""
    with DataDir(tmp_path / "embedded") as data:
        data.log.mkdir()
    with pytest.raises(Invalid, match="holds an embedded log; stores of a broker's log need another one"):
        DataDir(tmp_path / "embedded", with_log=False)
    with DataDir(tmp_path / "stores", with_log=False, app="a") as data:
        data.stores.mkdir()
    with pytest.raises(Invalid, match="has stores of a broker's log, and no log of its own"):
        DataDir(tmp_path / "stores")
