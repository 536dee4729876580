"""Record deltas in an app, and send them until the log has them. Reading order:

- `table` is where recorded deltas accumulate until they are drained, and `view` what apps record to. Both exist twice: in
  Python, which says what they do, and in the native core, which does the same; `views` takes those in use.
- `batching` makes batches of what was drained, `flusher` drains, `delivery` sends; `running` has the threads that do so, and
  `account` the memory that batches take.
- `client` is the publisher; `fork` has it begin anew in forked children, and drain when the process ends.
- `spool` outlives a kill; `spooling` is this process' own, and `rescue` sends what other processes have left.
"""
