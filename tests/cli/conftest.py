"""One server for all tests of a file, and commands run in this process, which is quicker than a new one for each."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Protocol

import pytest

from pipeline.cli.app import run
from tests.support import UpProcess


class Here(Protocol):
    """Runs a command in this process to its end, and returns its exit code and output."""

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]: ...


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A running `pipeline up`; each test uses views of its own."""
    with UpProcess(tmp_path_factory.mktemp("server") / "data") as up:
        yield up


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    """Run commands that need no process of their own."""

    def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["pipeline", *arguments])
        root = logging.getLogger()
        before = root.level, root.handlers[:]
        try:
            with pytest.raises(SystemExit) as ended:
                run()
        finally:
            root.level, root.handlers[:] = before
        code = ended.value.code
        assert isinstance(code, int)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run_here
