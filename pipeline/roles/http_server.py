"""An HTTP server (uvicorn) that is stopped from any thread or signal handler."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

import pipeline.metrics as m
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.tls import FollowedContext, server_context
from pipeline.errors import Invalid
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.query.cross_origin import is_loopback
from pipeline.roles.acceptor import Acceptor, MakeContext
from pipeline.roles.connections import Connections
from pipeline.roles.descriptors import raise_limit, sockets_within
from pipeline.roles.http_protocol import BoundedProtocol
from pipeline.settings import QuerySettings

_log = logging.getLogger(__name__)
_GRACEFUL_S = 5


def bind(settings: QuerySettings) -> socket.socket:
    """Return a listening socket.

    Raises `Invalid` if the address is taken or is not one of this machine, or if strangers could reach and use it.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise Invalid(f"can't listen on {settings.host}:{settings.port}: {error.strerror or error}; try --port") from None
    asks_who = settings.tokens_file or settings.tls_client_ca_file
    if not (asks_who or settings.insecure or is_loopback(listener.getsockname()[0])):
        listener.close()
        raise Invalid(
            f"{settings.host}:{settings.port} can be reached from other machines, and whoever reaches it could read, write "
            "and drop everything. Choose one: access tokens (pipeline tokens add, then the setting tokens_file); client "
            "certificates (--tls-client-ca); --host 127.0.0.1 behind a proxy that knows its clients; or --insecure, where "
            "the network lets no stranger in"
        )
    listener.listen(1024)
    return listener


def url_of(listener: socket.socket, settings: QuerySettings) -> str:
    """Return the URL of the listener for clients on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # nosec B104  # binds nothing
    scheme = "https" if settings.tls_cert_file else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def open_tls(settings: QuerySettings, metrics: Metrics) -> FollowedContext | None:
    """Return the TLS context of a server, which follows its files; None without a `tls_cert_file`.

    Raises `Invalid` if a file is missing or wrong.
    """
    if not settings.tls_cert_file:
        return None

    def complain(error: Invalid) -> None:
        metrics.inc(m.TLS_UNREADABLE)
        _log.warning("%s; new connections go on with the certificates that were read before", error)

    metrics.inc(m.TLS_UNREADABLE, 0)
    paths = [settings.tls_cert_file, settings.tls_key_file, settings.tls_client_ca_file]
    return FollowedContext(partial(server_context, settings), paths, SystemClock(), complain)


class UvicornServer(uvicorn.Server):
    """A server of uvicorn with bounded connections, which leaves signals to others.

    The application's `state.before_stop` is called, if there is one, when the server is told to stop: it ends what would
    never end by itself.
    """

    def __init__(self, config: uvicorn.Config, settings: QuerySettings, metrics: Metrics, tls: MakeContext | None) -> None:
        super().__init__(config)
        self._settings = settings
        self._metrics = metrics
        self._tls = tls
        self._sockets_max = sockets_within(raise_limit(), settings.sockets_max)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections from `sockets`."""
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        connections = Connections(self._settings, self._metrics, self._sockets_max, asyncio.get_running_loop().time)

        def make(host: str) -> BoundedProtocol:
            return BoundedProtocol(self.config, self.server_state, self.lifespan.state, connections, host)

        self._connections = connections
        self._acceptors = [Acceptor(it, connections, make, self._tls) for it in sockets or []]
        self.servers = []  # uvicorn closes these by itself
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """Close connections that have waited for too long, ten times a second."""
        try:
            self._connections.sweep()
        except Exception:  # an error that is raised here would end the server
            _log.exception("closing connections that have waited for too long")
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more, and give what is under way some time."""
        if before_stop := getattr(getattr(self.config.app, "state", None), "before_stop", None):
            before_stop()
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `signals`: uvicorn would raise them again before the log and the stores are closed."""
        yield


class HttpServer:
    """One server. `run` blocks; `stop` ends it from any thread or signal handler."""

    def __init__(
        self,
        app: Any,
        listener: socket.socket,
        settings: QuerySettings | None = None,
        metrics: Metrics = NO_METRICS,
        tls: MakeContext | None = None,
    ) -> None:
        self._listener = listener
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,  # nothing asks who the client is
            ws="none",
            timeout_graceful_shutdown=_GRACEFUL_S,
            lifespan="on",
        )
        self._server = UvicornServer(config, settings or QuerySettings(), metrics, tls)

    def run(self) -> None:
        """Serve until `stop`; requests under way get some seconds to finish."""
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(self._server.serve(sockets=[self._listener]))

    def stop(self) -> None:
        """End `run`."""
        self._server.should_exit = True

    @property
    def stopped(self) -> bool:
        """Return whether `stop` was called."""
        return self._server.should_exit


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
