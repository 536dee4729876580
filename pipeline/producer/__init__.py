"""Whoever sends. Reading order:

- `cell` (one series, where deltas wait), `buffer` and `views` (of series); `account` (the memory that all of it may take).
- The modes of `buffering`: `handle` (a list of a thread's own), `shards`, and `spooling` on a `spool` (it survives a kill).
- `sealing`, `delivery`: batches, and sending them; `keeping`: which of them a spool has; `snapshot`: what `local` shows.
- `flusher`, `linger`, `running`: what is done when, by which thread; `client`: the publisher; `process`: fork and exit.
- Other ways in: `batch` and `columns` (many rows at once), `timing`, `statsd`, and `gateway` (deltas over HTTP).
"""
