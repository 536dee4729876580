"""`python -m tests.house.latest`: see `--help`."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.house.pins import FILE, ROOT, differences, installed, pinned, rendered

INHERITED_NOT = ("PIP_CONSTRAINT", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Variables that would let packages in that pyproject.toml does not ask for."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.house.latest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(
            "Install the newest of everything that pyproject.toml allows, without constraints.txt, into a fresh virtual\n"
            "environment in a temporary folder, and run the quick part of the suite there (pytest --quick: no broker, no\n"
            "long simulation; a few minutes). Says at the end which versions differ from constraints.txt.\n"
            "Exit code 0: all passed; 1: the install or a test failed."
        ),
        epilog=(
            "examples:\n"
            "  python -m tests.house.latest                   look for a break before users see it\n"
            "  python -m tests.house.latest --write           and, if all passed, pin these versions\n"
            "  python -m tests.house.latest -- -n 1 tests/cli only one folder, in one process"
        ),
    )
    parser.add_argument("--python", default=sys.executable, help="interpreter to make the environment with (default: this)")
    parser.add_argument("--write", action="store_true", help="write the versions to constraints.txt if all tests passed")
    parser.add_argument("pytest", nargs="*", metavar="-- ARGUMENTS", help="further arguments of pytest")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Install, test and compare; return the exit code."""
    given = parse(arguments)
    env = {name: value for name, value in os.environ.items() if name not in INHERITED_NOT}
    with tempfile.TemporaryDirectory(prefix="pipeline-latest-") as folder:
        python = Path(folder) / "venv" / "bin" / "python"
        steps = (
            [given.python, "-m", "venv", str(python.parents[1])],
            [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", "-e", f"{ROOT}[dev]"],
        )
        for step in steps:
            if subprocess.run(step, cwd=ROOT, env=env, check=False).returncode != 0:
                print(f"latest: failed: {' '.join(step)}", file=sys.stderr)
                return 1
        # The caches of another environment's run are not this one's to overwrite.
        command = [str(python), "-m", "pytest", "--quick", "-p", "no:cacheprovider", *given.pytest]
        passed = subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == 0
        found = installed(python)
    changed = differences(pinned(), found)
    print(
        "\n".join(["latest: other than in constraints.txt:", *changed] if changed else ["latest: all as in constraints.txt"])
    )
    print(f"latest: the quick part of the suite {'passed' if passed else 'FAILED'}")
    if passed and given.write:
        FILE.write_text(rendered(found), encoding="utf-8")
        print("latest: constraints.txt is written")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
