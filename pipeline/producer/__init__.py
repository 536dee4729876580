"""The publisher's way out: it drains `pipeline.publisher.table` into batches and sends them. Reading order:

- `sealing`, `delivery`: batches, and sending them; `account`: the memory that they take, and who waits for it.
- `spooling`, `keeping`: the spool of this process, and which batches it has; `rescue`: what other processes have left.
- `linger`, `running`: what is done when, by which thread; `client`: the publisher; `process`: fork and exit.
- Other ways in: `statsd`, and `gateway` (deltas over HTTP).
"""
