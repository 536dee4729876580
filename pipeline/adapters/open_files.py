"""Shares of RocksDB in the files that this process may open.

Half of the limit is for the sockets of the HTTP server (`roles.descriptors`). Of the other half three quarters are for
stores, an eighth is for the embedded log, and the rest is for Kafka and everything else.
"""

from __future__ import annotations

import logging
import sys

_log = logging.getLogger(__name__)
_STORE_MAX = 256
_LEAST = 20
"""RocksDB takes no fewer."""
HOW_TO_RAISE = "raise the limit (ulimit -n, LimitNOFILE= of systemd, --ulimit nofile= of Docker)"
"""Advice for a limit on open files that is too low."""


def files_limit() -> int:
    """Return how many files this process may open; 0: any number."""
    if sys.platform == "win32":
        return 0
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if soft == resource.RLIM_INFINITY else soft


def files_of_store(limit: int, store_count: int) -> int:
    """Return how many files each of so many stores may keep open, of a process that may open `limit`."""
    share = limit * 3 // 8 // max(store_count, 1) if limit else _STORE_MAX
    if share < _LEAST:
        _log.warning(
            "%d stores of RocksDB may need %d open files, and this process may open %d for all it does: %s",
            *(store_count, store_count * _LEAST, limit, HOW_TO_RAISE),
        )
    return max(_LEAST, min(_STORE_MAX, share))


def files_of_log(limit: int) -> int:
    """Return how many files the embedded log may keep open; -1: all that it has."""
    return max(_LEAST, limit // 16) if limit else -1
