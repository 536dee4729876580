"""Exact counts from many processes: apps publish deltas from any thread, a log carries merged batches, workers fold them
exactly once, and a query API serves merged views that say how stale they are.

    from pipeline import Publisher, Reader

Reading order, from the data types outward:

1. `errors`, `core.record`, `core.kinds`: what can go wrong, the types that travel, and how values of each kind merge.
2. `core.codec`, `core.sequence`, `core.token`: encoding, deduplication, reads of one's own writes.
3. `core.task`: the protocol of a partition, as a state machine without side effects.
4. `ports`: the interfaces to log, store and clock; `adapters.memory` is the shortest implementation, `adapters.embedded` the
   durable one.
5. `worker.restore`, `worker.partition`: restore, fold, commit. `worker.loop`, with `active` and `commits`, runs what is
   assigned; `worker.replicas` follows the changelog for query servers and standbys; `worker.watchdog` ends a process that
   stands still.
6. `publisher`, which has a reading order of its own: buffering, sending, spooling. `native` has a second table.
   `ingest`, `core.statsd`, `core.otlp_wire` and `adapters.bridge` take deltas from programs that do not use it.
7. `core.query`, `query.reader`, `query.api`: answers.
8. `adapters.kafka`: `options` first, then `errors`, `reader`, `writer`, `transaction`, `log`.
9. `core.placement`: which member gets which partition. `adapters.faust`: `member_metadata`, `app`, `membership`, then
   `agents`, `offsets` and `changes` (with `worker.changes`) for users' own agents.
10. `roles`: `embedded` (all in one process), `worker` with `member`, and `server`; then `cli`.
"""

from typing import TYPE_CHECKING, Any

from pipeline.connect import Publisher
from pipeline.core.token import Token
from pipeline.errors import (
    BadRecord,
    BufferFull,
    Fenced,
    Invalid,
    LogCorrupt,
    NotFound,
    NotReady,
    PipelineError,
    RecordsLost,
    StoreCorrupt,
    Unavailable,
)

if TYPE_CHECKING:
    from pipeline.roles.agents import faust_app as faust_app
    from pipeline.roles.readers import AsyncReader, Reader

__all__ = [
    "AsyncReader",
    "BadRecord",
    "BufferFull",
    "Fenced",
    "Invalid",
    "LogCorrupt",
    "NotFound",
    "NotReady",
    "PipelineError",
    "Publisher",
    "Reader",
    "RecordsLost",
    "StoreCorrupt",
    "Token",
    "Unavailable",
]


def __getattr__(name: str) -> Any:
    """Import readers and `faust_app` on first use: an app that only publishes needs no HTTP client, Faust or RocksDB.

    `faust_app` is not in `__all__`, because the package can be installed without Faust.
    """
    if name in ("Reader", "AsyncReader"):
        from pipeline.roles.readers import AsyncReader, Reader

        globals().update(Reader=Reader, AsyncReader=AsyncReader)
        return globals()[name]
    if name != "faust_app":
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    try:
        from pipeline.roles.agents import faust_app
    except ModuleNotFoundError as error:
        raise ImportError(f"pipeline.faust_app needs {error.name}: pip install 'delta-pipeline[server]'") from error
    return faust_app
