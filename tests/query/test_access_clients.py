"""Clients send their access token to the server that they were made for, and read its file again when it is refused."""

import asyncio
import http.server
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

import pytest

from pipeline import AsyncReader, Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http_client import HttpClient
from pipeline.adapters.http_parts import HttpPart
from pipeline.adapters.prometheus import PrometheusMetrics, render_views
from pipeline.config import load
from pipeline.core.record import Definition
from pipeline.errors import Forbidden, Invalid, Unauthenticated, Unavailable
from pipeline.query.gather import GatherService
from pipeline.query.gather_api import create_gather_app
from pipeline.query.part_servers import PartServers
from pipeline.roles.statsd import StatsdGateway
from pipeline.settings import ClientSettings, QuerySettings
from tests.cli.conftest import Here, here
from tests.query.support import Server, World, running, serving, wait_until
from tests.query.test_access import TOKENS, access_of, entry, write

__all__ = ["here"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No token in the environment, and no settings in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("PIPELINE_TOKEN", "PIPELINE_TOKEN_FILE", "PIPELINE_CONFIG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    write(path, *[entry(scope, token, scope) for scope, token in TOKENS.items()])
    return path


@pytest.fixture(scope="module")
def server(tokens: Path) -> Iterator[Server]:
    """A server that needs tokens, whose partitions are folded all the time."""
    world = World()
    world.publish(Definition("revenue", "sum", ("region",)), {("eu",): 1})
    with serving(world, access=access_of(tokens)) as running, world.folding():
        yield running


def test_each_client_sends_its_token(server: Server) -> None:
    """Publisher, Reader, AsyncReader and a watch do their work with a token, given as text."""
    with Publisher(server.url, token=TOKENS["publish"]) as publisher:
        publisher.sum("clicks").add(3)
        token = publisher.flush(10)
    with Reader(server.url, token=TOKENS["read"]) as reader:
        assert reader.get("clicks", after=token).value() == 3
        assert next(reader.watch("clicks")).value() == 3
        assert next(iter(reader.pages("clicks"))).value() == 3

    async def ask() -> None:
        async with AsyncReader(server.url, token=TOKENS["read"]) as reader:
            assert (await reader.get("clicks")).value() == 3

    asyncio.run(ask())


def test_the_environment_has_the_token(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PIPELINE_TOKEN and PIPELINE_TOKEN_FILE stand in for keywords, which win; a file that merely lies there does not."""
    (tmp_path / "pipeline.toml").write_text(f"token = '{TOKENS['read']}'\n")
    with Reader(server.url) as reader, pytest.raises(Unauthenticated):
        reader.views()
    (tmp_path / "pipeline.toml").unlink()
    monkeypatch.setenv("PIPELINE_TOKEN", TOKENS["publish"])
    with Reader(server.url) as reader, pytest.raises(Forbidden, match="scope read is needed"):
        reader.views()
    (tmp_path / "token").write_text(f"{TOKENS['read']}\n")
    with Reader(server.url, token_file=str(tmp_path / "token")) as reader:
        assert reader.views()
    monkeypatch.delenv("PIPELINE_TOKEN")
    monkeypatch.setenv("PIPELINE_TOKEN_FILE", str(tmp_path / "token"))
    with Reader(server.url) as reader:
        assert reader.views()


def test_the_command_line_takes_the_token_from_the_environment(
    server: Server, here: Here, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every command that asks a server sends the token; without one it says what is missing, and ends with code 2."""
    refused = here("get", "revenue", "--from", server.url)
    assert (refused.returncode, "an access token is needed" in refused.stderr) == (2, True)
    monkeypatch.setenv("PIPELINE_TOKEN", TOKENS["read"])
    for command in (
        ["get", "revenue"],
        ["get"],
        ["get", "revenue", "--all"],
        ["status"],
        ["views", "ls"],
        ["dead-letters", "ls"],
    ):
        done = here(*command, "--from", server.url)
        assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "rows.csv").write_text("region\neu\n")
    publish = ["publish", "visits", str(tmp_path / "rows.csv"), "--labels", "region", "--to", server.url]
    refused = here(*publish, "--timeout-ms", "300")
    assert (refused.returncode, "scope publish is needed" in refused.stderr) == (1, True)
    monkeypatch.setenv("PIPELINE_TOKEN", TOKENS["publish"])
    assert here(*publish).returncode == 0
    assert here("publish", "visits", "rows.csv", "--to", server.url, "--set", "token=x").returncode == 2


def test_a_refused_token_is_read_again(tmp_path: Path) -> None:
    """A file that was replaced is read when the server refuses the token, for requests, streams and batches."""
    path, token_file = tmp_path / "tokens.json", tmp_path / "token"
    write(path, entry("1", "token-1", "read", "publish"))
    token_file.write_text("token-1\n")
    access = access_of(path)
    world = World(1)
    world.publish(Definition("revenue", "sum"), {(): 1})
    with serving(world, access=access) as running, world.folding():
        reader = Reader(running.url, token_file=str(token_file))
        publisher = Publisher(running.url, token_file=str(token_file))
        assert reader.get("revenue").value() == 1
        write(path, entry("2", "token-2", "read", "publish"))
        wait_until(lambda: running.request("GET", "/v1/views", headers={"Authorization": "Bearer token-2"}).status == 200)
        with pytest.raises(Unauthenticated):
            reader.get("revenue")
        publisher.sum("revenue").add(5)
        with pytest.raises(Unavailable, match="unknown, or was revoked"):
            publisher.flush(0.3)
        token_file.write_text("token-2\n")
        token = publisher.flush(10)
        assert next(reader.watch("revenue", after=token)).value() == 6
        token_file.unlink()
        assert reader.get("revenue").value() == 6
        publisher.close()
        reader.close()


class _Elsewhere(http.server.BaseHTTPRequestHandler):
    """Redirects everything, and keeps what it is sent."""

    seen: ClassVar[list[str | None]] = []
    to = ""

    def do_GET(self) -> None:
        self.seen.append(self.headers.get("Authorization"))
        self.send_response(307 if self.to else 200)
        if self.to:
            self.send_header("Location", self.to + self.path)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def answering(to: str) -> Iterator[tuple[str, list[str | None]]]:
    """Run a server that redirects to a URL; yield its own and the tokens that it was sent."""
    handler = type("_Handler", (_Elsewhere,), {"seen": [], "to": to})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.seen
        server.shutdown()
        thread.join()


def test_a_redirect_takes_the_token_nowhere() -> None:
    """A redirect is an error: neither the token nor the request reaches the other server."""
    with answering("") as (other, elsewhere), answering(other) as (url, here):
        with Reader(url, token="secret-1") as reader:
            with pytest.raises(Unavailable, match="307"):
                reader.get("revenue")
            with pytest.raises(Unavailable, match="307"):
                next(reader.watch("revenue"))
        assert here == ["Bearer secret-1"] * 2
        assert elsewhere == []


@pytest.mark.parametrize("token", ["a b", "a\nb", "a\r\nHost: x", "ä", "x" * 1_025, "\x00"])
def test_a_text_that_is_no_token_is_refused(token: str, tmp_path: Path) -> None:
    """A text that would be more than a token in a header is an error, which does not show it."""
    with pytest.raises(Invalid, match="not an access token") as refused:
        Reader("http://127.0.0.1:9", token=token)
    assert repr(token) not in str(refused.value)
    (tmp_path / "token").write_text(token)
    with pytest.raises(Invalid, match="not an access token"):
        Publisher("http://127.0.0.1:9", token_file=str(tmp_path / "token"))


def test_a_token_and_a_file_are_one_too_many(tmp_path: Path) -> None:
    """Two sources of a token, and a file that is not there, are errors."""
    with pytest.raises(Invalid, match="one of them"):
        Reader("http://127.0.0.1:9", token="a", token_file="b")
    with pytest.raises(Invalid, match=r"token_file=.*No such file"):
        Reader("http://127.0.0.1:9", token_file=str(tmp_path / "token"))


def test_no_traceback_shows_the_token() -> None:
    """An error while a request is sent shows its token in no text, also with the local variables of all frames."""
    client = HttpClient("http://127.0.0.1:9", SystemClock(), ClientSettings(token="s3cret"))  # type: ignore[arg-type]
    with pytest.raises(Unavailable) as failed:
        client.request("GET", "/v1/views", timeout_s=1)
    shown = traceback.TracebackException.from_exception(failed.value, capture_locals=True)
    assert "s3cret" not in "".join(shown.format())


def test_a_server_that_gathers_has_a_token_of_its_own(server: Server, tokens: Path) -> None:
    """A gatherer asks others with its own token, whatever its clients have; if that is refused, they are not at fault."""
    metrics, clock, settings = PrometheusMetrics(), SystemClock(), QuerySettings(gather_interval_ms=20)

    @contextmanager
    def gathering(token: str) -> Iterator[str]:
        part = HttpPart(server.url, clock, ClientSettings(token=token))  # type: ignore[arg-type]
        service = GatherService(PartServers([part], clock, metrics, 0.05), clock, settings, metrics)
        with running(create_gather_app(service, settings, metrics, render_views, access_of(tokens))) as port:
            yield f"http://127.0.0.1:{port}"

    with gathering(TOKENS["read"]) as url, Reader(url, token=TOKENS["read"]) as reader:
        assert reader.get("revenue", by=[]).value() == 1
        with Reader(url) as stranger, pytest.raises(Unauthenticated):
            stranger.get("revenue")
    wrong = pytest.raises(Unavailable, match="needs a token with scope read")
    with gathering(TOKENS["publish"]) as url, Reader(url, token=TOKENS["read"]) as reader, wrong:
        reader.get("revenue", timeout_ms=300)


def test_a_statsd_gateway_has_a_token_and_asks_for_one(
    server: Server, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A token that may only publish is enough for a gateway, which says what it can not know; its status needs one, too."""
    monkeypatch.setenv("PIPELINE_TOKEN", TOKENS["publish"])
    monkeypatch.setenv("PIPELINE_TOKENS_FILE", str(tokens))
    warnings: list[str] = []
    gateway = StatsdGateway(load(), server.url, "127.0.0.1", 0, labels={}, metrics_port=0, warn=warnings.append)
    gateway.start()
    try:
        assert any("scope read is needed" in it for it in warnings)
        with socket.create_connection(gateway.address) as sender:
            sender.sendall(b"statsd.orders:3|c\n")
        wait_until(lambda: gateway.sink.line_count == 1)
        assert gateway.metrics_url
        with Reader(gateway.metrics_url, token=TOKENS["read"]) as reader:
            assert reader.status()["role"] == "ingest"
        stranger = HttpClient(gateway.metrics_url, SystemClock())
        assert stranger.request("GET", "/metrics", timeout_s=5)[0] == 401
        assert stranger.request("GET", "/healthz", timeout_s=5)[0] == 200
        stranger.close()
        failure, token = gateway.stop()
        assert failure is None
    finally:
        gateway.close()
    with Reader(server.url, token=TOKENS["read"]) as reader:
        assert reader.get("statsd_orders", after=token).value() == 3
