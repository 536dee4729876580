"""Count things in production: apps publish deltas from any thread, a log carries merged batches, workers fold them
exactly once, and a query API serves merged views that say how stale they are.

    from pipeline import Publisher, Reader

Reading order, from the nouns inward out:

1. `errors`, `core.record`, `core.kinds`: what can go wrong, what travels, and the one algebra that merges it.
2. `core.codec`, `core.sequence`, `core.token`: bytes, exactly once, read your writes.
3. `core.task`: the protocol of a partition, as a state machine without side effects.
4. `ports`: what the shells need; `adapters.memory` is the shortest implementation, `adapters.embedded` the durable one.
5. `worker.follower`, `worker.partition`: restore, fold, commit; `worker.loop`, with `active` and `commits`, runs those that
   are ours, `worker.replica` follows the changelog for query servers and standbys, `worker.watchdog` ends what stalls.
6. `publisher` (it has a reading order of its own): where deltas wait, how they leave, and how they outlive a process; the
   table is in `native` too. `ingest`, `core.statsd`, `adapters.statsd`, `adapters.pushed` and `adapters.bridge`: deltas from
   programs that do not use it.
7. `core.view`, `query.reader`, `query.api`: answers.
8. `adapters.kafka`: `options` first, then `errors`, `reader`, `writer`, `transaction`, `log`.
9. `core.placement`: who gets which partition; `adapters.faust`: `wire` (what members tell each other), `app`, `membership`,
   then `agents`, `offsets` and `changes` (with `worker.changes`) for agents of users' own.
10. `engine` (all in one process), `cluster` (each role a process of its own: `worker` with `member`, `server`), `cli`.
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
    from pipeline.adapters.http import HttpReader as Reader
    from pipeline.roles.agents import faust_app as faust_app

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


def __getattr__(name: str) -> Any:
    """Load what an app that only publishes does not pay for: an HTTP client for `Reader`; Faust and RocksDB for `faust_app`.

    `faust_app` is not in `__all__`, because it can be installed without.
    """
    if name == "Reader":
        from pipeline.adapters.http import HttpReader

        globals()[name] = HttpReader
        return HttpReader
    if name != "faust_app":
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    try:
        from pipeline.roles.agents import faust_app
    except ModuleNotFoundError as error:
        raise ImportError(f"pipeline.faust_app needs {error.name}: pip install 'delta-pipeline[server]'") from error
    return faust_app
