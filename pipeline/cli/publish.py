"""`pipeline publish`: publishes the rows of a file or a pipe as deltas of one view.

A file is read twice: all of it is checked before the first row is sent. A pipe can't be rewound: its rows are sent as they
come, and a bad row ends the run. In both cases the run reports up to which line everything is acknowledged.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

import msgspec
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader as Reader
from pipeline.cli import console
from pipeline.cli.rows import FORMATS, TS_UNITS, BadRow, Columns, Row, check_delimiter, early_hint, read_rows
from pipeline.cli.source import Damaged, Interrupted, Lines, check_encoding
from pipeline.connect import Publisher
from pipeline.core.kinds import KIND_NAMES, KINDS
from pipeline.core.query import describe
from pipeline.core.record import Definition, canonical, check_definition, spread_of
from pipeline.errors import Forbidden, Invalid, NotReady, PipelineError, Unavailable
from pipeline.roles.signals import Stop, stopping_on_signals
from pipeline.settings import ClientSettings, KafkaSettings, PublisherSettings
from pipeline.topics import DELTAS

BAD_SHOWN_MAX = 20
LONG_ROW_LINES = 100
"""A row of more lines is likely to have a quote that is closed too late, which is said."""
CHECKPOINT_S = 2.0
"""Interval of waiting until everything so far is acknowledged, which is reported if the run can't go on."""
_SHOW_S = 0.1
_CONTACT_S = 5.0


class PublishRequest(msgspec.Struct, frozen=True):
    """Options of the command line."""

    url: str
    definition: Definition
    columns: Mapping[str, str]
    """The column of each label."""
    value: str | None
    ts: str | None
    format: str
    source: str
    """A path; `-` is standard input."""
    skip_bad: bool
    start_line: int
    as_json: bool
    spread: int | None = None
    """Partitions over which the view is spread; None: as the settings say."""
    delimiter: str = ","
    encoding: str | None = None
    """Encoding of the text; None: as its byte order mark says, else UTF-8."""
    ts_unit: str = "ms"
    left_out: frozenset[str] = frozenset()
    """Which of `window_s` and `retention_s` was not given: then it is as the server knows the view."""


class PublishReport(msgspec.Struct):
    """Result of a run, as `--json` prints it."""

    view: str
    complete: bool = False
    lines: int = 0
    """Rows that were recorded, one delta each."""
    bad_lines: int = 0
    last_line: int = 0
    """Last line that was recorded, or left out as bad."""
    acknowledged_line: int = 0
    """Line up to which everything is acknowledged: it survives kill -9 of the server."""
    deltas: int = 0
    entries: int = 0
    """Merged deltas, one for each series of a batch."""
    batches: int = 0
    token: str = ""
    """Token for `get --after`, which waits for all of it."""
    seconds: float = 0.0
    error: str | None = None


def make_request(  # one argument for each option
    *, view: str, url: str, kind: str, value: str | None, labels: str, ts: str | None, format_: str | None, source: str,
    skip_bad: bool, start_line: int, as_json: bool, monotone: bool = False, window_s: int | None = None,
    retention_s: int | None = None, spread: int | None = None, delimiter: str | None = None, encoding: str | None = None,
    ts_unit: str | None = None,
) -> PublishRequest:  # fmt: skip
    """Return the checked options; `Invalid` if they don't fit together."""
    columns: dict[str, str] = {}
    names = []
    for part in labels.split(",") if labels.strip() else []:
        name, _, column = part.partition("=")
        names.append(name.strip())
        columns[name.strip()] = column or name.strip()
    definition = Definition(view, kind, tuple(names), window_s or 0, monotone, retention_s or 0)
    check_definition(definition, KIND_NAMES)
    spread_of(definition, spread, 1)
    if value is None and kind != "sum":
        raise Invalid(f"--value COLUMN is needed: only a sum can count lines, not a {kind}")
    if ts is not None and kind != "last" and not window_s:
        raise Invalid(
            f"--ts is for kind last, and for views with windows (--window-s N); a {kind} without does not depend on time"
        )
    if format_ is None:
        name = source.removesuffix(".gz").removesuffix(".zst")
        format_ = "ndjson" if name.endswith((".ndjson", ".jsonl")) else "csv"
    if format_ not in FORMATS:
        raise Invalid(f"--format {format_}: one of {', '.join(FORMATS)}")
    if delimiter is not None and format_ != "csv":
        raise Invalid(f"--delimiter: is for CSV, not for {format_}")
    if ts_unit is not None and ts is None:
        raise Invalid("--ts-unit: is of the column that --ts names")
    if ts_unit is not None and ts_unit not in TS_UNITS:
        raise Invalid(f"--ts-unit {ts_unit:.20}: one of {', '.join(TS_UNITS)}")
    if encoding is not None:
        check_encoding(encoding)
    given = {"window_s": window_s, "retention_s": retention_s}
    left_out = frozenset(name for name, seconds in given.items() if seconds is None)
    return PublishRequest(
        url, definition, columns, value, ts, format_, source, skip_bad, start_line, as_json, spread,
        check_delimiter("," if delimiter is None else delimiter), encoding, ts_unit or "ms", left_out,
    )  # fmt: skip


def run_publish(request: PublishRequest, settings: PublisherSettings, kafka: KafkaSettings, client: ClientSettings) -> int:
    """Publish and print the result; return the exit code. Raises `Invalid`, with nothing sent, if the call is wrong."""
    with stopping_on_signals() as stop, _opened(request.source) as fd:
        run = _PublishRun(request, settings, kafka, client, fd, stop)
        try:
            return run.run()
        except Interrupted:
            return run.interrupted()
        finally:
            run.bar.stop()


@contextmanager
def _opened(source: str) -> Iterator[int]:
    if source == "-":
        yield sys.stdin.fileno()
        return
    try:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Invalid(f"{source}: {error.strerror}") from None
    try:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise Invalid(f"{source}: is a directory")
        yield fd
    finally:
        os.close(fd)


class _Bar:
    """Progress on a terminal: lines and rate, and for a file bytes and time left."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def start(self, doing: str, byte_count: int | None) -> None:
        self.stop()
        lines = TextColumn("{task.fields[lines]:,} lines, {task.fields[rate]:,.0f}/s")
        known: list[ProgressColumn] = [BarColumn(), DownloadColumn(binary_units=True), lines, TimeRemainingColumn()]
        columns = [TextColumn("{task.description}"), *([lines] if byte_count is None else known)]
        self._progress = Progress(*columns, console=console.err, disable=not console.err.is_terminal, transient=True)
        self._progress.add_task(doing, total=byte_count, lines=0, rate=0.0)
        self._progress.start()

    def show(self, byte_count: int, line_count: int, seconds: float) -> None:
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=byte_count, lines=line_count, rate=line_count / max(seconds, 0.001))

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _PublishRun:
    """One run over one file descriptor."""

    def __init__(
        self,
        request: PublishRequest,
        settings: PublisherSettings,
        kafka: KafkaSettings,
        client: ClientSettings,
        fd: int,
        stop: Stop,
    ) -> None:
        self.bar = _Bar()
        self._request = request
        self._settings = settings
        self._kafka = kafka
        self._client = client
        self._timeout_s = settings.close_timeout_ms / 1000
        self._fd = fd
        self._stop = stop
        self._clock = SystemClock()
        self._started_s = self._clock.monotonic_s()
        self._report = PublishReport(request.definition.view)
        self._definition = request.definition
        self._bad_rows = self._bad_unseen = 0
        self._noted: set[str] = set()

    def run(self) -> int:
        settings = (
            asdict(self._settings)
            | asdict(self._kafka)
            | asdict(self._client)
            | {
                "on_full": "block",  # no line may be dropped
                "block_timeout_ms": self._settings.close_timeout_ms,
            }
        )
        publisher = Publisher(self._request.url, **settings)
        try:
            return self._run(publisher)
        finally:
            with suppress(PipelineError):  # the report says what is not acknowledged
                publisher.close(timeout_s=0)

    def _run(self, publisher: Publisher) -> int:
        info = os.fstat(self._fd)
        start = os.lseek(self._fd, 0, os.SEEK_CUR) if stat.S_ISREG(info.st_mode) else None
        self._definition = self._agreed_definition()
        byte_count = checked = None
        if start is not None:
            byte_count = info.st_size - start
            if not self._request.skip_bad:
                try:
                    checked = self._check(byte_count)
                except Damaged as error:
                    return self._end(f"nothing was published: {error}, behind line {self._report.last_line}")
                os.lseek(self._fd, start, os.SEEK_SET)
                if self._report.bad_lines:
                    return self._end(f"nothing was published: {self._bad_count()}; --skip-bad leaves them out")
        return self._publish(publisher, byte_count, checked)

    def interrupted(self) -> int:
        """Report that a signal came before anything was recorded."""
        return self._end("stopped by a signal; nothing was published", self._stop.exit_code)

    def _agreed_definition(self) -> Definition:
        """Return the definition with the server's order of labels, and its window and retention where they were not given;
        `Invalid` if the server has only others of the view.
        """
        mine = self._request.definition
        if not self._request.url.startswith("http"):
            self._connect()
            return mine
        deadline_s = self._clock.monotonic_s() + self._timeout_s
        waiting = False
        timeout_s = max(0.1, min(self._timeout_s, _CONTACT_S))
        with Reader(self._request.url, timeout_s=timeout_s, settings=self._client) as reader:
            while True:
                try:
                    found = [view for view in reader.views() if view.name == mine.view]
                    break
                except (NotReady, Forbidden):
                    return mine  # it is restoring, and takes batches meanwhile; or the token is for publishing only
                except Unavailable as error:
                    if self._clock.monotonic_s() >= deadline_s:
                        raise Unavailable(f"no server within {self._timeout_s:g} s (--timeout-ms): {error}") from None
                    if not waiting:
                        waiting = True
                        console.note(f"waiting for a server: {error}")
                    if self._stop.wait(0.2):
                        raise Interrupted from None
        known = [it.definition for it in found]
        left_out = self._request.left_out
        for theirs in known:
            if canonical(theirs) == canonical(
                msgspec.structs.replace(mine, **{name: getattr(theirs, name) for name in left_out})
            ):
                return theirs
        if known:
            there = ", ".join(map(describe, known))
            raise Invalid(f"view {mine.view} is {there} at {self._request.url}, not {describe(mine)}")
        return mine

    def _connect(self) -> None:
        """Wait for a broker; `Invalid` at once if a login, a permission or a topic is missing."""
        if not self._request.url.startswith("kafka:"):
            return
        from pipeline.adapters.kafka.log import KafkaLog
        from pipeline.adapters.kafka.options import parse_url

        waiting = False

        def wait(error: Unavailable) -> None:
            nonlocal waiting
            if not waiting:
                waiting = True
                console.note(f"waiting for a broker: {error}")
            if self._stop.is_set():
                raise Interrupted

        settings = replace(self._kafka, kafka_timeout_ms=self._settings.close_timeout_ms)
        with closing(KafkaLog(parse_url(self._request.url), settings, self._clock)) as log:
            log.connect([DELTAS], wait)

    def _latest_ms(self) -> int:
        """Return the latest time that a row may have."""
        return self._clock.now_ms() + self._settings.ts_ahead_max_ms

    def _rows(self, lines: Lines) -> Iterator[Row | BadRow]:
        request = self._request
        labels = tuple(request.columns[label] for label in self._definition.labels)
        self._columns = Columns(labels, request.value, request.ts, request.ts_unit)
        rows = read_rows(lines, request.format, self._definition, self._columns, self._latest_ms, request.delimiter)
        return (row for row in rows if row.line >= request.start_line)

    def _lines(self) -> Lines:
        return Lines(self._fd, self._stop.is_set, self._request.encoding)

    def _check(self, byte_count: int) -> int:
        """Read everything and report bad rows; return the number of good rows."""
        self.bar.start("checking", byte_count)
        started_s = shown_s = self._clock.monotonic_s()
        lines = self._lines()
        count = 0
        for row in self._rows(lines):
            if isinstance(row, BadRow):
                self._note_bad(row)
            else:
                count += 1
                self._note_odd(row)
            self._report.last_line = row.last_line
            now_s = self._clock.monotonic_s()
            if now_s - shown_s > _SHOW_S:
                shown_s = now_s
                self.bar.show(lines.bytes_read, lines.line, now_s - started_s)
        self._report.last_line = 0
        return count

    def _publish(self, publisher: Publisher, byte_count: int | None, checked: int | None) -> int:
        self.bar.start("publishing", byte_count)
        lines = self._lines()
        rows = self._rows(lines)
        report = self._report
        try:
            failure = self._record(publisher, lines, rows, checked)
            self._checkpoint(publisher)
        except PipelineError as error:
            failure = self._failure(error)
        stats = publisher.stats()
        report.deltas, report.entries, report.batches = stats["deltas"], stats["entries"], stats["batches"]
        report.complete = failure is None
        return self._end(failure, self._stop.exit_code if self._stop.is_set() else console.FAILED)

    def _record(self, publisher: Publisher, lines: Lines, rows: Iterator[Row | BadRow], checked: int | None) -> str | None:
        """Record rows until the end, or until the run can't go on; return why it can't, else None."""
        report = self._report
        to = self._definition
        find: Any = publisher.define(to, self._request.spread).labels
        method = KINDS[to.kind].method
        started_s = shown_s = flushed_s = self._clock.monotonic_s()
        try:
            for row in rows:
                if report.lines == checked:
                    break  # the file has grown since it was checked
                if isinstance(row, BadRow):
                    if not self._request.skip_bad:
                        return self._stopped_at(row, changed=checked is not None)
                    self._note_bad(row)
                else:
                    record = getattr(find(*row.labels), method)
                    record(row.value) if row.ts_ms is None else record(row.value, ts_ms=row.ts_ms)
                    report.lines += 1
                    if checked is None:
                        self._note_odd(row)
                report.last_line = row.last_line
                now_s = self._clock.monotonic_s()
                if now_s - shown_s > _SHOW_S:
                    shown_s = now_s
                    self.bar.show(lines.bytes_read, report.lines, now_s - started_s)
                    if now_s - flushed_s > CHECKPOINT_S:
                        self._checkpoint(publisher)
                        flushed_s = self._clock.monotonic_s()
        except Interrupted:
            return self._through("stopped by a signal")
        except Damaged as error:
            return self._through(str(error))
        if checked is not None and report.lines < checked:
            return self._through("the file was changed while it was read")
        if report.bad_lines and not report.lines:
            return f"nothing was published: no line is good, {self._bad_count()}"
        return None

    def _stopped_at(self, row: BadRow, *, changed: bool) -> str:
        self._note_bad(row)
        why = "the file was changed while it was read" if changed else "stopped at a bad line (--skip-bad leaves them out)"
        return self._through(why)

    def _through(self, why: str) -> str:
        line = self._report.last_line
        if not line:
            return f"{why}; nothing was published"
        return f"{why}; every line up to {line} is published; to go on: --start-line {line + 1}"

    def _failure(self, error: PipelineError) -> str:
        done, last = self._report.acknowledged_line, self._report.last_line
        known = f"every line up to {done} is published" if done else "no line is known to be published"
        return f"{error}; {known}" + (f", those from {done + 1} to {last} may be or not" if last > done else "")

    def _checkpoint(self, publisher: Publisher) -> None:
        token = publisher.flush(self._timeout_s)
        self._report.token = str(token)
        self._report.acknowledged_line = self._report.last_line

    def _note_bad(self, row: BadRow) -> None:
        self._report.bad_lines += row.last_line - row.line + 1
        self._bad_rows += 1
        if self._bad_rows > BAD_SHOWN_MAX:
            self._bad_unseen += row.last_line - row.line + 1
        elif row.last_line == row.line:
            console.note(f"line {row.line}: {row.reason}")
        else:
            opened = f"; the quote that was opened on line {row.opened_on} goes on behind it" if row.opened_on else ""
            console.note(f"lines {row.line} to {row.last_line}: {row.reason}{opened}")

    def _note_odd(self, row: Row) -> None:
        """Say once what is right by the letter, and likely to be meant otherwise."""
        if row.last_line - row.line >= LONG_ROW_LINES and "row" not in self._noted:
            self._noted.add("row")
            console.note(f"lines {row.line} to {row.last_line} are one row: is there a quote that is closed too late?")
        if row.ts_ms is not None and "ts" not in self._noted and (hint := early_hint(row.ts_ms, self._columns)):
            self._noted.add("ts")
            console.note(f"line {row.line}: {hint}")

    def _bad_count(self) -> str:
        return f"{self._report.bad_lines:,} bad line{'s' if self._report.bad_lines > 1 else ''}"

    def _end(self, failure: str | None, failed: int = console.FAILED) -> int:
        self.bar.stop()
        report = self._report
        report.seconds = round(self._clock.monotonic_s() - self._started_s, 3)
        report.error = failure
        if self._bad_unseen:
            console.err.print(f"and {self._bad_unseen:,} more bad lines")
        if failure is not None:
            console.print_error(failure)
        if self._request.as_json:
            console.print_json(report)
        elif report.complete:
            merged = f"{report.deltas:,} deltas in {report.entries:,} entries of {report.batches:,} batches"
            console.out.print(
                f"published {report.view}: {report.lines:,} lines, {merged}, {report.seconds:.1f} s", soft_wrap=True
            )
            if report.bad_lines:
                console.out.print(f"left out {self._bad_count()}")
            console.show(f"token {report.token}")
        return console.OK if failure is None else failed


def with_timeout(settings: PublisherSettings, timeout_ms: int | None) -> PublisherSettings:
    """Return the settings with `--timeout-ms`, if it was given."""
    return settings if timeout_ms is None else replace(settings, close_timeout_ms=timeout_ms)
