"""Access to the HTTP API: the grant of each request, by its access token, and the scope that each route needs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from hmac import compare_digest
from typing import NamedTuple, Protocol

import pipeline.metrics as m
from pipeline.core.gathered import STATES_PATH
from pipeline.core.grants import (
    ADMIN,
    PUBLISH,
    READ,
    TOKEN_LENGTH_MAX,
    AccessToken,
    Grant,
    digest_of,
)
from pipeline.errors import Forbidden, GroupsForbidden, Invalid, Unauthenticated
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.openapi import READ_PATH, STREAM_PATH

_log = logging.getLogger(__name__)
_LOOK_S = 0.5
"""Time between two looks at whether the file has changed."""
_BEARER = b"bearer "
MISSING, MALFORMED, UNKNOWN, EXPIRED, SCOPE, BOUNDS = "missing", "malformed", "unknown", "expired", "scope", "bounds"
REASONS = (MISSING, MALFORMED, UNKNOWN, EXPIRED, SCOPE, BOUNDS)

NOBODY: frozenset[str] = frozenset()
"""Routes with these scopes are open: they need no token, and tell nothing of what is stored."""
READ_NEEDED, _PUBLISH, _ADMIN = frozenset([READ]), frozenset([PUBLISH]), frozenset([ADMIN])

NEEDED: Mapping[tuple[str, str], frozenset[str]] = {
    ("GET", "/healthz"): NOBODY,
    ("GET", "/readyz"): NOBODY,
    ("GET", "/openapi.json"): NOBODY,
    ("GET", "/docs"): NOBODY,
    ("GET", "/docs/start.js"): NOBODY,
    ("GET", "/docs/swagger_bundle.js"): NOBODY,
    ("GET", "/docs/swagger_style.css"): NOBODY,
    ("GET", "/"): NOBODY,
    ("GET", "/page/"): NOBODY,
    ("GET", "/metrics"): READ_NEEDED,
    ("GET", "/v1/status"): READ_NEEDED | _PUBLISH,
    ("GET", "/v1/views"): READ_NEEDED,
    ("GET", READ_PATH): READ_NEEDED,
    ("GET", STREAM_PATH): READ_NEEDED,
    ("POST", "/v1/query"): READ_NEEDED,
    ("POST", STATES_PATH): READ_NEEDED,
    ("GET", "/v1/openmetrics"): READ_NEEDED,
    ("POST", "/api/v1/read"): READ_NEEDED,
    ("POST", "/v1/deltas"): _PUBLISH,
    ("POST", "/v1/batches"): _PUBLISH,
    ("POST", "/v1/openmetrics"): _PUBLISH,
    ("POST", "/v1/metrics"): _PUBLISH,
    ("POST", "/metrics/{grouping:path}"): _PUBLISH,
    ("PUT", "/metrics/{grouping:path}"): _PUBLISH,
    ("POST", f"{READ_PATH}/drop"): _ADMIN,
    ("POST", f"{READ_PATH}/reset"): _ADMIN,
    ("GET", "/v1/dead-letters"): READ_NEEDED,
    ("GET", "/v1/dead-letters/{key}"): READ_NEEDED,
    ("POST", "/v1/dead-letters/replay"): _ADMIN,
}
"""By method and path of a route, the scopes of which a token needs one. A path that ends in `/` stands for all below it."""
KEEP_BOUNDS = frozenset(
    {
        ("GET", "/v1/status"),
        ("GET", "/v1/views"),
        ("GET", READ_PATH),
        ("GET", STREAM_PATH),
        ("POST", "/v1/query"),
        ("GET", "/v1/openmetrics"),
        ("GET", "/v1/dead-letters"),
        ("GET", "/v1/dead-letters/{key}"),
        ("POST", "/api/v1/read"),
        ("POST", "/v1/deltas"),
        ("POST", "/v1/batches"),
        ("POST", "/v1/openmetrics"),
        ("POST", "/v1/metrics"),
        ("POST", "/metrics/{grouping:path}"),
        ("PUT", "/metrics/{grouping:path}"),
        ("POST", f"{READ_PATH}/drop"),
        ("POST", f"{READ_PATH}/reset"),
    }
)
"""Routes that keep to the bounds of a token; all others are not for a token that is bound to views or labels."""


class TokensSource(Protocol):
    """The file of access tokens."""

    def changed(self) -> bool:
        """Return whether the file may have changed since it was read."""
        ...

    def read(self) -> list[AccessToken]:
        """Return the entries; `Invalid` if they can't be read."""
        ...


class _KnownToken(NamedTuple):
    grant: Grant
    expires_ms: int | None


class Access:
    """Finds the grant of each request. To be used on one event loop.

    Tokens are found by their digests. A client can learn from the time of a look-up at most how a digest begins, and from
    that neither a token nor another token with such a digest can be made; what is found is compared in constant time.
    Nothing else is remembered, so that no cache can outlive a token.
    """

    def __init__(self, source: TokensSource, clock: Clock, metrics: Metrics) -> None:
        """Read the file; `Invalid` if that fails, because a server must not begin without its tokens."""
        self._source = source
        self._clock = clock
        self._metrics = metrics
        self._said: set[str] = set()
        """Texts and reasons that were logged since the file was read."""
        self._looked_s = clock.monotonic_s()
        metrics.inc(m.TOKENS_UNREADABLE, 0)
        for reason in REASONS:
            metrics.inc(m.ACCESS_REFUSED, 0, reason)
        self._known: dict[bytes, _KnownToken] = {}
        self._take(source.read())

    def _take(self, tokens: Iterable[AccessToken]) -> None:
        self._known = {grant.digest: _KnownToken(grant, it.expires_ms) for it in tokens for grant in [it.grant]}
        self._metrics.set(m.TOKENS, len(self._known))
        self._said.clear()

    def look(self) -> None:
        """Read the file again if it has changed and that was not looked at a moment ago.

        While it can't be read, the tokens that were read before go on to count.
        """
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_s < _LOOK_S:
            return
        self._looked_s = now_s
        if not self._source.changed():
            return
        try:
            self._take(self._source.read())
        except Invalid as error:
            self._metrics.inc(m.TOKENS_UNREADABLE)
            self._say(f"tokens_file: {error}; the tokens that were read before go on to count")

    def grant_of(self, headers: Iterable[tuple[bytes, bytes]]) -> Grant:
        """Return what the token in these headers allows. Raises `Unauthenticated` without a token that is known."""
        self.look()
        found = [value for name, value in headers if name == b"authorization"]
        if not found:
            raise Unauthenticated("an access token is needed: Authorization: Bearer TOKEN", MISSING)
        token = found[0][len(_BEARER) :].strip()
        if len(found) > 1 or found[0][: len(_BEARER)].lower() != _BEARER or not 0 < len(token) <= TOKEN_LENGTH_MAX:
            raise Unauthenticated("one header is needed: Authorization: Bearer TOKEN", MALFORMED)
        digest = digest_of(token)
        known = self._known.get(digest)
        if known is None or not compare_digest(known.grant.digest, digest):
            raise Unauthenticated("the access token is unknown, or was revoked", UNKNOWN)
        if self._has_expired(known):
            raise Unauthenticated("the access token has expired", EXPIRED)
        return known.grant

    def holds(self, grant: Grant) -> bool:
        """Return whether a grant that was given is still what its token allows."""
        self.look()
        known = self._known.get(grant.digest)
        return known is not None and known.grant == grant and not self._has_expired(known)

    def _has_expired(self, known: _KnownToken) -> bool:
        return known.expires_ms is not None and self._clock.now_ms() >= known.expires_ms

    def note(self, error: Exception) -> None:
        """Count an error that refuses a request for want of rights, and log the first of each reason."""
        if isinstance(error, Unauthenticated):
            reason = error.reason
        elif isinstance(error, Forbidden):
            reason = SCOPE if error.scope else BOUNDS
        elif isinstance(error, GroupsForbidden):
            reason = BOUNDS
        else:
            return
        self._metrics.inc(m.ACCESS_REFUSED, 1, reason)
        if reason not in self._said:
            self._said.add(reason)
            _log.warning("a request was refused: %.500s; further ones are only counted, by reason", error)

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            _log.error("%s", text)


def needed_of(method: str, path: str) -> frozenset[str]:
    """Return the scopes of which a route needs one; `KeyError` for a route that the table does not have."""
    method = _plain(method)
    found = NEEDED.get((method, path))
    if found is None:
        found = NEEDED[method, f"/{path.split('/', 2)[1]}/"]
    return found


def check_grant(grant: Grant, needed: frozenset[str], *, keeps_bounds: bool) -> None:
    """Raise `Forbidden` unless a grant has one of the needed scopes, and no bounds that the route does not keep to."""
    if grant.scopes.isdisjoint(needed) and needed:
        wanted = sorted(needed)
        has = ", ".join(sorted(grant.scopes))
        raise Forbidden(f"scope {' or '.join(wanted)} is needed; the access token has {has}", " ".join(wanted))
    if grant.bounds is not None and needed and not keeps_bounds:
        raise Forbidden("this concerns all views at once: it is not for an access token that is bound to some")


def _plain(method: str) -> str:
    return "GET" if method == "HEAD" else method


def keeps_bounds(method: str, path: str) -> bool:
    """Return whether a route keeps to the bounds of a token."""
    return (_plain(method), path) in KEEP_BOUNDS


def is_open(path: str) -> bool:
    """Return whether every request to a path is answered without a token."""
    return path in _OPEN or path.startswith(_OPEN_BELOW)


_OPEN = frozenset(path for (_, path), needed in NEEDED.items() if not needed)
_OPEN_BELOW = tuple(path for path in _OPEN if path.endswith("/") and path != "/")
