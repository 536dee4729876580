"""rustfmt and clippy over the native core, as tests; and a written argument for each `unsafe`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from pipeline import native
from tests.house.test_tidy import ROOT

CRATE = ROOT / "pipeline" / "native"


def cargo(*arguments: str) -> None:
    """Run cargo in the crate; skip the test where the native core could not be built, or the tool is missing."""
    found = shutil.which("cargo")
    if found is None or native.extension() is None:
        assert os.environ.get("PIPELINE_NATIVE") != "require"
        pytest.skip("cargo is not on the PATH" if found is None else native.describe())
    if subprocess.run([found, arguments[0], "--version"], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"install it first: rustup component add {arguments[0].replace('fmt', 'rustfmt')}")
    env = {**os.environ, "PYO3_PYTHON": sys.executable, "CARGO_TARGET_DIR": str(CRATE / "target")}
    done = subprocess.run([found, *arguments], cwd=CRATE, env=env, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode != 0:
        pytest.fail(f"cargo {' '.join(arguments)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_rust_is_formatted() -> None:
    """`cargo fmt` would change nothing."""
    cargo("fmt", "--check")


@pytest.mark.long
@pytest.mark.timeout(300)
def test_clippy_finds_nothing() -> None:
    """`cargo clippy` finds nothing, and its warnings are errors."""
    cargo("clippy", "--release", "--", "-D", "warnings")


def test_unsafe_is_argued_for() -> None:
    """The lines above each `unsafe` say why it is safe, or, above a function, when."""
    wrong = []
    for path in sorted(CRATE.glob("src/**/*.rs")):
        lines = path.read_text("utf-8").splitlines()
        for number, line in enumerate(lines):
            if re.search(r"\bunsafe\b", line) and not line.lstrip().startswith(("//", "type ")):
                above = "\n".join(lines[max(0, number - 6) : number])
                if "// SAFETY: " not in above and "/// # Safety" not in above:
                    wrong.append(f"{path.name}:{number + 1}")
    assert not wrong
