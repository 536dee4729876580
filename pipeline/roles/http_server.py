"""An HTTP server (uvicorn) that is stopped from any thread or signal handler."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any

import uvicorn

from pipeline.errors import Invalid
from pipeline.query.cross_origin import is_loopback
from pipeline.settings import QuerySettings

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
    if not (settings.tokens_file or settings.insecure or is_loopback(listener.getsockname()[0])):
        listener.close()
        raise Invalid(
            f"{settings.host}:{settings.port} can be reached from other machines, and whoever reaches it could read, write "
            "and drop everything. Choose one: access tokens (pipeline tokens add, then the setting tokens_file); "
            "--host 127.0.0.1 behind a proxy that knows its clients; or --insecure, where the network lets no stranger in"
        )
    listener.listen(1024)
    return listener


def url_of(listener: socket.socket) -> str:
    """Return the URL of the listener for clients on this machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # nosec B104  # binds nothing
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class UvicornServer(uvicorn.Server):
    """A server of uvicorn that leaves signals to others, and whose application ends what would never end by itself.

    The application's `state.before_stop` is called, if there is one, when the server is told to stop.
    """

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if before_stop := getattr(getattr(self.config.app, "state", None), "before_stop", None):
            before_stop()
        await super().shutdown(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `signals`: uvicorn would raise them again before the log and the stores are closed."""
        yield


class HttpServer:
    """One server. `run` blocks; `stop` ends it from any thread or signal handler."""

    def __init__(self, app: Any, listener: socket.socket) -> None:
        self._listener = listener
        self._server = UvicornServer(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing asks who the client is
                ws="none",
                timeout_graceful_shutdown=_GRACEFUL_S,
                lifespan="on",
            )
        )

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
