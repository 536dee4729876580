"""Writing over HTTP: all deltas or batches of a request or none, exact, and within limits."""

import json
import re
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.frames import encode_frames
from pipeline.core.grants import Bounds
from pipeline.core.record import Definition
from pipeline.core.token import Token
from pipeline.errors import BufferFull, Unavailable
from pipeline.json_errors import OUT_OF_RANGE
from pipeline.ports import RawDelta, RequestKey
from pipeline.settings import QuerySettings
from tests.query.support import SECRET, Reply, Server, World, serving

NDJSON = "application/x-ndjson"
DEFINITION = Definition("sealed", "sum", ("x",))
OWN = {"Pipeline-Producer": SECRET}


def delta(value: object = 1, view: str = "v", kind: str = "sum", **labels: str) -> dict[str, Any]:
    return {"view": view, "kind": kind, "labels": labels, "value": value}


def post(server: Server, body: bytes | str | Sequence[Any], content_type: str = "application/json") -> Reply:
    if not isinstance(body, bytes | str):
        body = json.dumps(body)
    body = body.encode() if isinstance(body, str) else body
    return server.request("POST", "/v1/deltas", body, {"Content-Type": content_type})


def total(server: Server, view: str) -> Any:
    server.world.fold()
    (row,) = server.view(view, ("by", ""))["series"]
    return row["value"]


def test_deltas_as_an_array(server: Server) -> None:
    """Deltas are counted, acknowledged with a token, and in the view once they are folded."""
    reply = post(server, [delta(1, "array", region="eu"), delta(2.5, "array", region="us")])
    accepted = reply.json()
    assert (reply.status, accepted["accepted"]) == (200, 2)
    server.world.fold()
    token = Token.parse(accepted["token"])
    assert token.next_offsets
    answer = server.view("array", ("after", str(token)))
    assert [(row["labels"]["region"], row["value"]) for row in answer["series"]] == [("eu", 1), ("us", 2.5)]


@pytest.mark.parametrize(
    "content_type", [NDJSON, NDJSON + "; charset=utf-8", "application/json", "Application/JSON;charset=utf-8"]
)
def test_deltas_by_line(server: Server, content_type: str) -> None:
    """Deltas by line are told from an array by their media type or first byte; blank lines and CRLF do not matter."""
    view = "lines" + re.sub(r"\W", "_", content_type)
    lines = "\r\n\n".join(json.dumps(delta(i, view)) for i in range(5)) + "\n"
    assert post(server, lines, content_type).json()["accepted"] == 5
    assert total(server, view) == 10


def test_nothing_is_fine(server: Server) -> None:
    """A request without deltas succeeds with an empty token."""
    assert post(server, []).json() == {"accepted": 0, "token": ""}
    assert post(server, b" [ ] ").json() == {"accepted": 0, "token": ""}
    assert post(server, b"", NDJSON).json() == {"accepted": 0, "token": ""}
    assert server.request("POST", "/v1/batches", b"").json() == {"next_offsets": [], "token": ""}


def test_a_monotone_view(server: Server) -> None:
    """`monotone` defines a new view and may be left out after that; negative values are 400."""
    assert post(server, [{**delta(1, "rising"), "monotone": True}]).status == 200
    server.world.fold()
    assert post(server, [delta(2, "rising"), {**delta(3, "rising"), "monotone": True}]).status == 200
    for wrong, said in (
        (delta(-1, "rising"), "no negative number"),
        ({**delta(1, "rising"), "monotone": 1}, "'monotone' must be true, false or null"),
        ({**delta(1, "m", "max"), "monotone": True}, "a max cannot be monotone"),
    ):
        detail = server.problem(400, post(server, [delta(1, "rising"), wrong]))
        assert detail.startswith("delta 1: ")
        assert said in detail
    assert total(server, "rising") == 6
    (view,) = [view for view in server.get("/v1/views").json()["views"] if view["name"] == "rising"]
    assert view["monotone"] is True


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 2**64, 10**400, -1, 0])
def test_ints_of_any_size_stay_exact(server: Server, value: int) -> None:
    """An int of any size is read back exactly."""
    view = f"ints_{abs(hash(value))}"
    assert post(server, [delta(value, view), delta(1, view)]).status == 200
    assert total(server, view) == value + 1


def test_what_a_last_view_takes(server: Server) -> None:
    """A `last` view takes texts, nulls, bools and numbers, and shows the newest by its own time."""
    for i, value in enumerate(["up", None, True, 1.5, "a\0b"]):
        assert post(server, [delta(value, "last_of_all", "last") | {"ts_ms": 1_000 + i}]).status == 200
        assert total(server, "last_of_all") == value
    post(server, [delta("old", "last_of_all", "last") | {"ts_ms": 5}])
    assert total(server, "last_of_all") == "a\0b"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "a JSON array"),
        (b"   ", "a JSON array"),
        (b"hello", "a JSON array"),
        (b'"text"', "a JSON array"),
        (b"\xef\xbb\xbf[]", "a JSON array"),
        (b"[", "not a JSON array"),
        (b"[1", "not a JSON array"),
        (b"[{}]]", "not a JSON array"),
        (b"[{},]", "not a JSON array"),
        (b"[{}]", "delta 0: 'view' is missing"),
        (b"[1]", "delta 0: a JSON object is needed, got an int"),
        (b"[null]", "delta 0: "),
        (b"[[]]", "delta 0: "),
        (b"[" * 50_000, "not a JSON array"),
        (b'[{"view":"v","kind":"sum","value":' + b"[" * 50_000, "not a JSON array"),
        (json.dumps([delta(), delta(), {"view": 3}]), "delta 2: "),
        (json.dumps([delta() | {"extra": 1}]), "delta 0: there is no field 'extra'"),
        (json.dumps([delta() | {"labels": {"x": 1}}]), "delta 0: 'labels' must be an object of texts"),
        (json.dumps([delta() | {"labels": ["x"]}]), "delta 0: "),
        (json.dumps([delta() | {"ts_ms": 1.5}]), "delta 0: 'ts_ms' must be an int or null, got a float"),
        (json.dumps([delta([1])]), "delta 0: "),
        (json.dumps([delta({"a": 1})]), "delta 0: "),
        (json.dumps([delta(), delta("text")]), "delta 1: a number is needed"),
        (json.dumps([delta(), delta(None)]), "delta 1: a number is needed"),
        ('[{"view":"v","kind":"sum","value":NaN}]', "not a JSON array"),
        ('[{"view":"v","kind":"sum","value":1e999}]', f"delta 0: {OUT_OF_RANGE}"),
        (json.dumps([delta(2**8192)]), "delta 0: an int of 8193 bits"),
        ('[{"view":"v","kind":"sum","value":' + "9" * 10_000 + "}]", f"delta 0: {OUT_OF_RANGE}"),
        (json.dumps([delta(), delta(kind="median")]), "delta 1: "),
        (json.dumps([delta(view="9v")]), "delta 0: view name"),
        (json.dumps([delta(view="v\0")]), "delta 0: view name"),
        (json.dumps([delta(view="w", **{"a-b": "x"})]), "delta 0: label name"),
        (json.dumps([delta(view="w", **{f"l{i}": "x" for i in range(33)})]), "at most 32"),
        (json.dumps([delta(view="w", x="y" * 1_000_000)]), "delta 0: label x"),
        (json.dumps([delta() | {"window_s": 10**10}]), "delta 0: view v: window_s"),
        (b'[{"view":"v","kind":"sum","value":1,"labels":{"x":"\xff"}}]', "delta"),
        (b'[{"view":"v","kind":"sum","value":1,"labels":{"x":"\\ud800"}}]', "not a JSON array"),
        (b'{"view":"v","kind":"sum","value":1}\n{"view":"v"}', "line 2: 'kind' is missing"),
        (b'{"view":"v","kind":"sum","value":1}\n\nnot json\n', "line 3: not JSON from byte 0 on"),
        (b'{"view":"v","kind":"sum","value":1}{"view":"v","kind":"sum","value":1}', "line 1: "),
        (b'{"view":"v","kind":"sum","value":1', "line 1: "),
        (b'{\n"view":"v","kind":"sum","value":1}', "line 1: "),
        (b'{"view":"v","kind":"sum","value":1}\n\x00', "line 2: "),
    ],
)
def test_a_wrong_body_is_told_and_nothing_of_it_taken(server: Server, body: bytes | str, said: str) -> None:
    """A wrong body is answered with 400, the place and the reason, and the log has not grown."""
    before = [server.world.log.watermarks("deltas", number).end_offset for number in range(4)]
    assert said in server.problem(400, post(server, body))
    assert [server.world.log.watermarks("deltas", number).end_offset for number in range(4)] == before


def test_lines_by_media_type_are_not_an_array(server: Server) -> None:
    """A body whose media type says lines is read as lines."""
    assert "line 1" in server.problem(400, post(server, [delta()], NDJSON))


def test_definitions_do_not_conflict(server: Server) -> None:
    """Deltas of another kind, or of other labels, belong to another definition: all are taken, and read side by side."""
    sums = [delta(1, "wide", x="a"), delta(2, "wide", y="b"), delta(4, "wide", x="a", y="b")]
    for more in (sums[0], delta(7, "wide", "max", x="a"), *sums[1:]):
        assert post(server, [more]).status == 200
        server.world.fold()
    answer = server.view("wide")
    assert (answer["kind"], answer["also"]) == ("sum", [{"kind": "max", "window_s": 0}])
    rows = {(row["labels"]["x"], row["labels"]["y"]): row["value"] for row in answer["series"]}
    assert rows == {("a", ""): 1, ("", "b"): 2, ("a", "b"): 4}
    assert not sum(server.world.log.watermarks("dead-letters", number).end_offset for number in range(4))


def test_a_time_far_ahead_is_refused(server: Server) -> None:
    """A value of `last` over an hour ahead is refused: no later value would count for a long time."""
    now_ms = server.world.clock.now_ms()
    for ts_ms in (2**53, now_ms + 3_700_000):
        said = server.problem(400, post(server, [delta(), delta("x", "ahead", "last") | {"ts_ms": ts_ms}]))
        assert said.startswith("delta 1: ts_ms")
    assert post(server, [delta("x", "ahead", "last") | {"ts_ms": now_ms + 3_500_000}]).status == 200


def test_of_two_values_of_one_millisecond_the_later_wins(server: Server) -> None:
    """The later of two values of one millisecond wins, within and across requests, whichever text is the larger."""
    for first, second in (("running", "done"), ("done", "running"), (1, 0), (0, 1)):
        view = f"newest_{first}_{second}"
        stamped = {"ts_ms": server.world.clock.now_ms()}
        assert post(server, [delta(value, view, "last") | stamped for value in (first, second)]).status == 200
        server.world.fold()
        assert server.view(view)["series"][0]["value"] == second
        for value in (first, second):
            assert post(server, [delta(value, view + "_apart", "last") | stamped]).status == 200
        server.world.fold()
        assert server.view(view + "_apart")["series"][0]["value"] == second


def test_batches_are_taken_as_they_are(server: Server) -> None:
    """Each batch is covered by its own offset, all together by the token; batches that are sent again count once."""
    world = server.world
    batches = [world.batch(number, DEFINITION, {("a",): 1}) for number in (0, 1, 1)]
    for _ in range(2):
        reply = server.request("POST", "/v1/batches", encode_frames(batches), OWN).json()
        assert len(reply["next_offsets"]) == 3
        token = Token.parse(reply["token"])
        assert token.next_offsets == {0: reply["next_offsets"][0], 1: reply["next_offsets"][2]}
        assert total(server, "sealed") == 3


def test_batches_for_a_partition_that_is_not_known_yet(server: Server) -> None:
    """A batch for an unknown partition is 503, so that its publisher sends it again, and no other batch is taken."""
    before = server.world.log.watermarks("deltas", 0).end_offset
    body = encode_frames([server.world.batch(number, DEFINITION, {("a",): 1}) for number in (0, 77)])
    assert "no partition 77 yet" in server.problem(503, server.request("POST", "/v1/batches", body, OWN))
    assert server.world.log.watermarks("deltas", 0).end_offset == before


@pytest.mark.parametrize("damage", ["truncated", "length", "version", "checksum", "random", "empty"])
def test_damaged_batches_are_refused_whole(server: Server, damage: str) -> None:
    """A damaged batch is 400, and the good batch beside it is not taken either."""
    world = server.world
    good = world.batch(0, Definition("unharmed", "sum", ("x",)), {("a",): 1})
    body = {
        "truncated": encode_frames([good, good[:-1]]),
        "length": encode_frames([good]) + b"\xff\xff\xff\xffabc",
        "version": encode_frames([good, b"\x01" + good[1:]]),
        "checksum": encode_frames([good, good[:-1] + bytes((good[-1] ^ 1,))]),
        "random": b"\x00\x00\x00\x05hello",
        "empty": b"\x00\x00\x00\x00",
    }[damage]
    before = world.log.watermarks("deltas", 0).end_offset
    reply = server.request("POST", "/v1/batches", body, OWN)
    server.problem(400, reply)
    assert reply.json()["type"] == "urn:pipeline:error:BadRecord"
    assert world.log.watermarks("deltas", 0).end_offset == before


def chunks(size: int, count: int) -> Iterator[bytes]:
    for _ in range(count):
        yield b" " * size


def peak_bytes() -> int:
    """Largest resident size of this process since it was last reset."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", text)[1]) * 1024  # type: ignore[index]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("path", ["/v1/deltas", "/v1/batches"])
def test_a_huge_body_is_refused_without_being_held(server: Server, path: str, chunked: bool) -> None:
    """A body of 100 MB is 413, announced or in chunks, and memory does not grow by as much as the limit twice."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")
    before = peak_bytes() if reset.exists() else 0
    headers = {} if chunked else {"Content-Length": str(100 * 2**20)}
    reply = server.request("POST", path, chunks(2**20, 100), headers, timeout_s=60)
    assert "16777216" in server.problem(413, reply)
    if reset.exists():
        assert peak_bytes() - before < 40 * 2**20
    assert server.get("/healthz").status == 200


def test_an_announced_huge_body_is_refused_before_it_comes(server: Server) -> None:
    """An announced huge body is refused before the client has sent it."""
    with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
        kind = b"Content-Type: application/octet-stream\r\n"
        raw.sendall(b"POST /v1/batches HTTP/1.1\r\nHost: localhost\r\n" + kind + b"Content-Length: 104857600\r\n\r\n")
        assert raw.recv(65_536).startswith(b"HTTP/1.1 413 ")


def test_the_largest_body_is_taken() -> None:
    """A body of `body_bytes_max` bytes is taken, one byte more is 413, and so are too many deltas."""
    with serving(World(settings=QuerySettings(body_bytes_max=1_024, deltas_max=3))) as server:
        body = json.dumps([delta()]).encode()
        assert post(server, body + b" " * (1_024 - len(body))).status == 200
        server.problem(413, post(server, body + b" " * (1_025 - len(body))))
        assert post(server, [delta()] * 3).status == 200
        assert "at most 3" in server.problem(413, post(server, [delta()] * 4))
        lines = b"\n".join([json.dumps(delta()).encode()] * 4)
        assert "at most 3" in server.problem(413, post(server, lines, NDJSON))


def test_compressed_bodies_are_refused(server: Server) -> None:
    """A compressed body is 415 rather than bytes that make no sense."""
    reply = server.request("POST", "/v1/deltas", b"x", {"Content-Encoding": "gzip"})
    assert "compressed" in server.problem(415, reply)


def test_a_client_that_goes_away_harms_nobody(server: Server) -> None:
    """A client that closes the connection after half a body changes nothing, and the server goes on."""
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", server.port), 10) as raw:
            raw.sendall(b"POST /v1/deltas HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n[")
    assert post(server, [delta(1, "after_all")]).status == 200
    assert total(server, "after_all") == 1


class _Failing:
    """An ingest that cannot take anything now."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def deltas(self, deltas: Sequence[RawDelta], key: RequestKey | None = None, bounds: Bounds | None = None) -> Token:
        raise self._error

    def batches(self, batches: Sequence[bytes], secret: str, bounds: Bounds | None = None) -> tuple[list[int], Token]:
        raise self._error


@pytest.mark.parametrize(
    ("error", "status"),
    [(Unavailable("the log is away"), 503), (BufferFull("no room"), 503), (RuntimeError("secret"), 500)],
)
def test_what_the_log_refuses_is_told(error: Exception, status: int) -> None:
    """A refusal by the log is 503 with a time to come back, or 500 without a word of the inside."""
    world = World()
    world.ingest = _Failing(error)
    with serving(world) as server:
        for reply in (post(server, [delta()]), server.request("POST", "/v1/batches", b"\x00\x00\x00\x01\x01")):
            assert (str(error) in server.problem(status, reply)) is (status == 503)
            assert ("retry-after" in reply.headers) is (status == 503)


def test_a_server_without_ingest_only_reads() -> None:
    """The API of a server without ingest has no writes."""
    world = World()
    world.ingest = None
    with serving(world) as server:
        server.problem(404, post(server, [delta()]))
        assert "/v1/deltas" not in server.get("/openapi.json").json()["paths"]
