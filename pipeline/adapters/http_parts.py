"""A server whose states another one merges, over HTTP."""

from __future__ import annotations

from pipeline.adapters.http_client import HttpClient, error_of
from pipeline.core.gathered import STATES_PATH, STATES_TYPE
from pipeline.errors import Unavailable
from pipeline.ports import Clock
from pipeline.settings import ClientSettings


class HttpPart:
    """A `query.part_servers.PartServer` at a URL. Connections are kept and shared. Safe from any thread."""

    def __init__(self, url: str, clock: Clock, settings: ClientSettings | None = None) -> None:
        self._client = HttpClient(url, clock, settings)
        self.url = self._client.url

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        """Return the answer to an encoded request for states. Raises as the server does, or `Unavailable`."""
        status, answer = self._client.request("POST", STATES_PATH, timeout_s=timeout_s, body=body, content_type=STATES_TYPE)
        if status in (404, 405):
            raise Unavailable(f"{self.url}: it gives no states to others; is it a query server of this version?")
        if status in (401, 403):  # the one who asks this server has a token of his own, and it is not at fault
            error = error_of(self.url, status, answer)
            raise Unavailable(f"{self.url}: {error}: the server that asks it needs a token with scope read, without bounds")
        if status != 200:
            raise error_of(self.url, status, answer)
        return answer

    def close(self) -> None:
        """Close idle connections."""
        self._client.close()
