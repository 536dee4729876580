"""`pipeline ingest statsd`: lines of clients are in the views, and a report at the end accounts for every line."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer

from pipeline import Reader
from pipeline.cli.app import app
from tests.cli.conftest import Here
from tests.support import PROGRAM, Program, Terminal, UpProcess, environment, wait_until


class Ingest:
    """A running `pipeline ingest`, with its JSON output."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.ready: dict[str, Any] = json.loads(program.read_line())
        self.address = self.ready["host"], self.ready["port"]

    def udp(self, *packets: str) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for packet in packets:
                sock.sendto(packet.encode(), self.address)

    def tcp(self, text: str) -> None:
        with socket.create_connection(self.address, 30) as sock:
            sock.sendall(text.encode())

    def end(self, number: int = signal.SIGTERM, code: int = 0) -> dict[str, Any]:
        """Stop it, and return its report."""
        self.program.signal(number)
        report: dict[str, Any] = json.loads(self.program.read_line())
        assert self.program.wait() == code, self.program.stderr()
        return report


@contextmanager
def ingesting(tmp_path: Path, *arguments: str) -> Iterator[Ingest]:
    with Program("ingest", "statsd", "--port", "0", "--json", *arguments, stderr=tmp_path / "stderr") as program:
        yield Ingest(program)


def answers(server: UpProcess, view: str, token: str) -> dict[str, Any]:
    with Reader(server.url) as reader:
        answer = reader.get(view, after=token, timeout_ms=20_000)
    return {"/".join(series.labels.values()): series.value for series in answer.series}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_sent_is_there_when_it_has_ended(server: UpProcess, tmp_path: Path, number: int) -> None:
    """Right after the last packet the signal drains both sockets, and the report counts every line."""
    name = f"cli{number}"
    with ingesting(tmp_path, "--to", server.url) as ingest:
        ingest.tcp(f"{name}.t:1:3|ms\n{name}.g:5|g\n{name}.g:-2|g\nnonsense\n{name}.u:ann|s|#env:x")
        ingest.udp(*[f"{name}:1|c|#region:eu" for _ in range(300)], f"{name}:1|c|@0.1|#region:us\n\n", "_e{1,1}:a|b")
        report = ingest.end(number)
    assert (report["complete"], report["error"]) == (True, None)
    assert report["lines"] == 5 + 301 + 1
    assert report["left_out"] == {"format": 1, "unsupported": 1}
    assert answers(server, name, report["token"]) == {"eu": 300, "us": 10}
    assert answers(server, f"{name}_t_ms", report["token"]) == {"": 2.0}
    assert answers(server, f"{name}_g", report["token"]) == {"": 3}
    assert answers(server, f"{name}_u", report["token"]) == {"x/ann": 1}
    assert "statsd_tcp format 1 (the first: 'nonsense')" in ingest.program.stderr()


def test_labels_outlive_a_restart(server: UpProcess, tmp_path: Path) -> None:
    """The server's views decide which labels lines have, in whatever order they come; `--labels` decides for new views."""
    with ingesting(tmp_path, "--to", server.url, "--labels", "again.a=x,y") as ingest:
        ingest.udp("again.a:1|c|#x:1")
        ingest.end()
    with ingesting(tmp_path, "--to", server.url) as ingest:
        ingest.udp("again.a:2|c|#y:1", "again.a:4|c", "again.a:8|c|#z:1", "again.a:1|g")
        report = ingest.end()
    assert report["left_out"] == {"kind": 1, "labels": 1}
    assert answers(server, "again_a", report["token"]) == {"1/": 1, "/1": 2, "/": 4}


def test_it_can_be_watched(server: UpProcess, tmp_path: Path) -> None:
    """--metrics-port serves counts of lines and refusals by protocol and reason, health, and a status."""
    with ingesting(tmp_path, "--to", server.url, "--metrics-port", "0") as ingest:
        url = ingest.ready["metrics_url"]
        ingest.udp("watched:1|c", "bad")
        wait_until(lambda: get(url + "/v1/status")["lines"] == 2, "both lines")
        metrics = text(url + "/metrics")
        assert 'pipeline_ingest_lines_total{protocol="statsd_udp"} 2.0' in metrics
        assert 'pipeline_ingest_malformed_total{protocol="statsd_udp",reason="format"} 1.0' in metrics
        assert 'pipeline_ingest_malformed_total{protocol="statsd_tcp",reason="rate"} 0.0' in metrics
        assert get(url + "/readyz") == {"ready": True}
        assert get(url + "/v1/status")["left_out"] == {"format": 1}
        ingest.end()


def text(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return str(answer.read().decode())


def get(url: str) -> Any:
    return json.loads(text(url))


def test_a_server_that_is_away(tmp_path: Path) -> None:
    """Lines are taken while the server is away, up to the limit of memory; the report at the end counts them as lost."""
    limits = ("--set", "buffer_bytes_max=65536", "--set", "close_timeout_ms=300")
    with ingesting(tmp_path, "--to", "http://127.0.0.1:9", *limits) as ingest:
        ingest.tcp("".join(f"a:1|c|#n:{n}\n" for n in range(2_000)))
        report = ingest.end(code=1)
    assert (report["complete"], report["lines"], report["token"]) == (False, 2_000, "")
    assert 0 < report["left_out"]["buffer_full"] < 2_000
    assert "not everything was published: not acknowledged within 0.3 s" in report["error"]
    assert "the server's views are not known" in ingest.program.stderr()


def test_on_a_terminal(server: UpProcess) -> None:
    """The command prints its address, the count of lines while they come, and a report at the end."""
    terminal = Terminal()
    env = environment({"TERM": "xterm", "COLUMNS": "120"})
    command = [*PROGRAM, "ingest", "statsd", "--port", "0", "--to", server.url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal.fd, env=env, text=True) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first.startswith("StatsD on 127.0.0.1:")
            assert first.endswith(f"UDP and TCP, to {server.url}  (Ctrl-C stops)\n")
            address = "127.0.0.1", int(first.removeprefix("StatsD on 127.0.0.1:").partition(",")[0])
            with socket.create_connection(address, 30) as sock:
                sock.sendall(b"shown:1|c\nbad\n")
            wait_until(lambda: b"2 lines" in b"".join(terminal._parts), "the status line")
            process.send_signal(signal.SIGINT)
            said = process.stdout.read()
        finally:
            process.kill()
    terminal.close()
    assert process.returncode == 0
    assert "2 lines, 1 deltas in 1 entries of 1 batches" in said
    assert "left out 1: format 1" in said
    assert "token " in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "70000"), "--port"),
        (("--port", "0", "--host", "192.0.2.1"), "can't listen on 192.0.2.1:0"),
        (("--port", "0", "--host", "0.0.0.0"), "StatsD has no way to say who sends: use --host 127.0.0.1, or --insecure"),
        (("--port", "0", "--labels", "nothing"), "--labels nothing: NAME=TAG,TAG is needed"),
        (("--port", "0", "--labels", "a{=x"), "--labels a{=x: NAME=TAG,TAG is needed"),
        (("--port", "0", "--labels", "a=x", "--labels", "a=y"), "were given before"),
        (("--port", "0", "--to", "nonsense:1"), "unknown URL"),
        (("--port", "0", "--set", "ingest_views_max=0"), "ingest_views_max"),
        (("--port", "0", "--log-level", "loud"), "--log-level"),
        (("--port", "0", "--dialect", "etsy"), "ingest_dialect: auto, statsd or dogstatsd, got 'etsy'"),
    ],
)
def test_a_wrong_call_is_told(here: Here, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """A wrong call is exit code 2, and opens no socket."""
    to = () if "--to" in arguments else ("--to", f"embedded:{tmp_path / 'data'}")
    done = here("ingest", "statsd", *to, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_port_that_is_taken_is_told(here: Here, tmp_path: Path) -> None:
    """A taken port, also that of the metrics, is reported, and the sockets are closed."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        to = ("--to", f"embedded:{tmp_path / 'data'}")
        assert "can't listen" in here("ingest", "statsd", *to, "--port", port).stderr
        assert "can't listen" in here("ingest", "statsd", *to, "--port", "0", "--metrics-port", port).stderr


def test_its_help_teaches(here: Here) -> None:
    """The help has examples, every option, and the mapping of lines to views."""
    done = here("ingest", "statsd", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n      pipeline ingest statsd --port 8125 --to " in done.stdout
    for word in ("NAME_ms", "member", "left out", "Ctrl-C", "buffer_bytes_max"):
        assert word in done.stdout
    group = typer.main.get_command(app).commands["ingest"]  # type: ignore[attr-defined]
    for parameter in group.commands["statsd"].params:
        assert parameter.help, parameter.name
    assert "statsd" in here("ingest").stdout + here("ingest").stderr
