"""Record deltas in an app, and send them until the log has them. Reading order:

- `view` is what apps record to, and `table` where recorded deltas accumulate until they are drained. Both exist twice: in
  Python, which is the specification, and in the native core; `views` takes those in use.
- `batching` makes batches of drained states, `flusher` drains, `sender` sends; `runtime` has the threads that do so, and
  `memory` accounts for the bytes of batches.
- `client` is the publisher; `fork` has it begin anew in forked children, and drain when the process ends.
- `spool` outlives a kill, and `rescue` sends what processes that are gone have left in it.
"""
