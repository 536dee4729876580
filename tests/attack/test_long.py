"""All attacks on sockets at once, again and again: `--attack-s 3600` for an hour."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from random import Random
from threading import Thread

import pytest

from tests.attack.support import attacked, connect, flood
from tests.support import UpProcess

HOST = b"Host: localhost\r\n"
PART = b"x" * 65_536
CHUNKED = b"POST /v1/deltas HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
BODY = b"POST /v1/deltas HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n["


def send_without_end(port: int, random: Random) -> None:
    """Send a head, a URL, trailers or a chunk's extension without end."""
    head, part = random.choice(
        [
            (b"GET / HTTP/1.1\r\n", b"name: " + PART + b"\r\n"),
            (b"GET / HTTP/1.1\r\nname: ", PART),
            (b"GET /", PART),
            (CHUNKED + b"1\r\n[\r\n0\r\n", b"name: " + PART + b"\r\n"),
            (CHUNKED + b"1;name=", PART),
        ]
    )
    with connect(port) as client:
        client.sendall(head)
        flood(client, part, 100_000_000, 2.0)


def stop_within(port: int, random: Random) -> None:
    """Open many connections that stop before a head, within one, or within a body."""
    start = random.choice([b"", b"GET / HTTP/1.1\r\nHost: ", BODY % 1_000])
    with ExitStack() as stack:
        for _ in range(random.randrange(100, 1_100)):
            stack.enter_context(connect(port)).sendall(start)
        time.sleep(random.random() * 5)


def stop_within_large(port: int, random: Random) -> None:
    """Send bodies of 16 MB but for their last byte."""
    with ExitStack() as stack:
        for _ in range(4):
            client = stack.enter_context(connect(port))
            client.sendall(BODY % 16_777_216)
            client.sendall(b" " * (16_777_216 - 2))
        time.sleep(random.random() * 5)


def read_nothing(port: int, random: Random) -> None:
    """Ask and read no answers."""
    path = random.choice([b"/metrics", b"/v1/status", b"/openapi.json", b"/v1/views/bystander/stream"])
    with ExitStack() as stack:
        for _ in range(20):
            client = stack.enter_context(connect(port, receive_bytes=4_096))
            flood(client, b"GET %s HTTP/1.1\r\n%s\r\n" % (path, HOST) * 100, 1_000_000, 0.1)
        time.sleep(random.random() * 5)


ATTACKS: list[Callable[[int, Random], None]] = [send_without_end, stop_within, stop_within_large, read_nothing]


def attack(port: int, seconds: float) -> None:
    """Run all attacks at once until the time is over; for a process of its own, whose CPU is not the bystander's."""
    ends_s = time.monotonic() + seconds

    def again(one: Callable[[int, Random], None], seed: int) -> None:
        random = Random(seed)
        while time.monotonic() < ends_s:
            with suppress(OSError):
                one(port, random)

    threads = [Thread(target=again, args=(one, seed)) for seed, one in enumerate(ATTACKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.long
@pytest.mark.timeout(7_200)
def test_all_attacks_at_once(up: UpProcess, request: pytest.FixtureRequest) -> None:
    """Under all attacks at once others are answered rightly, health in time, and memory stays bounded."""
    seconds = request.config.getoption("--attack-s")
    attacker = get_context("spawn").Process(target=attack, args=(up.port, seconds))
    with attacked(up) as bystander:
        attacker.start()
        attacker.join()
    assert attacker.exitcode == 0
    bystander.check(grown_bytes_max=400_000_000, rounds_min=int(seconds / 10))
