"""Hatchling's build hook: compiles the native core if there is a Rust toolchain; without one the package is pure Python.

`PIPELINE_NATIVE` is `auto` (the default), `no`, or `require`, with which a failure ends the build.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CRATE = Path(__file__).resolve().parent
LIBRARIES = ("libpipeline_native.so", "libpipeline_native.dylib", "pipeline_native.dll")
BUILD_S_MAX = 900


class NativeHook(BuildHookInterface[Any]):
    """Adds the compiled extension to a wheel, as a module of its own beside the package."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and say in the wheel's tag for which systems it is."""
        wish = os.environ.get("PIPELINE_NATIVE", "auto")
        if self.target_name != "wheel" or wish == "no":
            return
        try:
            library = _compile()
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            if wish == "require":
                raise
            self.app.display_warning(f"The native core is not built, and recording will cost more: {error}")
            return
        suffix = ".pyd" if os.name == "nt" else ".abi3.so"
        include = build_data.setdefault("force_include_editable" if version == "editable" else "force_include", {})
        include[str(library)] = "pipeline_native" + suffix
        include[str(CRATE / "pipeline_native.pyi")] = "pipeline_native.pyi"
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data.update(pure_python=False, tag=f"cp311-abi3-{platform}")


def _compile() -> Path:
    """Compile the crate; return the library."""
    cargo = shutil.which("cargo")
    if cargo is None:
        raise RuntimeError("cargo is not on the PATH")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        raise RuntimeError("a free-threaded Python has no stable ABI to build for")
    digest = runpy.run_path(str(CRATE / "sources.py"))["digest"](CRATE)
    target = Path(os.environ.get("CARGO_TARGET_DIR", CRATE / "target")).resolve()
    env = {
        **os.environ,
        "CARGO_TARGET_DIR": str(target),
        "PIPELINE_NATIVE_SOURCES": digest,
        "PYO3_PYTHON": sys.executable,
    }
    done = subprocess.run(
        [cargo, "build", "--release"], cwd=CRATE, env=env, capture_output=True, text=True, timeout=BUILD_S_MAX, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"cargo failed:\n{done.stderr[-2_000:]}")
    for name in LIBRARIES:
        if (target / "release" / name).exists():
            return target / "release" / name
    raise RuntimeError("cargo made no library")
