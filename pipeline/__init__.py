"""Count things in production: apps publish deltas from any thread, a log carries merged batches, workers fold them
exactly once, and a query API serves merged views that say how stale they are.

    from pipeline import Publisher, Reader

Reading order, from the nouns inward out:

1. `errors`, `core.record`, `core.merge`: what can go wrong, what travels, and the one algebra that merges it.
2. `core.codec`, `core.sequence`, `core.token`: bytes, exactly once, read your writes.
3. `core.task`: the protocol of a partition, as a state machine without side effects.
4. `ports`: what the shells need; `adapters.memory` is the shortest implementation, `adapters.embedded` the durable one.
5. `worker.follower`, `worker.partition`, `worker.loop`: restore, fold, commit; `worker.replica` follows for query servers.
6. `producer.buffer`, `producer.client`: where deltas wait, and how they leave.
7. `core.view`, `query.reader`, `query.api`: answers.
8. `adapters.kafka`: `options` first, then `errors`, `reader`, `writer`, `transaction`, `log`.
9. `engine` (all in one process), `cluster` (each role a process of its own), `cli`: everything joined.
"""

from pipeline.connect import Publisher, Reader
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

__all__ = [
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
