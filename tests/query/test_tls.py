"""TLS between clients and servers: both sides are checked, certificates are followed, and errors name the setting."""

import asyncio
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from pipeline import AsyncReader, Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http_parts import HttpPart
from pipeline.adapters.tls import FollowedContext, client_context, server_context
from pipeline.core.record import Definition
from pipeline.errors import Invalid, Unavailable
from pipeline.settings import ClientSettings, QuerySettings
from tests.broker.tls import make
from tests.query.support import Server, World, serving, wait_until
from tests.support import HandClock

HITS = Definition("hits", "sum")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificates of one authority, in `one`, and of another, in `two`."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("one", "two"):
        (folder / name).mkdir()
        make(folder / name)
    return folder


def server_settings(folder: Path, **more: Any) -> QuerySettings:
    return QuerySettings(tls_cert_file=f"{folder}/server.pem", tls_key_file=f"{folder}/server.key", **more)


def secured(settings: QuerySettings) -> World:
    world = World(settings=settings)
    world.publish(HITS, {(): 7})
    return world


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Server]:
    """A server that speaks TLS."""
    with serving(secured(server_settings(files / "one", stream_heartbeat_ms=100, head_timeout_ms=500))) as running:
        running.url = f"https://127.0.0.1:{running.port}"
        yield running


@pytest.fixture(scope="module")
def mutual(files: Path) -> Iterator[Server]:
    """A server that wants certificates of its clients."""
    with serving(secured(server_settings(files / "one", tls_client_ca_file=f"{files}/one/ca.pem"))) as running:
        running.url = f"https://127.0.0.1:{running.port}"
        yield running


def total(url: str, **settings: str) -> Any:
    with Reader(url, timeout_s=10, **settings) as reader:  # type: ignore[arg-type]
        return reader.get("hits").series[0].value


def test_everything_goes_over_tls(server: Server, files: Path) -> None:
    """A publisher, both readers, watches that are closed while they wait, and a gatherer's part speak to an https:// URL."""
    ca_file = f"{files}/one/ca.pem"
    with server.world.folding(), Publisher(server.url, ca_file=ca_file) as publisher:  # type: ignore[union-attr]
        publisher.sum("sent").add(3)
        token = publisher.flush()
        with Reader(server.url, ca_file=ca_file) as reader:
            assert reader.get("sent", after=token).series[0].value == 3
            watch = reader.watch("sent")
            assert next(watch).series[0].value == 3
            publisher.sum("sent").add(4)
            while next(watch).series[0].value != 7:
                pass
            watch.close()

    async def read() -> Any:
        async with AsyncReader(server.url, ca_file=ca_file) as reader:
            return (await reader.get("hits")).series[0].value

    assert asyncio.run(read()) == 7
    with closing(HttpPart(server.url, SystemClock(), ClientSettings(ca_file=ca_file))) as part, pytest.raises(Invalid):
        part.ask(b"no request", 10)


@pytest.mark.parametrize(
    ("url", "ca", "says"),
    [
        ("https://127.0.0.1", "two/ca.pem", r"not trusted: .*; trusted are authorities of ca_file='.*two/ca.pem'"),
        ("https://127.0.0.1", "", r"not trusted: .*; trusted are authorities of the system; ca_file names others"),
        ("https://localhost", "one/ca.pem", r"certificate is of another name: .*'localhost'"),
        ("http://127.0.0.1", "", r"Unavailable|RemoteDisconnected|BadStatusLine|ConnectionReset"),
    ],
)
def test_wrong_trust_is_told(server: Server, files: Path, url: str, ca: str, says: str) -> None:
    """A server whose certificate is not trusted, or of another name, is not spoken to, and the error names the setting."""
    settings = {"ca_file": f"{files}/{ca}"} if ca else {}
    with pytest.raises(Unavailable, match=says):
        total(f"{url}:{server.port}", **settings)
    with Reader(f"{url}:{server.port}", **settings) as reader, pytest.raises(Unavailable, match=says):  # type: ignore[arg-type]
        next(reader.watch("hits"))


def test_no_client_falls_back(files: Path) -> None:
    """An https:// client does not speak to a server without TLS; certificates with an http:// URL are a usage error."""
    with serving(secured(QuerySettings())) as plain:
        with pytest.raises(Unavailable, match="does not speak TLS at this port"):
            total(f"https://127.0.0.1:{plain.port}", ca_file=f"{files}/one/ca.pem")
        for make_client in (Reader, AsyncReader, Publisher):
            with pytest.raises(Invalid, match=r"ca_file is for https://, but http://127.0.0.1"):
                make_client(plain.url, ca_file=f"{files}/one/ca.pem")


def test_clients_show_certificates(mutual: Server, files: Path) -> None:
    """A server with a `tls_client_ca_file` answers only clients with a certificate of that authority."""
    ca_file = f"{files}/one/ca.pem"
    own = {"client_cert_file": f"{files}/one/client.pem", "client_key_file": f"{files}/one/client.key"}
    other = {"client_cert_file": f"{files}/two/client.pem", "client_key_file": f"{files}/two/client.key"}
    assert total(mutual.url, ca_file=ca_file, **own) == 7
    with pytest.raises(Unavailable, match=r"a client certificate .*that it trusts: none is given"):
        total(mutual.url, ca_file=ca_file)
    with pytest.raises(Unavailable, match=r"a client certificate .*that it trusts: client_cert_file='.*two/client.pem'"):
        total(mutual.url, ca_file=ca_file, **other)
    publisher = Publisher(mutual.url, ca_file=ca_file)
    publisher.sum("stranger").add(1)
    with pytest.raises(Unavailable, match="client certificate"):
        publisher.close(timeout_s=1)
    mutual.world.fold()
    assert [view.name for view in mutual.world.reader.views().views] == ["hits"]


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_versions_are_refused(server: Server) -> None:
    """A client that speaks TLS 1.1 at most gets no connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    for version, works in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = version
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            if works:
                context.wrap_socket(raw).close()
            else:
                with pytest.raises(OSError, match=r"(?i)protocol|version|reset"):
                    context.wrap_socket(raw)


@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_handshakes_are_bounded(server: Server, sent: bytes) -> None:
    """A client that does not go on with its handshake, or speaks no TLS, is cut off after `head_timeout_ms`."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        raw.sendall(sent)
        began_s = time.monotonic()
        try:
            while raw.recv(1_000):
                pass
        except ConnectionResetError:
            pass
        assert time.monotonic() - began_s < 5
    assert total(server.url, ca_file=server.world.settings.tls_cert_file.replace("server.pem", "ca.pem")) == 7


def peer(port: int, trusted: Path) -> bool:
    """Return whether the server shows a certificate of this authority, on a new connection."""
    context = client_context(ClientSettings(ca_file=str(trusted)))
    try:
        with socket.create_connection(("127.0.0.1", port), 10) as raw, context.wrap_socket(raw, server_hostname="127.0.0.1"):
            return True
    except ssl.SSLCertVerificationError:
        return False


def test_certificates_are_replaced_while_it_runs(files: Path, tmp_path: Path) -> None:
    """New connections get the new certificate without a restart; open ones go on, and half a change changes nothing."""
    for name in ("server.pem", "server.key"):
        shutil.copy(files / "one" / name, tmp_path / name)
    with (
        serving(secured(server_settings(tmp_path))) as server,
        Reader(f"https://127.0.0.1:{server.port}", ca_file=f"{files}/one/ca.pem") as reader,
    ):
        reader.get("hits")
        replace(files / "two" / "server.pem", tmp_path / "server.pem")
        wait_until(lambda: peer(server.port, files / "one/ca.pem") and unreadable(server) == 1, 20)
        replace(files / "two" / "server.key", tmp_path / "server.key")
        wait_until(lambda: peer(server.port, files / "two/ca.pem"), 20)
        assert reader.get("hits").series[0].value == 7


def replace(source: Path, target: Path) -> None:
    shutil.copy(source, target.with_suffix(".new"))
    os.replace(target.with_suffix(".new"), target)


def unreadable(server: Server) -> float:
    text = server.world.metrics.render()[0].decode()
    return float(text.partition("\npipeline_tls_file_errors_total ")[2].partition("\n")[0])


def test_files_are_looked_at_rarely(tmp_path: Path) -> None:
    """A context is made again when a file has changed, at most once a second; a failure is told once, if it stays."""
    clock, told, path = HandClock(), list[Invalid](), tmp_path / "it"
    path.write_text("1")

    def made() -> Any:
        text = path.read_text() if path.exists() else "bad"
        if text == "bad":
            raise Invalid("bad")
        return text

    context: Callable[[], Any] = FollowedContext(made, [str(path), ""], clock, told.append)  # type: ignore[arg-type]
    for text, after_s, seen in (
        ("22", 0.5, "1"),
        ("22", 0.6, "22"),
        ("bad", 2, "22"),
        ("333", 0.1, "22"),
        ("333", 1, "333"),
    ):
        path.write_text(text)
        clock.s += after_s
        assert context() == seen
    assert not told
    path.write_text("bad")
    for _ in range(4):
        clock.s += 2
        assert context() == "333"
    assert len(told) == 1
    path.unlink()
    clock.s += 2
    assert context() == "333"


@pytest.mark.parametrize(
    ("cert", "key", "says"),
    [
        ("none.pem", "", "tls_cert_file='.*none.pem': No such file"),
        ("server.key", "", "tls_cert_file='.*server.key': there is no CERTIFICATE in it"),
        ("server.pem", "", "tls_cert_file='.*server.pem': there is no PRIVATE KEY in it"),
        ("server.pem", "client.key", "tls_key_file='.*client.key': not the key of the certificate in '.*server.pem'"),
        ("client.pem", "locked.key", "tls_key_file='.*locked.key': the key is encrypted"),
        (".", "", "tls_cert_file='.*': Is a directory"),
        ("broken.pem", "server.key", "tls_cert_file='.*broken.pem', tls_key_file: "),
    ],
)
def test_wrong_files_end_the_start(files: Path, cert: str, key: str, says: str) -> None:
    """A file that is missing, wrong, encrypted or of another pair is `Invalid`, with the names of setting and file."""
    folder = files / "one"
    (folder / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    given = {"tls_cert_file": str(folder / cert), "tls_key_file": str(folder / key) if key else ""}
    with pytest.raises(Invalid, match=says):
        server_context(QuerySettings(**given))  # type: ignore[arg-type]
    as_client = {name.replace("tls_", "client_"): value for name, value in given.items()}
    with pytest.raises(Invalid, match=says.replace("tls_", "client_")):
        Publisher("https://127.0.0.1:9", **as_client)  # type: ignore[arg-type]


def test_authorities_and_pairs_are_checked(files: Path) -> None:
    """A wrong file of authorities, and a part of a pair without the other, are `Invalid`."""
    for settings in ({"tls_key_file": "k"}, {"tls_client_ca_file": "c"}):
        with pytest.raises(Invalid, match="needs tls_cert_file"):
            QuerySettings(**settings)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="client_key_file needs client_cert_file"):
        ClientSettings(client_key_file="k")
    with pytest.raises(Invalid, match=r"ca_file='.*server.key': there is no CERTIFICATE"):
        client_context(ClientSettings(ca_file=f"{files}/one/server.key"))
    with pytest.raises(Invalid, match=r"tls_client_ca_file='.*broken"):
        server_context(server_settings(files / "one", tls_client_ca_file=f"{files}/one/broken.pem"))
