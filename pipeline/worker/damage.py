"""What was found wrong with stores, so that a rebuild that does not help is not tried for ever."""

from __future__ import annotations

import threading

from pipeline.errors import LogCorrupt, StoreCorrupt, Unreadable


class Damages:
    """Remembers the damage that was found in the stores of one process. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: set[tuple[int, str]] = set()

    def note(self, partition: int, error: StoreCorrupt) -> None:
        """Note what was found. Raises `LogCorrupt` if it is what a rebuild was to mend: then the changelog holds it.

        That can only be so of an entry whose bytes are whole. What RocksDB's checksums refuse is mended by a rebuild, and
        comes back with a disk that goes on to change bytes.
        """
        if not isinstance(error, Unreadable):
            return
        with self._lock:
            if (partition, str(error)) in self._found:
                raise LogCorrupt(f"{error}; the store was rebuilt for that before, so the changelog holds it too")
            self._found.add((partition, str(error)))
