"""Settings: the file, then the environment, then flags; a wrong name or value is an error that names it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

import pipeline.config as config
from pipeline.errors import Invalid
from pipeline.settings import GROUPS, default_of
from tests.cli.conftest import Here
from tests.support import UpProcess, environment, pipeline


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty working directory, and no settings in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in config.os.environ.keys() - environment().keys():
        monkeypatch.delenv(name)


def test_defaults() -> None:
    """Without file, environment and flags every setting has the default of its declaration."""
    loaded = config.load()
    found = (loaded.publisher, loaded.client, loaded.kafka, loaded.log, loaded.worker, loaded.query, loaded.ingest)
    for group, values in zip(GROUPS, found, strict=True):
        assert values == group()


def test_a_name_means_one_thing() -> None:
    """All settings share one flat space: a name in two groups has one default and one range, and is set for both."""
    found: dict[str, list[tuple[object, object]]] = {}
    for group in GROUPS:
        for item in fields(group):
            found.setdefault(item.name, []).append((default_of(item), item.metadata["least"]))
    assert all(len({*map(repr, meanings)}) == 1 for meanings in found.values())
    shared = {name for name, meanings in found.items() if len(meanings) > 1}
    assert shared == {"producer_ttl_ms", "series_max", "ts_ahead_max_ms"}
    loaded = config.load(dict.fromkeys(shared, "5000"))
    for name in shared:
        assert getattr(loaded.publisher, name) == getattr(loaded.worker, name) == 5_000


def test_later_ones_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """File < environment < flags, setting by setting; an empty variable and a flag that was not given set nothing."""
    Path("pipeline.toml").write_text("port = 1\ncommit_interval_ms = 1\nflush_interval_ms = 1\nfsync = true\n")
    monkeypatch.setenv("PIPELINE_COMMIT_INTERVAL_MS", "2")
    monkeypatch.setenv("PIPELINE_FLUSH_INTERVAL_MS", "2")
    monkeypatch.setenv("PIPELINE_PORT", "")
    loaded = config.load({"flush_interval_ms": "3", "port": None})
    assert loaded.query.port == 1
    assert loaded.worker.commit_interval_ms == 2
    assert loaded.publisher.flush_interval_ms == 3
    assert loaded.log.fsync is True


def test_another_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PIPELINE_CONFIG names the file to read in place of ./pipeline.toml; it must be there."""
    Path("pipeline.toml").write_text("port = 1\nhost = '::1'\n")
    (tmp_path / "other.toml").write_text("port = 2\n")
    monkeypatch.setenv("PIPELINE_CONFIG", str(tmp_path / "other.toml"))
    loaded = config.load()
    assert (loaded.query.port, loaded.query.host) == (2, "127.0.0.1")
    monkeypatch.setenv("PIPELINE_CONFIG", str(tmp_path / "gone.toml"))
    with pytest.raises(Invalid, match=r"PIPELINE_CONFIG names a file that is not there: .*gone\.toml"):
        config.load()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot = 1", "unknown setting 'prot' in pipeline.toml; did you mean port?"),
        ("[worker]\nport = 1", "unknown setting 'worker' in pipeline.toml"),
        ("port = 'http'", "setting port: a whole number is needed, got 'http'"),
        ("port = -1", "port: -1 is outside 0 to 65535"),
        ("on_full = 'wait'", "on_full: block, raise or drop_newest, got 'wait'"),
        ("fsync = 'perhaps'", "setting fsync: true or false is needed, got 'perhaps'"),
        ("port = ", "pipeline.toml: "),
        ("port = 1\nport = 2", "pipeline.toml: "),
        (b"\xff\xfe", "pipeline.toml: "),
    ],
)
def test_a_wrong_file(text: str | bytes, said: str) -> None:
    """The error for a wrong file names the setting, or the file if it is no TOML."""
    Path("pipeline.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Invalid) as error:
        config.load()
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("PIPELINE_PROT", "1", "unknown setting 'prot' in the environment; did you mean port?"),
        ("pipeline_port", "70000", "port: 70000 is outside 0 to 65535"),
        ("PIPELINE_FLUSH_INTERVAL_MS", "1.5", "setting flush_interval_ms: a whole number is needed"),
        ("PIPELINE_FSYNC", "perhaps", "setting fsync: "),
    ],
)
def test_a_wrong_environment(monkeypatch: pytest.MonkeyPatch, name: str, value: str, said: str) -> None:
    """The error names the setting."""
    monkeypatch.setenv(name, value)
    with pytest.raises(Invalid) as error:
        config.load()
    assert str(error.value).startswith(said)


def test_a_wrong_flag() -> None:
    """The error names the setting, and the closest known name."""
    with pytest.raises(Invalid, match=r"^unknown setting .flush_interval.; did you mean flush_interval_ms"):
        config.load({"flush_interval": "1"})


def test_a_folder_named_as_the_file() -> None:
    """A folder of that name is no settings file, so there is none."""
    Path("pipeline.toml").mkdir()
    assert config.load().query.port == 8080


def test_every_command_that_has_settings_refuses_wrong_ones(here: Here) -> None:
    """A wrong setting is exit code 2, from the file and from the environment alike."""
    Path("pipeline.toml").write_text("prot = 1\n")
    for arguments in (("up",), ("publish", "v", "/dev/null"), ("verify",)):
        done = here(*arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "pipeline: unknown setting 'prot' in pipeline.toml; did you mean port?\n"


def test_the_program_reads_them(tmp_path: Path, free_port: int) -> None:
    """A server takes its folder from the file, its partitions from the environment, its port from a flag."""
    Path("pipeline.toml").write_text(f"data = '{tmp_path}/elsewhere'\npartitions = 1\nport = 1\n")
    with UpProcess(tmp_path / "data", env={"PIPELINE_PARTITIONS": "2"}, port=free_port, cwd=tmp_path) as up:
        assert up.ready == {"url": up.url, "data": str(tmp_path / "data"), "partition_count": 2}
    done = pipeline("up", cwd=tmp_path, env={"PIPELINE_PORT": "x"})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pipeline: setting port: a whole number is needed, got 'x'")
