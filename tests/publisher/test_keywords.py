"""Settings of a publisher: keywords that type checkers know, then the environment, then a file, perhaps a stranger's."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from prometheus_client import CollectorRegistry

from pipeline import Invalid, Publisher
from pipeline.secret import Secret
from pipeline.settings import (
    DURABILITY,
    ON_FULL,
    SECRETS,
    ClientSettings,
    KafkaSettings,
    PublisherKeywords,
    PublisherSettings,
    default_of,
)
from tests.publisher.support import ROOT

HTTP = "http://127.0.0.1:1"
KAFKA = "kafka://127.0.0.1:1"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """An empty working directory, and an environment without settings."""
    import os

    import pipeline.publisher.environment as environment

    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("PIPELINE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(environment, "_warned", set())
    caplog.set_level(logging.WARNING, "pipeline")


def test_keywords_are_the_settings() -> None:
    """The keywords known to editors and type checkers are the settings of the dataclasses, with the types of these."""
    hints = get_type_hints(PublisherKeywords)
    groups = (PublisherSettings, KafkaSettings, ClientSettings)
    items = {item.name: item for group in groups for item in fields(group)}
    assert hints.keys() == items.keys()
    choices = {"on_full": ON_FULL, "durability": DURABILITY}
    for name, hint in hints.items():
        if name in choices:
            assert get_args(hint) == choices[name]
        elif name in SECRETS:
            assert hint == str | Secret
        elif name == "kafka":
            assert hint == Mapping[str, Any]
        else:
            assert hint is type(default_of(items[name]))


WRONG = {
    'Publisher("http://h", bach_bytes_max=1_024)': 'Unexpected keyword argument "bach_bytes_max" for "Publisher"',
    'Publisher("http://h", batch_bytes_max="1 MB")': 'Argument "batch_bytes_max" to "Publisher" has incompatible type "str"',
    'Publisher("http://h", on_full="blok")': 'Argument "on_full" to "Publisher" has incompatible type "Literal[\'blok\']"',
    'Publisher("http://h", registry=1)': 'Argument "registry" to "Publisher" has incompatible type "int"',
    'Publisher("http://h", batch_bytes_max=1_024, on_full="raise", kafka={"acks": 1})': "",
}


@pytest.mark.timeout(300)
def test_a_type_checker_finds_a_wrong_setting(tmp_path: Path) -> None:
    """mypy refuses a name that is no setting, a wrong type and a wrong value, and accepts everything right."""
    file = tmp_path / "app.py"
    file.write_text("from pipeline import Publisher\n\n" + "\n".join(WRONG) + "\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", "--config-file", "pyproject.toml", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    for number, (code, said) in enumerate(WRONG.items(), start=3):
        lines = [line for line in done.stdout.splitlines() if f"app.py:{number}: error" in line]
        assert bool(lines) == bool(said), f"{code}\n{done.stdout}{done.stderr}"
        assert said in "".join(lines)


@pytest.fixture
def made() -> Iterator[list[Publisher]]:
    """Publishers that are closed afterwards."""
    publishers: list[Publisher] = []
    yield publishers
    for pub in publishers:
        pub.close()


def room_of(made: list[Publisher], **settings: Any) -> float | None:
    """Return a new publisher's `buffer_bytes_max`, as its statistics show it."""
    registry = CollectorRegistry()
    made.append(Publisher(HTTP, registry=registry, **settings))
    return registry.get_sample_value("pipeline_publisher_buffer_bytes_max", {"publisher": "0"})


def test_keywords_win_over_the_environment_and_that_over_the_file(
    made: list[Publisher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A publisher ignores settings of other parts of the program in the same places."""
    Path("pipeline.toml").write_text("buffer_bytes_max = 70_000\nport = 1\ncommit_interval_ms = 5\n")
    assert room_of(made) == 70_000
    monkeypatch.setenv("PIPELINE_BUFFER_BYTES_MAX", "80_000")
    monkeypatch.setenv("PIPELINE_PORT", "2")
    monkeypatch.setenv("PIPELINE_FLUSH_INTERVAL_MS", "")
    assert room_of(made) == 80_000
    assert room_of(made, buffer_bytes_max=90_000) == 90_000
    Path("pipeline.toml").unlink()
    Path("pipeline.toml").mkdir()  # a folder of that name is nothing
    assert room_of(made) == 80_000
    assert not caplog.records


def test_a_named_file_is_meant(made: list[Publisher], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a file that PIPELINE_CONFIG names a wrong value is `Invalid`, as is a missing file."""
    Path("pipeline.toml").write_text("buffer_bytes_max = 70_000\n")
    named = tmp_path / "ours.toml"
    monkeypatch.setenv("PIPELINE_CONFIG", str(named))
    with pytest.raises(Invalid, match=r"PIPELINE_CONFIG names a file that is not there: .*ours\.toml"):
        Publisher(HTTP)
    for text, said in [
        ("flush_interval_min_ms = 'x'\n", r"ours\.toml: flush_interval_min_ms: a whole number is needed, got 'x'"),
        ("on_full = 'blok'\n", r"ours\.toml: on_full: block, .* got 'blok'"),
        ("flush_interval_min_ms =\n", r"ours\.toml: Invalid value"),
    ]:
        named.write_text(text)
        with pytest.raises(Invalid, match=said):
            Publisher(HTTP)
    named.write_text("buffer_bytes_max = 80_000\n")
    assert room_of(made) == 80_000


def test_unknown_names_are_warnings_once(
    made: list[Publisher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Unknown names in a named file, and in the environment, warn once, except those that Kubernetes and tests set."""
    named = tmp_path / "ours.toml"
    named.write_text("flush_interval_min_mss = 1\nbuffer_bytes_max = 70_000\n")
    monkeypatch.setenv("PIPELINE_CONFIG", str(named))
    monkeypatch.setenv("PIPELINE_WORKSPACE", "/builds")
    monkeypatch.setenv("PIPELINE_FLUSH_INTERVALL_MS", "5")
    monkeypatch.setenv("PIPELINE_LONG_TESTS", "1")
    for name in ("SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"):
        monkeypatch.setenv(f"PIPELINE_{name}", "tcp://10.0.0.1:80")
        monkeypatch.setenv(f"PIPELINE_WORKER_{name}", "tcp://10.0.0.1:80")
    for _ in range(2):
        assert room_of(made) == 70_000
    assert sorted(record.getMessage() for record in caplog.records) == [
        f"unknown setting 'flush_interval_min_mss' in {named}; did you mean flush_interval_min_ms?",
        "unknown setting 'flush_intervall_ms' in the environment (PIPELINE_FLUSH_INTERVALL_MS); "
        "did you mean flush_interval_ms?",
        "unknown setting 'workspace' in the environment (PIPELINE_WORKSPACE)",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[stages]\nbuild = 1\n", "unknown setting 'stages'"),
        (
            "buffer_bytes_max = 70_000\nflush_interval_min_mss = 1\n",
            "unknown setting 'flush_interval_min_mss'; did you mean flush_interval_min_ms?",
        ),
        ("buffer_bytes_max = 'all'\n", "buffer_bytes_max: a whole number is needed"),
        ("durability = ['a']\n", "durability: str expected"),
        ("stages:\n  - build\n", "Expected '=' after a key"),
        (b"\xff\xfe", "can't decode byte"),
    ],
)
def test_a_strangers_file_breaks_nothing(
    made: list[Publisher], caplog: pytest.LogCaptureFixture, text: str | bytes, said: str
) -> None:
    """A pipeline.toml that lies in the working directory is used as a whole or, with one warning, not at all."""
    Path("pipeline.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for _ in range(2):
        assert room_of(made) == 67_108_864
    (record,) = caplog.records
    assert said in record.getMessage()
    assert "is left out, as if it were another program's" in record.getMessage()
    assert "name it in PIPELINE_CONFIG" in record.getMessage()


def test_options_of_librdkafka_come_from_a_file_only_if_it_was_named(
    made: list[Publisher], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """librdkafka's options can load code, so writing to the working directory must not set them. HTTP needs none."""
    Path("pipeline.toml").write_text('[kafka]\n"plugin.library.paths" = "/tmp/evil.so"\n')
    made.append(Publisher(HTTP))
    assert not caplog.records
    made.append(Publisher(KAFKA))
    (record,) = caplog.records
    assert "kafka in " in record.getMessage()
    assert "is left out. If it is yours, name it in PIPELINE_CONFIG" in record.getMessage()
    Path("pipeline.toml").write_text('[kafka]\n"no.such.option" = "1"\n')
    monkeypatch.setenv("PIPELINE_CONFIG", "pipeline.toml")
    with pytest.raises(Invalid, match=r"no\.such\.option"):
        Publisher(KAFKA)
    monkeypatch.delenv("PIPELINE_CONFIG")
    monkeypatch.setenv("PIPELINE_KAFKA", '{"no.such.variable": 1}')
    with pytest.raises(Invalid, match=r"no\.such\.variable"):
        Publisher(KAFKA)
    monkeypatch.setenv("PIPELINE_KAFKA", "broker:9092")
    made.append(Publisher(HTTP))
    with pytest.raises(Invalid, match="PIPELINE_KAFKA: kafka: a table of options is needed, got str"):
        Publisher(KAFKA)


@pytest.mark.parametrize(
    ("name", "text", "keywords", "said"),
    [
        ("SERIES_MAX", "soon", {}, "PIPELINE_SERIES_MAX: series_max: a whole number is needed, got 'soon'"),
        ("SERIES_MAX", "0", {}, "PIPELINE_SERIES_MAX: series_max: 0 is outside 1 to any"),
        ("ON_FULL", "blok", {}, "PIPELINE_ON_FULL: on_full: block, raise"),
        ("DURABILITY", "process", {}, "durability=process needs spool_dir"),
        ("SERIES_MAX", "1", {"bach_bytes_max": 1_024}, "unknown settings: bach_bytes_max; did you mean batch_bytes_max"),
    ],
)
def test_what_is_wrong_is_an_error(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, keywords: dict[str, Any], said: str
) -> None:
    """A wrong setting is an error in the environment and in keywords, also without a type checker."""
    monkeypatch.setenv(f"PIPELINE_{name}", text)
    with pytest.raises(Invalid, match=said):
        Publisher(HTTP, **keywords)
