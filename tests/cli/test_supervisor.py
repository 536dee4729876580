"""`pipeline worker --processes N`: failed workers are restarted, ended ones are not, and none outlives its supervisor."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import typer

from pipeline.adapters.clock import SystemClock
from pipeline.cli.app import app
from pipeline.roles.signals import Stop
from pipeline.roles.supervisor import Backoff, Supervisor, child_command
from tests.cli.conftest import Here
from tests.support import Program, wait_until

OWN = ("python", "/bin/pipeline", "worker", "--from", "kafka://h:1", "--processes", "4", "--data", "d", "--port", "1")


def params(command: Sequence[str]) -> dict[str, object]:
    """Return the parameters that the program parses from a command line."""
    worker = typer.main.get_command(app).commands["worker"]  # type: ignore[attr-defined]
    found: dict[str, object] = worker.make_context("worker", list(command)).params
    return found


def test_a_child_is_called_as_its_parent_was_but_for_what_is_its_own() -> None:
    """Name, folder and port are the child's; everything else, repeated options too, is as it was given."""
    own = [*OWN, "--set", "a=1", "--name=x", "--set", "b=2", "--json"]
    command = child_command(own, 2, name="x", data="d", port=8081)
    assert command[: len(own)] == own
    found = params(command[3:])
    assert (found["name"], found["data"], found["port"]) == ("x-2", str(Path("d/2")), 8083)
    assert (found["supervised"], found["from_"], found["json"]) == (True, "kafka://h:1", True)
    assert list(found["set_"]) == ["a=1", "b=2"]  # type: ignore[call-overload]


def test_a_child_without_a_port() -> None:
    """Port 0 is 0 for all, and an end of options does not hide the child's own ones."""
    found = params(child_command([*OWN, "--"], 3, name="x", data="d", port=0)[3:])
    assert (found["name"], found["port"], found["data"]) == ("x-3", 0, str(Path("d/3")))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--processes", "2", "--partitions", "0-3"], "--partitions"),
        (["--processes", "2", "--port", "65535"], "65536"),
        (["--processes", "0"], "--processes"),
        (["--processes", "2", "--name", "a b"], "--name a b: "),
        (["--name", ""], "--name : "),
        (["--standbys", "2"], "--standbys: --name"),
        (["--no-static"], "--no-static: --name"),
    ],
)
def test_what_cannot_be_is_a_wrong_call(here: Here, arguments: list[str], says: str) -> None:
    """An impossible call is refused before anything is started, also an empty name, as from an unset variable."""
    done = here("worker", "--from", "kafka://127.0.0.1:1", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr


def test_pauses_double_up_to_a_limit_and_begin_anew_after_health() -> None:
    """Pauses are 0.5 s, 1, 2... 30 s, and 0.5 again after a run of a minute."""
    backoff = Backoff()
    assert [backoff.after(1.0) for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 30, 30]
    assert backoff.after(60.0) == 0.5
    assert backoff.after(59.9) == 1


PRELUDE = """
import os, signal, sys, time
def note(text):
    with open(sys.argv[1], "a") as file:
        file.write(text + "\\n")
with open(sys.argv[1]) as file:
    runs = sum(line.startswith("run") for line in file)
note(f"run {os.getpid()}")
"""


class Crew:
    """A supervisor in a thread, of children that each run a Python text with a file of their own to append lines to."""

    def __init__(self, folder: Path, *texts: str, drain_s: float = 60.0, first_s: float = 0.001) -> None:
        folder.mkdir(exist_ok=True)
        self.files = [folder / f"{index}.txt" for index in range(len(texts))]
        self.said: list[tuple[str, str]] = []
        self.stop = Stop()
        self.code = -1
        for file in self.files:
            file.touch()
        commands = [
            [sys.executable, "-S", "-c", PRELUDE + text, str(file)] for text, file in zip(texts, self.files, strict=True)
        ]
        supervisor = Supervisor(
            commands,
            labels=[str(index) for index in range(len(texts))],
            clock=SystemClock(),
            say=lambda label, what: self.said.append((label, what)),
            new_backoff=lambda: Backoff(first_s, 0.01),
            drain_s=drain_s,
        )

        def run() -> None:
            self.code = supervisor.run(self.stop)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def lines(self, index: int = 0) -> list[str]:
        return self.files[index].read_text().splitlines()

    def runs(self, index: int = 0) -> int:
        return sum(line.startswith("run") for line in self.lines(index))

    def pid(self, index: int = 0) -> int:
        return int([line for line in self.lines(index) if line.startswith("run")][-1].split()[1])

    def wait(self) -> int:
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self.code

    def end(self, number: int = signal.SIGTERM) -> int:
        self.stop.number = number
        return self.wait()


POLITE = """
def end(number, _):
    note(f"asked {number}")
    sys.exit(int(os.environ.get("CODE", "0")))
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
note("ready")
parent = os.getppid()
while os.getppid() == parent:
    time.sleep(1)
"""


@pytest.mark.parametrize("how", ["sys.exit(3)", "sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)", "os.abort()"])
def test_a_child_that_fails_is_started_again(tmp_path: Path, how: str) -> None:
    """A child is restarted after exit code 3, any other failure and any signal; its last end counts."""
    crew = Crew(tmp_path, f"if runs < 3:\n    {how}\n")
    assert crew.wait() == 0
    assert crew.runs() == 4
    assert sum("again in" in what for _, what in crew.said) == 3
    assert crew.said[-1] == ("0", "ended with 0")


def test_a_child_that_ends_well_is_not_started_again(tmp_path: Path) -> None:
    """Other children go on without it."""
    crew = Crew(tmp_path, "", POLITE)
    wait_until(lambda: ("0", "ended with 0") in crew.said and "ready" in crew.lines(1), "the end of one", 60)
    assert crew.end() == 0
    assert (crew.runs(0), crew.runs(1)) == (1, 1)


def test_what_a_person_must_decide_is_not_started_again(tmp_path: Path) -> None:
    """After exit code 4 the others go on without the child, and the code is that of the supervisor at the end."""
    crew = Crew(tmp_path, "sys.exit(4)", POLITE)
    wait_until(lambda: any("a person must decide" in what for _, what in crew.said) and "ready" in crew.lines(1), "it", 60)
    assert crew.end() == 4
    assert (crew.runs(0), crew.runs(1)) == (1, 1)
    alone = Crew(tmp_path / "alone", "sys.exit(4)")
    assert (alone.wait(), alone.runs()) == (4, 1)


def test_a_wrong_call_ends_all(tmp_path: Path) -> None:
    """Other children are asked to stop, and the exit code tells of the wrong call."""
    wait = "while 'ready' not in open(sys.argv[1].replace('0.txt', '1.txt')).read(): time.sleep(0.01)\nsys.exit(2)"
    crew = Crew(tmp_path, wait, POLITE)
    assert crew.wait() == 2
    assert ("0", "ended with 2") in crew.said
    assert crew.runs(0) == 1
    assert crew.lines(1)[-1] == f"asked {signal.SIGTERM.value}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_is_passed_on_once_and_waited_for(tmp_path: Path, number: int) -> None:
    """Each child gets the signal once, and ends by itself; none is started again."""
    crew = Crew(tmp_path, POLITE, POLITE)
    wait_until(lambda: all("ready" in crew.lines(index) for index in (0, 1)), "two children", 60)
    groups = [os.getpgid(crew.pid(index)) for index in (0, 1)]
    assert crew.end(number) == 0
    assert groups == [crew.pid(index) for index in (0, 1)], "or Ctrl-C in a terminal would come twice"
    for index in (0, 1):
        assert crew.lines(index)[1:] == ["ready", f"asked {number}"]


def test_the_worst_exit_code_is_ours(tmp_path: Path) -> None:
    """The supervisor ends with the worst of its children's last exit codes."""
    crew = Crew(tmp_path, POLITE, POLITE.replace('int(os.environ.get("CODE", "0"))', "3"))
    wait_until(lambda: all("ready" in crew.lines(index) for index in (0, 1)), "two children", 60)
    assert crew.end() == 3


def test_a_child_that_a_signal_ends(tmp_path: Path) -> None:
    """A child ended by a signal has the exit code that a shell gives it."""
    crew = Crew(tmp_path, "note('ready')\ntime.sleep(600)", POLITE)
    wait_until(lambda: all("ready" in crew.lines(index) for index in (0, 1)), "two children", 60)
    assert crew.end() == 128 + signal.SIGTERM
    assert ("0", "was ended by SIGTERM") in crew.said


def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    """A child is killed after `drain_s`, and the exit code tells."""
    crew = Crew(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nnote('ready')\ntime.sleep(600)", drain_s=0.3)
    wait_until(lambda: "ready" in crew.lines(), "the child", 60)
    pid = crew.pid()
    assert crew.end() == 128 + signal.SIGKILL
    assert not alive(pid)
    assert "does not stop: killed" in crew.said[-1][1]


def test_a_stop_while_a_child_waits_to_be_started_again(tmp_path: Path) -> None:
    """A stop starts no child any more, and its last exit code counts."""
    crew = Crew(tmp_path, "sys.exit(3)", first_s=600.0)
    wait_until(lambda: any("again in 600 s" in what for _, what in crew.said), "the pause", 60)
    assert crew.end() == 3
    assert crew.runs() == 1


def test_what_cannot_be_started_is_tried_again() -> None:
    """A missing program is reported, and tried again."""
    said: list[str] = []
    stop = Stop()
    supervisor = Supervisor(
        [["/nothing/here"]],
        labels=["w"],
        clock=SystemClock(),
        say=lambda _, what: said.append(what),
        new_backoff=lambda: Backoff(0.001, 0.001),
    )
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(supervisor.run(stop)))
    thread.start()
    wait_until(lambda: len(said) >= 2, "two attempts", 60)
    stop.number = signal.SIGTERM
    thread.join(60)
    assert ended == [3]
    assert all("can't be started" in what for what in said)


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def lines(program: Program, count: int) -> list[str]:
    """Return the next lines of output; they may come all at once."""
    assert program.process.stdout is not None
    return [program.process.stdout.readline().decode() for _ in range(count)]


CHILD = """
import os, time
import pipeline.roles.supervisor as supervisor
supervisor.{without}
supervisor.die_with_parent()
print("child", os.getpid(), flush=True)
time.sleep(600)
"""
PARENT = """
import sys
from pipeline.adapters.clock import SystemClock
from pipeline.roles.signals import stopping_on_signals
from pipeline.roles.supervisor import Supervisor
with stopping_on_signals() as stop:
    command = [sys.executable, "-c", {child!r}]
    supervisor = Supervisor([command] * 2, labels=["a", "b"], clock=SystemClock(), say=lambda *_: None)
    sys.exit(supervisor.run(stop))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize(
    "without", ["_die_at_end_of_input = lambda: None", "_PR_SET_PDEATHSIG = 0"], ids=["by the kernel", "by the pipe"]
)
def test_children_end_with_a_supervisor_that_is_killed(tmp_path: Path, without: str) -> None:
    """kill -9 of the supervisor leaves no child behind, by either of two ways alone."""
    text = PARENT.format(child=CHILD.format(without=without))
    with Program(stderr=tmp_path / "stderr", program=[sys.executable, "-c", text]) as parent:
        pids = [int(line.split()[1]) for line in lines(parent, 2)]
        assert all(map(alive, pids))
        parent.signal(signal.SIGKILL)
        try:
            wait_until(lambda: not any(map(alive, pids)), "the end of the children", 30)
        finally:
            for pid in filter(alive, pids):
                os.kill(pid, signal.SIGKILL)


def test_the_command_supervises(tmp_path: Path) -> None:
    """Two workers without a broker fail, and are restarted, until SIGTERM; each has its own name, folder and port."""
    arguments = ("--from", "kafka://127.0.0.1:1", "--data", str(tmp_path / "d"), "--port", "0", "--name", "w")
    fast = ("--set", "kafka_timeout_ms=100")
    with Program("worker", *arguments, *fast, "--processes", "2", stderr=tmp_path / "stderr") as program:
        text = "".join(lines(program, 4))
        program.signal(signal.SIGTERM)
        assert program.wait(60) in (0, 1, 3, 128 + signal.SIGTERM)
    assert "w-0 started" in text
    assert "w-1 started" in text
    assert "again in 0.5 s" in text
