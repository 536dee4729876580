"""A role with its HTTP server in front of it: what `pipeline up`, `worker` and `serve` run."""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import pipeline.metrics as m
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.prometheus import PrometheusMetrics, render_views
from pipeline.adapters.tokens_file import TokensFile
from pipeline.config import Config
from pipeline.core.answer import Status
from pipeline.errors import Exit, exit_code
from pipeline.ingest.openmetrics import parse_pushed
from pipeline.ingest.otlp import parse_export
from pipeline.ingest.totals import RunningTotals
from pipeline.metrics import Metrics
from pipeline.ports import Ingest
from pipeline.publisher.sender import held_after_ms
from pipeline.pushed import TotalsMemory
from pipeline.query.access import Access
from pipeline.query.api import create_app, create_operations_app
from pipeline.query.dead_letters import DeadLetters
from pipeline.query.gather_api import create_gather_app
from pipeline.query.otlp_api import ExportTaking
from pipeline.query.reader import ViewReader
from pipeline.roles.descriptors import raise_limit
from pipeline.roles.http_server import HttpServer, bind, open_tls, url_of
from pipeline.settings import QuerySettings
from pipeline.threads import guarded
from pipeline.worker.restore import RestoreProgress

if TYPE_CHECKING:
    from pipeline.adapters.faust.agents import AgentsApp
    from pipeline.roles.embedded import Engine
    from pipeline.roles.gather import Gatherer
    from pipeline.roles.server import ClusterServer
    from pipeline.roles.worker import ClusterWorker

_log = logging.getLogger(__name__)
_MALLOC_OPTIONS = {-8: 2, -3: 2**20, -1: 4 * 2**20}
"""Values of M_ARENA_MAX, M_MMAP_THRESHOLD and M_TRIM_THRESHOLD, by their numbers in malloc.h."""

OnProgress = Callable[[RestoreProgress], None]


def _ignore(_: Any) -> None:
    pass


class Role(Protocol):
    """An `Engine`, a `ClusterWorker`, a `ClusterServer` or a `Gatherer`."""

    @property
    def ready(self) -> bool: ...

    def start(self) -> None: ...

    def wait_ready(self, timeout_s: float) -> bool: ...

    def stop(self) -> bool: ...

    def status(self) -> Status: ...


class QueryRole(Role, Protocol):
    """An `Engine` or a `ClusterServer`."""

    reader: ViewReader

    @property
    def letters(self) -> DeadLetters: ...

    @property
    def ingest(self) -> Ingest | None: ...


class Hooks(NamedTuple):
    """Receivers of what a role reports."""

    metrics: PrometheusMetrics
    on_fatal: Callable[[BaseException], None]
    on_progress: OnProgress


RoleT = TypeVar("RoleT", bound=Role)


class Service(Generic[RoleT]):
    """A role and the HTTP server in front of it. `url` is known from the start, also for port 0.

    Raises what the role raises, and `Invalid` if the port is taken.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        make: Callable[[Hooks], RoleT],
        make_app: Callable[[RoleT, PrometheusMetrics, Access | None], Any],
        on_progress: OnProgress,
    ) -> None:
        self.fatal: BaseException | None = None
        """The error that ended the role."""
        self._accept_loss = config.worker.accept_loss
        self._ready = False
        raise_limit()  # before a role opens files
        self._metrics = metrics = PrometheusMetrics()
        self._data = config.log.data
        metrics.show_info(name)
        access = open_access(config.query, metrics)
        tls = open_tls(config.query, metrics)
        self.role = make(Hooks(metrics, self._fail, on_progress))
        try:  # after the role: that a directory is in use says more than that a port is in use
            self._listener = bind(config.query)
        except BaseException:
            self.role.stop()
            raise
        self.url = url_of(self._listener, config.query)
        app = make_app(self.role, metrics, access)
        self._server = HttpServer(app, self._listener, config.query, metrics, tls)
        metrics.before_render = self._measure

    def run(self, on_ready: Callable[[str], None] = _ignore) -> int:
        """Serve until `stop` or a fatal error, then close everything; return the exit code. `on_ready` gets the URL."""
        announce = guarded(_log, "pipeline-ready", self._announce, self._metrics)
        watcher = threading.Thread(target=announce, args=(on_ready,), name="pipeline-ready", daemon=True)
        try:
            self.role.start()
            watcher.start()
            self._server.run()
        finally:
            stopped = self.role.stop()
            self._listener.close()
        if self.fatal is not None:
            return exit_code(self.fatal, started=True, ready=self._ready, decided=self._accept_loss)
        return Exit.OK if stopped else Exit.RESTART

    def _announce(self, on_ready: Callable[[str], None]) -> None:
        while self.fatal is None and not self._server.stopped:
            if self.role.wait_ready(0.2):
                self._ready = True
                on_ready(self.url)
                return

    def _measure(self) -> None:
        self._metrics.set(m.READY, self.role.ready)
        with suppress(OSError):
            disk = os.statvfs(self._data)
            self._metrics.set(m.DISK_BYTES, disk.f_frsize * disk.f_blocks)
            self._metrics.set(m.DISK_FREE, disk.f_frsize * disk.f_bavail)

    def stop(self) -> None:
        """End `run`, from any thread or a signal handler."""
        self._server.stop()

    def _fail(self, error: BaseException) -> None:
        self.fatal = error
        self.stop()


def embedded_service(config: Config, on_progress: OnProgress = _ignore) -> Service[Engine]:
    """Return log, worker and query API in one process, without a broker."""
    from pipeline.roles.embedded import Engine

    def make(hooks: Hooks) -> Engine:
        return Engine(
            config.log,
            worker_settings=config.worker,
            query_settings=config.query,
            publisher_settings=config.publisher,
            **hooks._asdict(),
        )

    def make_app(engine: Engine, metrics: PrometheusMetrics, access: Access | None) -> Any:
        return _query_app(config, engine, metrics, access, engine.totals)

    return Service(config, "up", make, make_app, on_progress)


def worker_service(
    config: Config,
    url: str,
    *,
    partitions: Sequence[int] | None,
    name: str,
    static: bool,
    agents: AgentsApp | None,
    on_progress: OnProgress = _ignore,
) -> Service[ClusterWorker]:
    """Return a worker of the Kafka log at `url`; see `ClusterWorker`."""
    from pipeline.roles.worker import ClusterWorker

    def make(hooks: Hooks) -> ClusterWorker:
        return ClusterWorker(
            url,
            config.log,
            kafka_settings=config.kafka,
            worker_settings=config.worker,
            partitions=partitions,
            name=name,
            static=static,
            agents=agents,
            publisher_settings=config.publisher,
            **hooks._asdict(),
        )

    def make_app(worker: ClusterWorker, metrics: PrometheusMetrics, access: Access | None) -> Any:
        return create_operations_app(config.query, metrics, worker.clock, worker.status, lambda: worker.ready, access)

    service = Service(config, "worker", make, make_app, on_progress)
    # Other members ask this URL for the status, and nobody can connect to a wildcard address.
    wildcard = config.query.host in ("0.0.0.0", "::")  # nosec B104  # binds nothing
    scheme, port = service.url.partition("://")[0], service.url.rpartition(":")[2]
    service.role.url = f"{scheme}://{socket.gethostname()}:{port}" if wildcard else service.url
    return service


def query_service(
    config: Config,
    url: str,
    *,
    ingest: bool,
    partitions: Collection[int] | None = None,
    on_progress: OnProgress = _ignore,
) -> Service[ClusterServer]:
    """Return a query server of the Kafka log at `url`; see `ClusterServer`."""
    from pipeline.roles.server import ClusterServer

    def make(hooks: Hooks) -> ClusterServer:
        return ClusterServer(
            url,
            config.log,
            kafka_settings=config.kafka,
            worker_settings=config.worker,
            query_settings=config.query,
            publisher_settings=config.publisher,
            ingest=ingest,
            partitions=partitions,
            **hooks._asdict(),
        )

    return Service(config, "server", make, partial(_query_app, config), on_progress)


def gather_service(config: Config, urls: Sequence[str], on_progress: OnProgress = _ignore) -> Service[Gatherer]:
    """Return a server that merges what the servers at these URLs have."""
    from pipeline.roles.gather import Gatherer

    def make(hooks: Hooks) -> Gatherer:
        return Gatherer(urls, query_settings=config.query, client_settings=config.client, metrics=hooks.metrics)

    def make_app(gatherer: Gatherer, metrics: PrometheusMetrics, access: Access | None) -> Any:
        return create_gather_app(gatherer.service, config.query, metrics, render_views, access)

    return Service(config, "gatherer", make, make_app, on_progress)


def _query_app(
    config: Config, role: QueryRole, metrics: PrometheusMetrics, access: Access | None, memory: TotalsMemory | None = None
) -> Any:
    """Return the application of a server; one with a `memory` is the only one of its log."""
    settings, totals = config.query, None
    if role.ingest is not None and (memory is not None or settings.otlp_totals):
        resend_ms = held_after_ms(config.worker.producer_ttl_ms)
        most = settings.otlp_streams_max
        totals = RunningTotals(role.ingest, SystemClock(), most, memory, resend_ms=resend_ms, metrics=metrics)
    return create_app(
        role.reader,
        role.ingest,
        settings,
        metrics,
        status=role.status,
        ready=lambda: role.ready,
        render_views=render_views,
        parse_pushed=parse_pushed,
        exports=ExportTaking(parse_export, totals),
        letters=role.letters,
        access=access,
    )


def open_access(settings: QuerySettings, metrics: Metrics) -> Access | None:
    """Return what the setting `tokens_file` grants; None without one. `Invalid` if the file can't be read."""
    if not settings.tokens_file:
        return None
    clock = SystemClock()
    return Access(TokensFile(settings.tokens_file, clock), clock, metrics)


def return_memory() -> None:
    """Let glibc's malloc keep less of the memory that is freed; a no-op elsewhere. Call it before threads start.

    By default each thread gets an arena of its own, and what is freed there is of no use to the others; and the more a
    program frees at once, the more of it malloc keeps. With the threads and buffers of RocksDB that is a quarter of the
    process' memory.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)
