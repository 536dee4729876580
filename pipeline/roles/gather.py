"""A server without stores, which merges what other servers have."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http_parts import HttpPart
from pipeline.core.answer import Status
from pipeline.errors import Invalid
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.query.gather import GatherService
from pipeline.query.part_servers import PartServers
from pipeline.settings import ClientSettings, QuerySettings

_SERVERS_MAX = 256
_LOOK_S = 0.02


class Gatherer:
    """Answers reads from the servers at these URLs, each of which follows some partitions or all.

    Raises `Invalid` for a URL that is none, or that stands twice.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        query_settings: QuerySettings | None = None,
        client_settings: ClientSettings | None = None,
        metrics: Metrics = NO_METRICS,
    ) -> None:
        settings, clock = query_settings or QuerySettings(), SystemClock()
        if not 0 < len(urls) <= _SERVERS_MAX:
            raise Invalid(f"--gather: 1 to {_SERVERS_MAX} servers are needed, got {len(urls)}")
        servers = [HttpPart(url, clock, client_settings) for url in urls]
        if len({it.url for it in servers}) < len(servers):
            raise Invalid(f"--gather: a server stands twice in {', '.join(urls)}")
        known = PartServers(servers, clock, metrics, settings.gather_interval_ms / 1000)
        self.service = GatherService(known, clock, settings, metrics)
        self._stopping = threading.Event()

    @property
    def ready(self) -> bool:
        """Return whether every partition has a server that answers."""
        return self.service.ready

    def start(self) -> None:
        """Do nothing: the HTTP server's event loop asks the servers."""

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait until every partition has a server that answers, at most `timeout_s`; return whether it has."""
        for _ in range(max(1, round(timeout_s / _LOOK_S))):
            if self.ready:
                return True
            self._stopping.wait(_LOOK_S)
        return False

    def stop(self) -> bool:
        """Close everything; return whether it was done in time. May be called twice."""
        self._stopping.set()
        self.service.close()
        return True

    def status(self) -> Status:
        """Return what `/v1/status` shows."""
        return self.service.status()
