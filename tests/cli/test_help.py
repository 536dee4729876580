"""`--help` teaches, and is quick."""

from __future__ import annotations

import subprocess
import sys

import pytest
import typer

from pipeline.cli.app import app
from tests.cli.conftest import Here
from tests.support import ROOT, environment, pipeline

COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def test_the_program_shows_its_commands_and_a_first_run(here: Here) -> None:
    """Without arguments and with --help: the purpose, examples, each command with a whole sentence, exit codes."""
    shown = here("--help").stdout
    alone = here()
    assert shown in (alone.stdout, alone.stderr)
    for command in COMMANDS:
        line = next(line for line in shown.splitlines() if line.startswith(f"  {command} "))
        assert line.endswith(".")
        assert not line.endswith("...")
    assert "pipeline demo" in shown
    assert "Exit codes: 0 fine" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example(here: Here, command: str) -> None:
    """The help of each command shows a call, says what every option does, and has no markup."""
    done = here(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"\n      pipeline {command}" in done.stdout
    assert "[/" not in done.stdout.replace("[/app]", "")  # no markup is left over
    assert "\x1b" not in done.stdout
    for parameter in typer.main.get_command(app).commands[command].params:  # type: ignore[attr-defined]
        assert parameter.help, f"{command} {parameter.name} has no help"


def test_version() -> None:
    """`--version` prints the installed version, and nothing else."""
    done = pipeline("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip() in ("0.1.0", "not installed")


def test_help_loads_nothing_heavy() -> None:
    """Packages that a command needs are imported when it runs."""
    heavy = ["httpx", "psutil", "pydantic", "re2", "rocksdict", "structlog", "uvicorn"]
    code = (
        "import sys\nsys.argv = ['pipeline', '--help']\nfrom pipeline.cli import main\n"
        f"try:\n    main()\nexcept SystemExit:\n    print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr == "[]\n"


def test_a_missing_package_is_named() -> None:
    """Without the server extra the error says what to install, not where it failed."""
    code = "import sys\nsys.modules['typer'] = None\nfrom pipeline.cli import main\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("pipeline: typer is not installed: the programs need the server extra")
