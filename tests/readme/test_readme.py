"""The README tells the truth: its code blocks run, its tables are complete, its commands are those that CI runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme.tables import README, with_tables
from tests.support import UpProcess

TEXT = README.read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.S | re.M)
ROOT = README.parent


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return [code for name, code in BLOCKS if name == language]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A server for all blocks of this file."""
    with UpProcess(tmp_path_factory.mktemp("readme") / "data") as up:
        yield up


def run(command: list[str], cwd: Path) -> str:
    """Run it as a user would, with this interpreter's programs first on the PATH; what it printed."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_tables_are_complete() -> None:
    """Every setting and every metric stands in the README, as the code has it."""
    assert with_tables(TEXT) == TEXT, "run python -m tests.readme.tables"


def test_setup_commands_are_those_of_ci() -> None:
    """CI runs the README's test command, word for word, and nothing else."""
    ci = (ROOT / ".ci" / "run").read_text()
    test_command = next(code for code in blocks("setup") if "pytest" in code)
    for step in test_command.strip().split(" && "):
        assert step in ci


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code: str, server: UpProcess, tmp_path: Path) -> None:
    """Each Python block does what it says, against a server."""
    run([sys.executable, "-c", code.replace("http://127.0.0.1:8080", server.url)], tmp_path)


def test_the_example_is_short() -> None:
    """A newcomer can take the example in at a glance: about twenty lines."""
    assert len([line for line in blocks("python")[0].splitlines() if line.strip()]) <= 22


@pytest.mark.parametrize("code", blocks("sh"), ids=lambda code: code.splitlines()[0][:40])
def test_shell_blocks_run(code: str, server: UpProcess, tmp_path: Path) -> None:
    """Each line of a shell block succeeds, against a server; what the example of a spool leaves behind is there to drain."""
    if "./spool" in code:
        example = next(block for block in blocks("python") if "./spool" in block)
        dies = example.rstrip() + "\n    import os; os._exit(0)\n"
        run([sys.executable, "-c", dies.replace("http://127.0.0.1:8080", "http://127.0.0.1:1")], tmp_path)
    for line in code.strip().splitlines():
        printed = run(["bash", "-ec", line.replace("http://127.0.0.1:8080", server.url)], tmp_path)
        if "pipeline get requests" in line:
            assert "/cart" in printed
            assert "20" in printed
        if "spool drain" in line:
            assert "1 deltas were in none before" in printed


def test_the_answer_is_what_the_api_says(server: UpProcess) -> None:
    """The JSON example has the members of a real answer."""
    shown = json.loads(blocks("json")[0])
    delta = {"view": "shown", "kind": "sum", "labels": {"region": "eu"}, "value": 1}
    with urllib.request.urlopen(f"{server.url}/v1/deltas", json.dumps([delta]).encode(), timeout=10) as accepted:
        token = json.load(accepted)["token"]
    with urllib.request.urlopen(f"{server.url}/v1/views/shown?by=region&after={token}", timeout=10) as answer:
        real = json.load(answer)
    assert real.keys() == shown.keys()
    assert real["as_of"].keys() == shown["as_of"].keys()
    assert real["series"][0].keys() == shown["series"][0].keys()
