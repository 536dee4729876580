"""Errors, each named for what the caller must do (DESIGN section 9).

Adapters translate driver errors into these in one place, by code or type, never by message text alone.
"""


class PipelineError(Exception):
    """Base of every error that this package raises on purpose."""


class Unavailable(PipelineError):
    """Retry with backoff: the other side is away, busy, or out of space. Nothing was accepted that was not acknowledged.

    After a timeout the request may have been carried out all the same; sending the same sealed batch again is safe.
    """


class BufferFull(PipelineError):
    """Slow down, or drop and count: the publisher's memory account is exhausted."""


class Fenced(PipelineError):
    """Stop writing: another owner has taken over this partition, or another process opened this spool."""


class StoreCorrupt(PipelineError):
    """Delete the store and restore it from the changelog; the changelog is the truth."""


class LogCorrupt(PipelineError):
    """Stop, and bring the log back from a backup: it is the truth, so nothing can be restored in its place."""


class BadRecord(PipelineError):
    """Dead-letter: the bytes are not a valid batch or entry, or contradict what was committed."""


class NotReady(PipelineError):
    """Wait: the state is being restored, or does not yet hold what was asked for."""


class Invalid(PipelineError):
    """Fix the call or the setting: it can never succeed as it is."""


class NotFound(Invalid):
    """Fix the name: nothing of this name is known."""


class NewerFormat(BadRecord):
    """Start a newer version of this program: one wrote what is there."""


class RecordsLost(PipelineError):
    """Decide: records were deleted before they were folded; go on without them only with `accept_loss`."""


class Stalled(PipelineError):
    """Start the process again: something in it stands still."""


class IllegalTransition(PipelineError):
    """A bug in this package: crash, and report it."""
