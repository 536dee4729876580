"""`pipeline up`: log, worker and query API in one process."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.cli import console
from pipeline.cli.bars import RestoreBars
from pipeline.cli.server import HttpServer, bind, url_of
from pipeline.cli.signals import stopping_on_signals
from pipeline.config import Config
from pipeline.engine import Engine
from pipeline.query.api import create_app

_log = logging.getLogger(__name__)
_MALLOC_OPTIONS = {-8: 2, -3: 2**20, -1: 4 * 2**20}
"""By malloc.h's numbers: M_ARENA_MAX, M_MMAP_THRESHOLD, M_TRIM_THRESHOLD."""


class Up:
    """The whole pipeline with its HTTP server, as one thing to run and stop.

    Raises as `Engine` does, and `Invalid` if the port is taken. `url` is known from the start, also for port 0.
    """

    def __init__(self, config: Config) -> None:
        self._fatal: BaseException | None = None
        self._bars = RestoreBars()
        metrics = PrometheusMetrics()
        self.engine = Engine(
            config.log,
            worker_settings=config.worker,
            query_settings=config.query,
            publisher_settings=config.publisher,
            metrics=metrics,
            on_fatal=self._fail,
            on_progress=self._bars,
        )
        try:  # only now: of two wrongs, a directory in use says more than a port in use
            self._listener = bind(config.query)
        except BaseException:
            self.engine.stop()
            raise
        self.url = url_of(self._listener)
        app = create_app(
            self.engine.reader,
            self.engine.gateway,
            config.query,
            metrics,
            status=self.engine.status,
            ready=lambda: self.engine.ready,
        )
        self._server = HttpServer(app, self._listener, config.query)

    def run(self, on_ready: Callable[[str], None] = lambda _: None) -> int:
        """Serve until `stop` or a fatal error, then close everything; the exit code. `on_ready` gets the URL."""
        watcher = threading.Thread(target=self._announce, args=(on_ready,), name="pipeline-ready", daemon=True)
        try:
            self.engine.start()
            watcher.start()
            self._server.run()
        finally:
            self._bars.close()
            stopped = self.engine.stop()
            self._listener.close()
        if self._fatal is not None:
            console.print_error(self._fatal)
            return console.FATAL
        return console.OK if stopped else console.FATAL

    def _announce(self, on_ready: Callable[[str], None]) -> None:
        while self._fatal is None and not self._server.stopped:
            if self.engine.wait_ready(0.2):
                self._bars.close()
                on_ready(self.url)
                return

    def stop(self) -> None:
        """End `run`, from any thread or a signal handler."""
        self._server.stop()

    def _fail(self, error: BaseException) -> None:
        self._fatal = error
        self.stop()


def _return_memory() -> None:
    """Let glibc's malloc hold on to less freed memory; a no-op elsewhere. To be called before threads start.

    By default each thread gets an arena of its own, and what is freed there is of no use to the others; and the more a
    program frees at once, the more of it malloc keeps. With the threads and buffers of RocksDB that is a quarter of the
    process' memory.
    """
    with suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC_OPTIONS.items():
            mallopt(option, value)


def run_up(config: Config, *, as_json: bool) -> int:
    """Run until SIGINT or SIGTERM; the exit code."""
    _return_memory()
    up = Up(config)

    def announce(url: str) -> None:
        status: Mapping[str, Any] = up.engine.status()
        if as_json:
            console.print_json({"url": url, "data": config.log.data, "partition_count": status["partition_count"]})
        else:
            print(
                f"ready at {url}  (data in {config.log.data}, {status['partition_count']} partitions, Ctrl-C stops)",
                flush=True,
            )

    with stopping_on_signals(up.stop):
        code = up.run(announce)
    if code == console.FATAL:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # a thread that hangs in a disk's write would keep the interpreter from ending
    return code
