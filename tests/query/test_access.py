"""Requests need an access token with the scope of their route, and the file of tokens is followed."""

import asyncio
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.prometheus import PrometheusMetrics, render_views
from pipeline.adapters.tokens_file import TokensFile
from pipeline.core.grants import NOTHING, SCOPES, AccessToken, Grant, digest_of, encode_tokens
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from pipeline.pushed import Pushed
from pipeline.query.access import NEEDED, Access, needed_of
from pipeline.query.api import create_app, create_operations_app
from pipeline.query.gather import GatherService
from pipeline.query.gather_api import create_gather_app
from pipeline.query.guard import Guard
from pipeline.query.otlp_api import ExportTaking
from pipeline.query.part_servers import PartServers
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving, wait_until

TOKENS = {scope: f"pipeline_{scope}-token" for scope in SCOPES}


def entry(name: str, token: str, *scopes: str, **more: Any) -> AccessToken:
    return AccessToken(name, digest_of(token.encode()).hex(), scopes, 0, **more)


def write(path: Path, *entries: AccessToken) -> None:
    """Replace the file, as `pipeline tokens` does."""
    TokensFile(str(path), SystemClock()).change(lambda _: entries)


@pytest.fixture(scope="module")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a token for each scope, one for all, and one that has expired."""
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    each = [entry(scope, token, scope) for scope, token in TOKENS.items()]
    write(path, *each, entry("all", "pipeline_all", *SCOPES), entry("old", "pipeline_old", *SCOPES, expires_ms=1))
    return path


@pytest.fixture(scope="module")
def server(listed: Path) -> Iterator[Server]:
    """A server with one view that needs tokens."""
    world = World(settings=QuerySettings(timeout_ms_default=40, timeout_ms_max=50))
    world.publish(Definition("revenue", "sum", ("region",)), {("eu",): 1, ("us",): 2.5})
    with serving(world, access=Access(TokensFile(str(listed), world.clock), world.clock, world.metrics)) as running:
        yield running


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def refused(server: Server, reason: str) -> float:
    """Return how often requests were refused for a reason."""
    text = server.request("GET", "/metrics", headers=bearer(TOKENS["read"])).body.decode()
    line = next(it for it in text.splitlines() if it.startswith(f'pipeline_access_refused_total{{reason="{reason}"}}'))
    return float(line.rpartition(" ")[2])


def requests_of_each_scope() -> list[tuple[str, str, bytes, frozenset[str]]]:
    """Return a request to each route, and the scopes of which it needs one."""
    return [
        (method, path.replace("{view}", "revenue").replace("{key}", "1f2e3d4c.0-17-2"), b"{}", needed)
        for (method, path), needed in NEEDED.items()
        if not path.endswith("/stream") and path != "/page/"
    ]


@pytest.mark.parametrize(("method", "path", "body", "needed"), requests_of_each_scope())
def test_each_route_needs_its_scope(server: Server, method: str, path: str, body: bytes, needed: frozenset[str]) -> None:
    """Without a token a route answers 401, with one of another scope 403 that names the missing one; open ones answer."""
    sent = body if method == "POST" else None
    reply = server.request(method, path, sent)
    if not needed:
        assert reply.status == 200
        return
    assert "token is needed" in server.problem(401, reply)
    assert reply.headers["www-authenticate"] == 'Bearer realm="pipeline"'
    for scope, token in TOKENS.items():
        reply = server.request(method, path, sent, bearer(token))
        if scope in needed:
            assert reply.status not in (401, 403)
            continue
        detail = server.problem(403, reply)
        assert detail == f"scope {' or '.join(sorted(needed))} is needed; the access token has {scope}"
        said = reply.headers["www-authenticate"]
        assert said == f'Bearer realm="pipeline", error="insufficient_scope", scope="{" ".join(sorted(needed))}"'


def test_an_open_path_grants_nothing(listed: Path) -> None:
    """A request that needs no token may do nothing else, so that a path that looks open opens no other route."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        grants.append(scope["grant"])

    grants: list[Grant] = []
    metrics, clock = PrometheusMetrics(), SystemClock()
    guard = Guard(app, None, {}, QuerySettings(), metrics, clock, access_of(listed, metrics))
    for path in ("/", "/page/app.js", "/page/../v1/views", "/docs", "/healthz"):
        scope = {"type": "http", "method": "GET", "path": path, "headers": [(b"host", b"localhost")], "query_string": b""}
        asyncio.run(guard(scope, None, None))  # type: ignore[arg-type]
    assert grants == [NOTHING] * 5


def test_a_stream_needs_the_scope_read(server: Server) -> None:
    """A stream is a read."""
    assert server.get("/v1/views/revenue/stream").status == 401
    assert server.request("GET", "/v1/views/revenue/stream", headers=bearer(TOKENS["publish"])).status == 403


def test_every_route_of_every_application_is_in_the_table() -> None:
    """No route of any role, and no operation of the document, is without an entry; an application with one is not made."""
    world, settings, metrics, clock = World(1), QuerySettings(), PrometheusMetrics(), SystemClock()
    service = GatherService(PartServers([], clock, metrics, 1), clock, settings, metrics)
    apps = [
        create_app(
            *(world.reader, world.ingest, settings, metrics, world.status, lambda: True, render_views),
            parse_pushed=lambda *_: None,  # type: ignore[arg-type, return-value]
            exports=ExportTaking(lambda *_: Pushed([], [], []), None),
            letters=world.letters,
        ),
        create_gather_app(service, settings, metrics, render_views),
        create_operations_app(settings, metrics, clock, world.status, lambda: True),
    ]
    for app in apps:
        for route in app.routes:
            assert isinstance(route, Route)
            for method in route.methods or ():
                needed_of(method, route.path)
    with pytest.raises(KeyError):
        needed_of("POST", "/v1/unknown")
    service.close()


HOSTILE = {
    "empty": ["Bearer "],
    "no token": ["Bearer"],
    "basic": ["Basic dXNlcjpwYXNzd29yZA=="],
    "not ASCII": ["Bearer pipeline_\xff\xe9"],
    "long": ["Bearer " + "x" * 60_000],
    "two headers": [f"Bearer {TOKENS['read']}"] * 2,
    "two tokens": [f"Bearer {TOKENS['read']}, Bearer {TOKENS['read']}"],
    "without a scheme": [TOKENS["read"]],
    "a digest": [f"Bearer {digest_of(TOKENS['read'].encode()).hex()}"],
    "one letter less": [f"Bearer {TOKENS['read'][:-1]}"],
    "expired": ["Bearer pipeline_old"],
}


@pytest.mark.parametrize("values", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("path", ["/v1/views/revenue", "/v1/views", "/v1/nothing"])
def test_other_headers_are_refused(server: Server, values: list[str], path: str) -> None:
    """Anything in place of one known token is 401, also where there is no route, and is echoed nowhere."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    connection.putrequest("GET", path)
    for value in values:
        connection.putheader("Authorization", value.encode("latin-1"))
    connection.endheaders()
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 401
    assert response.getheader("www-authenticate") == 'Bearer realm="pipeline", error="invalid_token"'
    assert b"pipeline_" not in body
    assert b"dXNl" not in body


def test_a_token_is_taken_in_any_case_of_the_scheme(server: Server) -> None:
    """The scheme's name has no case, and HEAD needs the scope of GET."""
    for scheme in ("bearer", "BEARER"):
        assert server.request("GET", "/v1/views", headers={"Authorization": f"{scheme}  {TOKENS['read']} "}).status == 200
    assert server.request("HEAD", "/v1/views", headers=bearer(TOKENS["read"])).status == 200
    assert server.request("HEAD", "/v1/views").status == 401


def test_a_body_is_not_waited_for(server: Server) -> None:
    """A request without a token is answered before its body has come, however large that is to be."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        head = "POST /v1/batches HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/octet-stream\r\n"
        connection.sendall(f"{head}Content-Length: 16000000\r\n\r\n.".encode())
        assert connection.recv(1_000).startswith(b"HTTP/1.1 401 ")


def test_refusals_are_counted_by_reason(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Each reason has a count of its own, and is logged once."""
    cases = {
        "missing": {},
        "malformed": {"Authorization": "Basic eDp5"},
        "unknown": bearer("x"),
        "expired": bearer("pipeline_old"),
        "scope": bearer(TOKENS["publish"]),
    }
    for reason, headers in cases.items():
        before = refused(server, reason)
        caplog.clear()
        for _ in range(3):
            server.request("GET", "/v1/views/revenue", headers=headers)
        assert refused(server, reason) == before + 3
        assert len([it for it in caplog.records if "was refused" in it.message]) <= 1


def test_the_document_says_who_may(server: Server) -> None:
    """Each operation has its scopes, and 401 and 403 unless it is open."""
    document = server.get("/openapi.json").json()
    assert document["components"]["securitySchemes"]["accessToken"]["scheme"] == "bearer"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            needed = needed_of(method.upper(), path)
            assert [it["accessToken"] for it in operation["security"]] == [[scope] for scope in sorted(needed)]
            assert {"401", "403"}.issubset(operation["responses"]) is bool(needed)


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("get", "/v1/views/{view}"),
        ("get", "/v1/views/{view}/stream"),
        ("post", "/v1/query"),
        ("post", "/v1/deltas"),
        ("post", "/v1/batches"),
        ("post", "/v1/views/{view}/drop"),
        ("get", "/v1/dead-letters/{key}"),
    ],
)
def test_nothing_is_done_without_a_token(server: Server, verb: str, path: str) -> None:
    """No request that the schema allows succeeds without a token."""
    operation: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][verb]

    @settings(max_examples=5, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(operation.as_strategy())
    def run(case: Any) -> None:
        case.headers = {name: value for name, value in (case.headers or {}).items() if name.lower() != "authorization"}
        assert case.call().status_code == 401

    run()


@pytest.mark.parametrize(("verb", "path"), [("get", "/v1/views/{view}"), ("post", "/v1/deltas")])
def test_requests_with_a_token_are_answered_as_documented(server: Server, verb: str, path: str) -> None:
    """With a token for everything the answers are those of the document, and without it, or with another one, 401."""
    operation: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")[path][verb]

    @settings(max_examples=3, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(operation.as_strategy())
    def run(case: Any) -> None:
        case.headers = {**(case.headers or {}), **bearer("pipeline_all")}
        response = case.call()
        assert response.status_code not in (401, 403, 500)
        case.validate_response(response, excluded_checks=[positive_data_acceptance, not_a_server_error])

    run()


def test_without_a_file_everything_is_allowed() -> None:
    """A server without a file of tokens asks for none, and its document does not speak of them."""
    world = World(1)
    world.publish(Definition("revenue", "sum"), {(): 1})
    with serving(world) as running:
        assert running.get("/v1/views/revenue").status == 200
        assert running.request("GET", "/v1/views/revenue", headers={"Authorization": "Basic eDp5"}).status == 200
        assert "securitySchemes" not in running.get("/openapi.json").json()["components"]


# The file


def access_of(path: Path, metrics: PrometheusMetrics | None = None) -> Access:
    clock = SystemClock()
    return Access(TokensFile(str(path), clock), clock, metrics or PrometheusMetrics())


def knows(access: Access, token: str) -> bool:
    access._looked_s = 0
    try:
        access.grant_of([(b"host", b"x"), (b"authorization", f"Bearer {token}".encode())])
    except Invalid:
        return False
    return True


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    """A token counts from when it is in the file until it is not, without a restart."""
    path = tmp_path / "tokens.json"
    write(path, entry("a", "one", "read"))
    access = access_of(path)
    assert (knows(access, "one"), knows(access, "two")) == (True, False)
    write(path, entry("b", "two", "read"))
    assert (knows(access, "one"), knows(access, "two")) == (False, True)


def test_a_file_that_is_changed_twice_within_one_tick_is_read_twice(tmp_path: Path) -> None:
    """Times of files have ticks: a file that is young when it is read is read again."""
    path = tmp_path / "tokens.json"
    write(path, entry("a", "one", "read"))
    file = TokensFile(str(path), SystemClock())
    file.read()
    assert file.changed()


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"version":2,"tokens":[]}', b"\xff", b'{"version":1,"tokens":[{"name":"x"}]}', None]
)
def test_a_broken_file_keeps_what_was_read(tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture) -> None:
    """A file that is broken or gone is counted and logged once, and the last good one goes on to count."""
    path = tmp_path / "tokens.json"
    write(path, entry("a", "one", "read"))
    metrics = PrometheusMetrics()
    access = access_of(path, metrics)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert (knows(access, "one"), knows(access, "two")) == (True, False)
    assert knows(access, "one")
    assert b"pipeline_tokens_file_errors_total 3.0" in metrics.render()[0]
    assert len([it for it in caplog.records if it.levelname == "ERROR"]) == 1
    path.unlink(missing_ok=True)
    write(path, entry("a", "two", "read"))
    assert (knows(access, "one"), knows(access, "two")) == (False, True)


def test_a_server_does_not_begin_without_its_tokens(tmp_path: Path) -> None:
    """A file that is not there, not a regular one, or open to others is an error at the start."""
    path = tmp_path / "tokens.json"
    with pytest.raises(Invalid, match="No such file"):
        access_of(path)
    with pytest.raises(Invalid, match="not a regular file"):
        access_of(Path("/dev/null"))
    write(path, entry("a", "one", "read"))
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o666)
    with pytest.raises(Invalid, match="others can write"):
        access_of(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scopes": ("root",)}, "scope"),
        ({"scopes": ()}, "scope"),
        ({"name": "a b"}, "name"),
        ({"sha256": "00"}, "sha256"),
        ({"views": ("a b",)}, "view"),
        ({"views": ("a*b",)}, "view"),
        ({"labels": {"__name__": "x"}}, "label"),
        ({"labels": {"le": "x"}}, "label"),
        ({"labels": {"team": ""}}, "label"),
        ({"labels": {"team": "__overflow__"}}, "label"),
    ],
)
def test_entries_are_checked(tmp_path: Path, change: Mapping[str, Any], why: str) -> None:
    """An entry that would allow something else than it says is refused, and with it the file."""
    path = tmp_path / "tokens.json"
    good = {"name": "a", "sha256": "0" * 64, "scopes": ("read",), "created_ms": 0}
    path.write_bytes(encode_tokens([AccessToken(**{**good, **change})]))
    path.chmod(0o600)
    with pytest.raises(Invalid, match=why):
        access_of(path)


def test_rotation_under_load_loses_no_request(tmp_path: Path) -> None:
    """While tokens are rotated, a client that has one of the present two is never refused, and a revoked one soon is."""
    path = tmp_path / "tokens.json"
    write(path, entry("0", "token-0", "read"))
    world = World(1)
    world.publish(Definition("revenue", "sum"), {(): 1})
    present, statuses, stop = ["token-0"], [], threading.Event()
    with serving(world, access=access_of(path)) as running:

        def load() -> None:
            while not stop.is_set():
                statuses.append(running.request("GET", "/v1/views/revenue", headers=bearer(present[0])).status)

        threads = [threading.Thread(target=load) for _ in range(2)]
        for thread in threads:
            thread.start()
        for number in range(1, 3):
            both = [entry(str(it), f"token-{it}", "read") for it in (number - 1, number)]
            write(path, *both)
            time.sleep(0.8)  # a server looks every half second
            present[0] = f"token-{number}"
            time.sleep(0.05)
            write(path, both[1])
            old = bearer(f"token-{number - 1}")
            wait_until(lambda: running.request("GET", "/v1/views/revenue", headers=old).status == 401, 5)  # noqa: B023
        stop.set()
        for thread in threads:
            thread.join()
    assert set(statuses) == {200}
    assert len(statuses) > 20


def test_a_stream_ends_with_its_token(tmp_path: Path) -> None:
    """A revoked token ends the streams that it has opened, also if another token gets its name at once."""
    path = tmp_path / "tokens.json"
    write(path, entry("a", "one", "read"))
    world = World(1, settings=QuerySettings(stream_heartbeat_ms=100))
    world.publish(Definition("revenue", "sum"), {(): 1})
    with serving(world, access=access_of(path)) as running:
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=10)
        connection.request("GET", "/v1/views/revenue/stream", headers=bearer("one"))
        response = connection.getresponse()
        assert response.read(1)
        write(path, entry("a", "two", "read"))
        started_s = time.monotonic()
        with suppress(http.client.HTTPException, OSError):  # the server breaks the connection off
            while response.read1(65_536):
                assert time.monotonic() - started_s < 8
        connection.close()
        assert running.request("GET", "/v1/views/revenue", headers=bearer("one")).status == 401


def test_entries_say_nothing_of_tokens(listed: Path) -> None:
    """The file has digests, and no token."""
    text = listed.read_text()
    assert not any(token in text for token in TOKENS.values())
    assert len(json.loads(text)["tokens"]) == 5
