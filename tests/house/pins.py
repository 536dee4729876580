"""Reads and writes `constraints.txt`: one `name==version` a line, sorted, behind a comment that says what it is for."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "constraints.txt"
HEAD = """\
# The versions that README's commands and .ci/run install: pip install -c constraints.txt -e '.[dev]'
# What pyproject.toml allows is more: python -m tests.house.latest tries the newest of it, and --write keeps them here.
"""
LINE = re.compile(r"([a-z0-9]+(?:-[a-z0-9]+)*)==([a-zA-Z0-9.!+]+)")
"""A canonical name and a version: no address, no marker, no range."""


def parsed(text: str) -> dict[str, str]:
    """Return versions by name; `ValueError` names the first line that is neither a pin nor a comment."""
    pins: dict[str, str] = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            match = LINE.fullmatch(line)
            if match is None or match[1] in pins:
                raise ValueError(f"constraints.txt: {line!r}")
            pins[match[1]] = match[2]
    return pins


def pinned() -> dict[str, str]:
    """Return the pins in the file."""
    return parsed(FILE.read_text(encoding="utf-8"))


def rendered(pins: Mapping[str, str]) -> str:
    """Return the whole file."""
    return HEAD + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))


def installed(python: Path) -> dict[str, str]:
    """Return the distributions of an interpreter's environment, without this project itself."""
    command = [str(python), "-m", "pip", "freeze", "--exclude-editable", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    pairs = (line.partition("==") for line in done.stdout.splitlines() if "==" in line)
    return {str(canonicalize_name(name)): version for name, _, version in pairs}


def differences(pins: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Return a line for each distribution that is pinned at another version, not pinned, or pinned and not there."""
    lines = []
    for name in sorted(pins.keys() | found.keys()):
        before, now = pins.get(name), found.get(name)
        if before != now:
            lines.append(f"{name}: {before or 'not pinned'} -> {now or 'not installed'}")
    return lines
