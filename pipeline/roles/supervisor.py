"""`pipeline worker --processes N`: starts workers, starts those again that fail, and ends with them.

The workers are children in process groups of their own, so that Ctrl-C in a terminal reaches them once, through here.
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
"""More than a worker takes for its requests and its last commits."""


def child_command(own: Sequence[str], index: int, *, name: str, data: str, port: int) -> list[str]:
    """The command line of child `index`: our own, with what only this child has behind it, where it wins.

    `port` is the first child's; 0: each picks a free one.
    """
    command = [*own[:-1], *(argument for argument in own[-1:] if argument != "--")]
    command += ["--supervised", "--data", str(Path(data) / str(index)), "--port", str(port and port + index)]
    return [*command, "--name", f"{name}-{index}"]


def die_with_parent() -> None:
    """In a child: be killed as soon as the parent has ended, however it did.

    Linux sees to it. Elsewhere, and for a parent that ended before this call, there is standard input: a pipe into which
    nobody writes and whose other end only the parent has.
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
    """How long to wait before a child is started again: `first_s`, doubling to `most_s`; `first_s` again after health."""

    def __init__(self, first_s: float = 0.5, most_s: float = 30.0, healthy_s: float = 60.0) -> None:
        self._first_s = self._next_s = first_s
        self._most_s = most_s
        self._healthy_s = healthy_s

    def after(self, ran_s: float) -> float:
        """The pause behind a run of so many seconds."""
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
        """When it is to be started; None: it runs, or has ended for good."""
        self.code: int = Exit.OK


class Supervisor:
    """Runs each command until it ends with 0; other ends start it again after a pause.

    But not 2, a wrong call, which is everybody's, and ends all; nor 4, after which every start would end in the same way
    until a person has decided: the others go on without it. `say` gets a line for each event: whose it is, and what it was.
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
        """Until `stop` is set and all have ended, or all have ended by themselves; the worst exit code.

        That of a child is its last one: 128 and the signal's number, as a shell has it, if a signal ended it.
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
        """Start it again after a pause, in seconds."""
        now_s = self._clock.monotonic_s()
        pause_s = child.backoff.after(now_s - child.began_s)
        child.code, child.due_s = code, now_s + pause_s
        return pause_s

    def _ended(self, child: _Child) -> str | None:
        """How it ended, if it has; None while it runs, and if it did not run."""
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
        """Ask those that run to stop, once; wait; kill who does not."""
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
                with suppress(subprocess.TimeoutExpired):  # one that hangs in a disk's write ends when the disk answers
                    child.process.wait(_KILL_S)
                child.code = 128 + signal.SIGKILL
                child.process = None


def _environment() -> dict[str, str]:
    """A child's: if there is something to be waited for, its parent does."""
    return {name: value for name, value in os.environ.items() if name != HOLD_VARIABLE}
