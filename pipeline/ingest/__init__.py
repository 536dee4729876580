"""Take deltas from programs that have no `Publisher`, and count each once.

`gateway` takes those that arrive over HTTP, `admission` says which of them a log may have, `idempotency` makes a repeated
request the same batches again; `statsd` takes lines of StatsD.
"""
