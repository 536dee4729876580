"""Staying where a start again can't help, for supervisors that start whatever ends, and don't look at exit codes.

Docker's restart policies are such: `unless-stopped` starts a container again after any exit code, and `on-failure` forgets
it when the machine restarts. With the variable set, a process that would end with 2 or 4 closes everything, says so, and
waits to be stopped. It answers no health check then, so it is seen; and nobody who reads its logs finds the reason a
thousand times.
"""

from __future__ import annotations

import os

from pipeline.cli import console
from pipeline.cli.signals import stopping_on_signals
from pipeline.settings import HOLD_VARIABLE

_WAKE_INTERVAL_S = 3_600.0


def holding(code: int) -> int:
    """Return the code: at once, or, if a start again can't help and the variable is set, after SIGINT or SIGTERM."""
    if code in (console.USAGE, console.DECIDE) and os.environ.get(HOLD_VARIABLE, "") not in ("", "0"):
        console.print_error(f"exit code {code:d}: to start again can't help; waiting to be stopped ({HOLD_VARIABLE} is set)")
        with stopping_on_signals() as stop:
            while not stop.wait(_WAKE_INTERVAL_S):
                pass
    return code
