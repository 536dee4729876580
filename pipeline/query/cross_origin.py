"""Which hosts and origins a server answers, so that no page of another site can write to it or read from it.

A browser sends requests to this machine for any page that is open in it. What tells them from others is `Host`, which is
the page's own name if that name was rebound to this machine's address (DNS rebinding), and `Sec-Fetch-Site` and `Origin`,
which no page can set.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

import pipeline.metrics as m
from pipeline.errors import Invalid
from pipeline.metrics import Metrics
from pipeline.query.problems import Refused
from pipeline.settings import QuerySettings

Headers = list[tuple[bytes, bytes]]

ALWAYS: Headers = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
]
"""Headers of every answer."""
_OWN_SITE = (b"same-origin", b"none")
"""Values of Sec-Fetch-Site for this server's own page, and for addresses that a person has typed."""
_HOSTS_REMEMBERED_MAX = 1_000
_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST",
    "Access-Control-Allow-Headers": "authorization, content-type, idempotency-key, last-event-id",
    "Access-Control-Max-Age": "600",
}
_EXPOSED = (
    b"etag, retry-after, pipeline-staleness-ms, pipeline-series-total, pipeline-final-before-ms, "
    b"pipeline-expired-before-ms, pipeline-missing-partitions, pipeline-next-cursor, pipeline-heartbeat-ms"
)


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on is one of loopback; a name is none, but for `localhost`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class CrossOriginProtection:
    """Refuses requests for a host that is not this server, and requests that pages of other origins have sent.

    Allowed hosts are IP addresses, `localhost` and names below it, the name in `host`, those of `allowed_hosts`, and this
    machine's own name if the server listens beyond loopback: none of them can be a hostile page's own name. With a
    `tokens_file` any host is allowed, because a page has no token, and with TLS, because the server's certificate is not of
    the page's name. Allowed origins are those of `cors_origins`.
    """

    def __init__(self, settings: QuerySettings, metrics: Metrics) -> None:
        names = {settings.host, *_listed(settings.allowed_hosts)}
        if not is_loopback(settings.host):
            names.add(socket.gethostname())
        self._names = {name.lower().rstrip(".") for name in names}
        self._all_hosts = "*" in names or bool(settings.tokens_file or settings.tls_cert_file)
        self._known_hosts: set[bytes] = set()
        """Values of Host that are allowed, as they were sent."""
        self._origins = {_origin(text).encode() for text in _listed(settings.cors_origins)}
        self._own = [*ALWAYS, (b"vary", b"Origin")] if self._origins else ALWAYS
        self._metrics = metrics
        for reason in ("host", "origin"):
            metrics.inc(m.REQUESTS_REFUSED, 0, reason)

    def check(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Headers:
        """Return the headers that the answer has beside its own; `Refused` if there is to be no other answer.

        `headers` are those of `scope`, by name.
        """
        host = headers.get(b"host", b"")
        if host not in self._known_hosts:
            self._check_host(host)
        origin, site = headers.get(b"origin"), headers.get(b"sec-fetch-site")
        if (site is None and origin is None) or site in _OWN_SITE:
            return self._own
        if origin is not None and origin in self._origins:
            return [*self._own, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", _EXPOSED)]
        if site is None and origin is not None and origin.partition(b"://")[2] == host:
            return self._own  # this server's own page in a browser that sends no Sec-Fetch-Site, as it does over plain HTTP
        if _is_link(scope, headers):
            return self._own
        self._metrics.inc(m.REQUESTS_REFUSED, 1, "origin")
        who = "another site" if origin is None else repr(origin[:200].decode("latin-1"))
        raise Refused(403, f"a page of {who} may not use this server; the setting cors_origins can name its origin")

    def preflight(self, scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> Mapping[str, str] | None:
        """Return the headers of the answer to a browser that asks before a request; None if it does not.

        Call `check` before, which refuses origins that are not allowed.
        """
        asks = scope["method"] == "OPTIONS" and b"access-control-request-method" in headers
        return _PREFLIGHT if asks and headers.get(b"origin") in self._origins else None

    def _check_host(self, value: bytes) -> None:
        if not self._is_allowed(value.decode("latin-1")):
            self._metrics.inc(m.REQUESTS_REFUSED, 1, "host")
            raise Refused(
                421,
                f"this server is not known as {value[:200].decode('latin-1')!r}: "
                "name it in the setting allowed_hosts, or ask for it by its IP address",
            )
        if len(self._known_hosts) < _HOSTS_REMEMBERED_MAX:
            self._known_hosts.add(value)

    def _is_allowed(self, host: str) -> bool:
        if self._all_hosts or not host:  # browsers always say a host
            return True
        name = (host if host.endswith("]") else host.rpartition(":")[0] or host).lower().rstrip(".")
        if name in self._names or name == "localhost" or name.endswith(".localhost"):
            return True
        try:
            ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True


def _is_link(scope: Mapping[str, Any], headers: Mapping[bytes, bytes]) -> bool:
    """Return whether a person has followed a link of another site, whose page sees nothing of the answer."""
    return (
        scope["method"] == "GET"
        and headers.get(b"sec-fetch-mode") == b"navigate"
        and headers.get(b"sec-fetch-dest") == b"document"
    )


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _origin(text: str) -> str:
    """Return an origin as browsers write it."""
    try:
        parts = urlsplit(text.lower())
        port = parts.port
    except ValueError:
        raise Invalid(f"cors_origins: {text!r:.200} is no origin; one looks like https://grafana.example") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.path or parts.query or parts.username:
        raise Invalid(f"cors_origins: {text!r:.200} is no origin; one looks like https://grafana.example, without a path")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    default = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{host}" + ("" if port in (None, default) else f":{port}")
