"""The StatsD sockets: lines arrive one by one, within limits, and in time before the end."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

import pipeline.ingest.statsd_server as statsd
from pipeline.adapters.clock import SystemClock
from pipeline.errors import Invalid
from pipeline.ingest.statsd_server import StatsdServer
from pipeline.settings import IngestSettings
from tests.support import wait_until


class Heard:
    """A `ports.LineSink` that remembers."""

    def __init__(self) -> None:
        self.lines: dict[str, list[bytes]] = {"statsd_udp": [], "statsd_tcp": []}
        self.refused: Counter[tuple[str, str]] = Counter()
        self.senders: set[str | None] = set()
        self.ticks = 0
        self.gate = threading.Event()
        self.gate.set()

    def take(self, lines: Any, protocol: str, sender: str | None = None) -> None:
        assert self.gate.wait(30)
        self.senders.add(sender)
        self.lines[protocol] += [line for line in lines if line]

    def refuse(self, reason: str, protocol: str) -> None:
        self.refused[reason, protocol] += 1

    def tick(self) -> None:
        self.ticks += 1

    @property
    def udp(self) -> list[bytes]:
        return self.lines["statsd_udp"]

    @property
    def tcp(self) -> list[bytes]:
        return self.lines["statsd_tcp"]


@contextmanager
def listening(host: str = "127.0.0.1", port: int = 0, **limits: Any) -> Iterator[tuple[StatsdServer, Heard]]:
    heard = Heard()
    server = StatsdServer(host, port, IngestSettings(**limits), heard, SystemClock())
    try:
        server.start()
        yield server, heard
    finally:
        heard.gate.set()
        assert server.stop()
        assert not server.failed


def udp(server: StatsdServer, *packets: bytes) -> None:
    family = socket.AF_INET6 if ":" in server.address[0] else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        for packet in packets:
            sock.sendto(packet, server.address)


def tcp(server: StatsdServer, *parts: bytes) -> socket.socket:
    sock = socket.create_connection(server.address, 30)
    for part in parts:
        sock.sendall(part)
    return sock


def test_packets_have_lines() -> None:
    """A packet has any number of lines, with any line end or none; an empty packet has none."""
    with listening() as (server, heard):
        udp(server, b"a:1|c", b"b:1|c\nc:1|c\n", b"", b"d:1|c\r\n\n")
        wait_until(lambda: len(heard.udp) == 4, "four lines")
    assert heard.udp == [b"a:1|c", b"b:1|c", b"c:1|c", b"d:1|c\r"]
    assert heard.ticks > 0


@pytest.mark.parametrize("size", [1, 3, 7, 10_000])
def test_streams_are_cut_into_lines(size: int) -> None:
    """Lines are found in any fragmentation; the last needs no line end if the connection is closed in order."""
    lines = [b"name%d:%d|c" % (n, n) for n in range(40)]
    data = b"\n".join(lines)
    with listening() as (server, heard):
        with tcp(server, *[data[start : start + size] for start in range(0, len(data), size)]):
            pass
        wait_until(lambda: len(heard.tcp) == len(lines), "all lines")
    assert heard.tcp == lines
    assert not heard.refused


def test_a_line_that_does_not_end_costs_little() -> None:
    """An endless line is refused once, at the limit, and the next line is taken."""
    with listening(ingest_line_bytes_max=64) as (server, heard):
        with tcp(server, b"x" * 10, *[b"y" * 50_000] * 20, b"\nafter:1|c\n" + b"z" * 65, b"z", b"z\nlast:1|c"):
            wait_until(lambda: b"after:1|c" in heard.tcp, "the line behind it")
        wait_until(lambda: b"last:1|c" in heard.tcp, "the last line")
    assert [line for line in heard.tcp if len(line) <= 64] == [b"after:1|c", b"last:1|c"]
    whole = [line for line in heard.tcp if len(line) > 64]  # came at once, with its end: whoever reads it refuses it
    assert heard.refused["line_long", "statsd_tcp"] + len(whole) == 2
    assert max(map(len, heard.tcp)) < 70_000


def test_a_packet_that_is_too_long_is_refused() -> None:
    """All of the packet is refused, because its last line may be cut."""
    with listening(ingest_packet_bytes_max=64) as (server, heard):
        udp(server, b"a" * 64, b"b" * 65, b"c:1|c")
        wait_until(lambda: b"c:1|c" in heard.udp, "the last packet")
    assert heard.udp == [b"a" * 64, b"c:1|c"]
    assert heard.refused == {("packet_long", "statsd_udp"): 1}


def test_connections_have_a_limit() -> None:
    """A connection beyond the limit is closed at once and counted; when another ends there is room again."""
    with listening(ingest_connections_max=2) as (server, heard):
        one, two = tcp(server, b"one:1|c\n"), tcp(server, b"two:1|c\n")
        wait_until(lambda: len(heard.tcp) == 2, "both")
        with tcp(server) as third:
            assert third.recv(1) == b""
        assert heard.refused == {("connections_max", "statsd_tcp"): 1}
        one.close()

        while b"again:1|c" not in heard.tcp:
            with tcp(server) as fourth, suppress(ConnectionError):  # it is refused until the other's end was read
                fourth.sendall(b"again:1|c\n")
                fourth.shutdown(socket.SHUT_WR)
                assert fourth.recv(1) == b""
        two.close()


def test_an_idle_connection_is_closed() -> None:
    """A connection on which no line ends for too long makes room, also one that drips bytes; a busy one stays."""
    with listening(ingest_connections_max=3, ingest_idle_timeout_ms=300) as (server, heard):
        silent, dripping, busy = tcp(server), tcp(server, b"x"), tcp(server, b"busy:0|c\n")
        for number in range(1, 30):
            busy.sendall(b"busy:%d|c\n" % number)
            with suppress(ConnectionError):
                dripping.sendall(b"x")
            if heard.refused["idle", "statsd_tcp"] == 2:
                break
            assert number < 29
            threading.Event().wait(0.05)
        assert silent.recv(1) == b""
        count = len(heard.tcp)
        busy.sendall(b"last:1|c\n")
        wait_until(lambda: len(heard.tcp) > count, "the busy one")
        with tcp(server, b"new:1|c\n") as new:
            wait_until(lambda: b"new:1|c" in heard.tcp, "a new one")
            new.shutdown(socket.SHUT_WR)
        for sock in (silent, dripping, busy):
            sock.close()
    assert heard.refused == {("idle", "statsd_tcp"): 2, ("cut", "statsd_tcp"): 1}


def test_the_sender_of_lines_is_known() -> None:
    """Lines come with the address that they are from, so that one sender gets no more than its share."""
    with listening() as (server, heard):
        for number in (1, 2):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.bind((f"127.0.0.{number}", 0))
                sock.sendto(b"a:1|c", server.address)
        with socket.create_connection(server.address, 30, ("127.0.0.3", 0)) as sock:
            sock.sendall(b"a:1|c\nb:1|c")
        wait_until(lambda: len(heard.udp) + len(heard.tcp) == 4, "four lines")
    assert heard.senders == {"127.0.0.1", "127.0.0.2", "127.0.0.3"}


def test_a_connection_that_breaks_off_harms_nobody() -> None:
    """The last, incomplete line of a broken connection is counted as cut."""
    with listening() as (server, heard):
        broken = tcp(server, b"whole:1|c\nhal")
        wait_until(lambda: heard.tcp, "the whole line")
        broken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        broken.close()  # with a reset
        wait_until(lambda: heard.refused, "the half")
        udp(server, b"after:1|c")
        wait_until(lambda: heard.udp, "the next")
    assert heard.tcp == [b"whole:1|c"]
    assert heard.refused == {("cut", "statsd_tcp"): 1}


def test_what_has_arrived_is_taken_before_the_end() -> None:
    """Packets in the kernel's buffer, pending connections, and data that is not read yet are taken."""
    heard = Heard()
    server = StatsdServer("127.0.0.1", 0, IngestSettings(), heard, SystemClock())
    heard.gate.clear()
    server.start()
    udp(server, b"first:1|c")
    udp(server, *[b"u%d:1|c" % n for n in range(200)])
    socks = [tcp(server, b"t%d:1|c\n" % n + b"rest") for n in range(20)]
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    wait_until(server._thread.stopping.is_set, "the end to begin")
    heard.gate.set()
    stopping.join(30)
    for sock in socks:
        sock.close()
    assert heard.udp == [b"first:1|c", *[b"u%d:1|c" % n for n in range(200)]]
    assert sorted(heard.tcp) == sorted([b"t%d:1|c" % n for n in range(20)])
    assert heard.refused == {("cut", "statsd_tcp"): 20}
    assert server.stop()


def test_a_sender_that_never_stops_does_not_keep_it_from_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end waits for data that is there, not for more: here each packet brings another."""
    monkeypatch.setattr(statsd, "_DRAIN_S", 0.2)
    with listening() as (server, heard):
        take = heard.take

        def take_and_send(lines: Any, protocol: str, sender: str | None = None) -> None:
            take(lines, protocol, sender)
            udp(server, b"again:1|c")

        heard.take = take_and_send  # type: ignore[method-assign]
        udp(server, b"a:1|c")
        wait_until(lambda: heard.udp, "the first")
        assert server.stop(20.0)


def test_many_senders_at_once() -> None:
    """Every line of every stream arrives, once."""
    with listening() as (server, heard):

        def send(who: int) -> None:
            with tcp(server) as sock:
                for n in range(200):
                    sock.sendall(b"%d.%d:1|c\n" % (who, n))

        threads = [threading.Thread(target=send, args=(who,)) for who in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        wait_until(lambda: len(heard.tcp) == 1_600, "all lines")
    assert sorted(heard.tcp) == sorted(b"%d.%d:1|c" % (who, n) for who in range(8) for n in range(200))


def test_an_address_that_is_taken() -> None:
    """An address that is taken, or another machine's, is an error at once, for TCP and UDP, and nothing stays open."""
    with listening() as (server, _), pytest.raises(Invalid, match=r"can't listen on 127\.0\.0\.1:"):
        StatsdServer("127.0.0.1", server.address[1], IngestSettings(), Heard(), SystemClock())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        with pytest.raises(Invalid, match="try --port or --host"):
            StatsdServer("127.0.0.1", other.getsockname()[1], IngestSettings(), Heard(), SystemClock())
    for host in ("192.0.2.1", "no host", "x" * 300):
        with pytest.raises(Invalid, match="can't listen"):
            StatsdServer(host, 0, IngestSettings(), Heard(), SystemClock())


def test_one_that_was_never_started_can_be_stopped() -> None:
    """`stop` without `start` closes the port."""
    server = StatsdServer("127.0.0.1", 0, IngestSettings(), Heard(), SystemClock())
    assert server.receive_buffer_bytes >= 4_096
    port = server.address[1]
    assert server.stop()
    with listening(port=port):
        pass


def test_an_error_of_the_sink_is_known() -> None:
    """Receiving ends with an error, rather than to lose lines in silence."""
    heard = Heard()
    heard.take = lambda lines, protocol, sender: 1 / 0  # type: ignore[method-assign,assignment]
    server = StatsdServer("127.0.0.1", 0, IngestSettings(), heard, SystemClock())
    server.start()
    udp(server, b"a:1|c")
    wait_until(lambda: server.failed, "the failure")
    assert server.stop()


@pytest.mark.parametrize(
    "sent",
    [
        b"POST / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nevil:1|c\n",
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n\r\nevil:1|c\n",
        b"PUT /a HTTP/1.0\nevil:1|c\n",
        b"OPTIONS * HTTP/1.1\r\n\r\nevil:1|c",
        b"GET http://x/ HTTP/1.1\r\n\r\nevil:1|c\n",
        b"\x16\x03\x01\x02\x00\nevil:1|c\n",
    ],
)
@pytest.mark.parametrize("part_bytes", [3, 100_000])
def test_other_protocols_are_cut_off(sent: bytes, part_bytes: int) -> None:
    """A connection that begins as HTTP or TLS, as a browser's would, is closed, and no line of it is taken."""
    with listening() as (server, heard):
        with suppress(OSError), socket.create_connection(server.address, 10) as client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for start in range(0, min(len(sent), 100), part_bytes):
                client.sendall(sent[start : start + part_bytes])
            client.sendall(sent[100 if part_bytes < 100 else len(sent) :])
            client.settimeout(10)
            while client.recv(100):
                pass
        wait_until(lambda: heard.refused["http", "statsd_tcp"] == 1, "it is counted")
        with socket.create_connection(server.address, 10) as own:
            own.sendall(b"GET /cart:1|c\nPOST /x HTTP/1.1\n")
        wait_until(lambda: len(heard.tcp) == 2, "lines of StatsD are taken")
        assert heard.tcp == [b"GET /cart:1|c", b"POST /x HTTP/1.1"]
