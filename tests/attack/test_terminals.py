"""Texts from outside on a terminal and in a log: none controls the one or forges a line of the other."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline import Publisher
from pipeline.adapters.http_client import error_of
from pipeline.printable import printable, printable_json
from tests.preloaded import PROGRAM, PreloadedPopen
from tests.support import Terminal, UpProcess, environment, pipeline

EVIL = "a\x1b[2J\r\n\x07\x7f\x9b31m\u202e\u2066\u200b\u2028\ufeff\U000e0041[bold]x[/bold]:heart:"
"""ESC, line ends, bell, DEL, C1, changes of direction, invisible characters, and what rich would take for its own."""
FORBIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A server with a view whose labels and values are hostile, and with a dead letter."""
    folder = tmp_path_factory.mktemp("evil")
    with UpProcess(folder / "data", "--set=partitions=1") as server:
        with Publisher(server.url) as publisher:
            publisher.sum("evil", labels=("a",)).add(1, a=EVIL)
            publisher.last("newest", labels=("a",)).set(EVIL, a=EVIL)
            publisher.topk("top", labels=("a",)).add(EVIL, a=EVIL)
            publisher.flush()
        yield server


def clean(text: str) -> bool:
    """Return whether a text is without anything that controls a terminal."""
    return not FORBIDDEN.search(text)


COMMANDS = [
    ("get", "evil"),
    ("get", "evil", "--json"),
    ("get", "evil", "--where", f"a={EVIL}"),
    ("get", "newest"),
    ("get", "newest", "--json", "--all"),
    ("get", "top"),
    ("get", EVIL.replace("/", "")),
    ("get",),
    ("views", "ls"),
    ("views", "ls", "--json"),
    ("views", "drop", EVIL.replace("/", ""), "--yes"),
    ("status",),
    ("status", "--json"),
    ("dead-letters", "ls"),
    ("dead-letters", "show", EVIL),
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda it: " ".join(it)[:20].encode("ascii", "replace").decode())
def test_a_command_in_a_pipe(up: UpProcess, command: tuple[str, ...]) -> None:
    """Output and errors of a command are clean; JSON has the same values as before, and markup of rich means nothing."""
    option = "--to" if command[:2] == ("views", "drop") else "--from"
    done = pipeline(*command, option, up.url)
    assert "Traceback" not in done.stderr
    assert clean(done.stdout), ascii(done.stdout)
    assert clean(done.stderr), ascii(done.stderr)
    if "--json" in command and command[0] == "get":
        assert json.loads(done.stdout)["series"][0]["labels"] == {"a": EVIL}
    elif command[0] == "get" and done.returncode == 0 and len(command) > 1 and command[1] != "top":
        assert "[bold]x[/bold]:heart:" in done.stdout


@pytest.mark.parametrize("more", [("--csv",), (), ("--json",)])
def test_a_command_on_a_terminal(up: UpProcess, more: tuple[str, ...]) -> None:
    """A terminal gets tables, CSV and JSON without control characters but the program's own; a pipe gets CSV as it is."""
    terminal = Terminal()
    with PreloadedPopen(
        [*PROGRAM, "get", "evil", *more, "--from", up.url], stdout=terminal.fd, env=environment({"COLUMNS": "200"})
    ) as process:
        assert process.wait(30) == 0
    shown = terminal.close()
    assert clean(shown.replace("\r\n", "")), ascii(shown)
    assert "[2J" in shown
    if more == ("--csv",):
        assert "\x1b[2J" in pipeline("get", "evil", "--csv", "--from", up.url).stdout


@pytest.mark.parametrize("as_json", [False, True])
def test_a_log_line_is_one_line(as_json: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Texts, arguments and tracebacks in a log forge no line: each call is one, but for the frames of a traceback."""
    from pipeline.cli.console import configure_logging

    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        configure_logging("info", as_json=as_json)
        log = logging.getLogger("pipeline.tests")
        log.warning("producer %s of %r", EVIL, EVIL)
        try:
            raise ValueError(EVIL)
        except ValueError:
            log.exception("failed: %s", EVIL)
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    written = capfd.readouterr().err
    assert clean(written), ascii(written)
    lines = written.splitlines()
    assert lines[0].count("producer") == 1
    if as_json:
        assert len(lines) == 2
        assert json.loads(lines[0])["event"] == f"producer {EVIL} of {EVIL!r}"
    else:
        assert sum(line.startswith("20") for line in lines) == 2


def test_an_error_that_nobody_expected(capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback on standard error is clean, too."""
    from pipeline.cli.app import _show_traceback

    try:
        raise ValueError(EVIL)
    except ValueError as error:
        _show_traceback(ValueError, error, error.__traceback__)
    said = capsys.readouterr().err
    assert clean(said)
    assert said.startswith("Traceback")


def test_texts_of_a_server() -> None:
    """The text of a problem document is one clean line in the error, which an app may log."""
    problem: dict[str, Any] = {"type": "urn:pipeline:error:NotReady", "detail": EVIL}
    for body in (json.dumps(problem).encode(), EVIL.encode(), b"\x1b\xff" * 40):
        assert str(error_of("http://h", 503, body)).isprintable()


def test_json_is_the_same_value() -> None:
    """Escapes change no value, of any character; lone surrogates and bytes that are no UTF-8 become visible."""
    text = "".join(map(chr, [*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F000, 0x1F100), *range(0xE0000, 0xE0100)]))
    body = printable_json(json.dumps(text, ensure_ascii=False).encode())
    assert json.loads(body) == text
    assert body.decode().isprintable()
    assert printable("\ud800\x1b") == "\\ud800\\x1b"
    assert printable_json(b'"\xff\x1b"').isascii()
    assert printable_json('"grün 統計 😀"'.encode()).decode() == '"grün 統計 😀"'
    assert sys.excepthook is not None
