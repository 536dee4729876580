"""Roles of processes: each joins core, adapters and settings into one process.

`embedded` is all in one process; `worker` folds partitions of a Kafka log (`member`: in a group with others, `agents`: with
the user's agents beside it); `server` answers reads; `statsd` takes StatsD lines. Start at `service`, which puts an HTTP
server in front of a role. `supervisor` starts several workers; The rest looks at what is kept, or changes it.
"""
