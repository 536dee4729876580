"""A network in which answers take their time, and are lost when the server dies while they are on their way."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from types import TracebackType
from typing import Self

ANSWER_S = 0.01
"""Time that an answer is on its way."""


class SlowNetwork:
    """Passes connections on to a port of this machine. Answers sent just before the server dies do not arrive.

    Otherwise every answer would reach the client before the server is killed, and no batch would ever be sent twice.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._accept, daemon=True)

    @property
    def url(self) -> str:
        """The URL at which clients reach the server."""
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                server = socket.create_connection(("127.0.0.1", self._port), 5)
            except OSError:
                return
            with server, contextlib.suppress(OSError):
                self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        """Pass bytes on until one side closes, or the server dies with an answer on its way."""
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            readable = select.select([client, server], [], [])[0]
            if client in readable:
                data = client.recv(65_536)
                if not data:
                    return
                server.sendall(data)
            if server in readable:
                data = server.recv(65_536)
                if not data or _dies(server):
                    return
                client.sendall(data)


def _dies(server: socket.socket) -> bool:
    """Return whether to close the connection while the answer is on its way."""
    readable = select.select([server], [], [], ANSWER_S)[0]
    return bool(readable) and not server.recv(1, socket.MSG_PEEK)
