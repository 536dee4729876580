"""Supervises worker processes (`pipeline worker --processes N`): starts them, and restarts those that fail.

Each worker has a process group of its own, so that Ctrl-C in a terminal reaches it once, through the supervisor.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from pipeline.errors import Exit
from pipeline.ports import Clock
from pipeline.roles.signals import Stop
from pipeline.settings import HOLD_VARIABLE
from pipeline.threads import POLL_INTERVAL_S

_KILL_S = 5.0
_PR_SET_PDEATHSIG = 1
DRAIN_S = 45.0
"""Time for workers to end: more than their requests and last commits take."""


def child_command(own: Sequence[str], index: int, *, name: str, data: str, port: int) -> list[str]:
    """Return the command line of child `index`: `own`, followed by the options of this child, which win.

    `port` is that of the first child; 0: each child picks a free one.
    """
    command = [*own[:-1], *(argument for argument in own[-1:] if argument != "--")]
    command += ["--supervised", "--data", str(Path(data) / str(index)), "--port", str(port and port + index)]
    return [*command, "--name", f"{name}-{index}"]


def die_with_parent() -> None:
    """Have this process killed as soon as its parent ends, in whatever way.

    Linux does that. On other systems, and for a parent that ended before this call, the end of standard input tells it: a
    pipe whose other end only the parent has.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    threading.Thread(target=_die_at_end_of_input, name="pipeline-parent", daemon=True).start()


def _die_at_end_of_input() -> None:
    with suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGKILL)


class Backoff:
    """Pauses before restarts: `first_s`, doubling up to `most_s`; `first_s` again after a run of `healthy_s`."""

    def __init__(self, first_s: float = 0.5, most_s: float = 30.0, healthy_s: float = 60.0) -> None:
        self._first_s = self._next_s = first_s
        self._most_s = most_s
        self._healthy_s = healthy_s

    def after(self, ran_s: float) -> float:
        """Return the pause after a run of `ran_s` seconds."""
        pause_s = self._first_s if ran_s >= self._healthy_s else self._next_s
        self._next_s = min(2 * pause_s, self._most_s)
        return pause_s


class _Child:
    def __init__(self, label: str, command: Sequence[str], backoff: Backoff) -> None:
        self.label = label
        self.command = command
        self.backoff = backoff
        self.process: subprocess.Popen[bytes] | None = None
        self.began_s = 0.0
        self.due_s: float | None = 0.0
        """Time of the next start; None: the child runs, or has ended for good."""
        self.code: int = Exit.OK


class Supervisor:
    """Runs each command until it ends with 0, and restarts it after a pause if it ends otherwise.

    Exit code 2, a wrong call, is common to all commands and ends all. After 4 a command is not restarted, because a person
    must decide first; the others go on. `say` gets label and text of each event.
    """

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        *,
        labels: Sequence[str],
        clock: Clock,
        say: Callable[[str, str], None],
        new_backoff: Callable[[], Backoff] = Backoff,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._children = [_Child(*child, new_backoff()) for child in zip(labels, commands, strict=True)]
        self._clock = clock
        self._say = say
        self._drain_s = drain_s

    def run(self, stop: Stop) -> int:
        """Run until all children have ended, by themselves or because `stop` is set; return the worst exit code.

        The exit code of a child that a signal ended is 128 and the signal's number, as in a shell.
        """
        ours, theirs = os.pipe()
        try:
            while not stop.wait(POLL_INTERVAL_S):
                for child in self._children:
                    self._look_after(child, ours)
                if any(child.code == Exit.USAGE for child in self._children):
                    self._drain(signal.SIGTERM)
                    return Exit.USAGE
                if not any(child.process or child.due_s is not None for child in self._children):
                    break
            else:
                self._drain(stop.number)
            return max(child.code for child in self._children)
        finally:
            self._kill()
            os.close(ours)
            os.close(theirs)

    def _look_after(self, child: _Child, stdin: int) -> None:
        now_s = self._clock.monotonic_s()
        if child.due_s is not None and now_s >= child.due_s:
            child.due_s, child.began_s = None, now_s
            try:
                child.process = subprocess.Popen(child.command, stdin=stdin, process_group=0, env=_environment())
            except OSError as error:
                self._say(child.label, f"can't be started: {error}")
                self._again(child, Exit.RESTART)
                return
            self._say(child.label, f"started, pid {child.process.pid}")
        how = self._ended(child)
        if how is None:
            return
        if child.code == Exit.DECIDE:
            self._say(child.label, f"{how}; not started again: a person must decide what it says")
        elif child.code in (Exit.OK, Exit.USAGE):
            self._say(child.label, how)
        else:
            self._say(child.label, f"{how}; again in {self._again(child, child.code):g} s")

    def _again(self, child: _Child, code: int) -> float:
        """Plan the next start; return the pause in seconds."""
        now_s = self._clock.monotonic_s()
        pause_s = child.backoff.after(now_s - child.began_s)
        child.code, child.due_s = code, now_s + pause_s
        return pause_s

    def _ended(self, child: _Child) -> str | None:
        """Return how a child ended; None while it runs, and if it was not running."""
        code = None if child.process is None else child.process.poll()
        if code is None:
            return None
        child.process = None
        child.code = 128 - code if code < 0 else code
        if code >= 0:
            return f"ended with {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:  # real-time signals have no names
            return f"was ended by signal {-code}"

    def _drain(self, number: int) -> None:
        """Send the signal to all running children, wait for them, and kill those that do not end."""
        deadline_s = self._clock.monotonic_s() + self._drain_s
        never = threading.Event()
        for child in self._children:
            if child.process is not None:
                self._say(child.label, f"is sent {signal.Signals(number).name}")
                child.process.send_signal(number)
        while any(child.process for child in self._children) and self._clock.monotonic_s() < deadline_s:
            for child in self._children:
                how = self._ended(child)
                if how is not None:
                    self._say(child.label, how)
            never.wait(POLL_INTERVAL_S)
        self._kill()

    def _kill(self) -> None:
        for child in self._children:
            if child.process is not None:
                self._say(child.label, f"does not stop: killed, pid {child.process.pid}")
                child.process.kill()
                with suppress(subprocess.TimeoutExpired):  # a process that hangs in a disk write ends when the disk answers
                    child.process.wait(_KILL_S)
                child.code = 128 + signal.SIGKILL
                child.process = None


def _environment() -> dict[str, str]:
    """Return the environment of a child, without PIPELINE_HOLD: only the supervisor waits."""
    return {name: value for name, value in os.environ.items() if name != HOLD_VARIABLE}
