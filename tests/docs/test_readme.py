"""README and docs tell the truth: their code blocks run, their tables are complete, their links lead somewhere."""

from __future__ import annotations

import json
import os
import pkgutil
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from pipeline.metrics import CATALOGUE
from pipeline.settings import GROUPS
from tests.docs.tables import PAGES, ROOT, with_tables
from tests.support import UpProcess

README = PAGES[0]
BLOCKS = [it for page in PAGES for it in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), flags=re.S | re.M)]


def blocks(language: str) -> list[str]:
    """Return the code blocks of one language: those of the README, then of the pages in alphabetical order."""
    return [code for name, code in BLOCKS if name == language]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A server for all blocks of this file."""
    with UpProcess(tmp_path_factory.mktemp("readme") / "data") as up:
        yield up


def run(command: list[str], cwd: Path, timeout_s: float = 60.0) -> str:
    """Run a command as a user would, with this interpreter's programs first on the PATH; return its output."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_tables_are_complete() -> None:
    """Every setting, metric, error and state stands in the docs, as the code has it."""
    text = "".join(page.read_text() for page in PAGES)
    assert with_tables(text) == text, "run python -m tests.docs.tables"
    assert text.count("written by python -m tests.docs.tables") == 7


def test_the_readme_is_short() -> None:
    """A user reads one page of at most 200 lines, and finds every other page from there."""
    text = README.read_text()
    assert text.count("\n") <= 200
    assert all(f"(pipeline/docs/{page.name})" in text for page in PAGES[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """Each link to a file or a heading of ours leads there."""
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text()):
        other = page.parent / target if target else page
        assert other.exists(), target
        headings = {
            re.sub(r"[^a-z0-9 -]", "", it.lower()).replace(" ", "-")
            for it in re.findall(r"^#+ (.*)$", other.read_text() if heading else "", re.M)
        }
        assert not heading or heading in headings, heading


def test_what_the_page_on_security_names_is_there() -> None:
    """Each setting and each metric that it names exists."""
    page = (ROOT / "pipeline" / "docs" / "security.md").read_text()
    named = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)`", page))
    settings = {item.name for group in GROUPS for item in fields(group)}
    assert len(named) > 15
    assert not named - settings - {it.name for it in CATALOGUE}


def test_each_step_of_a_delta_is_there() -> None:
    """The page that follows a delta has at most 30 steps, and names functions that exist."""
    text = (ROOT / "pipeline" / "docs" / "inside.md").read_text()
    steps = re.split(r"^\d+\. ", text, flags=re.M)[1:]
    assert 20 <= len(steps) <= 30
    for step in steps:
        names = re.findall(r"`(pipeline\.[\w.]+)`", step)
        assert names, step
        for name in names:
            found = pkgutil.resolve_name(name)
            assert callable(found) or isinstance(found, property), name


def test_docs_command(tmp_path: Path) -> None:
    """`pipeline docs` names every page, and prints one."""
    shown = run(["pipeline", "docs"], tmp_path)
    assert all(page.stem in shown for page in PAGES[1:])
    assert run(["pipeline", "docs", "kafka"], tmp_path) == (ROOT / "pipeline" / "docs" / "kafka.md").read_text()


def test_setup_commands_are_those_of_ci() -> None:
    """CI runs the README's test command, word for word, and nothing else."""
    ci = (ROOT / ".ci" / "run").read_text()
    test_command = next(code for code in blocks("setup") if "pytest" in code)
    for step in test_command.strip().split(" && "):
        assert step in ci


@pytest.mark.parametrize("code", blocks("python")[1:], ids=lambda code: code.splitlines()[0])
def test_python_blocks_run(code: str, server: UpProcess, tmp_path: Path) -> None:
    """Each Python block runs against a server."""
    run([sys.executable, "-c", code.replace("http://127.0.0.1:8080", server.url)], tmp_path)


def test_the_example_can_be_run_twice(tmp_path: Path) -> None:
    """The example is short, and counts on when it is run again."""
    example = blocks("python")[0]
    assert len([line for line in example.splitlines() if line.strip()]) <= 22
    with UpProcess(tmp_path / "data") as up:
        code = example.replace("http://127.0.0.1:8080", up.url)
        answers = [run([sys.executable, "-c", code], tmp_path).split()[0] for _ in range(2)]
    assert answers == ["16012.5", "32025.0"]


@pytest.mark.parametrize("code", blocks("sh"), ids=lambda code: code.splitlines()[0][:40])
def test_shell_blocks_run(code: str, server: UpProcess, tmp_path: Path) -> None:
    """Each line of a shell block succeeds, against a server; the example of a spool leaves deltas to drain."""
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
    body, headers = json.dumps([delta]).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.url}/v1/deltas", body, headers)
    with urllib.request.urlopen(request, timeout=10) as accepted:
        token = json.load(accepted)["token"]
    with urllib.request.urlopen(f"{server.url}/v1/views/shown?by=region&after={token}", timeout=10) as answer:
        real = json.load(answer)
    assert real.keys() == shown.keys()
    assert real["as_of"].keys() == shown["as_of"].keys()
    assert real["series"][0].keys() == shown["series"][0].keys()
