"""Errors, each named for what the caller must do (DESIGN section 9).

Adapters translate driver errors into these in one place, by code or type, never by message text alone. The exit code of a
process that an error ends is decided here too, because it says the same: what must be done.
"""

from collections.abc import Sequence
from enum import IntEnum


class PipelineError(Exception):
    """Base of every error that this package raises on purpose."""


class Unavailable(PipelineError):
    """Retry with backoff: the other side is away, busy, or out of space. Nothing was accepted that was not acknowledged.

    After a timeout the request may have been carried out all the same; sending the same sealed batch again is safe.
    """


class NoSpace(Unavailable):
    """Make room: a disk or a quota is full. Nothing is lost, and nothing goes on until somebody has."""


class BufferFull(PipelineError):
    """Slow down, or drop and count: the publisher's memory account is exhausted."""


class Fenced(PipelineError):
    """Stop writing: another owner has taken over this partition, or another process opened this spool."""


class StoreCorrupt(PipelineError):
    """Delete the store and restore it from the changelog; the changelog is the truth."""

    def __init__(self, text: str = "", partition: int | None = None) -> None:
        super().__init__(text)
        self.partition = partition
        """Of which partition the store is, where that is known."""


class Unreadable(StoreCorrupt):
    """As `StoreCorrupt`, once: the bytes are whole, but an entry can't be decoded. If it comes back, the log has it."""


class LogCorrupt(PipelineError):
    """Stop, and bring the log back from a backup, or decide to go on without what is gone (`accept_loss`)."""


class Discontinuous(PipelineError):
    """Start again, which finds out what the log holds now: a log went back, or has a hole, or is another than it was."""


class Displaced(Discontinuous):
    """Look at what stands where the commit was to begin, and commit behind it. Nothing of the commit will be visible."""


class BadRecord(PipelineError):
    """Dead-letter: the bytes are not a valid batch or entry, or contradict what was committed."""


class GroupsRefused(BadRecord):
    """Send the batch again without these groups: a task is certain to refuse them, and takes the others."""

    def __init__(self, detail: str, groups: Sequence[tuple[int, str, str]] = (), batch: int | None = None) -> None:
        super().__init__(detail)
        self.groups = tuple(groups)
        """Of each group where it stands in the batch, its view, and the reason."""
        self.batch = batch
        """Where the batch stands in the request."""


class NotReady(PipelineError):
    """Wait: the state is being restored, or does not yet hold what was asked for."""


class Invalid(PipelineError):
    """Fix the call or the setting: it can never succeed as it is."""


class NotFound(Invalid):
    """Fix the name: nothing of this name is known."""


class OtherTopic(Invalid):
    """Flush again, or read without `after`: the token is of a topic that is not the one there now."""


class NewerFormat(BadRecord):
    """Start a newer version of this program: one wrote what is there."""


class RecordsLost(PipelineError):
    """Decide: records were deleted before they were folded; go on without them only with `accept_loss`."""


class StoreAhead(RecordsLost):
    """Decide: a store reflects records that its changelog does not have, so the store is the better copy.

    The changelog was truncated, restored from a backup, or made anew. Only with `accept_loss` what it says counts, and then
    the store is set aside, not deleted.
    """


class Stalled(PipelineError):
    """Start the process again: something in it stands still."""


class IllegalTransition(PipelineError):
    """A bug in this package: crash, and report it."""


class Exit(IntEnum):
    """Exit codes, for whoever starts the process again: a supervisor must do so after 1 and 3, and not after 2 and 4."""

    OK = 0
    FAILED = 1
    """It could not be done now. A later try may succeed: no broker answers, another process has the folder."""
    USAGE = 2
    """The call, a setting, or a permission is wrong."""
    RESTART = 3
    """The process can't go on, and a new one can: fenced, a commit that was not decided, something stands still."""
    DECIDE = 4
    """A person must decide or do something first; until then every start ends in the same way."""


_RUNNING: dict[type[BaseException], Exit] = {
    NewerFormat: Exit.DECIDE,
    NoSpace: Exit.DECIDE,
    LogCorrupt: Exit.DECIDE,
    RecordsLost: Exit.DECIDE,
}
"""What ends a process that was running; every other error, foreign ones too, is `RESTART`: it begins at the last commit."""
_STARTING: dict[type[BaseException], Exit] = {
    **_RUNNING,
    Fenced: Exit.RESTART,
    Stalled: Exit.RESTART,
    Invalid: Exit.USAGE,
}
"""What ends a command, or a process before it was ready; every other error is `FAILED`."""


def exit_code(error: BaseException, *, started: bool = False, ready: bool = False, decided: bool = False) -> Exit:
    """Return the exit code that an error calls for.

    `started`: it ended a process that serves, such as a worker, after its start. `ready`: after that process was ready too:
    from then on a wrong setting or permission is not the caller's, and may be put right while the process starts again; a
    start that still finds it wrong ends with `USAGE`. `decided`: it has `accept_loss`, so a start goes on without what was
    lost while it ran.
    """
    if decided and ready and isinstance(error, LogCorrupt | RecordsLost):
        return Exit.RESTART
    if started and isinstance(error, Invalid) and not ready:
        return Exit.USAGE
    table, otherwise = (_RUNNING, Exit.RESTART) if started else (_STARTING, Exit.FAILED)
    return next((table[kind] for kind in type(error).__mro__ if kind in table), otherwise)
