"""Folders that are for one user: whoever can read what is in a spool or a store knows the ids of producers, and whoever can
write there could send in their names.
"""

from __future__ import annotations

import logging
import stat
from pathlib import Path

from pipeline.errors import Invalid

_log = logging.getLogger(__name__)
_warned: set[Path] = set()
"""Folders that somebody was told of already."""


def make_private(folder: Path) -> None:
    """Make a folder that only this user can look into, if it is not there. Raises as `check_private`, and `OSError`."""
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    check_private(folder)


def check_private(folder: Path) -> None:
    """Raise `Invalid` if everybody can write to a folder; say so, once, if the group can, or others can look into it."""
    try:
        mode = stat.S_IMODE(folder.stat().st_mode)
    except FileNotFoundError:
        return
    if mode & stat.S_IWOTH:
        raise Invalid(f"{folder}: everybody can write to it (mode {mode:o}); chmod 700, or name a folder in it")
    if mode & (stat.S_IRWXG | stat.S_IRWXO) and folder not in _warned:
        _warned.add(folder)
        _log.warning("%s: others can look into it (mode %o); it is for one user: chmod 700", folder, mode)
