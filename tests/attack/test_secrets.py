"""Secrets planted wherever one can be given: no output, log, error, status, metric, process list or traceback shows one."""

from __future__ import annotations

import ctypes
import glob
import json
import logging
import os
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import confluent_kafka
import pytest
import typer
from confluent_kafka import KafkaException, Producer

import pipeline.config as config
from pipeline import AsyncReader, Publisher, Reader
from pipeline.cli.app import app
from pipeline.errors import Invalid
from pipeline.secret import is_secret_option
from pipeline.settings import SECRETS
from tests.attack.support import request
from tests.support import UpProcess

PLANTED = "pl4nted"
NO_SECRETS = {"sasl.username", "ssl.ca.pem", "ssl.key.location", "sasl.oauthbearer.assertion.private.key.file"}
"""Options that librdkafka leaves out of its logs although they hold no secret."""
KAFKA_URL = "kafka://127.0.0.1:1"


def sensitive_options() -> Iterator[str]:
    """Yield the options whose values librdkafka itself leaves out of its logs."""
    pattern = os.path.join(os.path.dirname(confluent_kafka.__file__), "..", "confluent_kafka.libs", "librdkafka*")
    library, libc = ctypes.CDLL(glob.glob(pattern)[0]), ctypes.CDLL(None)
    libc.open_memstream.restype = ctypes.c_void_p
    text, size = ctypes.c_char_p(), ctypes.c_size_t()
    stream = ctypes.c_void_p(libc.open_memstream(ctypes.byref(text), ctypes.byref(size)))
    library.rd_kafka_conf_properties_show(stream)
    libc.fclose(stream)
    assert text.value
    lines: list[str] = []
    log = logging.getLogger("tests.sensitive")
    log.setLevel(logging.DEBUG)
    log.propagate = False
    log.handlers[:] = [handler := logging.Handler()]
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    for name in {*re.findall(r"^([a-z][a-z0-9._]+) +\|", text.value.decode(), re.MULTILINE)}:
        try:
            Producer({name: PLANTED, "debug": "conf", "logger": log}).poll(0)
        except (KafkaException, TypeError, ValueError):  # no text, or only for consumers
            continue
    for line in lines:
        yield from re.findall(r"(\S+) = \[redacted\]", line)


def planted(folder: Path) -> dict[str, str]:
    """Return an environment in which each setting that takes a secret has one that is easily found."""
    names = {*filter(is_secret_option, sensitive_options()), "sasl.oauthbearer.client.credentials.client.secret"}
    options = {name: f"{PLANTED}-{name}" for name in names - {"ssl.key.pem", "ssl.keystore.password"}}
    lines = [f"{name} = '{PLANTED}-{name}'" for name in SECRETS]
    lines += ["[kafka]", *(f"'{name}' = '{value}'" for name, value in options.items())]
    (folder / "settings.toml").write_text("\n".join(lines))
    return {"PIPELINE_CONFIG": str(folder / "settings.toml")}


def test_we_know_the_options_that_librdkafka_takes_for_sensitive() -> None:
    """Each option that librdkafka itself keeps out of its logs holds a secret for us, too, or is known to hold none."""
    found = {*sensitive_options()}
    assert "sasl.password" in found
    assert {name for name in found if not is_secret_option(name)} <= NO_SECRETS


def test_settings_and_their_errors_show_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Settings, errors about them, and tracebacks with local variables show no secret, nor does what is logged."""
    caplog.set_level(logging.DEBUG)
    env = planted(tmp_path)
    monkeypatch.setenv("PIPELINE_CONFIG", env["PIPELINE_CONFIG"])
    loaded = config.load()
    shown = [repr(loaded)]
    assert loaded.kafka.kafka["sasl.password"].reveal() == f"{PLANTED}-sasl.password"
    wrong = [{"kafka": PLANTED}, {"kafka": {"sasl.password": [PLANTED]}}, *({name: [PLANTED]} for name in SECRETS)]
    for given in wrong:
        with pytest.raises(Invalid) as error:
            config.load(given)
        shown += traceback.TracebackException.from_exception(error.value).format()
    login = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN", "sasl.password": PLANTED}
    for more in (
        {},
        {"sasl.username": "u", "no.such.option": "x"},
        {"sasl.username": "u", "ssl.key.password_file": "/gone"},
    ):
        with pytest.raises(Invalid) as error:
            Publisher(KAFKA_URL, kafka={**login, **more})
        shown += traceback.TracebackException.from_exception(error.value, capture_locals=True).format()
    for kind in (Publisher, Reader, AsyncReader):
        for url in (f"http://u:{PLANTED}@h:1", f"http://h:{PLANTED}@", f"http://h/?token={PLANTED}", f"u:{PLANTED}@h"):
            with pytest.raises(Invalid) as error:
                kind(url)
            shown.append(str(error.value))
    # The test's own frame has the texts: only frames of the package count.
    shown = [text for text in shown if __file__ not in text]
    assert not [text for text in [*shown, caplog.text] if PLANTED in text]


@pytest.mark.parametrize("more", [[], ["--log-json"]])
def test_a_process_shows_no_secret(tmp_path: Path, more: list[str]) -> None:
    """A server with secrets in all its settings shows none: not in its output, its answers, its command line."""
    env = {**planted(tmp_path), "PIPELINE_PARTITIONS": "1"}
    with UpProcess(tmp_path / "data", "--log-level", "debug", *more, env=env) as up:
        pid = up.program.process.pid
        shown = [Path(f"/proc/{pid}/cmdline").read_text(), json.dumps(up.ready)]
        for path in ("/v1/status", "/metrics", "/healthz", "/readyz", "/openapi.json", "/v1/views", "/"):
            shown.append(request(up.port, "GET", path).body.decode())
        up.terminate()
        shown.append(up.program.stderr())
    assert not [text for text in shown if PLANTED in text]


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each command of the program with its name."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))
    else:
        yield path, command


def options_with(metavar: str) -> list[tuple[str, ...]]:
    """Return a command line up to each option with this kind of value, with all arguments that the command needs."""
    found = []
    for path, command in commands(typer.main.get_command(app)):
        needed = ["x" for it in command.params if it.param_type_name == "argument" and it.required]
        options = [it for it in command.params if it.param_type_name == "option"]
        for option in options:
            if (option.metavar or "").startswith(metavar):
                others = [it.opts[0] for it in options if it.required and it is not option]
                found.append((*path, *needed, *(text for name in others for text in (name, KAFKA_URL)), option.opts[0]))
    assert found
    return found


def refused(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must be refused, and return all that it says."""
    with pytest.raises((Invalid, SystemExit)) as error:
        app([*arguments], prog_name="pipeline")
    if isinstance(error.value, SystemExit):
        assert error.value.code == 2, arguments
    return "".join([str(error.value), *capsys.readouterr()])


@pytest.fixture
def same_logging(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty working directory, and the handlers of the root logger put back after commands that set up their own."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.long
@pytest.mark.usefixtures("same_logging")
def test_a_url_with_a_password_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Every option for a URL refuses one with a password, and does not repeat it."""
    for call in options_with("URL"):
        for url in (f"kafka://u:{PLANTED}@127.0.0.1:1", f"http://u:{PLANTED}@127.0.0.1:1"):
            assert PLANTED not in refused((*call, url), capsys), call


@pytest.mark.usefixtures("same_logging")
def test_a_secret_on_the_command_line_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `--set` refuses a secret, does not repeat it, and says where it belongs."""
    given = ["kafka.sasl.password", "kafka.ssl.key.password", *SECRETS]
    for number, call in enumerate(options_with("NAME=VALUE")):
        for name in given[number % len(given) :][:1] if number else given:
            said = refused((*call, f"{name}={PLANTED}"), capsys)
            assert f"--set {name}: a command line can be read by everybody" in said, call
            assert f"{name}_file=PATH" in said
            assert PLANTED not in said
    assert PLANTED not in refused((*call, f"kafka.some.url=http://u:{PLANTED}@h"), capsys)
