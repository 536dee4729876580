"""The native core, where it was built: a Rust crate in this folder, compiled at install by `hatch_build`.

It does for each delta the same as `pipeline.publisher.table` does in Python, for each entry that a worker folds the same as
`pipeline.core.overlay` and `pipeline.core.changes`, for each entry of a scan the same as
`pipeline.query.grouping`, for each message of a commit the same as confluent_kafka's `Producer.produce`, and nothing else.
Both always work.
`PIPELINE_NATIVE` chooses, at install and when the program runs: `auto` (the default) uses the native core if it is there,
`no` does not, and with `require` its absence is an error that says what to do.
"""

from __future__ import annotations

import importlib
import logging
import os
from functools import cache
from typing import Any

from pipeline.errors import Invalid

VERSION = 11
"""The version of the extension that this package needs; `src/lib.rs` has the same number."""
VARIABLE = "PIPELINE_NATIVE"
_MODULE = "pipeline_native"
_log = logging.getLogger(__name__)


@cache
def _found() -> tuple[Any, str]:
    """Return the extension, or None, and a sentence that says which is in use and why."""
    wish = os.environ.get(VARIABLE, "auto")
    if wish not in ("auto", "no", "require"):
        raise Invalid(f"{VARIABLE} is auto, no or require; got {wish!r:.50}")
    if wish == "no":
        return None, f"the native core is not in use: {VARIABLE}=no"
    try:
        extension = importlib.import_module(_MODULE)
    except ImportError as error:
        there = "is not installed" if isinstance(error, ModuleNotFoundError) else f"can't be loaded: {error}"
        return _without(wish, f"the native core {there}")
    if extension.VERSION != VERSION:
        return _without(
            wish, f"the native core has version {extension.VERSION}, and {VERSION} is needed: it is of another build"
        )
    return extension, f"the native core is in use, version {VERSION}"


def is_required() -> bool:
    """Return whether the absence of what is native is an error."""
    return os.environ.get(VARIABLE) == "require"


def _without(wish: str, why: str) -> tuple[None, str]:
    what = "install the package again, with a Rust toolchain (cargo) on the PATH"
    if wish == "require":
        raise Invalid(f"{why}, and {VARIABLE}=require: {what}")
    _log.info("%s; recording costs more without it. To have it, %s", why, what)
    return None, f"{why}; {what}"


def extension() -> Any:
    """Return the extension module, or None where the plain implementation is to be used.

    Raises `Invalid` where the native core is required and not there.
    """
    return _found()[0]


def in_use() -> bool:
    """Return whether the native core is in use."""
    return extension() is not None


def describe() -> str:
    """Return a sentence that says whether the native core is in use, and why not."""
    return _found()[1]
