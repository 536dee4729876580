"""Bodies of requests that cost a server far more than their bytes: they are refused for little, and keep nobody else out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgspec
import pytest

from pipeline.core.codec import seal
from pipeline.core.frames import encode_frames
from pipeline.core.record import Definition, producer_id_of, series_suffix, travelling
from tests.attack.support import Reply, attacked, connect, flood, request
from tests.support import UpProcess

TYPES = {
    "/v1/deltas": "application/json",
    "/v1/batches": "application/octet-stream",
    "/v1/openmetrics": "text/plain; version=0.0.4",
}
SECRET = "attack"
OWN = {"Pipeline-Producer": SECRET}
MB = 10**6
GROWN_MAX = 150 * MB
"""Bound of the memory that one body of 16 MB may cost beside its own, which is held once or twice while it arrives."""
encode = msgspec.msgpack.Encoder().encode


def batch(groups: bytes, sequence: int = 0) -> bytes:
    head = encode((producer_id_of(SECRET), 0, sequence, 0, time.time_ns() // MB, False, None, []))
    return seal(0, bytes((head[0] + 1,)) + head[1:] + groups)


def array(item: bytes, count: int) -> bytes:
    return b"\xdd" + count.to_bytes(4, "big") + item * count


DEFINITION = encode(travelling(Definition("dense", "sum", ("x",))))
SUFFIX = encode(series_suffix(("a",)))
DELTA = b'{"view":"a","kind":"sum","value":1}'
ATTACKS: dict[str, tuple[str, bytes, int]] = {
    "empty columns": (
        "/v1/batches",
        encode_frames([batch(b"\x91\x93" + DEFINITION + encode([b""]) + array(b"\x90", 16 * MB))]),
        400,
    ),
    "long columns": (
        "/v1/batches",
        encode_frames([batch(b"\x91\x93" + DEFINITION + b"\x91" + SUFFIX + b"\x91" + array(b"\x92\0\0", 5 * MB))]),
        400,
    ),
    "short suffixes": (
        "/v1/batches",
        encode_frames([batch(b"\x91\x93" + DEFINITION + array(b"\xc4\0", 3 * MB) + b"\x91" + array(b"\x92\0\0", 3 * MB))]),
        400,
    ),
    "groups": ("/v1/batches", encode_frames([batch(array(b"\x93\x92\xa1v\xa3sum\x90\x90", 14 * MB // 9))]), 400),
    "tiny batches": ("/v1/batches", encode_frames([batch(b"\x90")] * 150_000), 413),
    "no deltas": ("/v1/deltas", b"[" + b"1," * (8 * MB) + b"1]", 400),
    "arrays": ("/v1/deltas", b"[" + b"[]," * (5 * MB) + b"[]]", 400),
    "deltas": ("/v1/deltas", b"[" + (DELTA + b",") * 399_999 + DELTA + b"]", 413),
    "lines": ("/v1/deltas", (DELTA + b"\n") * 400_000, 413),
    "blank lines": ("/v1/deltas", DELTA + b"\n" * (16 * MB) + DELTA, 200),
    "labels": (
        "/v1/deltas",
        b'[{"view":"a","kind":"sum","value":1,"labels":{' + b",".join(b'"%x":""' % i for i in range(1_400_000)) + b"}}]",
        400,
    ),
    "types": ("/v1/openmetrics", b"".join(b"# TYPE a%x counter\n" % i for i in range(700_000)), 413),
    "comments": ("/v1/openmetrics", b"#\n" * (8 * MB), 200),
}  # fmt: skip
"""By name: path, body, and the status of the answer."""
SLOW = ("lines", "arrays", "comments")


def post(up: UpProcess, path: str, body: bytes, timeout_s: float = 60.0) -> Reply:
    headers = {**OWN, "content-type": TYPES[path]}
    return request(up.port, "POST", path, body, headers, timeout_s=timeout_s)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [pytest.param(*it, id=name, marks=[pytest.mark.long] * (name in SLOW)) for name, it in ATTACKS.items()],
)
def test_a_dense_body_is_refused_for_little(up: UpProcess, path: str, body: bytes, status: int) -> None:
    """The items of 16 MB are counted before they are built, so memory does not grow to a multiple of the body."""
    assert len(body) <= 2**24
    with attacked(up) as bystander:
        reply = post(up, path, body)
    assert reply.status == status, reply.body[:300]
    bystander.check(grown_bytes_max=GROWN_MAX)


def send_all(up: UpProcess, path: str, bodies: Sequence[bytes]) -> list[int]:
    """Return the status of each request; all are sent at once."""
    with ThreadPoolExecutor(len(bodies)) as threads:
        return [reply.status for reply in threads.map(lambda body: post(up, path, body), bodies)]


def samples(number: int, count: int) -> bytes:
    return b"".join([b'pushed{writer="%d",x="%d"} 1\n' % (number, i) for i in range(count)])


@pytest.mark.parametrize("count", [4_000, pytest.param(90_000, marks=pytest.mark.long)])
def test_large_requests_keep_small_ones_waiting_for_little(up: UpProcess, count: int) -> None:
    """While more large texts come than can be parsed, others write and read; some of the large ones may be refused."""
    bodies = [samples(number, count) for number in range(8)]
    with attacked(up) as bystander:
        statuses = send_all(up, "/v1/openmetrics", bodies)
    assert set(statuses) <= {200, 503}
    assert 200 in statuses
    assert not [it for it in bystander.failures if "/v1/deltas" in it], bystander
    bystander.check(grown_bytes_max=500 * MB, rounds_min=2)


@pytest.mark.long
def test_large_bodies_in_memory_leave_room_for_small_ones(up: UpProcess) -> None:
    """Large bodies that stall before their end hold no more than their part of the memory: small ones are taken."""
    head = (
        b"POST /v1/deltas HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 16000000\r\n\r\n"
    )
    with attacked(up) as bystander, ExitStack() as open_until_then:
        for _ in range(8):
            client = connect(up.port)
            open_until_then.callback(client.close)
            flood(client, head + b" " * (15 * MB), 15 * MB)
        time.sleep(1.0)
    assert not bystander.failures, bystander
    bystander.check(grown_bytes_max=GROWN_MAX, rounds_min=3)
