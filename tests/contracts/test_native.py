"""The native core is built where possible, loaded where it fits, and optional everywhere else."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline import native
from pipeline.native.sources import digest
from pipeline.publisher import views
from pipeline.publisher.table import Table
from tests.contracts.tables import extension
from tests.support import ROOT, environment

CRATE = ROOT / "pipeline" / "native"


def test_the_extension_is_of_these_sources() -> None:
    """A build of other sources is stale: install the package again."""
    assert digest(CRATE) == extension().SOURCES
    assert f"const VERSION: u32 = {native.VERSION};" in (CRATE / "src" / "lib.rs").read_text("utf-8")


def test_the_stub_says_what_is_there() -> None:
    """The stub lists exactly the public classes and methods of the extension."""
    found = extension()
    tree = ast.parse((CRATE / "pipeline_native.pyi").read_text("utf-8"))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes.keys() == {name for name, value in vars(found).items() if isinstance(value, type)}
    for name, node in classes.items():
        said = {it.name for it in node.body if isinstance(it, ast.FunctionDef) if not it.name.startswith("_")}
        said |= {it.target.id for it in node.body if isinstance(it, ast.AnnAssign) and isinstance(it.target, ast.Name)}
        there = {it for it in vars(getattr(found, name)) if not it.startswith("_")}
        bases = {it for base in node.bases if isinstance(base, ast.Name) for it in vars(getattr(found, base.id, int))}
        assert there - said <= ({"series_type"} & bases) | {"series_type"}, name
        assert said - {"series_type"} == there - {"series_type"}, name


def test_both_tables_have_one_interface() -> None:
    """Both tables have the same methods, with the same parameters."""
    found = extension().Table
    for name in [it for it in vars(found) if not it.startswith("_")]:
        assert hasattr(Table, name) or name == "used_bytes", name
        if inspect.isroutine(getattr(found, name)):
            one, other = (inspect.signature(getattr(kind, name)).parameters for kind in (found, Table))
            assert [it.name for it in one.values()] == [it.name for it in other.values()], name
    assert views.Table is found


def run(code: str, *path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**environment(env), "PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT]))}
    return subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, timeout=60, check=False
    )


SHOW = """
import logging; logging.basicConfig(level="INFO")
from pipeline import native
from pipeline.publisher.views import Table
print(native.in_use(), Table.__module__, native.describe(), native.describe() == native.describe())
"""


def test_no_is_plain() -> None:
    """PIPELINE_NATIVE=no chooses the plain table, whatever is installed."""
    done = run(SHOW, PIPELINE_NATIVE="no")
    assert done.stdout == "False pipeline.publisher.table the native core is not in use: PIPELINE_NATIVE=no True\n"
    assert done.stderr == ""


def test_a_value_that_is_none_is_refused() -> None:
    """An invalid value is refused, and the valid ones are named."""
    assert "PIPELINE_NATIVE is auto, no or require; got 'yes'" in run(SHOW, PIPELINE_NATIVE="yes").stderr


@pytest.mark.parametrize("content", ["VERSION = 999", "raise ImportError('no such symbol')"])
def test_an_extension_that_does_not_fit_is_left_alone(content: str, tmp_path: Path) -> None:
    """A log line says why an unfit extension is not used; with `require` that is an error that says what to do."""
    (tmp_path / "pipeline_native.py").write_text(content)
    done = run(SHOW, tmp_path)
    assert done.stdout.startswith("False pipeline.publisher.table the native core ")
    assert len(done.stderr.splitlines()) == 1
    assert "install the package again" in done.stderr
    refused = run(SHOW, tmp_path, PIPELINE_NATIVE="require")
    assert refused.returncode == 1
    assert "Invalid: the native core" in refused.stderr
    assert "PIPELINE_NATIVE=require: install the package again, with a Rust toolchain" in refused.stderr


def build(tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Build a wheel as pip does, of a tree without its history, offline."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-index", "--no-deps", "--no-build-isolation", "-w"]
    settings = {**environment(env), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return subprocess.run(
        [*command, str(tmp_path), str(ROOT)], env=settings, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture
def no_cargo(tmp_path: Path) -> str:
    """A PATH with everything but a Rust toolchain."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("git", "sh", "env", "uname"):
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return str(folder)


def test_without_cargo_the_package_is_pure(tmp_path: Path, no_cargo: str) -> None:
    """The build says that it is pure, and its wheel is for every system, without sources of the crate."""
    done = build(tmp_path, PATH=no_cargo)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "The native core is not built, and recording will cost more: cargo is not on the PATH" in done.stdout + done.stderr
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "pipeline/native/__init__.py" in names
    assert not [name for name in names if name.endswith((".rs", ".so", ".pyi", "Cargo.toml", "hatch_build.py"))]


def test_without_cargo_require_ends_the_build(tmp_path: Path, no_cargo: str) -> None:
    """The build ends with an error that names cargo."""
    done = build(tmp_path, PATH=no_cargo, PIPELINE_NATIVE="require")
    assert done.returncode != 0
    assert "cargo is not on the PATH" in done.stdout + done.stderr


def test_what_cannot_be_compiled_is_left_out(tmp_path: Path, no_cargo: str) -> None:
    """A toolchain that fails is treated as none, and the end of its output is shown."""
    cargo = Path(no_cargo) / "cargo"
    cargo.write_text("#!/bin/sh\necho 'error: no network' >&2\nexit 101\n")
    cargo.chmod(0o755)
    done = build(tmp_path, PATH=no_cargo)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "error: no network" in done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_what_cargo_makes_is_in_the_wheel(tmp_path: Path, no_cargo: str) -> None:
    """The wheel is tagged for its systems, and has the extension and its stub beside the package."""
    cargo = Path(no_cargo) / "cargo"
    cargo.write_text(
        '#!/bin/sh\nmkdir -p "$CARGO_TARGET_DIR/release"\n: > "$CARGO_TARGET_DIR/release/libpipeline_native.so"\n'
    )
    cargo.chmod(0o755)
    (Path(no_cargo) / "mkdir").symlink_to(shutil.which("mkdir") or "mkdir")
    done = build(tmp_path, PATH=no_cargo, CARGO_TARGET_DIR=str(tmp_path / "target"))
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert "-cp311-abi3-" in wheel.name
    assert {"pipeline_native.abi3.so", "pipeline_native.pyi"} <= {*zipfile.ZipFile(wheel).namelist()}


def test_nothing_that_is_built_is_committed() -> None:
    """Neither libraries nor lock files, which hold addresses of registries, are committed."""
    listed = subprocess.run(
        ["git", "ls-files", "pipeline/native"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert not [name for name in listed.splitlines() if name.endswith((".so", ".lock", ".rlib")) or "/target/" in name]
