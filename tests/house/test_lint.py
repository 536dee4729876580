"""ruff, mypy and bandit, as tests: a failure here fails in CI, with the tool's own words."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_tool(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    if done.returncode != 0:
        pytest.fail(f"{' '.join(arguments)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    """The rules of pyproject.toml hold, the banned clocks among them."""
    run_tool("ruff", "check", "--output-format=concise", ".")


def test_code_is_formatted() -> None:
    """`ruff format .` would change nothing."""
    run_tool("ruff", "format", "--check", ".")


@pytest.mark.timeout(300)
def test_types_are_strict() -> None:
    """`mypy --strict` accepts the package."""
    run_tool("mypy", "--strict", "--no-error-summary")


@pytest.mark.long
def test_no_insecure_call() -> None:
    """bandit finds nothing in the package but what is marked as harmless, each mark for one rule."""
    pytest.importorskip("bandit", reason="pip install -c constraints.txt -e '.[dev]'")
    run_tool("bandit", "-q", "-c", "pyproject.toml", "-r", "pipeline", "dashboards")
    for path in (ROOT / "pipeline").rglob("*.py"):
        for line in path.read_text().splitlines():
            assert not re.search(r"# nosec(?! B\d{3}\b)", line), f"{path}: {line.strip()}: nosec names its rule"
