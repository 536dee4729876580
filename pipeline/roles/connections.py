"""Bounds on all connections of an HTTP server together: their number, how long they wait, and the memory that they hold.

A connection waits while the server can do nothing for it before its client does something: sends a request, the rest of a
head or of a body, or takes more of an answer. Where connections are short, the one that has waited longest is closed.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Protocol

import pipeline.metrics as m
from pipeline.metrics import Metrics
from pipeline.settings import QuerySettings

_log = logging.getLogger(__name__)
RESERVED_MAX = 32
"""Connections beyond `sockets_max`, on which only health and metrics are answered."""
CLOSING_S = 2.0
"""Time in which a client may read why its connection is closed."""
PROGRESS_BYTES = 65_536
"""A client that takes so much of its answer, or the rest, within `write_timeout_ms` is not stalled."""
_FRESH_S = 1.0
"""Time after which it is known how quickly a client reads."""
_QUICK_BYTES_PER_S = 1_048_576
"""Clients that read so quickly are cut off at twice `buffered_bytes_max` only: their answers are soon gone."""
_LIMITS = (
    *("sockets_max", "sockets_per_address_max", "head_bytes_max", "buffered_bytes_max"),
    *("idle_timeout_ms", "head_timeout_ms", "body_timeout_ms", "write_timeout_ms"),
)
"""Settings at whose limits connections are closed."""
_ORDINARY = "idle_timeout_ms"
"""Limit that any client may reach."""


class Connection(Protocol):
    """One connection, as `Connections` knows it."""

    address: str
    """Address that the connection counts for."""
    reserved: bool
    """True for a connection that is beyond the limit, and only answers operators."""

    @property
    def unsent_bytes(self) -> int:
        """Bytes of answers that the client has not taken."""
        ...

    def cut(self) -> None:
        """Close the connection at once."""
        ...

    def late(self, limit: str) -> None:
        """Answer that the client is too late, if it waits for an answer, and close the connection."""
        ...


Waits = dict[Connection, float]
"""Connections that wait for one thing, with the times since when: the longest first."""


@dataclass(slots=True)
class _Unsent:
    """An answer, or a part of one, that a client has to take."""

    began_s: float
    """Time from which on the client's speed is measured: the system's buffers have taken their part by then."""
    began_bytes: int
    seen_s: float
    """Time of the last progress."""
    seen_bytes: int
    """Bytes that were left at that time."""
    now_bytes: int

    def rate(self, now_s: float) -> float:
        """Return the bytes that the client takes in a second."""
        took_s = now_s - self.began_s
        return (self.began_bytes - self.now_bytes) / took_s if took_s > _FRESH_S else inf


class Connections:
    """All connections of one server, on its event loop. `now_s` is that loop's clock."""

    def __init__(self, settings: QuerySettings, metrics: Metrics, sockets_max: int, now_s: Callable[[], float]) -> None:
        self.settings = settings
        self.now_s = now_s
        self.idle: Waits = {}
        """Connections that wait for their next request."""
        self.heads: Waits = {}
        """Connections that wait for a head: for the first from the start, for others from the first byte."""
        self.bodies: Waits = {}
        self.closing: Waits = {}
        self._waits = (self.idle, self.heads, self.bodies, self.closing)
        self._timeouts = [
            (self.idle, "idle_timeout_ms", settings.idle_timeout_ms / 1000),
            (self.heads, "head_timeout_ms", settings.head_timeout_ms / 1000),
            (self.bodies, "body_timeout_ms", settings.body_timeout_ms / 1000),
        ]
        self._sockets_max = sockets_max
        self._metrics = metrics
        self._open: set[Connection] = set()
        self._addresses: Counter[str] = Counter()
        self._reserved = 0
        self._unsent: dict[Connection, _Unsent] = {}
        self._buffered_bytes = 0
        self._logged: set[str] = set()
        metrics.set(m.CONNECTIONS, 0)
        metrics.set(m.CONNECTIONS_MAX, sockets_max)
        for limit in _LIMITS:
            metrics.inc(m.CONNECTIONS_CUT, 0, limit)

    def admit(self, connection: Connection) -> bool:
        """Take a new connection in, if need be in the place of one that waits; return whether there is a place for it."""
        limit = self._limit_reached(connection.address)
        if limit:
            waiting = self._longest_waiting(connection.address if limit == "sockets_per_address_max" else None)
            if waiting is not None:
                self.cut(waiting, limit)
            elif not self._reserve(connection, limit):
                return False
        self._open.add(connection)
        self._addresses[connection.address] += 1
        self._metrics.set(m.CONNECTIONS, len(self._open))
        return True

    def make_room(self) -> None:
        """Close the connection that has waited longest, if one waits: the system has no descriptor left."""
        waiting = self._longest_waiting(None) if self._addresses else None
        if waiting is not None:
            self.cut(waiting, "sockets_max")

    def _limit_reached(self, address: str) -> str:
        if self._addresses[address] >= self.settings.sockets_per_address_max:
            return "sockets_per_address_max"
        return "sockets_max" if len(self._open) - self._reserved >= self._sockets_max else ""

    def _reserve(self, connection: Connection, limit: str) -> bool:
        if self._reserved >= RESERVED_MAX:
            waiting = self._longest_waiting(None, reserved=True)
            self.count(limit, connection)
            if waiting is None:
                return False
            self.cut(waiting, limit)
        connection.reserved = True
        self._reserved += 1
        return True

    def _longest_waiting(self, address: str | None, *, reserved: bool = False) -> Connection | None:
        """Return the connection from `address`, by default that with the most connections, that has waited longest.

        By default, if none from there waits, return one from another address.
        """
        of = self._most_crowded() if address is None else address
        waiting = min(self._first_waiting(of, reserved), default=None, key=lambda it: it[0])
        if waiting is None and address is None:
            waiting = min(self._first_waiting(None, reserved), default=None, key=lambda it: it[0])
        return None if waiting is None else waiting[1]

    def _most_crowded(self) -> str:
        return max(self._addresses, key=self._addresses.__getitem__)

    def _first_waiting(self, address: str | None, reserved: bool) -> Iterator[tuple[float, Connection]]:
        def fits(it: Connection) -> bool:
            return it.reserved == reserved and (address is None or it.address == address)

        for waits in (self.idle, self.heads, self.bodies):
            yield from islice(((since_s, it) for it, since_s in waits.items() if fits(it)), 1)
        yield from ((unsent.seen_s, it) for it, unsent in self._unsent.items() if fits(it))

    def lost(self, connection: Connection) -> None:
        """Forget a connection that is closed. May be called twice."""
        self.sent(connection)
        self._forget_waits(connection)
        if connection in self._open:
            self._open.remove(connection)
            self._addresses[connection.address] -= 1
            if not self._addresses[connection.address]:
                del self._addresses[connection.address]
            self._reserved -= connection.reserved
            self._metrics.set(m.CONNECTIONS, len(self._open))

    def _forget_waits(self, connection: Connection) -> None:
        for waits in self._waits:
            waits.pop(connection, None)

    def cut(self, connection: Connection, limit: str) -> None:
        """Close a connection at a limit, and count that."""
        self.count(limit, connection)
        self.sent(connection)
        self._forget_waits(connection)
        connection.cut()

    def count(self, limit: str, connection: Connection) -> None:
        """Count a connection that is closed at a limit; the first of each limit is logged."""
        self._metrics.inc(m.CONNECTIONS_CUT, 1, limit)
        if limit not in self._logged and limit != _ORDINARY:
            self._logged.add(limit)
            value = self._sockets_max if limit == "sockets_max" else getattr(self.settings, limit)
            _log.warning(
                "%s=%d is reached: a connection from %s is closed; %s counts these from now on, without further lines here",
                *(limit, value, connection.address, m.CONNECTIONS_CUT.name),
            )

    def unsent(self, connection: Connection) -> None:
        """Note that a client has to take more before its connection goes on; beyond the limit the slowest is cut off."""
        now_s, size = self.now_s(), connection.unsent_bytes
        self.sent(connection)
        self._unsent[connection] = _Unsent(inf, size, now_s, size, size)
        self._buffered_bytes += size
        if self._buffered_bytes > self.settings.buffered_bytes_max:
            self._look_at_unsent(now_s)
            self._cut_slowest(now_s)

    def _cut_slowest(self, now_s: float) -> None:
        bytes_max = self.settings.buffered_bytes_max
        while self._buffered_bytes > bytes_max and self._unsent:
            slowest = min(self._unsent, key=lambda it: self._unsent[it].rate(now_s))
            if self._unsent[slowest].rate(now_s) >= _QUICK_BYTES_PER_S and self._buffered_bytes <= 2 * bytes_max:
                return
            self.cut(slowest, "buffered_bytes_max")

    def sent(self, connection: Connection) -> None:
        """Note that a client has taken what it had to. May be called at any time."""
        it = self._unsent.pop(connection, None)
        if it is not None:
            self._buffered_bytes -= it.now_bytes

    def hold(self, size: int) -> bool:
        """Add the bytes of a request that came before its turn; return whether there is room for them."""
        self._buffered_bytes += size
        return self._buffered_bytes <= self.settings.buffered_bytes_max

    def release(self, size: int) -> None:
        """Take away what was added with `hold`."""
        self._buffered_bytes -= size

    def sweep(self) -> None:
        """Close all connections that have waited for too long. To be called several times a second."""
        now_s = self.now_s()
        for waits, limit, timeout_s in self._timeouts:
            for connection in self._late(waits, now_s - timeout_s):
                self.count(limit, connection)
                connection.late(limit)
        for connection in self._late(self.closing, now_s - CLOSING_S):
            connection.cut()
        if self._unsent:
            self._look_at_unsent(now_s)
            for it in self._unsent.values():
                if it.began_s == inf:
                    it.began_s, it.began_bytes = now_s, it.now_bytes
            stalled_s = now_s - self.settings.write_timeout_ms / 1000
            for connection in [connection for connection, it in self._unsent.items() if it.seen_s <= stalled_s]:
                self.cut(connection, "write_timeout_ms")
            self._cut_slowest(now_s)

    @staticmethod
    def _late(waits: Waits, before_s: float) -> Iterator[Connection]:
        while waits:
            connection, since_s = next(iter(waits.items()))
            if since_s > before_s:
                return
            del waits[connection]
            yield connection

    def _look_at_unsent(self, now_s: float) -> None:
        for connection, it in self._unsent.items():
            size = connection.unsent_bytes
            self._buffered_bytes += size - it.now_bytes
            it.now_bytes = size
            if it.seen_bytes - size >= PROGRESS_BYTES:
                it.seen_s, it.seen_bytes = now_s, size
