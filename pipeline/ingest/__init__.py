"""Take deltas from who has no `Publisher`, each counted once.

`gateway` takes those that arrive over HTTP, `admission` says which of them a log may have, `idempotency` makes a repeated
request the same batches again; `statsd` takes lines of StatsD.
"""
