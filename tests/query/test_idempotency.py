"""`Idempotency-Key`: a repeat counts once, at this server and at another; another body under the same key is refused."""

import json
from typing import Any

import pytest

import pipeline.ingest.idempotency as keyed
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Definition
from pipeline.errors import Invalid, Unavailable
from pipeline.ingest.admission import Rooms
from pipeline.ingest.gateway import Gateway
from pipeline.query.idempotency import KEY_LENGTH_MAX, UsedKeys, parse_key
from pipeline.query.problems import Refused
from pipeline.query.stored_state import StoredState
from pipeline.settings import PublisherSettings, QuerySettings
from tests.query.support import Reply, Server, World, serving

PUSHED = "# TYPE pushed counter\npushed_total 3\n"


def post(server: Server, key: str, body: str, path: str = "/v1/deltas", **headers: str) -> Reply:
    return server.request("POST", path, body.encode(), {"Idempotency-Key": key, **headers})


def delta(view: str, value: Any = 1) -> str:
    return json.dumps([{"view": view, "kind": "sum", "value": value}])


def total(server: Server, view: str) -> Any:
    server.world.fold()
    return server.view(view)["series"][0]["value"]


def test_a_repeat_counts_once(server: Server) -> None:
    """A repeat counts once, with or without quotes around the key, and each answer has a token that a read can wait with."""
    for key in ("first", '"first"', " first "):
        reply = post(server, key, delta("once"))
        assert reply.status == 200, reply.body
        server.world.fold()
        assert server.view("once", ("after", reply.json()["token"]))["series"][0]["value"] == 1
    assert post(server, "second", delta("once")).status == 200
    assert total(server, "once") == 2
    for _ in range(2):
        assert post(server, "first", PUSHED, "/v1/openmetrics").json()["accepted"] == 1
    assert total(server, "pushed_total") == 3


def test_another_body_is_refused(server: Server) -> None:
    """Another body under a used key is 422, as the draft of the header says. A refused request has not used its key."""
    assert post(server, "used", delta("body")).status == 200
    assert "used with another body" not in server.problem(400, post(server, "fresh", delta("body", "text")))
    assert post(server, "fresh", delta("body", 10)).status == 200
    said = server.problem(422, post(server, "used", delta("body", 5)))
    assert "'used' was used for /v1/deltas with another body" in said
    assert total(server, "body") == 11
    assert post(server, "used", delta("body")).status == 200
    assert total(server, "body") == 11


def test_a_body_that_is_too_large_has_not_used_its_key() -> None:
    """A body that is too large, or of another media type, is not taken, so the client may send less under the same key."""
    world = World(settings=QuerySettings(deltas_max=2))
    with serving(world) as server:
        server.problem(413, post(server, "much", "\n".join([delta("less")[1:-1]] * 3)))
        assert post(server, "much", delta("less")).status == 200
        server.problem(413, post(server, "much", PUSHED + "pushed_total 3\n" * 2, "/v1/openmetrics"))
        assert post(server, "much", PUSHED, "/v1/openmetrics").status == 200
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        server.problem(415, post(server, "order", "view=less", "/v1/views/less/reset", **form))
        world.fold()
        as_json = {"Content-Type": "application/json"}
        assert post(server, "order", "{}", "/v1/views/less/reset", **as_json).status == 200


def test_a_repeat_that_is_refused_says_what_may_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key stays used if a part of the first try got into the log, even when there is no room for the repeat."""
    monkeypatch.setattr(keyed, "CHUNK_BYTES_MAX", 100)
    world = World()
    limits, facts = TaskLimits(views_max=2), StoredState(world.stores)
    world.ingest = gateway = Gateway(world.log, world.clock, PublisherSettings(), {}.get, limits=limits, facts=facts)
    body = json.dumps([{"view": view, "kind": "sum", "value": 1} for view in ("part_1", "part_2")])
    append = world.log.append

    def cut(messages: Any, *, timeout_s: float) -> Any:
        return [*append(messages[:1], timeout_s=timeout_s), *[Unavailable("away")] * len(messages[1:])]

    with serving(world) as server:
        world.log.append = cut  # type: ignore[method-assign]
        assert "1 of 2 batches not acknowledged" in server.problem(503, post(server, "cut", body))
        world.log.append = append  # type: ignore[method-assign]
        world.append(0, Definition("other", "sum"), {(): 1})
        assert total(server, "part_1") == 1
        gateway._rooms = Rooms(facts, limits.views_max)  # what it kept free for the first try, it keeps for a while
        for _ in range(2):
            said = server.problem(400, post(server, "cut", body))
            assert "views_max" in said
            assert said.endswith("all or a part of what it got then may be counted")
        assert "with another body" in server.problem(422, post(server, "cut", delta("part_2")))
        said = server.problem(400, post(server, "new", body))
        assert "views_max" in said
        assert "may be counted" not in said
        assert total(server, "part_1") == 1
    with serving(world) as server:
        said = server.problem(400, post(server, "cut", body))
        assert "may be counted" not in said, "a server that has not seen the key can't know: the document says so"


def test_another_server_counts_a_repeat_once(server: Server) -> None:
    """A server that was just started shares nothing with the first but the log, and counts the repeat once."""
    assert post(server, "moved", delta("moved", 7)).status == 200
    world = server.world
    first, world.ingest = world.ingest, Gateway(world.log, world.clock, PublisherSettings(), world._definition_of)
    try:
        with serving(world) as other:
            assert post(other, "moved", delta("moved", 7)).status == 200
    finally:
        world.ingest = first
    assert total(server, "moved") == 7


@pytest.mark.parametrize("bad", ["", '""', " ", "a b", "x" * (KEY_LENGTH_MAX + 1), "ü", '"unended', '"a\\b"', "tab\t."])
def test_a_key_that_is_none(bad: str) -> None:
    """An invalid key is refused, not ignored: the client relies on it."""
    with pytest.raises(Invalid, match="Idempotency-Key: 1 to 200"):
        parse_key([bad])


def test_keys() -> None:
    """A request has one key at most; quotes and backslashes in a quoted key are escaped."""
    assert parse_key([]) is None
    assert parse_key(["8e03978e-40d5-43e8"]) == parse_key(['"8e03978e-40d5-43e8"']) == "8e03978e-40d5-43e8"
    assert parse_key([r'"a \"b\" \\ c"']) == r'a "b" \ c'
    with pytest.raises(Invalid, match="once in a request"):
        parse_key(["a", "b"])


def test_a_wrong_key_is_told(server: Server) -> None:
    """A wrong key is 400, and nothing is taken."""
    assert "Idempotency-Key: 1 to 200" in server.problem(400, post(server, "a b", delta("wrong_key")))
    server.problem(404, server.get("/v1/views/wrong_key"))


def test_memory_is_bounded() -> None:
    """The newest keys are remembered; an older key is free for another body."""
    keys = UsedKeys(2)
    for name in "abc":
        with keys.using("/p", name, b"1") as key:
            assert key is not None
            assert key.key == name
    with keys.using("/p", "a", b"2") as key:
        assert key is not None
    with pytest.raises(Refused, match="another body"), keys.using("/p", "c", b"2"):
        pass
    with keys.using("/other", "c", b"2") as key:
        assert key is not None
    with keys.using("/p", None, b"") as key:
        assert key is None
    with keys.using("/metrics/job/" + "x" * 60_000, "d", b"1"):
        pass
    assert sum([len(it) for pair in keys._digests.items() for it in pair]) == 2 * 64


def test_at_a_world_of_its_own() -> None:
    """A first try that is in the log but was never answered counts once with its repeat."""
    world = World()
    with serving(world) as server:
        append = world.log.append

        def cut(messages: Any, *, timeout_s: float) -> Any:
            append(messages, timeout_s=timeout_s)
            raise RuntimeError("the process is gone before it can answer")

        world.log.append = cut  # type: ignore[method-assign]
        assert post(server, "cut", delta("cut", 5)).status == 500
        world.log.append = append  # type: ignore[method-assign]
        assert post(server, "cut", delta("cut", 5)).status == 200
        assert total(server, "cut") == 5
