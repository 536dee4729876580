"""Errors, each named for what the caller must do (DESIGN section 9).

Adapters translate driver errors into these in one place, by code or type, never by message text alone. The exit code that an
error leads to is decided here, too, because it depends on the same question.
"""

from collections.abc import Sequence
from enum import IntEnum


class PipelineError(Exception):
    """Base of every error that this package raises on purpose."""


class Unavailable(PipelineError):
    """Retry with backoff: the other side can't be reached, is busy, or out of space. Only acknowledged items count as
    accepted.

    After a timeout the request may have been carried out all the same; sending the same sealed batch again is safe.
    """


class NoSpace(Unavailable):
    """Free space: a disk or a quota is full. Nothing is lost, and nothing goes on until then."""


class BufferFull(PipelineError):
    """Slow down, or drop and count: the publisher's memory account is exhausted."""


class Fenced(PipelineError):
    """Stop writing: another owner has taken over this partition, or another process opened this spool."""


class StoreCorrupt(PipelineError):
    """Delete the store and restore it from the changelog; the changelog is the truth."""

    def __init__(self, text: str = "", partition: int | None = None) -> None:
        super().__init__(text)
        self.partition = partition
        """Partition of the store, if it is known."""


class Unreadable(StoreCorrupt):
    """Delete and restore the store, once: an intact entry can't be decoded. If that recurs, it is in the log."""


class LogCorrupt(PipelineError):
    """Stop, and restore the log from a backup, or decide to go on without the lost records (`accept_loss`)."""


class Discontinuous(PipelineError):
    """Start the process again, which then reads what the log holds: the log went back, has a hole, or was replaced."""


class Displaced(Discontinuous):
    """Read which records stand where the commit was to begin, and commit after them. The commit has no effect."""


class BadRecord(PipelineError):
    """Dead-letter: the bytes are not a valid batch or entry, or contradict what was committed."""


class GroupsRefused(BadRecord):
    """Send the batch again without these groups: a task is certain to refuse them, and takes the others."""

    def __init__(self, detail: str, groups: Sequence[tuple[int, str, str]] = (), batch: int | None = None) -> None:
        super().__init__(detail)
        self.groups = tuple(groups)
        """For each refused group its index in the batch, its view, and the reason."""
        self.batch = batch
        """Index of the batch in the request."""


class NotReady(PipelineError):
    """Wait: the state is being restored, or does not yet hold what was asked for."""


class Invalid(PipelineError):
    """Fix the call or the setting: it can never succeed as it is."""


class NotFound(Invalid):
    """Fix the name: nothing of this name is known."""


class OtherTopic(Invalid):
    """Flush again, or read without `after`: the token belongs to a topic that was replaced."""


class CursorGone(Invalid):
    """Begin again with the first page: the server keeps the pages of this cursor no more."""


class Unauthenticated(Invalid):
    """Send an access token that the server knows: there was none, or it was malformed, unknown, revoked or expired."""

    def __init__(self, text: str = "", reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason
        """One word for what was wrong with the token; empty at a client."""


class Forbidden(Invalid):
    """Use another access token: this one lacks a scope, or is bound to other views or labels."""

    def __init__(self, text: str = "", scope: str = "") -> None:
        super().__init__(text)
        self.scope = scope
        """The scope that the token lacks; empty: it is bound to other views or labels."""


class GroupsForbidden(GroupsRefused):
    """Send the batch again without these groups: the access token is bound to other views or labels."""


class NewerFormat(BadRecord):
    """Start a newer version of this program: a newer one wrote the data."""


class RecordsLost(PipelineError):
    """Decide: records were deleted before they were folded; go on without them only with `accept_loss`."""


class StoreAhead(RecordsLost):
    """Decide: a store has records that its changelog lacks, so the store is the better copy.

    The changelog was truncated, restored from a backup, or created again. Only with `accept_loss` the changelog is followed,
    and the store set aside, not deleted.
    """


class Stalled(PipelineError):
    """Start the process again: one of its threads or partitions makes no progress."""


class IllegalTransition(PipelineError):
    """A bug in this package: crash, and report it."""


class Exit(IntEnum):
    """Exit codes. A supervisor must start the process again after 1 and 3, and not after 2 and 4."""

    OK = 0
    FAILED = 1
    """A later attempt may succeed: no broker answers, another process has the folder."""
    USAGE = 2
    """The call, a setting, or a permission is wrong."""
    RESTART = 3
    """A new process can go on where this one can't: it was fenced, a commit was not decided, a thread stalled."""
    DECIDE = 4
    """A person must decide or act first; until then every start ends in the same way."""


_RUNNING: dict[type[BaseException], Exit] = {
    NewerFormat: Exit.DECIDE,
    NoSpace: Exit.DECIDE,
    LogCorrupt: Exit.DECIDE,
    RecordsLost: Exit.DECIDE,
}
"""Errors that end a running process otherwise than with `RESTART`, which is the code of all others, foreign ones included.
"""
_STARTING: dict[type[BaseException], Exit] = {
    **_RUNNING,
    Fenced: Exit.RESTART,
    Stalled: Exit.RESTART,
    Invalid: Exit.USAGE,
}
"""Errors that end a command, or a process before it was ready, otherwise than with `FAILED`, the code of all others."""


def exit_code(error: BaseException, *, started: bool = False, ready: bool = False, decided: bool = False) -> Exit:
    """Return the exit code for an error.

    `started`: the error ended a serving process, such as a worker, after its start. `ready`: that process had become ready,
    too. From then on a wrong setting or permission is not the caller's mistake, and may be corrected while the process
    starts again; a start that still finds it wrong ends with `USAGE`. `decided`: the process has `accept_loss`, so a new
    start goes on without records that were lost while it ran.
    """
    if decided and ready and isinstance(error, LogCorrupt | RecordsLost):
        return Exit.RESTART
    if started and isinstance(error, Invalid) and not ready:
        return Exit.USAGE
    table, otherwise = (_RUNNING, Exit.RESTART) if started else (_STARTING, Exit.FAILED)
    return next((table[kind] for kind in type(error).__mro__ if kind in table), otherwise)
