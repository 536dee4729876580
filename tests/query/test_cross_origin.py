"""Which hosts, origins and media types the API answers; a real browser tries to get by in tests/attack/test_browser.py."""

import http.client
import json
from collections.abc import Iterator
from contextlib import suppress

import pytest

from pipeline.adapters.prometheus import render_views
from pipeline.core.record import Definition
from pipeline.errors import Invalid
from pipeline.ingest.openmetrics import parse_pushed
from pipeline.ingest.otlp import parse_export
from pipeline.metrics import NO_METRICS
from pipeline.query.api import create_app
from pipeline.query.cross_origin import CrossOriginProtection
from pipeline.query.otlp_api import ExportTaking
from pipeline.query.problems import Refused
from pipeline.settings import QuerySettings
from tests.query.support import Reply, Server, World, serving

GRAFANA = "https://grafana.example"
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain", "")
"""Media types that a page can send to another site without asking; the empty one stands for none."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with a view, that allows the pages of one origin."""
    world = World(settings=QuerySettings(cors_origins=f"{GRAFANA}, http://[::1]:3000"))
    world.publish(Definition("hits", "sum"), {(): 1})
    with serving(world) as running:
        yield running


def asked(server: Server, method: str, path: str, **headers: str) -> Reply:
    """Send a request without a body; names of headers have underscores in place of dashes."""
    return server.request(
        method, path, b"[]" if method == "POST" else None, {k.replace("_", "-"): v for k, v in headers.items()}
    )


def protection(**settings: str) -> CrossOriginProtection:
    return CrossOriginProtection(QuerySettings(**settings), NO_METRICS)  # type: ignore[arg-type]


def allows(it: CrossOriginProtection, host: str) -> bool:
    with suppress(Refused):
        it.check({"method": "GET"}, {b"host": host.encode("latin-1")})
        return True
    return False


def writes(world: World) -> set[tuple[str, str]]:
    """Return method and path of all routes of a server that has everything, but those of GET and HEAD."""
    app = create_app(
        world.reader,
        world.ingest,
        world.settings,
        world.metrics,
        world.status,
        lambda: True,
        render_views,
        parse_pushed,
        ExportTaking(parse_export, None),
        world.letters,
    )
    found: set[tuple[str, str]] = set()
    for it in app.routes:
        path = it.path.replace("{view}", "hits").replace("{grouping:path}", "job/a")  # type: ignore[attr-defined]
        found |= {(method, path) for method in it.methods or () if method not in ("GET", "HEAD")}  # type: ignore[attr-defined]
    return found


def test_no_body_is_one_that_a_form_can_send(server: Server) -> None:
    """Each POST and PUT refuses the media types that a page can send without asking, and says which it needs."""
    found = writes(World())
    assert {("POST", "/v1/deltas"), ("POST", "/v1/batches"), ("POST", "/v1/metrics"), ("PUT", "/metrics/job/a")} < found
    for method, path in found:
        for content_type in FORM_TYPES:
            connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
            connection.request(method, path, b"{}", {"Content-Type": content_type} if content_type else {})
            reply = connection.getresponse()
            text = reply.read().decode()
            assert reply.status == 415, (path, content_type)
            assert "curl: -H 'Content-Type: " in text or path == "/api/v1/read", (path, text)
            connection.close()


@pytest.mark.parametrize("content_type", ["text/plain; version=0.0.4", "text/plain;charset=utf-8; version=1.0.0"])
def test_metrics_are_pushed_as_plain_text_with_its_version(server: Server, content_type: str) -> None:
    """The text format of Prometheus is plain text with a parameter that no form sends."""
    headers = {"Content-Type": content_type}
    assert server.request("POST", "/v1/openmetrics", b"# TYPE pushed_total counter\npushed_total 1\n", headers).status == 200


@pytest.mark.parametrize(
    ("settings", "allowed", "refused"),
    [
        (
            {},
            "127.0.0.1:8080 127.0.0.1 [::1]:8080 localhost LocalHost.:1 a.localhost:80 10.1.2.3:99",
            "evil.test localhost.evil.test",
        ),
        ({}, "", "127.0.0.1.evil.test:80 [evil]:80 x: 127.0.0.1@evil.test evil.test:127.0.0.1 \xff"),
        ({"allowed_hosts": "stats.example, Server"}, "stats.example:8080 server SERVER:80", "other.example tats.example"),
        ({"allowed_hosts": "*"}, "evil.test", ""),
        ({"host": "box.example"}, "box.example:8080 127.0.0.1", "evil.test"),
    ],
)
def test_hosts(settings: dict[str, str], allowed: str, refused: str) -> None:
    """Addresses and the server's own names are allowed, so no page that was rebound to its address is answered."""
    it = protection(**settings)
    for _ in range(2):  # the second time from memory
        assert [host for host in allowed.split() if not allows(it, host)] == []
        assert [host for host in refused.split() if allows(it, host)] == []


def test_a_machines_own_name_is_allowed_beyond_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other members and Prometheus ask a worker by its machine's name; a server on loopback nobody asks so."""
    monkeypatch.setattr("socket.gethostname", lambda: "worker-a")
    assert allows(protection(host="0.0.0.0"), "worker-a:8080")
    assert allows(protection(host="::"), "worker-a:8080")
    assert not allows(protection(host="127.0.0.1"), "worker-a:8080")
    assert not allows(protection(host="0.0.0.0"), "worker-b:8080")


def test_other_hosts_are_misdirected(server: Server) -> None:
    """A host that is not this server's is 421 at every path, which says what to do; it is counted."""
    for path in ("/", "/v1/views", "/v1/views/hits", "/healthz", "/metrics", "/docs", "/nothing"):
        assert "'evil.test': name it in the setting allowed_hosts" in server.problem(
            421, asked(server, "GET", path, Host="evil.test")
        )
    server.problem(421, asked(server, "POST", "/v1/deltas", Host="evil.test:80", Sec_Fetch_Site="same-origin"))
    assert 'pipeline_requests_refused_total{reason="host"} 8.0' in server.get("/metrics").body.decode()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"Sec_Fetch_Site": "same-origin"}, 200),
        ({"Sec_Fetch_Site": "none"}, 200),
        (
            {"Sec_Fetch_Site": "same-origin", "Origin": "https://stats.example"},
            200,
        ),  # a proxy calls this server by another name
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Sec_Fetch_Site": "same-site"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Origin": GRAFANA}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Origin": f"{GRAFANA}.evil.test"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": ""}, 403),
        ({"Origin": "http://evil.test"}, 403),
        ({"Origin": "http://[::1]:3000"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.test", "Sec_Fetch_Site": "nonsense"}, 403),
    ],
)
def test_origins(server: Server, headers: dict[str, str], status: int) -> None:
    """A request of another origin's page is 403, to write or to read; browsers say whose request it is."""
    headers = {name: value.format(port=server.port) for name, value in headers.items()}
    for reply in (asked(server, "POST", "/v1/deltas", **headers), asked(server, "GET", "/v1/views/hits", **headers)):
        assert reply.status == status
        if status == 403:
            assert "cors_origins" in server.problem(403, reply)
        assert reply.headers.get("access-control-allow-origin") == (
            headers["Origin"] if headers.get("Origin") in (GRAFANA, "http://[::1]:3000") else None
        )
        assert "access-control-allow-credentials" not in reply.headers


def test_links_of_other_sites_work(server: Server) -> None:
    """A person may follow a link to the page or to an answer; frames, images and posts of another site are refused."""
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    for path in ("/", "/v1/views/hits"):
        assert asked(server, "GET", path, **link).status == 200
        assert asked(server, "GET", path, **{**link, "Sec_Fetch_Dest": "iframe"}).status == 403
        assert asked(server, "GET", path, **{**link, "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}).status == 403
    assert asked(server, "POST", "/v1/deltas", **link).status == 403


def test_browsers_ask_before(server: Server) -> None:
    """A preflight is answered for allowed origins only, with what the API needs and without credentials."""
    ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    reply = asked(server, "OPTIONS", "/v1/deltas", Origin=GRAFANA, **ask)
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == GRAFANA
    assert reply.headers["access-control-allow-methods"] == "GET, POST"
    assert {"authorization", "content-type", "idempotency-key"} <= {
        *reply.headers["access-control-allow-headers"].split(", ")
    }
    server.problem(403, asked(server, "OPTIONS", "/v1/deltas", Origin="http://evil.test", **ask))
    server.problem(405, asked(server, "OPTIONS", "/v1/deltas"))


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/page/app.js", "/v1/views", "/v1/views/hits", "/healthz", "/metrics", "/none"]
)
def test_headers_of_every_answer(server: Server, path: str) -> None:
    """Each answer, errors too, tells browsers to take it for what it says, for nobody else, and to pass no address on."""
    for reply in (server.get(path), asked(server, "POST", path)):
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["cross-origin-resource-policy"] == "same-origin"
        assert reply.headers["referrer-policy"] == "no-referrer"
        assert "Origin" in reply.headers["vary"]
        if reply.headers["content-type"].startswith("text/html"):
            policy = reply.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy


@pytest.mark.parametrize(
    "origin", ["*", "grafana.example", "https://grafana.example/d", "ftp://x", "https://", "http://x:y", "null"]
)
def test_wrong_origins_end_the_start(origin: str) -> None:
    """An origin in the settings that no browser would send is `Invalid`, and so is the one that stands for all."""
    with pytest.raises(Invalid, match="cors_origins"):
        protection(cors_origins=origin)


def test_memory_of_hosts_is_bounded() -> None:
    """A client that says a new port each time costs no memory beyond a bound."""
    it = protection()
    for port in range(3_000):
        assert allows(it, f"127.0.0.1:{port}")
    assert len(it._known_hosts) <= 1_000


def test_json_is_posted_with_its_own_type(server: Server) -> None:
    """A request as curl's --json sends it is taken."""
    body = json.dumps([{"view": "posted", "kind": "sum", "value": 1}]).encode()
    assert server.request("POST", "/v1/deltas", body, {"Content-Type": "application/json"}).json()["accepted"] == 1
