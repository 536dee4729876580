"""Starts the `pipeline` program in processes that have loaded its modules already, which saves most of a start's CPU.

One helper process loads the package and its dependencies, and starts no thread. It forks once for each program. The fork
takes the arguments, the environment, the folder and the standard streams that it is given and runs `main()`, as an
interpreter of its own would: it is a child of this process, with its own pid, threads and files, and ends as ever.
"""

from __future__ import annotations

import array
import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

PROGRAM = [sys.executable, "-c", "from pipeline.cli import main; main()"]
AT_START = ("LANG", "LC_", "LD_", "MALLOC_", "PIPELINE_NATIVE", "PYTHON", "TZ")
"""Beginnings of the names of variables that matter when an interpreter starts or loads the package."""
PR_SET_CHILD_SUBREAPER = 36
HELPER = "import sys; from tests.preloaded import serve; serve(int(sys.argv[1])); from pipeline.cli import main; main()"
REQUEST_BYTES_MAX = 1_000_000
STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))
_PIPES = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
_PARAMETERS = (
    *("executable", "preexec_fn", "close_fds", "pass_fds", "cwd", "env", "startupinfo", "creationflags", "shell", *_PIPES),
    *("restore_signals", "gid", "gids", "uid", "umask", "start_new_session", "process_group"),
)


class PreloadedPopen(subprocess.Popen[bytes]):
    """`Popen` that forks PROGRAM with its arguments from the helper, and starts any other command as ever."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        given = dict(zip(_PARAMETERS, rest, strict=True))
        env = os.environ if given["env"] is None else given["env"]
        wants_more = given["preexec_fn"] or given["pass_fds"] or given["shell"] or given["process_group"] != -1
        program, arguments = list(args[: len(PROGRAM)]), [str(it) for it in args[len(PROGRAM) :]]
        helper = None if wants_more or program != PROGRAM else _Helper.of_this_process(env)
        if helper is None:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        streams = [own if given[pipe] == -1 else given[pipe] for own, pipe in enumerate(("p2cread", "c2pwrite", "errwrite"))]
        try:
            self.pid = helper.start(arguments, env, Path(given["cwd"] or "").absolute(), streams)
        finally:
            self._close_pipe_fds(*(given[name] for name in _PIPES))  # type: ignore[attr-defined]
        self._child_created = True


class _Helper:
    """Process that forks programs, and ends with this one."""

    _of: ClassVar[dict[int, _Helper]] = {}
    _lock = threading.Lock()

    @classmethod
    def of_this_process(cls, env: Mapping[str, str]) -> _Helper | None:
        """Return the helper, started at the first call; None where there can be none, or where `env` makes another start."""
        if sys.platform != "linux":
            return None
        with cls._lock:
            helper = cls._of.get(os.getpid())
            if helper is None:
                helper = cls._of[os.getpid()] = cls(env)
        return helper if helper._at_start == _at_start(env) else None

    def __init__(self, env: Mapping[str, str]) -> None:
        self._at_start = _at_start(env)
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", HELPER, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=env,
                cwd=Path(__file__).parent.parent,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, arguments: Sequence[str], env: Mapping[str, str], cwd: Path, streams: Sequence[int]) -> int:
        """Start the program and return its pid."""
        request = json.dumps([list(arguments), dict(env), str(cwd)]).encode()
        fds = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))
        with self._lock:
            _adopt(True)
            try:
                self._channel.sendmsg([request], [fds])
                answer = self._channel.recv(REQUEST_BYTES_MAX)
            finally:
                _adopt(False)
        assert answer, f"the helper that starts programs ended with {self._process.wait(10)}"
        return int(answer)


def _at_start(env: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in env.items() if name.startswith(AT_START)}


def _adopt(on: bool) -> None:
    """Set whether descendants whose parent ends become children of this process."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def serve(channel_fd: int) -> None:
    """Fork a process for each request; return in the forks only."""
    _load()
    gc.collect()
    gc.freeze()
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a module that was loaded has started {len(threads) - 1} threads"
    channel = socket.socket(fileno=channel_fd)
    while True:
        request, fds, _, _ = socket.recv_fds(channel, REQUEST_BYTES_MAX, len(STREAMS))
        if not request:
            os._exit(0)
        read_end, write_end = os.pipe()
        between = os.fork()
        if between == 0:
            between = os.getpid()
            pid = os.fork()
            if pid != 0:
                os.write(write_end, b"%d" % pid)
                os._exit(0)
            os.close(read_end)
            os.close(write_end)
            channel.close()
            while os.getppid() == between:  # until it has ended this is no child of the process that asked
                time.sleep(0.001)
            _become(*json.loads(request), fds)
            return
        os.waitpid(between, 0)
        channel.send(os.read(read_end, 20))
        for fd in (read_end, write_end, *fds):
            os.close(fd)


def _load() -> None:
    package = importlib.import_module("pipeline")
    for module in pkgutil.walk_packages(package.__path__, "pipeline."):
        if not module.name.endswith(("__main__", "hatch_build")):
            importlib.import_module(module.name)


def _become(arguments: Sequence[str], env: Mapping[str, str], cwd: str, fds: Sequence[int]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv, sys.orig_argv = ["-c", *arguments], [*PROGRAM, *arguments]
    for number, (fd, (name, mode)) in enumerate(zip(fds, STREAMS, strict=True)):
        os.dup2(fd, number)
        os.close(fd)
        encoding, errors = getattr(sys, name).encoding, getattr(sys, name).errors
        raw = io.FileIO(number, mode, closefd=False)
        buffer = io.BufferedReader(raw) if mode == "r" else io.BufferedWriter(raw)
        lines = name == "stderr" or raw.isatty()
        text = io.TextIOWrapper(buffer, encoding=encoding, errors=errors, line_buffering=lines)
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
