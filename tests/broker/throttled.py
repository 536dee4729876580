"""`pipeline` on a slow disk: `python -m tests.broker.throttled worker ...`; every call to its stores takes time.

`THROTTLED_WRITE_MS` is the time of each write, `THROTTLED_OPEN_MS` of each open and close; lookups take a tenth of a write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pipeline.roles.kafka_role as role
from pipeline.adapters.rocks import RocksStores
from pipeline.cli import main
from pipeline.ports import Store, StoreView

WRITE_MS, OPEN_MS = "THROTTLED_WRITE_MS", "THROTTLED_OPEN_MS"


class Throttled:
    """A `ports.Store` on a slow disk."""

    def __init__(self, store: Store, write_s: float, open_s: float) -> None:
        self._store, self._write_s, self._open_s = store, write_s, open_s

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        time.sleep(self._write_s / 10)
        return self._store.get(keys)

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        time.sleep(self._write_s / 10)
        return self._store.scan(start, end)

    def snapshot(self) -> StoreView:
        return self._store.snapshot()

    def write(self, keys: Sequence[bytes], values: Sequence[bytes | None]) -> None:
        time.sleep(self._write_s)
        self._store.write(keys, values)

    def close(self) -> None:
        time.sleep(self._open_s)
        self._store.close()


class ThrottledStores:
    """`ports.Stores` on a slow disk."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._stores = RocksStores(*arguments, **settings)
        self._write_s = int(os.environ.get(WRITE_MS, "0")) / 1000
        self._open_s = int(os.environ.get(OPEN_MS, "0")) / 1000

    def open(self, partition: int) -> Store:
        time.sleep(self._open_s)
        return Throttled(self._stores.open(partition), self._write_s, self._open_s)

    def destroy(self, partition: int) -> None:
        self._stores.destroy(partition)

    def set_aside(self, partition: int, reason: str) -> str:
        return self._stores.set_aside(partition, reason)

    def close(self) -> None:
        self._stores.close()


if __name__ == "__main__":
    role.RocksStores = ThrottledStores  # type: ignore[assignment, attr-defined]
    main()
