"""The layers of the house, and the cost of `import pipeline`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HEAVY = [
    "faust",
    "psutil",
    "pydantic",
    "re2",
    "rich",
    "rocksdict",
    "starlette",
    "structlog",
    "typer",
    "uvicorn",
]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)


def test_imports_keep_the_contracts() -> None:
    """Every import points down, every module has a layer, drivers stay where they belong (pyproject.toml)."""
    done = run_python(
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    )
    if done.returncode != 0:
        pytest.fail(f"lint-imports:\n{done.stdout}{done.stderr}", pytrace=False)


@pytest.mark.parametrize("statement", ["import pipeline", "from pipeline import Publisher"])
def test_publishing_loads_no_server_package(statement: str) -> None:
    """An app that publishes pays for no web framework, store, or command line."""
    done = run_python(f"{statement}\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_faust_is_loaded_without_our_arguments() -> None:
    """Faust looks for options of its own in `sys.argv` when it is imported: ours are hidden from it, and stay."""
    done = run_python(
        "import sys; sys.argv = ['pipeline', '--loop', 'nonsense', '--datadir']\nimport pipeline\n"
        "pipeline.faust_app(); print(sys.argv[1:])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['--loop', 'nonsense', '--datadir']"
