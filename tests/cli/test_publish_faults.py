"""`pipeline publish` with a wrong input, call or server, or interrupted by Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import NotFound, Reader
from pipeline.cli.publish import _PublishRun
from pipeline.cli.rows import ROW_BYTES_MAX
from tests.cli.conftest import Here
from tests.support import Program, UpProcess, everything, pipeline, wait_until


def total(server: UpProcess, view: str) -> Any:
    """Return the total of the view with everything in the log; None if the view does not exist."""
    with Reader(server.url) as reader:
        try:
            return reader.get(view, by=(), after=everything(reader), timeout_ms=20_000).value()
        except NotFound:
            return None


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_bad_line_in_a_file_publishes_nothing(here: Here, server: UpProcess, tmp_path: Path, at: int) -> None:
    """A file with a bad line anywhere is checked before the first row is sent, so the view does not even exist."""
    lines = ["v", "1", "2", "4", "8"]
    lines.insert(at - 1, "x")
    file = tmp_path / "bad.csv"
    file.write_text("\n".join(lines) + "\n")
    view = f"file_with_bad_{at}"
    done = here("publish", view, "--to", server.url, "--value", "v", "--json", str(file))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        f"line {at}: column v: a number is needed, got 'x'",
        "pipeline: nothing was published: 1 bad line; --skip-bad leaves them out",
    ]
    report = json.loads(done.stdout)
    assert (report["complete"], report["lines"], report["bad_lines"], report["batches"]) == (False, 0, 1, 0)
    assert total(server, view) is None


@pytest.mark.parametrize(("at", "before"), [(2, None), (4, 3), (6, 15)])
def test_a_bad_line_in_a_pipe_ends_the_run_there(server: UpProcess, at: int, before: int | None) -> None:
    """Lines before the bad one are acknowledged and reported, nothing after it is sent, and the run is not complete."""
    lines = ["v", "1", "2", "4", "8"]
    lines.insert(at - 1, "x")
    view = f"pipe_with_bad_{at}"
    done = pipeline("publish", view, "--to", server.url, "--value", "v", "--json", "-", input="\n".join(lines))
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert (report["complete"], report["lines"], report["bad_lines"]) == (False, at - 2, 1)
    assert total(server, view) == before
    if before is None:
        assert done.stderr.endswith("nothing was published\n")
    else:
        assert done.stderr.endswith(f"every line up to {at - 1} is published; to go on: --start-line {at}\n")
        assert report["acknowledged_line"] == at - 1


def test_bad_lines_are_left_out_when_told_to(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """--skip-bad publishes the good ones, reports the first 20 bad ones, counts all of them, and is a success."""
    file = tmp_path / "bad.csv"
    file.write_text("v\n" + "x\n1\n" * 30)
    done = here("publish", "skipped", "--to", server.url, "--value", "v", "--skip-bad", str(file))
    assert done.returncode == 0
    assert done.stdout.splitlines()[1] == "left out 30 bad lines"
    reported = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in reported[:20]] == [f"line {number}" for number in range(2, 42, 2)]
    assert reported[20:] == ["and 10 more bad lines"]
    assert total(server, "skipped") == 30


def test_a_file_that_is_shorter_than_when_it_was_checked(
    here: Here, server: UpProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is cut after it was checked is no success: the report says which lines are published."""
    file = tmp_path / "cut.csv"
    file.write_text("v\n" + "1\n" * 30)
    check = _PublishRun._check

    def check_and_cut(run: _PublishRun, byte_count: int) -> int:
        count = check(run, byte_count)
        os.truncate(file, 2 + 2 * 20)
        return count

    monkeypatch.setattr(_PublishRun, "_check", check_and_cut)
    done = here("publish", "cut_short", "--to", server.url, "--value", "v", str(file))
    assert done.returncode == 1
    assert "the file was changed while it was read; every line up to 21 is published" in done.stderr
    assert total(server, "cut_short") == 20


def test_input_that_is_no_text_at_all(here: Here, server: UpProcess, tmp_path: Path) -> None:
    """Noise, and a line that does not end, are bad rows in little memory, not a crash."""
    file = tmp_path / "noise"
    noise = bytes(range(256)) * 4000
    file.write_bytes(noise + b"\n" + b"x" * 8 * ROW_BYTES_MAX + b'\n{"v":5}\n')
    done = here(
        "publish", "noise", "--to", server.url, "--value", "v", "--format", "ndjson", "--skip-bad", "--json", str(file)
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["lines"], report["bad_lines"]) == (1, noise.count(b"\n") + 2)
    assert report["last_line"] == noise.count(b"\n") + 3
    assert "Traceback" not in done.stderr
    assert all(line.isprintable() for line in done.stderr.split("\n"))
    done = here("publish", "noise_csv", "--to", server.url, "--value", "v", str(file))
    assert done.returncode == 2
    assert done.stderr.startswith("pipeline: column 'v' is not in the header: ")
    assert done.stderr[:-1].isprintable()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("view", "missing.csv"), "missing.csv: No such file or directory"),
        (("view", "."), ".: is a directory"),
        (("view", "rows.csv", "--value", "w"), "column 'w' is not in the header: 'v'"),
        (("view", "rows.csv", "--labels", "region"), "column 'region' is not in the header: 'v'"),
        (("view", "rows.csv", "--kind", "average"), "unknown kind 'average'; known: sum, min, max, mean, last"),
        (("view", "rows.csv", "--kind", "mean"), "--value COLUMN is needed"),
        (("view", "rows.csv", "--ts", "v"), "--ts is for kind last"),
        (("view", "rows.csv", "--ts", "v", "--window-s", "0"), "--ts is for kind last, and for views with windows"),
        (("view", "rows.csv", "--window-s", "1.5"), "--window-s"),
        (("view", "rows.csv", "--window-s", "-1"), "--window-s"),
        (("view", "rows.csv", "--window-s", "10000000000"), "window_s is 1 to"),
        (("view", "rows.csv", "--retention-s", "100000000000"), "retention_s is 0 (for ever) to"),
        (("view", "rows.csv", "--format", "xml"), "--format xml: one of csv, ndjson"),
        (("1view", "rows.csv"), "view name '1view' does not match"),
        (("view", "rows.csv", "--labels", "a b"), "label name 'a b' does not match"),
        (("view", "rows.csv", "--to", "ftp://host"), "unknown URL 'ftp://host'"),
        (("view", "rows.csv", "--set", "batch_bytes=1"), "unknown setting 'batch_bytes'; did you mean batch_bytes_max?"),
        (("view", "rows.csv", "--start-line", "0"), "--start-line"),
        (("view", "empty.csv"), "no line at all: a CSV begins with its header"),
        (("view",), "FILE|-"),
    ],
    ids=lambda value: " ".join(value)[-40:] if isinstance(value, tuple) else "",
)
def test_a_wrong_call(
    here: Here, server: UpProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str], said: str
) -> None:
    """A wrong call is exit code 2, one line that says what is wrong, and nothing on standard output."""
    (tmp_path / "rows.csv").write_text("v\n1\n")
    (tmp_path / "empty.csv").touch()
    to = () if "--to" in arguments else ("--to", server.url)
    monkeypatch.chdir(tmp_path)
    done = here("publish", *arguments, *to)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_server_that_is_away(free_port: int) -> None:
    """A clear error comes when --timeout-ms has passed, not before and not much later."""
    began = time.monotonic()
    done = pipeline("publish", "away", "--to", f"http://127.0.0.1:{free_port}", "--timeout-ms", "700", "-", input="v\n1\n")
    assert done.returncode == 1
    assert 0.7 <= time.monotonic() - began < 40
    assert f"no server within 0.7 s (--timeout-ms): http://127.0.0.1:{free_port}: " in done.stderr


def test_a_server_that_does_not_answer(tmp_path: Path) -> None:
    """A server that accepts connections and does not answer is treated as absent."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = pipeline("publish", "silent", "--to", url, "--timeout-ms", "500", "-", input="v\n1\n")
    assert done.returncode == 1
    assert "no server within 0.5 s" in done.stderr


def feed(program: Program, data: bytes) -> None:
    assert program.process.stdin is not None
    program.process.stdin.write(data)
    program.process.stdin.flush()


def publishing(server: UpProcess, view: str, tmp_path: Path, *arguments: str) -> Program:
    return Program(
        "publish", view, "--to", server.url, "--value", "v", "--json", *arguments, "-",
        stderr=tmp_path / "publish.stderr", stdin=subprocess.PIPE,
    )  # fmt: skip


def test_a_server_that_dies_on_the_way(tmp_path: Path) -> None:
    """The run ends after --timeout-ms with the line up to which everything is acknowledged and in the view."""
    with UpProcess(tmp_path / "data") as up, publishing(up, "dying", tmp_path, "--timeout-ms", "1000") as program:
        feed(program, b"v\n" + b"1\n" * 100)
        wait_until(lambda: total(up, "dying") == 100, "the first rows are in the view")
        up.kill()
        feed(program, b"1\n" * 50)
        assert program.process.stdin is not None
        program.process.stdin.close()
        report = json.loads(program.read_line())
        assert program.wait() == 1
        done, last = report["acknowledged_line"], report["last_line"]
        assert not report["complete"]
        assert done in (0, 101)  # it makes sure every two seconds; the view is not asked
        assert 100 <= report["lines"] == last - 1 <= 150
        assert f"those from {done + 1} to {last} may be or not" in program.stderr()
        up.start()
        assert total(up, "dying") == 100


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_publishes_what_was_read(server: UpProcess, tmp_path: Path, number: int) -> None:
    """Whole lines that were read are acknowledged, half a line is not sent, and the run says where to go on."""
    view = f"signalled_{number}"
    with publishing(server, view, tmp_path) as program:
        feed(program, b"v\n" + b"1\n" * 100 + b"100")
        wait_until(lambda: total(server, view) == 100, "the rows are in the view")
        began = time.monotonic()
        program.signal(number)
        report = json.loads(program.read_line())
        assert program.wait() == 128 + number
        assert time.monotonic() - began < 25
    assert (report["complete"], report["lines"], report["acknowledged_line"]) == (False, 100, 101)
    assert "stopped by a signal; every line up to 101 is published; to go on: --start-line 102" in program.stderr()
    assert total(server, view) == 100


def test_a_signal_in_the_middle_of_a_file(server: UpProcess, tmp_path: Path) -> None:
    """The reported line and the view agree to the row, however fast rows come."""
    file = tmp_path / "long"
    os.mkfifo(file)
    arguments = ("publish", "cut", "--to", server.url, "--value", "v", "--json", str(file))
    with Program(*arguments, stderr=tmp_path / "publish.stderr") as program:
        with file.open("wb", buffering=0) as pipe:
            pipe.write(b"v\n")
            try:
                while program.process.poll() is None:
                    pipe.write(b"1\n" * 1000)
                    if total_is_there(server):
                        program.signal(signal.SIGINT)
                        break
                while program.process.poll() is None:
                    pipe.write(b"1\n" * 1000)
            except BrokenPipeError:
                pass
        report = json.loads(program.read_line())
        assert program.wait() == 130
    assert report["lines"] == report["last_line"] - 1 == report["acknowledged_line"] - 1
    assert total(server, "cut") == report["lines"] > 0


def total_is_there(server: UpProcess) -> bool:
    with Reader(server.url) as reader:
        return any(view.name == "cut" for view in reader.views())


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    """A second signal ends the run at once, without waiting for a server that is away."""
    with (
        UpProcess(tmp_path / "data") as up,
        publishing(up, "stuck", tmp_path, "--timeout-ms", "60000") as program,
    ):
        feed(program, b"v\n1\n")
        wait_until(lambda: total(up, "stuck") == 1, "the row is in the view")
        up.kill()
        feed(program, b"1\n")
        program.signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            program.wait(1.0)
        program.signal(signal.SIGINT)
        assert program.wait(5.0) == 130


def test_stopped_while_it_waits_for_a_server(free_port: int, tmp_path: Path) -> None:
    """Ctrl-C ends the wait: nothing was published."""
    arguments = ("publish", "waiting", "--to", f"http://127.0.0.1:{free_port}", "--timeout-ms", "60000", "/dev/null")
    with Program(*arguments, stderr=tmp_path / "stderr") as program:
        wait_until(lambda: "waiting for a server" in program.stderr(), "it says that it waits")
        program.signal(signal.SIGINT)
        assert program.wait(5.0) == 130
        assert "stopped by a signal; nothing was published" in program.stderr()
