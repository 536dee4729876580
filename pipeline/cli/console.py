"""Output of all commands: exit codes, errors, JSON, logging."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec
from rich.console import Console

from pipeline.errors import Exit, Invalid, PipelineError, Unauthenticated, exit_code
from pipeline.printable import printable as printable  # noqa: PLC0414  # commands have it from here
from pipeline.printable import printable_json, printable_lines
from pipeline.roles.signals import stopping_on_signals
from pipeline.settings import HOLD_VARIABLE

OK, FAILED, USAGE, FATAL, DECIDE = map(int, Exit)
"""Exit codes: fine; failed; the call or a setting is wrong; a restart helps; a person must decide."""

QUIET = "critical"
"""Log level of commands whose errors repeat what the drivers log."""
_WAIT_S = 3_600.0

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)


def write(data: bytes) -> None:
    """Write all of `data` to standard output: with PYTHONUNBUFFERED, one write may take only a part of it."""
    sys.stdout.flush()
    left = memoryview(data)
    while left:
        left = left[sys.stdout.buffer.write(left) :]
    sys.stdout.buffer.flush()


def print_json(value: Any) -> None:
    """Print one JSON document to standard output."""
    write_json(msgspec.json.encode(value))


def write_json(body: bytes) -> None:
    """Write one JSON document to standard output, with escapes for what could control a terminal."""
    write(printable_json(body) + b"\n")


def write_csv(data: bytes) -> None:
    """Write CSV to standard output: as it is, but what could control a terminal is spelled out on one."""
    write(printable_lines(data.decode(errors="replace").replace("\r\n", "\n")).encode() if out.is_terminal else data)


def utc(at_ms: int) -> str:
    """Return a time in ms since 1970 as text; the number, if it is out of the calendar's range."""
    try:
        return f"{datetime.fromtimestamp(at_ms / 1000, UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):
        return f"{at_ms} ms"


def show(text: str, *, style: str | None = None) -> None:
    """Print one line to standard output, with control characters spelled out."""
    out.print(printable(text), style=style, markup=False, soft_wrap=True)


def note(text: str) -> None:
    """Print one line to standard error, with control characters spelled out."""
    err.print(printable(text), markup=False, soft_wrap=True)


def print_error(error: object) -> None:
    """Print an error, on one line, to standard error."""
    err.print(f"pipeline: {printable(str(error))}", style="red", markup=False, soft_wrap=True)


def explain(error: PipelineError) -> int:
    """Print the error; return the exit code for it."""
    print_error(f"{error}; set PIPELINE_TOKEN_FILE, or PIPELINE_TOKEN" if isinstance(error, Unauthenticated) else error)
    return exit_code(error)


def wait_if_restart_is_useless(code: int) -> int:
    """Return the exit code; if PIPELINE_HOLD is set and a restart can't help (2 and 4), only after SIGINT or SIGTERM.

    Docker's restart policies do not look at exit codes: `unless-stopped` starts a container again after any. A process that
    waits answers no health check, so it is noticed, and its log gives the reason once and not a thousand times.
    """
    if code in (USAGE, DECIDE) and os.environ.get(HOLD_VARIABLE, "") not in ("", "0"):
        print_error(f"exit code {code:d}: to start again can't help; waiting to be stopped ({HOLD_VARIABLE} is set)")
        with stopping_on_signals() as stop:
            while not stop.wait(_WAIT_S):
                pass
    return code


def _printable_event(_: Any, __: str, event: Any) -> Any:
    """Spell out control characters in all texts of a log line, so that no text from outside forges another line."""
    return {
        name: printable_lines(value) if name == "exception" else printable(value) if isinstance(value, str) else value
        for name, value in event.items()
    }


def configure_logging(level: str, *, as_json: bool = False) -> None:
    """Send the standard library's loggers through structlog to standard error."""
    import structlog

    number = logging.getLevelNamesMapping().get(level.upper())
    if not number:
        raise Invalid(f"--log-level {level}: debug, info, warning, error or critical")
    shared: list[Any] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    # Tracebacks are plain, and texts before they are rendered: rich would print local variables, and passwords with them.
    plain = structlog.dev.ConsoleRenderer(colors=err.is_terminal, exception_formatter=structlog.dev.plain_traceback)
    last: list[Any] = [structlog.processors.format_exc_info, *([] if as_json else [_printable_event])]
    renderer: Any = structlog.processors.JSONRenderer() if as_json else plain
    handler = logging.StreamHandler()
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(number)
