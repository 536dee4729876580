"""Accepts the connections of a listening socket, each only once it has a place among `Connections`."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable
from typing import Any

from pipeline.roles.connections import Connections
from pipeline.roles.http_protocol import BoundedProtocol

_log = logging.getLogger(__name__)
_AT_ONCE = 16
"""Connections that are accepted before the loop does something else: among it, closing those that make room."""
MakeContext = Callable[[], ssl.SSLContext]
_SHUTDOWN_S = 5.0
"""Longest wait for a client's part of the end of TLS."""
_PAUSE_S = 0.1
"""Pause after the system had no descriptor or memory for a connection: trying on would take a core."""


class Acceptor:
    """The accepting end of one server, in place of `asyncio.Server`, which accepts whatever comes.

    `make` returns the protocol of a connection from a host; `tls` the TLS context of a connection that is made now.
    """

    def __init__(
        self,
        listener: socket.socket,
        connections: Connections,
        make: Callable[[str], BoundedProtocol],
        tls: MakeContext | None,
    ) -> None:
        self.sockets = (listener,)
        self._listener = listener
        self._connections = connections
        self._make = make
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()
        self._closed = False
        self._failed = False
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._closed = True
        self._loop.remove_reader(self._listener)

    def _listen(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            try:
                client, address = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if not self._failed:
                    self._failed = True
                    _log.error("the system has nothing left for another connection: %s", error)
                self._connections.make_room()
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_PAUSE_S, self._listen)
                return
            self._begin(client, str(address[0]))

    def _begin(self, client: socket.socket, host: str) -> None:
        client.setblocking(False)
        protocol = self._make(host)
        if not self._connections.admit(protocol):
            client.close()
            return
        protocol.accepted(client)
        task = self._loop.create_task(self._connect(client, protocol))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, client: socket.socket, protocol: BoundedProtocol) -> None:
        try:
            options: dict[str, Any] = {}
            if self._tls is not None:
                options["ssl"] = self._tls()
                options["ssl_handshake_timeout"] = self._connections.settings.head_timeout_ms / 1000
                options["ssl_shutdown_timeout"] = _SHUTDOWN_S
            await self._loop.connect_accepted_socket(lambda: protocol, client, **options)
        except (OSError, asyncio.CancelledError):  # the client has gone, or its handshake has failed
            pass
        finally:
            if protocol.is_connecting:
                client.close()
                self._connections.lost(protocol)
