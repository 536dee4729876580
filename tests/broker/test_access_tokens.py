"""Access tokens: of a file, of an endpoint, of a function; what is wrong with one is said, and no secret is shown."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import pipeline.adapters.kafka.tokens as tokens
from pipeline.adapters.faust.security import security_of
from pipeline.adapters.kafka.options import parse_url, try_user_options
from pipeline.adapters.kafka.tokens import BearerToken, CachedTokens, TokenFile, token_source
from pipeline.errors import Invalid, Unavailable
from pipeline.secret import Secret
from tests.broker.kafka import Port
from tests.broker.mechanisms import CLIENT_SECRET, USER, TokenEndpoint, token, token_endpoint

P = "sasl.oauthbearer."


@pytest.fixture(scope="module")
def endpoint() -> Iterator[TokenEndpoint]:
    with token_endpoint(lifetime_s=100) as it:
        yield it


def oidc(url: str, **more: str) -> dict[str, Any]:
    """Return options of a client of the endpoint."""
    named = {"method": "oidc", "token.endpoint.url": url, "client.id": USER, "client.secret": CLIENT_SECRET, **more}
    return {"sasl.mechanism": "OAUTHBEARER", **{f"{P}{name}": value for name, value in named.items()}}


def test_an_endpoint_gives_tokens(endpoint: TokenEndpoint) -> None:
    """A token, its end and the scope that was asked for; secrets may be of type Secret."""
    asked_s = time.time()
    options = oidc(endpoint.url, scope="kafka")
    found = token_source({**options, f"{P}client.secret": Secret(CLIENT_SECRET)})()
    assert found.text.reveal().count(".") == 2
    assert asked_s + 99 < found.ends_at_s < time.time() + 101
    assert endpoint.asked[-1] == {"grant_type": "client_credentials", "scope": "kafka"}


@pytest.mark.parametrize(
    ("status", "body", "error", "said"),
    [
        (401, {"error": "invalid_client"}, Invalid, "refuses with 401 'invalid_client': check sasl.oauthbearer.* in"),
        (400, {"error": "invalid_scope", "error_description": "x" * 999}, Invalid, "refuses with 400 'invalid_scope: xxx"),
        (403, ["\x1b[2J"], Invalid, "refuses with 403 ''"),
        (500, {}, Unavailable, "gives no token, status 500"),
        (302, {}, Unavailable, "gives no token, status 302"),
        (200, {"access_token": 5}, Unavailable, "gives no token, status 200"),
        (200, {"access_token": "x" * 70_000}, Unavailable, "its answer is larger than 65536 bytes"),
    ],
)
def test_an_endpoint_that_gives_none(
    endpoint: TokenEndpoint, monkeypatch: pytest.MonkeyPatch, status: int, body: object, error: type[Exception], said: str
) -> None:
    """A refusal is Invalid, everything else Unavailable; the words are bounded and show no secret."""
    monkeypatch.setattr(endpoint, "_answer", lambda _: (status, body))
    with pytest.raises(error) as raised:
        token_source(oidc(endpoint.url))()
    assert said in str(raised.value)
    assert CLIENT_SECRET not in str(raised.value)
    assert len(str(raised.value)) < 500


def test_an_endpoint_that_drips(endpoint: TokenEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that comes bit by bit is given up in the time for all of it."""
    monkeypatch.setattr(tokens, "_TIMEOUT_S", 0.3)
    monkeypatch.setattr(endpoint, "pause_s", 0.1)
    started_s = time.monotonic()
    with pytest.raises(Unavailable, match=r"no whole answer within 0\.3 s"):
        token_source(oidc(endpoint.url))()
    assert time.monotonic() - started_s < 2


def test_an_endpoint_that_is_away() -> None:
    """A refused connection is Unavailable, and no user of the URL is shown."""
    with pytest.raises(Unavailable, match="Connection refused") as raised:
        token_source(oidc(f"http://user:hidden@127.0.0.1:{Port().number}/token"))()
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "OAUTHBEARER needs sasl.oauthbearer.token_file or sasl.oauthbearer.method=oidc"),
        (oidc(""), "sasl.oauthbearer.token.endpoint.url is needed"),
        (oidc("http://a", **{"client.secret": ""}), "sasl.oauthbearer.client.secret is needed"),
        (oidc("ftp://a"), "sasl.oauthbearer.token.endpoint.url is no URL"),
        (oidc("http://a", **{"grant.type": "jwt"}), "sasl.oauthbearer.grant.type: only client_credentials"),
        ({**oidc("https://a"), "https.ca.location": "/nowhere"}, "https.ca.location='/nowhere': No such file"),
        ({"oauth_cb": 5}, "oauth_cb is a function"),
        ({f"{P}token_file": "/nowhere"}, "sasl.oauthbearer.token_file='/nowhere': No such file"),
    ],
)
def test_what_cannot_be(options: Mapping[str, Any], said: str) -> None:
    """Options without which there is no token are named, also by the membership."""
    for make in (token_source, security_of):
        with pytest.raises(Invalid) as raised:
            make({"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER", **options})
        assert said in str(raised.value)
    with pytest.raises(Unavailable, match="oauth_cb gives no token: ZeroDivisionError"):
        token_source({"oauth_cb": lambda _: 1 // 0})()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sasl.mechanism": "PLAIN"}, "needs sasl.mechanism=OAUTHBEARER and security.protocol=SASL_SSL"),
        ({"security.protocol": "ssl"}, "needs sasl.mechanism=OAUTHBEARER and security.protocol=SASL_SSL"),
        ({f"{P}method": "oidc"}, "sasl.oauthbearer.token_file and sasl.oauthbearer.method are both given; leave one out"),
        ({"oauth_cb": print}, "sasl.oauthbearer.token_file and oauth_cb are both given; leave one out"),
        ({}, "sasl.oauthbearer.token_file='/nowhere': No such file"),
    ],
)
def test_options_that_do_not_fit_together(options: Mapping[str, Any], said: str) -> None:
    """A token file of a login that asks for none is refused at once, where confluent_kafka would wait for ten seconds."""
    login = {"security.protocol": "SASL_SSL", "sasl.mechanism": "OAUTHBEARER", f"{P}token_file": "/nowhere"}
    with pytest.raises(Invalid) as raised:
        try_user_options(parse_url("kafka://127.0.0.1:9092"), {**login, **options}, timeout_ms=1_000)
    assert said in str(raised.value)


def test_a_file(tmp_path: Path) -> None:
    """A file is read again by the end of its token and at least once a minute; one that is gone leaves the last token."""
    path = tmp_path / "token"

    def left(text: str) -> float:
        path.write_text(text)
        found = source()
        assert found.text == Secret(text.strip())
        return found.ends_at_s - time.time()

    path.write_text("first")
    source = TokenFile(str(path))
    assert 19 < left(f"{token(lifetime_s=20)}\n") < 21
    assert 59 < left(token(lifetime_s=3600)) < 61
    assert 4 < left(token(lifetime_s=-3600)) < 6
    for odd in ("opaque", "a.b.c", "a.bnVsbA.c", "a.eyJleHAiOiBOYU59.c", "\u00e4.\u00e4.\u00e4"):
        assert 59 < left(odd) < 61
    path.unlink()
    assert source.for_librdkafka("")[0] == "\u00e4.\u00e4.\u00e4"


def test_tokens_are_kept() -> None:
    """A token is used for four fifths of its life, and to its end if there is no other."""
    asked = 0

    def source() -> BearerToken:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise Unavailable("away")
        return BearerToken(Secret(f"t{asked}"), time.time() + 0.5)

    kept = CachedTokens(source)
    assert kept() == kept() == Secret("t1")
    time.sleep(0.42)
    assert kept() == Secret("t1")
    assert asked == 2
    assert kept() == Secret("t3")
