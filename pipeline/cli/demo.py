"""`pipeline demo`: records real input, and proves that nothing was lost or counted twice."""

from __future__ import annotations

import logging
import re
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader as Reader
from pipeline.cli import console
from pipeline.cli.machine import VIEWS, NoCounters, Sampler, samplers
from pipeline.cli.recount import Recorder, answered, differences, expected_answers
from pipeline.cli.screen import Screen
from pipeline.config import Config
from pipeline.connect import Publisher
from pipeline.core.answer import Answer, Status, known
from pipeline.core.record import Definition
from pipeline.core.token import Token
from pipeline.errors import Invalid, NotFound, PipelineError
from pipeline.ports import Clock
from pipeline.roles.http_server import bind
from pipeline.roles.service import embedded_service
from pipeline.roles.signals import Stop, stopping_on_signals
from pipeline.threads import POLL_INTERVAL_S

_log = logging.getLogger(__name__)
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
UNATTENDED_S = 20.0
"""Seconds that it runs without --for and without a terminal."""
_REST_FACTOR = 9
"""A sampler pauses this many times as long as a sample took: it uses at most a tenth of a CPU."""
_SCREEN_EVERY_S = 0.5
_START_TIMEOUT_S = 60.0
_FLUSH_TIMEOUT_S = 30.0
_JOIN_TIMEOUT_S = 10.0
_PRINTED_MAX = 20
_WINDOWS_A_READ = 5_000


class Summary(msgspec.Struct, frozen=True):
    """Result of a run."""

    url: str
    seconds: float
    threads: int
    deltas_recorded: int
    batches_sent: int
    entries_stored: int
    """Entries of series in all stores, as the server counts them."""
    views_compared: int
    series_compared: int
    differences: list[str]
    notes: list[str]

    @property
    def equal(self) -> bool:
        """Return whether every answer equals the demo's own count."""
        return not self.differences


def parse_duration_s(text: str) -> float:
    """Return the seconds of `500ms`, `20s`, `2m` or `1h`; `Invalid` for other texts."""
    match = _DURATION.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise Invalid(f"--for {text[:50]!r}: a time is needed, such as 500ms, 20s, 2m or 1h")
    return float(match[1]) * _UNIT_S[match[2]]


class _DemoServer:
    """`pipeline up` in a thread."""

    def __init__(self, config: Config) -> None:
        self.exit_code = console.OK
        self._service = embedded_service(config)
        self.url = self._service.url
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="demo-server")

    def _run(self) -> None:
        self.exit_code = console.FATAL
        self.exit_code = self._service.run(lambda _: self._ready.set())
        if self._service.fatal is not None:
            console.print_error(self._service.fatal)

    @property
    def running(self) -> bool:
        """Return whether the server still runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Return once the server answers. Raises `PipelineError` if it ends before."""
        self._thread.start()
        for _ in range(int(_START_TIMEOUT_S / POLL_INTERVAL_S)):
            if self._ready.wait(POLL_INTERVAL_S):
                return
            if not self.running:
                break
        raise PipelineError("the server did not start")

    def stop(self) -> None:
        """Stop the server, and wait until it has committed and closed."""
        self._service.stop()
        self._thread.join()


class _Recording:
    """Records each sampler in a thread of its own, until `stop`."""

    def __init__(self, views: dict[str, Any], clock: Clock) -> None:
        self._clock = clock
        self.began_ms = clock.now_ms()
        self._stop = threading.Event()
        self.failures: list[str] = []
        """Failures of the demo: deltas that could not be recorded, threads that did not end."""
        self.notes: list[str] = []
        """Counters that this machine does not show."""
        self._sources = samplers(clock)
        self.recorders = [Recorder(views, clock) for _ in self._sources]
        self._threads = [
            threading.Thread(target=self._record, args=pair, name=f"demo-{pair[0].name}", daemon=True)
            for pair in zip(self._sources, self.recorders, strict=True)
        ]

    @property
    def delta_count(self) -> int:
        """Deltas recorded so far."""
        return sum(recorder.delta_count for recorder in self.recorders)

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End all threads."""
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT_S)
            if thread.is_alive():
                self.failures.append(f"thread {thread.name} does not end")

    def _record(self, source: Sampler, recorder: Recorder) -> None:
        looks = 0
        try:
            while not self._stop.is_set():
                started_s = self._clock.monotonic_s()
                source.sample(recorder)
                took_s = self._clock.monotonic_s() - started_s
                recorder.record("samples", 1)
                recorder.record("samples_by_second", 1)
                recorder.record("sample_us", round(took_s * 1e6), source.name)
                looks += 1
                self._stop.wait(max(POLL_INTERVAL_S - took_s, _REST_FACTOR * took_s))
        except PipelineError as error:
            self.failures.append(f"{source.name}: could not record: {error}")
        except NoCounters as missing:
            self.notes.append(f"{source.name}: {missing}: this machine has none, or a sandbox hides them")
        except Exception as error:  # psutil raises many kinds of errors where /proc is missing or has another shape
            _log.debug("source %s", source.name, exc_info=True)
            self.notes.append(f"{source.name}: can't be read here after {looks} looks: {type(error).__name__}: {error}")


def run_demo(config: Config, *, data: str | None, port: int | None, seconds: float | None, as_json: bool) -> int:
    """Run for `seconds`, or until SIGINT or SIGTERM; return the exit code, 0 if every answer equals the demo's own count.

    Without `data` the state is in a folder that is removed at the end; without `port` a free one is taken.
    Raises `Invalid` if `data` is not empty: this run has not counted what is in it.
    """
    if seconds is None and not console.out.is_terminal:
        seconds = UNATTENDED_S
    with stopping_on_signals() as stop, _folder(data) as folder:
        config = replace(config, log=replace(config.log, data=str(folder)), query=_with_port(config, port))
        server = _DemoServer(config)
        try:
            server.start()
            summary = _run(server, config, seconds, stop, as_json=as_json)
        finally:
            server.stop()
        if as_json:
            console.print_json({**msgspec.to_builtins(summary), "equal": summary.equal})
        else:
            _print(summary, data)
    if server.exit_code != console.OK:
        return server.exit_code
    return console.OK if summary.equal else console.FAILED


@contextmanager
def _folder(data: str | None) -> Iterator[Path]:
    if data is None:
        with tempfile.TemporaryDirectory(prefix="pipeline-demo-") as folder:
            yield Path(folder)
        return
    path = Path(data).expanduser()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise Invalid(f"--data {path}: the demo needs a new or empty folder, because it compares everything that is in it")
    yield path


def _with_port(config: Config, port: int | None) -> Any:
    if port is None:
        try:
            bind(config.query).close()
        except Invalid:
            return replace(config.query, port=0)
    return config.query


def _run(server: _DemoServer, config: Config, seconds: float | None, stop: Stop, *, as_json: bool) -> Summary:
    clock = SystemClock()
    if as_json:
        console.print_json({"url": server.url, "data": config.log.data})
    else:
        console.show(f"see it at {server.url}/ in a browser; its API is at {server.url}/docs")
    with Reader(server.url, settings=config.client) as reader, _publisher(server, config) as publisher:
        views = {definition.view: publisher.define(definition) for definition in VIEWS}
        recording = _Recording(views, clock)
        started_s = clock.monotonic_s()
        recording.start()
        try:
            with Screen(reader, VIEWS, server.url, quiet=as_json) as screen:
                while not stop.is_set() and server.running:
                    elapsed_s = clock.monotonic_s() - started_s
                    left_s = _SCREEN_EVERY_S if seconds is None else seconds - elapsed_s
                    if left_s <= 0 or stop.wait(min(left_s, _SCREEN_EVERY_S)):
                        break
                    elapsed_s = clock.monotonic_s() - started_s
                    screen.update(elapsed_s, recording.delta_count, publisher.stats(), recording.notes)
        finally:
            recording.stop()
        return _summary(server, config, publisher, reader, recording, clock.monotonic_s() - started_s)


@contextmanager
def _publisher(server: _DemoServer, config: Config) -> Iterator[Publisher]:
    publisher = Publisher(server.url, **asdict(config.publisher), **asdict(config.kafka), **asdict(config.client))
    try:
        yield publisher
    finally:
        try:
            publisher.close(_FLUSH_TIMEOUT_S if server.running else 0.0)
        except PipelineError as error:  # deltas that were not flushed are among the differences already
            _log.warning("closing the publisher: %s", error)


def _summary(
    server: _DemoServer, config: Config, publisher: Publisher, reader: Reader, recording: _Recording, seconds: float
) -> Summary:
    """Flush, wait until all of it is in the answers, and compare every series of every view."""
    found = list(recording.failures)
    series_count = entry_count = 0
    expected = expected_answers(VIEWS, recording.recorders)
    try:
        token = publisher.flush(_FLUSH_TIMEOUT_S if server.running else 0.0) | _everything(reader)
        for definition in VIEWS:
            known = expected[definition.view]
            try:
                answer = _read(reader, definition, token, config, recording.began_ms)
            except NotFound:
                if known:
                    found.append(f"{definition.view}: {len(known)} series were recorded, but there is no such view")
                continue
            found += differences(definition, known, answer)
            series_count += len(known.keys() | answered(definition, answer).keys())
        stored = reader.views()
        entry_count = sum(view.series_count for view in stored if view.series_count is not UNSET)
        found += [f"{view.name}: this view was not recorded by the demo" for view in stored if view.name not in expected]
    except PipelineError as error:
        found.append(f"could not be compared: {error}")
    stats = publisher.stats()
    if stats["deltas"] != recording.delta_count:
        found.append(f"{recording.delta_count} deltas were recorded, but the publisher drained {stats['deltas']}")
    return Summary(
        url=server.url,
        seconds=round(seconds, 1),
        threads=len(recording.recorders),
        deltas_recorded=recording.delta_count,
        batches_sent=stats["batches"],
        entries_stored=entry_count,
        views_compared=sum(map(bool, expected.values())),
        series_compared=series_count,
        differences=found,
        notes=list(recording.notes),
    )


def _read(reader: Reader, definition: Definition, token: Token, config: Config, began_ms: int) -> Answer:
    """Read all of a view; one with windows from `began_ms` on, in as many ranges as it takes."""
    limits: dict[str, Any] = {"limit": config.query.limit_max, "timeout_ms": config.query.timeout_ms_max, "after": token}
    if not definition.window_s:
        return reader.get(definition.view, **limits)
    length_ms = definition.window_s * 1000 * _WINDOWS_A_READ
    ranges = range(began_ms, SystemClock().now_ms() + 1, length_ms)
    limits["step"] = definition.window_s
    answers = [reader.get(definition.view, start=start, end=start + length_ms, **limits) for start in ranges]
    return msgspec.structs.replace(answers[0], series=[row for answer in answers for row in answer.series])


def _everything(reader: Reader) -> Token:
    """Return a token of everything in the log: a batch that was appended twice must be folded before the comparison."""
    status = msgspec.convert(reader.status(), Status)
    ends = {it.partition: known(it.end_offset) or 0 for it in status.partitions}
    return Token(ends, known(status.topic_id) or "")


def _print(summary: Summary, data: str | None) -> None:
    lines: list[str] = [
        f"deltas recorded  {summary.deltas_recorded:,} by {summary.threads} threads in {summary.seconds:.1f} s",
        f"batches sent     {summary.batches_sent:,}",
        f"entries stored   {summary.entries_stored:,}",
        f"series compared  {summary.series_compared:,} in {summary.views_compared} views",
        *(f"note             {note}" for note in summary.notes),
    ]
    for line in lines:
        console.show(line)
    if summary.equal:
        console.out.print("answers          all equal to the demo's own count", style="green")
    else:
        console.out.print(
            f"answers          {len(summary.differences):,} DIFFERENCES from the demo's own count", style="red"
        )
        _print_differences(summary.differences)
    if data is not None:
        console.show(f"state kept in {data}: pipeline verify --data {data}")


def _print_differences(found: Sequence[str]) -> None:
    for difference in found[:_PRINTED_MAX]:
        console.show(f"  {console.printable(difference)}")
    if len(found) > _PRINTED_MAX:
        console.out.print(f"  and {len(found) - _PRINTED_MAX:,} more (--json shows all)")
