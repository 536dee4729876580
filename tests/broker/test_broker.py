"""Brokers of tests leave no process behind, never share a port, and say what is missing to run them."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.broker.jars import Missing, cache, jars
from tests.broker.kafka import Broker, absent, create_topics
from tests.support import ROOT, environment, wait_until


def alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def in_group(group: int) -> list[int]:
    """Return the running processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and alive(int(entry.name)):
            try:
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
            except ProcessLookupError:
                pass
    return found


OWNER = """
import sys
from pathlib import Path
from tests.broker.kafka import Broker
broker = Broker(Path(sys.argv[1]))
broker.start()
print(broker.pid, flush=True)
if sys.argv[2] == "wait":
    sys.stdin.read()
"""


@pytest.mark.long
@pytest.mark.parametrize("ends", ["killed", "forgets"])
def test_a_broker_ends_with_its_owner(tmp_path: Path, kafka_jars: Path, ends: str) -> None:
    """No process is left when the owner is killed -9, or ends without stopping its broker."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "kafka"), "wait" if ends == "killed" else "go"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(),
        cwd=ROOT,
    )
    with owner:
        assert owner.stdout is not None
        pid = int(owner.stdout.readline())
        if ends == "killed":
            assert pid in in_group(pid)
            owner.send_signal(signal.SIGKILL)
        owner.wait(30)
    wait_until(lambda: not in_group(pid), "broker and its guard gone")


@pytest.mark.long
def test_ports_are_apart_and_a_stolen_one_is_replaced(tmp_path: Path, kafka_jars: Path) -> None:
    """Brokers never share a port, and one that was taken between choice and first start is chosen anew."""
    one, two = Broker(tmp_path / "1"), Broker(tmp_path / "2")
    try:
        stolen = one.port
        assert len({stolen, two.port, int(one.controller[10:]), int(two.controller[10:])}) == 4
        with socket.socket() as thief:
            thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            thief.bind(("127.0.0.1", stolen))
            thief.listen()
            one.start()
        assert one.port != stolen
        create_topics(one.bootstrap, "a", 1)
    finally:
        one.close()
        two.close()


@pytest.mark.parametrize("program", ["java", "mvn"])
def test_what_is_missing_is_named(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without java or mvn the reason says what to install: tests skip with it, or fail where a broker is required."""
    other = shutil.which("java")
    if program == "mvn":
        if other is None:
            pytest.skip("needs java")
        (tmp_path / "java").symlink_to(other)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(Missing, match=rf"no {program}: apt-get install maven .*PIPELINE_TEST_KAFKA") as caught:
        jars()
    monkeypatch.delenv("PIPELINE_REQUIRE_KAFKA", raising=False)
    with pytest.raises(pytest.skip.Exception, match="apt-get"):
        absent(caught.value)
    monkeypatch.setenv("PIPELINE_REQUIRE_KAFKA", "1")
    with pytest.raises(pytest.fail.Exception, match="apt-get"):
        absent(caught.value)


MVN = """#!/bin/sh
echo run >>"$RUNS"
for argument; do case "$argument" in -DoutputDirectory=*) out="${argument#*=}";; esac; done
[ -n "$out" ] && mkdir -p "$out" && : >"$out/a.jar" && [ ! -e "$RUNS.fail" ] || { echo no network; exit 1; }
"""


def test_jars_are_fetched_once_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed fetch leaves nothing and says what mvn said; one of several processes that need the jars fetches them."""
    bin, runs = tmp_path / "bin", tmp_path / "runs"
    bin.mkdir()
    for name, text in (("mvn", MVN), ("java", "#!/bin/sh\n")):
        (bin / name).write_text(text)
        (bin / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("RUNS", str(runs))
    failing = tmp_path / "runs.fail"
    failing.touch()
    with pytest.raises(Missing, match="no network"):
        jars()
    assert not cache().exists()
    failing.unlink()
    runs.unlink()
    script = "from tests.broker.jars import jars; print(jars())"
    several = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment(), cwd=ROOT)
        for _ in range(4)
    ]
    assert {process.communicate(timeout=60)[0].decode().strip() for process in several} == {str(cache() / "lib")}
    assert runs.read_text() == "run\n"
    assert (cache() / "lib" / "a.jar").exists()
