"""Private folders. A reader of a spool or a store learns the ids of producers; a writer could send in their names."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from pipeline.errors import Invalid

_log = logging.getLogger(__name__)
_warned: set[Path] = set()
"""Folders that were warned about already."""


def make_private(folder: Path) -> None:
    """Create a folder for this user only, if it does not exist. Raises what `check_private` does, and `OSError`."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raise `Invalid` if a folder is world-writable; warn, once, if group or others have any access."""
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except FileNotFoundError:
        return
    if mode & stat.S_IWOTH:
        raise Invalid(f"{folder}: everybody can write to it (mode {mode:o}); chmod 700, or name a folder in it")
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and folder not in _warned:
        _warned.add(folder)
        _log.warning("%s: others can look into it (mode %o); it is for one user: chmod 700", folder, mode)
