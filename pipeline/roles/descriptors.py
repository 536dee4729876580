"""Bound on the sockets of an HTTP server, so that databases and Kafka always have descriptors for their own."""

from __future__ import annotations

import logging
from contextlib import suppress

from pipeline.adapters.open_files import HOW_TO_RAISE, files_limit
from pipeline.roles.connections import RESERVED_MAX

_log = logging.getLogger(__name__)
_RAISED_MAX = 65_536
"""More descriptors than any bound needs: a limit may be raised to billions, and some programs walk through all."""
_SPARE = 16
"""Connections that are accepted while others, which make room for them, are being closed."""


def raise_limit() -> int:
    """Raise the limit on open files as far as this process may, and return it; 0 where there is none."""
    soft = files_limit()
    if not soft:
        return 0
    import resource  # not on Windows, which has no limit

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _RAISED_MAX if hard == resource.RLIM_INFINITY else min(hard, _RAISED_MAX)
    if soft < wanted:
        with suppress(OSError, ValueError):  # macOS has a limit below the one it states
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return wanted
    return soft


def sockets_within(limit: int, wanted: int) -> int:
    """Return how many sockets there may be: `wanted`, or half of the limit on open files, which is logged."""
    most = limit // 2 - RESERVED_MAX - _SPARE if limit else wanted
    if most >= wanted:
        return wanted
    most = max(1, most)
    _log.warning(
        "the HTTP server has at most %d connections, not sockets_max=%d: a process may open %d files, and half of them are "
        "for databases and Kafka; %s",
        *(most, wanted, limit, HOW_TO_RAISE),
    )
    return most
