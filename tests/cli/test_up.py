"""`pipeline up`: starts, serves, stops and refuses as an operator expects."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import pipeline.topics as topics
from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.rocks import RocksStores
from pipeline.settings import LogSettings
from pipeline.topics import DELTAS
from pipeline.worker.follower import read_position
from tests.cli.conftest import Here
from tests.support import PROGRAM, Program, UpProcess, environment, everything, pipeline, wait_until


def positions(data: Path) -> list[tuple[int, int]]:
    """Return, by partition, the folded position of a stopped server's store, and the end of its log."""
    settings = LogSettings(data=str(data))
    with DataDir(data) as folder:
        log = EmbeddedLog(folder.log, topics.load(), settings, SystemClock())
        stores = RocksStores(folder.stores, settings)
        try:
            return [
                (read_position(stores.open(number)).next_offset, log.watermarks(DELTAS, number).end_offset)
                for number in range(log.partition_count(DELTAS))
            ]
        finally:
            stores.close()
            log.close()


def load(url: str) -> Any:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return json.load(answer)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_commits_and_ends_it(tmp_path: Path, number: int) -> None:
    """Exit code 0 comes within seconds, and all acknowledged deltas are in the stores, though no commit was due."""
    with UpProcess(tmp_path / "data", "--set", "commit_interval_ms=60000") as up:
        with Publisher(up.url) as publisher:
            view = publisher.sum("v", labels=("n",))
            for n in range(100):
                view.add(n, n=str(n))
            publisher.flush()
        began = time.monotonic()
        assert up.terminate(number) == 0
        assert time.monotonic() - began < 25
        assert up.program.stderr() == ""
        found = positions(up.data)
        assert sum(next_offset for next_offset, _ in found) > 0
        assert all(next_offset == end_offset for next_offset, end_offset in found)


def test_what_it_says_when_it_is_ready(tmp_path: Path, free_port: int) -> None:
    """One line has a URL that answers. --json adds the folder and the partitions for machines."""
    with UpProcess(tmp_path / "data", "--partitions", "3", port=free_port) as up:
        assert up.ready == {
            "url": f"http://127.0.0.1:{free_port}", "data": str(tmp_path / "data"), "partition_count": 3,
        }  # fmt: skip
        assert load(up.url + "/readyz") == {"ready": True}
    arguments = ("up", "--data", str(tmp_path / "data"), "--port", str(free_port))
    with Program(*arguments, stderr=tmp_path / "stderr") as program:
        line = program.read_line()
        assert line == (
            f"ready at http://127.0.0.1:{free_port}  (data in {tmp_path / 'data'}, 3 partitions, Ctrl-C stops)\n"
        )


def test_a_second_one_is_refused(here: Here, tmp_path: Path) -> None:
    """A second process on the directory ends with an error that names the first, whatever its port; the first goes on."""
    with UpProcess(tmp_path / "data") as up:
        for port in (0, up.port):
            done = here("up", "--data", str(up.data), "--port", str(port))
            assert (done.returncode, done.stdout) == (1, "")
            pid = up.program.process.pid
            assert done.stderr == f"pipeline: data directory {up.data} is in use by process {pid}\n"
        assert load(up.url + "/readyz") == {"ready": True}


def test_a_port_that_is_in_use(here: Here, tmp_path: Path) -> None:
    """A port in use is a usage error that names address and port; the directory is free again at once."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = here("up", "--data", str(tmp_path / "data"), "--port", str(port))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pipeline: can't listen on 127.0.0.1:{port}: Address already in use; try --port\n"
    DataDir(tmp_path / "data").close()


def test_an_address_of_another_machine(here: Here, tmp_path: Path) -> None:
    """The address of another machine is a usage error that names it."""
    for host, said in (("192.0.2.1", "Cannot assign requested address"), ("no such host", "")):
        done = here("up", "--data", str(tmp_path / "data"), "--host", host, "--port", "0")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"pipeline: can't listen on {host}:0: {said}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "0"])
def test_strangers_are_not_let_in_by_oversight(here: Here, tmp_path: Path, host: str) -> None:
    """An address that other machines can reach is a usage error that names the ways out."""
    for command in (("up", "--data", str(tmp_path / "data")), ("serve", "--gather", "http://127.0.0.1:9")):
        done = here(*command, "--host", host, "--port", "0")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"{host}:0 can be reached from other machines" in done.stderr
        for way in ("tokens_file", "--host 127.0.0.1", "--insecure"):
            assert way in done.stderr


@pytest.mark.parametrize("host", ["0.0.0.0", "::1", "127.0.0.5", "localhost"])
def test_addresses_that_are_let_in(tmp_path: Path, host: str) -> None:
    """A server listens on loopback by any name of it, and on every address with `--insecure`."""
    insecure = ("--insecure",) if host == "0.0.0.0" else ()
    with UpProcess(tmp_path / "data", "--host", host, *insecure) as up:
        address = "127.0.0.1" if host == "0.0.0.0" else host
        connection = http.client.HTTPConnection(address, up.port, timeout=20)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()


def test_a_tokens_file_lets_other_machines_in(tmp_path: Path) -> None:
    """With access tokens a server may listen on every address, under any name, and asks for a token."""
    made = pipeline("tokens", "add", "all", "--scope", "admin", "--file", str(tmp_path / "tokens"))
    assert made.returncode == 0, made.stderr
    with UpProcess(tmp_path / "data", "--host", "0.0.0.0", "--set", f"tokens_file={tmp_path / 'tokens'}") as up:
        connection = http.client.HTTPConnection("127.0.0.1", up.port, timeout=20)
        connection.request("GET", "/v1/views", headers={"Host": "service.namespace:8080"})
        assert connection.getresponse().status == 401
        connection.close()


def test_a_folder_of_something_else(here: Here, tmp_path: Path) -> None:
    """A folder with other files in it is left alone."""
    (tmp_path / "letter.txt").write_text("dear")
    done = here("up", "--data", str(tmp_path), "--port", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"{tmp_path} is neither empty nor a data directory" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"letter.txt", "LOCK"}
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_folder_that_cannot_be_written(here: Here, tmp_path: Path) -> None:
    """A folder below a file, in a file system of the kernel's, or read-only is a clear error without traceback."""
    (tmp_path / "file").touch()
    folders = [tmp_path / "file" / "data", Path("/proc/data")]
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        folders.append(tmp_path / "closed")
    for folder in folders:
        done = here("up", "--data", str(folder), "--port", "0")
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"pipeline: data directory {folder}: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_has_become_read_only(here: Here, tmp_path: Path) -> None:
    """Existing state that can't be written any more is refused with the reason."""
    with UpProcess(tmp_path / "data") as up:
        assert up.terminate() == 0
    folders = [up.data, *(path for path in up.data.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o500)
    done = here("up", "--data", str(up.data), "--port", "0")
    for folder in folders:
        folder.chmod(0o700)
    assert done.returncode in (1, 2)
    assert str(up.data) in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--port", "http"), "--port"),
        (("--port", "70000"), "port: 70000 is outside 0 to 65535"),
        (("--partitions", "0x"), "--partitions"),
        (("--log-level", "loud"), "--log-level loud: debug, info, warning, error or critical"),
        (("--set", "fsync"), "--set: NAME=VALUE is needed"),
        (("--set", "fsink=1"), "unknown setting 'fsink'; did you mean fsync?"),
        (("--set", "commit_interval_ms=soon"), "setting commit_interval_ms: "),
        (("--set", "commit_interval_ms=0"), "commit_interval_ms: 0 is outside 1 to "),
        (("--nonsense",), "--nonsense"),
        (("more",), "more"),
    ],
)
def test_a_wrong_call(here: Here, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
    """A wrong call is exit code 2 and one line that says what is wrong; no directory is made."""
    done = here("up", "--data", str(tmp_path / "data"), *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "data").exists()


def test_partitions_are_for_ever(here: Here, tmp_path: Path) -> None:
    """A log keeps its number of partitions; asking for another one is an error that says so."""
    with UpProcess(tmp_path / "data", "--partitions", "2") as up:
        up.kill()
        done = here("up", "--data", str(up.data), "--port", "0", "--partitions", "5")
        assert done.returncode == 2
        assert "2" in done.stderr
        assert "5" in done.stderr


def test_a_disk_that_is_full(tmp_path: Path) -> None:
    """A server that can't write ends with 3 and says why; everything acknowledged is there after a restart."""
    data = tmp_path / "data"
    limit = 'ulimit -f 1500; exec "$@"'  # kilobytes of a file
    up = UpProcess(data)
    with up:
        up.kill()
        errors = (tmp_path / "limited.stderr").open("wb")
        process = subprocess.Popen(
            ["bash", "-c", limit, "bash", *PROGRAM, "up", "--data", str(data), "--port", str(up.port), "--json"],
            stdout=subprocess.PIPE, stderr=errors, env=environment(),
        )  # fmt: skip
        try:
            assert process.stdout is not None
            assert process.stdout.readline()
            acknowledged = _fill(up.url, process)
            assert process.wait(60) == 3
        finally:
            process.kill()
            process.wait()
            errors.close()
        assert "Traceback" not in (tmp_path / "limited.stderr").read_text()
        up.start()
        with Reader(up.url) as reader:
            assert reader.get("v", by=(), after=everything(reader), timeout_ms=30_000).value() >= acknowledged


def _fill(url: str, process: subprocess.Popen[bytes]) -> int:
    """Post until the server dies, and return how many deltas were acknowledged."""
    acknowledged = 0
    text = "x" * 4000
    deltas = [{"view": "v", "kind": "sum", "labels": {"n": f"{n}{text}"}, "value": 1} for n in range(100)]
    body = json.dumps(deltas).encode()
    while process.poll() is None:
        try:
            request = urllib.request.Request(f"{url}/v1/deltas", body, {"Content-Type": "application/json"})
            urllib.request.urlopen(request, timeout=20).close()
        except OSError:
            wait_until(lambda: process.poll() is not None, "it ends", 60)
        else:
            acknowledged += 100
    return acknowledged
