"""Access tokens for logins by OAUTHBEARER: from a file, from a token endpoint, or from a function of the app's.

librdkafka asks a token endpoint by itself (`sasl.oauthbearer.method=oidc`). It is asked here for what connects without
librdkafka, and to find out what is wrong.
"""

from __future__ import annotations

import base64
import json
import ssl
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from pipeline.adapters.clock import SystemClock
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.secret import Secret, read_secret, redacted_url, revealed

TOKEN_FILE = "sasl.oauthbearer.token_file"  # nosec B105  # the name of an option
"""Our own option beside those of librdkafka: the file of a token, which another program renews."""
CALLBACK = "oauth_cb"
"""Option of confluent_kafka: a function that is given a text and returns (token, time of its end in seconds, ...)."""
_PREFIX = "sasl.oauthbearer."
_URL, _METHOD = f"{_PREFIX}token.endpoint.url", f"{_PREFIX}method"
_ID = (f"{_PREFIX}client.credentials.client.id", f"{_PREFIX}client.id")
_SECRET = (f"{_PREFIX}client.credentials.client.secret", f"{_PREFIX}client.secret")
OPTIONS = frozenset(
    {
        *_ID,
        *_SECRET,
        CALLBACK,
        TOKEN_FILE,
        _METHOD,
        _URL,
        "https.ca.location",
        "https.ca.pem",
        f"{_PREFIX}config",
        f"{_PREFIX}extensions",
        f"{_PREFIX}grant.type",
        f"{_PREFIX}scope",
    }
)
"""Options from which `token_source` can make a source."""
_READ_AGAIN_S, _READ_AGAIN_S_MIN = 60.0, 5.0
"""Bounds of the time until a file is read again."""
_NEVER_S = 1e12
_TIMEOUT_S = 10.0
_ANSWER_BYTES_MAX = 65_536
_SHOWN = 200
_USED = 0.8
"""Part of its life for which a token is used before the next one is asked for, as librdkafka does."""
_REFUSED = (400, 401, 403)
"""Statuses by which an endpoint refuses a client (RFC 6749, 5.2)."""


class BearerToken(NamedTuple):
    """A token, and the time at which to have the next one."""

    text: Secret
    ends_at_s: float


TokenSource = Callable[[], BearerToken]


class TokenFile:
    """Token of a file, which is read again by its end and at least once a minute.

    While the file can't be read the last token stays in use: the broker decides how long that is good.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._last = Secret()
        self()

    def __call__(self) -> BearerToken:
        """Return the token. Raises `Invalid` if the file can't be read, and never could."""
        try:
            self._last = Secret(read_secret(self._path, f"setting kafka: {TOKEN_FILE}").reveal().strip())
        except Invalid:
            if not self._last:
                raise
        now_s = SystemClock().now_ms() / 1000
        left_s = min(_end_of(self._last.reveal(), now_s + _READ_AGAIN_S) - now_s, _READ_AGAIN_S)
        return BearerToken(self._last, now_s + max(left_s, _READ_AGAIN_S_MIN))

    def for_librdkafka(self, _config: str) -> tuple[str, float]:
        """Return the token as confluent_kafka's `oauth_cb` does."""
        token = self()
        return token.text.reveal(), token.ends_at_s


class TokenEndpoint:
    """Tokens of an endpoint of OAuth 2.0, by the grant `client_credentials` (RFC 6749, 4.4)."""

    def __init__(self, user: Mapping[str, Any]) -> None:
        self._url = str(user.get(_URL, ""))
        self._client = (_first(user, _ID), Secret(_first(user, _SECRET)))
        self._scope = str(user.get(f"{_PREFIX}scope", ""))
        needed = {_URL: self._url, _ID[1]: self._client[0], _SECRET[1]: self._client[1]}
        if missing := [name for name, value in needed.items() if not value]:
            raise Invalid(f"setting kafka: {missing[0]} is needed for {_METHOD}=oidc")
        if user.get(f"{_PREFIX}grant.type", "client_credentials") != "client_credentials":
            raise Invalid(f"setting kafka: {_PREFIX}grant.type: only client_credentials is known")
        if not self._url.startswith(("https://", "http://")):
            raise Invalid(f"setting kafka: {_URL} is no URL")
        self._tls = _tls(user)

    def __call__(self) -> BearerToken:
        """Ask for a token. Raises `Invalid` if the endpoint refuses, `Unavailable` if it does not answer."""
        import httpx

        clock = SystemClock()
        asked_s, deadline_s = clock.now_ms() / 1000, clock.monotonic_s() + _TIMEOUT_S
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        body = {"grant_type": "client_credentials", **({"scope": self._scope} if self._scope else {})}
        login = self._client[0], self._client[1].reveal()
        try:
            with (
                httpx.Client(verify=self._tls, timeout=_TIMEOUT_S) as client,
                client.stream("POST", self._url, data=body, auth=login, headers=headers) as answer,
            ):
                data = b""
                for part in answer.iter_raw():
                    data += part
                    if clock.monotonic_s() > deadline_s:
                        raise Unavailable(f"{self._where}: no whole answer within {_TIMEOUT_S:g} s")
                    if len(data) > _ANSWER_BYTES_MAX:
                        raise Unavailable(f"{self._where}: its answer is larger than {_ANSWER_BYTES_MAX} bytes")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Unavailable(f"{self._where}: {str(error) or type(error).__name__!r:.{_SHOWN}}") from None
        return self._read(answer.status_code, data, asked_s)

    @property
    def _where(self) -> str:
        return f"token endpoint {redacted_url(self._url)!r:.{_SHOWN}}"

    def _read(self, status: int, data: bytes, asked_s: float) -> BearerToken:
        try:
            answer = json.loads(data)
        except ValueError:
            answer = None
        found = answer if isinstance(answer, dict) else {}
        if status in _REFUSED:
            words = ": ".join(str(found[it]) for it in ("error", "error_description") if it in found)
            raise Invalid(
                f"{self._where} refuses with {status} {words!r:.{_SHOWN}}: check {_PREFIX}* in the setting `kafka`"
            )
        text = found.get("access_token")
        if status != 200 or not isinstance(text, str) or not text:
            raise Unavailable(f"{self._where} gives no token, status {status}")
        life_s = found.get("expires_in")
        if isinstance(life_s, int | float) and not isinstance(life_s, bool) and life_s > 0:
            return BearerToken(Secret(text), asked_s + life_s)
        return BearerToken(Secret(text), _end_of(text, asked_s + _READ_AGAIN_S))


class CachedTokens:
    """Tokens of a source, each used for most of its life. Safe from any thread."""

    def __init__(self, source: TokenSource) -> None:
        self._source = source
        self._token = BearerToken(Secret(), 0.0)
        self._renewed_at_s = 0.0
        self._lock = threading.Lock()

    def __call__(self) -> Secret:
        """Return a token that has not ended. Raises as the source does, if the last token has ended, too."""
        with self._lock:
            now_s = SystemClock().now_ms() / 1000
            if now_s >= self._renewed_at_s + _USED * (self._token.ends_at_s - self._renewed_at_s):
                try:
                    self._token, self._renewed_at_s = self._source(), now_s
                except PipelineError:
                    if now_s >= self._token.ends_at_s:
                        raise
            return self._token.text


def token_source(user: Mapping[str, Any]) -> TokenSource:
    """Return the source of tokens that these options name. Raises `Invalid` if there is none, or a file can't be read."""
    user = revealed(user)
    if TOKEN_FILE in user:
        return TokenFile(str(user[TOKEN_FILE]))
    if CALLBACK in user:
        return _Callback(user[CALLBACK], str(user.get(f"{_PREFIX}config", "")))
    if str(user.get(_METHOD, "")).lower() == "oidc":
        return TokenEndpoint(user)
    raise Invalid(f"setting kafka: sasl.mechanism OAUTHBEARER needs {TOKEN_FILE} or {_METHOD}=oidc")


def check_tokens(user: Mapping[str, Any]) -> None:
    """Ask once for a token, if confluent_kafka is to get tokens from a file or a function.

    It would wait ten seconds for the first one, keep no reason, and never ask where the login is another. Raises as
    `token_source` and the source do, and `Invalid` if these options do not fit together.
    """
    given = [name for name in (TOKEN_FILE, CALLBACK) if name in user]
    if not given:
        return
    mechanism = str(user.get("sasl.mechanism", user.get("sasl.mechanisms", ""))).upper()
    if mechanism != "OAUTHBEARER" or not str(user.get("security.protocol", "")).lower().startswith("sasl_"):
        raise Invalid(f"setting kafka: {given[0]} needs sasl.mechanism=OAUTHBEARER and security.protocol=SASL_SSL")
    if others := [*given[1:], *(name for name in (_METHOD,) if user.get(name))]:
        raise Invalid(f"setting kafka: {given[0]} and {others[0]} are both given; leave one out")
    token_source(user)()


def why_no_token(user: Mapping[str, Any]) -> PipelineError | None:
    """Return why librdkafka gets no token from the endpoint that it asks, or None if it asks none or gets one."""
    try:
        if str(user.get(_METHOD, "")).lower() == "oidc":
            TokenEndpoint(revealed(user))()
    except PipelineError as error:
        return error
    return None


def extensions_of(user: Mapping[str, Any]) -> dict[str, str]:
    """Return the SASL extensions `name=value,name=value` that go to the broker with a token."""
    pairs = str(user.get(f"{_PREFIX}extensions", "")).split(",")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name}


class _Callback:
    def __init__(self, call: Callable[[str], Any], config: str) -> None:
        if not callable(call):
            raise Invalid(f"setting kafka: {CALLBACK} is a function that returns (token, time of its end in seconds)")
        self._call, self._config = call, config

    def __call__(self) -> BearerToken:
        try:
            text, ends_at_s, *_ = self._call(self._config)
            return BearerToken(Secret(text), float(ends_at_s))
        except Exception as error:  # the app's own
            raise Unavailable(f"setting kafka: {CALLBACK} gives no token: {type(error).__name__}") from error


def _first(user: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((str(user[name]) for name in names if user.get(name)), "")


def _tls(user: Mapping[str, Any]) -> ssl.SSLContext:
    place, pem = user.get("https.ca.location"), user.get("https.ca.pem")
    own = place not in (None, "", "probe")
    try:
        return ssl.create_default_context(cafile=str(place) if own else None, cadata=str(pem) if pem else None)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Invalid(f"setting kafka: https.ca.location={place!r:.{_SHOWN}}: {reason}") from None


def _end_of(token: str, otherwise_s: float) -> float:
    """Return the time at which a JSON web token ends by its own word, unchecked; `otherwise_s` if it does not say."""
    try:
        payload = token.split(".")[1]
        ends_at_s = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return otherwise_s
    return float(ends_at_s) if isinstance(ends_at_s, int | float) and 0 < ends_at_s < _NEVER_S else otherwise_s
