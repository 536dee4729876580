"""A StatsD server: a UDP and a TCP socket on one port, read by one thread that passes lines on.

Packets that come faster than they are read are dropped by the kernel, which only `ss -lunm` shows (`d`). TCP senders are
slowed down instead. Memory is bounded whatever is sent: by the kernel's buffers, one partial line for each connection, and
one read of each socket.
"""

from __future__ import annotations

import logging
import re
import selectors
import socket
from contextlib import suppress
from functools import partial

from pipeline.errors import Invalid
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock, LineSink
from pipeline.settings import IngestSettings
from pipeline.threads import PeriodicThread

UDP, TCP = "statsd_udp", "statsd_tcp"
_TICK_S = 0.05
_READ_BYTES = 65_536
_BURST_PACKETS = 256
"""Packets to read at once before TCP has its turn."""
_BURST_BYTES = 1_048_576
_DRAIN_S = 2.0
"""Longest time for which senders that do not stop may hold up the end."""
_PAUSE_S = 1.0
"""Pause after a connection could not be accepted for lack of file descriptors."""
_PORT_TRIES = 20
_HTTP_START = re.compile(rb"[A-Z]{3,7} (?:/|\*|https?:)")
_HTTP_END = re.compile(rb" HTTP/1\.[01]\r?\Z")
_TLS_START = b"\x16\x03"
_log = logging.getLogger(__name__)


class _Connection:
    """A connection, with the beginning of a line whose end has not come."""

    def __init__(self, sock: socket.socket, sender: str, now_s: float) -> None:
        self.sock = sock
        self.sender = sender
        self.line_at_s = now_s
        """The time at which the last line has ended, or the connection was accepted."""
        self.began = False
        """True once it is known that the sender does not begin as one of another protocol would."""
        self.partial = b""
        self.skipping = False
        """True while the rest of an oversized line is skipped."""


class StatsdServer:
    """Listens as soon as it is made; `start` begins to read. `Invalid` if the address is taken or not of this machine."""

    def __init__(
        self, host: str, port: int, settings: IngestSettings, sink: LineSink, clock: Clock, metrics: Metrics = NO_METRICS
    ) -> None:
        self._settings = settings
        self._sink = sink
        self._clock = clock
        self._listener, self._udp = _bind_both(host, port)
        self._udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, settings.ingest_receive_buffer_bytes)
        self._connections: dict[socket.socket, _Connection] = {}
        """Connections, those first in which no line has ended for longest."""
        self._buffer = bytearray(settings.ingest_packet_bytes_max + 1)
        self._wake, self._woken = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        for sock in (self._listener, self._udp, self._woken):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ)
        self._accept_at_s: float | None = None
        self._thread = PeriodicThread(
            "pipeline-statsd",
            partial(self._turn, _TICK_S),
            log=_log,
            clock=clock,
            metrics=metrics,
            on_fatal=lambda _: None,  # `failed` says it
            fatal_message="receiving ends",
            on_end=self._finish,
        )

    @property
    def failed(self) -> bool:
        """True if an exception has ended the thread."""
        return self._thread.failed

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of both sockets."""
        host, port = self._listener.getsockname()[:2]
        return host, port

    @property
    def receive_buffer_bytes(self) -> int:
        """Bytes that the kernel grants for waiting packets; it reports twice that, for its own records."""
        granted = self._udp.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        return granted // 2 if hasattr(socket, "SO_PASSCRED") else granted

    def start(self) -> None:
        """Start to read."""
        self._thread.start()

    def stop(self, timeout_s: float = 30.0) -> bool:
        """Take in what has arrived, then close; return whether that was done in time. Idempotent."""
        self._thread.stopping.set()
        with suppress(OSError):
            self._wake.send(b"x")
        if not self._thread.started:
            self._close()
            return True
        return self._thread.stop(timeout_s)

    def _finish(self) -> None:
        """Take in what has arrived, unless reading has failed, and close."""
        try:
            if not self._thread.failed:
                self._drain()
        finally:
            self._close()

    def _turn(self, timeout_s: float) -> bool:
        """Wait for input, and read some from every socket that has any; return whether one had."""
        ready = self._selector.select(timeout_s)
        for key, _ in ready:
            self._read(key.fileobj)
        self._sink.tick()
        self._end_idle()
        if self._accept_at_s is not None and self._clock.monotonic_s() >= self._accept_at_s:
            self._accept_at_s = None
            self._selector.register(self._listener, selectors.EVENT_READ)
        return bool(ready)

    def _read(self, sock: object) -> None:
        if sock is self._udp:
            self._read_packets()
        elif sock is self._listener:
            self._accept()
        elif isinstance(sock, socket.socket) and sock in self._connections:
            self._read_stream(self._connections[sock])

    def _drain(self) -> None:
        """Read until nothing is left, or time is over."""
        with suppress(KeyError):
            self._selector.unregister(self._woken)
        deadline_s = self._clock.monotonic_s() + _DRAIN_S
        while self._turn(0.0) and self._clock.monotonic_s() < deadline_s:
            pass

    def _close(self) -> None:
        for connection in [*self._connections.values()]:
            self._end(connection, closed_in_order=False)
        for sock in (self._listener, self._udp, self._woken, self._wake):
            sock.close()
        self._selector.close()

    # UDP

    def _read_packets(self) -> None:
        lines: list[bytes] = []
        size, sender = 0, ""
        for _ in range(_BURST_PACKETS):
            try:
                count, address = self._udp.recvfrom_into(self._buffer)
            except (BlockingIOError, InterruptedError):
                break
            except OSError as error:  # such as an ICMP answer to another packet
                _log.debug("udp: %s", error)
                continue
            if count > self._settings.ingest_packet_bytes_max:
                self._sink.refuse("packet_long", UDP)
                continue
            if lines and address[0] != sender:
                self._sink.take(lines, UDP, sender)
                lines = []
            sender = address[0]
            lines += bytes(memoryview(self._buffer)[:count]).split(b"\n")
            size += count
            if size >= _BURST_BYTES:
                break
        if lines:
            self._sink.take(lines, UDP, sender)

    # TCP

    def _accept(self) -> None:
        try:
            sock, address = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:
            _log.warning("no connection can be accepted: %s", error)
            self._selector.unregister(self._listener)
            self._accept_at_s = self._clock.monotonic_s() + _PAUSE_S
            return
        if len(self._connections) >= self._settings.ingest_connections_max:
            self._sink.refuse("connections_max", TCP)
            sock.close()
            return
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._connections[sock] = _Connection(sock, address[0], self._clock.monotonic_s())
        self._selector.register(sock, selectors.EVENT_READ)

    def _read_stream(self, connection: _Connection) -> None:
        try:
            data = connection.sock.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # the connection broke: the last line may be incomplete
            self._end(connection, closed_in_order=False)
            return
        if not data:
            self._end(connection, closed_in_order=True)
            return
        first, *more = data.split(b"\n")
        if not connection.began and self._is_foreign(connection, connection.partial + first, whole=bool(more)):
            self._sink.refuse("http", TCP)
            connection.partial = b""
            self._end(connection, closed_in_order=False)
            return
        if not more:
            self._keep(connection, connection.partial + first)
            return
        connection.line_at_s = self._clock.monotonic_s()
        self._connections[connection.sock] = self._connections.pop(connection.sock)
        lines = more[:-1]
        if connection.skipping:
            connection.skipping = False
        else:
            lines.insert(0, connection.partial + first)
        connection.partial = b""
        self._keep(connection, more[-1])
        if lines:
            self._sink.take(lines, TCP, connection.sender)

    def _is_foreign(self, connection: _Connection, line: bytes, *, whole: bool) -> bool:
        """Return whether a connection begins as HTTP or TLS does.

        Any page that is open in a browser of this machine can send HTTP here, with lines of StatsD as the body.
        """
        connection.began = whole or len(line) > self._settings.ingest_line_bytes_max
        if line.startswith(_TLS_START):
            return True
        return connection.began and bool(_HTTP_START.match(line)) and (not whole or bool(_HTTP_END.search(line)))

    def _end_idle(self) -> None:
        """Close connections that only take up room: an open one costs its sender nothing."""
        end_s = self._clock.monotonic_s() - self._settings.ingest_idle_timeout_ms / 1000
        while self._connections and (first := next(iter(self._connections.values()))).line_at_s <= end_s:
            self._sink.refuse("idle", TCP)
            self._end(first, closed_in_order=False)

    def _keep(self, connection: _Connection, partial: bytes) -> None:
        """Remember the beginning of a line, unless it is too long already."""
        if connection.skipping:
            return
        connection.partial = partial
        if len(partial) > self._settings.ingest_line_bytes_max:
            connection.partial = b""
            connection.skipping = True
            self._sink.refuse("line_long", TCP)

    def _end(self, connection: _Connection, *, closed_in_order: bool) -> None:
        """Close a connection. A last line without a line end counts if the sender closed in order."""
        del self._connections[connection.sock]
        self._selector.unregister(connection.sock)
        connection.sock.close()
        if connection.partial.strip():
            if closed_in_order:
                self._sink.take([connection.partial], TCP, connection.sender)
            else:
                self._sink.refuse("cut", TCP)


def _bind_both(host: str, port: int) -> tuple[socket.socket, socket.socket]:
    """Return a listening TCP socket and a UDP socket on one port; for port 0 on any that is free for both."""
    error: OSError | None = None
    for _ in range(1 if port else _PORT_TRIES):
        listener = udp = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            found.sort(key=lambda it: it[0] != socket.AF_INET)  # IPv4 first, which StatsD clients use
            family, _, _, _, address = found[0]
            listener = socket.socket(family, socket.SOCK_STREAM)
            udp = socket.socket(family, socket.SOCK_DGRAM)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            udp.bind((address[0], listener.getsockname()[1], *address[2:]))
            listener.listen(128)
            return listener, udp
        except (OSError, UnicodeError, OverflowError) as failed:
            for sock in (listener, udp):
                if sock is not None:
                    sock.close()
            error = failed if isinstance(failed, OSError) else OSError(str(failed))
    assert error is not None
    raise Invalid(f"can't listen on {host}:{port}: {error.strerror or error}; try --port or --host") from None
