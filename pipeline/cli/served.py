"""A role of the pipeline with its HTTP server, as one thing to run and stop: what `up`, `worker` and `serve` share."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from pipeline.adapters.openmetrics import parse_pushed
from pipeline.adapters.prometheus import PrometheusMetrics, render_views
from pipeline.cli import console
from pipeline.cli.bars import RestoreBars
from pipeline.cli.hold import holding
from pipeline.cli.server import HttpServer, bind, url_of
from pipeline.cli.signals import stopping_on_signals
from pipeline.errors import exit_code
from pipeline.ports import Ingest
from pipeline.query.api import create_app
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.reader import ViewReader
from pipeline.settings import QuerySettings
from pipeline.threads import guarded
from pipeline.worker.restore import RestoreProgress

_log = logging.getLogger(__name__)
_MALLOC_OPTIONS = {-8: 2, -3: 2**20, -1: 4 * 2**20}
"""By malloc.h's numbers: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD."""


class Role(Protocol):
    """An `Engine`, a `ClusterWorker` or a `ClusterServer`."""

    def start(self) -> None: ...

    def wait_ready(self, timeout_s: float) -> bool: ...

    def stop(self) -> bool: ...

    def status(self) -> dict[str, Any]: ...


class QueryRole(Role, Protocol):
    """An `Engine` or a `ClusterServer`."""

    reader: ViewReader

    @property
    def letters(self) -> DeadLetters: ...

    @property
    def ingest(self) -> Ingest | None: ...

    @property
    def ready(self) -> bool: ...


class Hooks(NamedTuple):
    """What a role reports to."""

    metrics: PrometheusMetrics
    on_fatal: Callable[[BaseException], None]
    on_progress: Callable[[RestoreProgress], None]


RoleT = TypeVar("RoleT", bound=Role)


class Served(Generic[RoleT]):
    """A role and the server in front of it. `url` is known from the start, also for port 0.

    Raises as the role does, and `Invalid` if the port is taken.
    """

    def __init__(
        self,
        settings: QuerySettings,
        make: Callable[[Hooks], RoleT],
        make_app: Callable[[RoleT, PrometheusMetrics], Any],
        *,
        accept_loss: bool = False,
    ) -> None:
        self._accept_loss = accept_loss
        self._fatal: BaseException | None = None
        self._ready = False
        self._bars = RestoreBars()
        self._metrics = metrics = PrometheusMetrics()
        self.role = make(Hooks(metrics, self._fail, self._bars))
        try:  # only now: of two wrongs, a directory in use says more than a port in use
            self._listener = bind(settings)
        except BaseException:
            self.role.stop()
            raise
        self.url = url_of(self._listener)
        self._server = HttpServer(make_app(self.role, metrics), self._listener, settings)

    def run(self, on_ready: Callable[[str], None] = lambda _: None) -> int:
        """Serve until `stop` or a fatal error, then close everything; the exit code. `on_ready` gets the URL."""
        announce = guarded(_log, "pipeline-ready", self._announce, self._metrics)
        watcher = threading.Thread(target=announce, args=(on_ready,), name="pipeline-ready", daemon=True)
        try:
            self.role.start()
            watcher.start()
            self._server.run()
        finally:
            self._bars.close()
            stopped = self.role.stop()
            self._listener.close()
        if self._fatal is not None:
            console.print_error(self._fatal)
            return exit_code(self._fatal, started=True, ready=self._ready, decided=self._accept_loss)
        return console.OK if stopped else console.FATAL

    def _announce(self, on_ready: Callable[[str], None]) -> None:
        while self._fatal is None and not self._server.stopped:
            if self.role.wait_ready(0.2):
                self._ready = True
                self._bars.close()
                on_ready(self.url)
                return

    def stop(self) -> None:
        """End `run`, from any thread or a signal handler."""
        self._server.stop()

    def _fail(self, error: BaseException) -> None:
        self._fatal = error
        self.stop()


def query_app(settings: QuerySettings, role: QueryRole, metrics: PrometheusMetrics) -> Any:
    """What answers queries, and takes deltas if the role does."""
    return create_app(
        role.reader,
        role.ingest,
        settings,
        metrics,
        status=role.status,
        ready=lambda: role.ready,
        render_views=render_views,
        parse_pushed=parse_pushed,
        letters=role.letters,
    )


def return_memory() -> None:
    """Let glibc's malloc hold on to less freed memory; a no-op elsewhere. To be called before threads start.

    By default each thread gets an arena of its own, and what is freed there is of no use to the others; and the more a
    program frees at once, the more of it malloc keeps. With the threads and buffers of RocksDB that is a quarter of the
    process' memory.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def run_served(served: Served[Any], *, data: str, as_json: bool) -> int:
    """Run until SIGINT or SIGTERM; the exit code."""

    def announce(url: str) -> None:
        count = served.role.status()["partition_count"]
        if as_json:
            console.print_json({"url": url, "data": data, "partition_count": count})
        else:
            print(f"ready at {url}  (data in {data}, {count} partitions, Ctrl-C stops)", flush=True)

    with stopping_on_signals(served.stop):
        code = served.run(announce)
    holding(code)
    if code != console.OK:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread that hangs in a disk's write would keep the interpreter from ending
    return code
