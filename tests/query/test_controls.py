"""Dropping and resetting views over HTTP: answers, refusals, and what readers see before and after."""

import json
from typing import Any

import pytest

from pipeline.core.record import Definition
from tests.query.support import Reply, Server

JSON = {"Content-Type": "application/json"}


def post(server: Server, view: str, action: str, body: Any = None, **headers: str) -> Reply:
    return server.request("POST", f"/v1/views/{view}/{action}", json.dumps(body or {}).encode(), {**JSON, **headers})


def publish(server: Server, definition: Definition, **values: int) -> None:
    series = {(name,) if definition.labels else (): value for name, value in values.items()}
    server.world.publish(definition, series)


def listed(server: Server, view: str) -> list[tuple[str, list[str], int]]:
    found = server.get("/v1/views").json()["views"]
    return [(it["kind"], it["labels"], it["series_count"]) for it in found if it["name"] == view]


def test_a_view_that_is_dropped_is_not_there(server: Server) -> None:
    """A dropped view is 404 from the token on, and shows the old answer before it; later deltas count from zero."""
    view = Definition("dropped", "sum", ("a",))
    publish(server, view, x=1, y=2)
    reply = post(server, "dropped", "drop")
    assert reply.status == 200, reply.body
    said = reply.json()
    assert (said["action"], said["view"], len(said["definitions"])) == ("drop", "dropped", 1)
    assert said["definitions"][0]["series_count"] == 2
    assert len(server.view("dropped")["series"]) == 2, "no partition has carried it out yet"
    server.world.fold()
    server.problem(404, server.get("/v1/views/dropped", ("after", said["token"])))
    assert listed(server, "dropped") == []
    assert b"dropped{" not in server.get("/v1/openmetrics").body
    publish(server, view, x=5)
    assert [row["value"] for row in server.view("dropped")["series"]] == [5]


def test_a_view_that_is_reset_is_empty(server: Server) -> None:
    """A reset view has no series, keeps its definitions, and the same definition answers."""
    view = Definition("emptied", "sum", ("a",))
    publish(server, view, x=1, y=2)
    before = server.get("/v1/views").json()["views"]
    token = post(server, "emptied", "reset").json()["token"]
    server.world.fold()
    assert server.view("emptied", ("after", token))["series"] == []
    assert listed(server, "emptied") == [("sum", ["a"], 0)]
    after = server.get("/v1/views").json()["views"]
    assert [it["defined_at_ms"] for it in after] == [it["defined_at_ms"] for it in before]
    assert b"emptied{" not in server.get("/v1/openmetrics").body


def test_some_definitions_of_a_view(server: Server) -> None:
    """Definitions are dropped by kind, by exactly these labels in any order, or by both; the others stay."""
    a, ab, most = (
        Definition("several", "sum", ("a",)),
        Definition("several", "sum", ("a", "b")),
        Definition("several", "max", ("a",)),
    )
    publish(server, a, x=1)
    server.world.publish(ab, {("x", "y"): 2})
    publish(server, most, x=3)
    found = [it for it in server.get("/v1/views").json()["views"] if it["name"] == "several"]
    assert [(it["kind"], it["answers"]) for it in found] == [("sum", True), ("sum", True), ("max", False)]
    for body, left in (
        ({"kind": "sum", "labels": ["b", "a"]}, [("sum", ["a"], 1), ("max", ["a"], 1)]),
        ({"labels": ["a"], "kind": "max"}, [("sum", ["a"], 1)]),
    ):
        assert len(post(server, "several", "drop", body).json()["definitions"]) == 1
        server.world.fold()
        assert listed(server, "several") == left
    detail = server.problem(404, post(server, "several", "drop", {"kind": "max"}))
    assert "it has sum(a)" in detail
    detail = server.problem(404, post(server, "several", "drop", {"labels": []}))
    assert "no definition of this kind and these labels" in detail


def test_what_is_refused(server: Server) -> None:
    """Unknown views, and bodies that choose no definition, are refused."""
    publish(server, Definition("kept", "sum"), x=1)
    path = "/v1/views/kept/drop"
    server.problem(404, post(server, "nobody", "drop"))
    assert "unknown kind" in server.problem(400, post(server, "kept", "drop", {"kind": "median"}))
    assert "kin" in server.problem(400, post(server, "kept", "drop", {"kin": "sum"}))
    assert "name of a view" in server.problem(400, post(server, "a%20b", "reset"))
    for body in (b"", b"[]", b"\xff", b'{"labels": "a"}'):
        server.problem(400, server.request("POST", path, body, JSON))
    assert server.request("GET", path).status == 405
    server.world.fold()
    assert listed(server, "kept") == [("sum", [], 1)]


def test_a_repeat_with_a_key_is_carried_out_once(server: Server) -> None:
    """A repeat has the answer of the first request, though the view is gone, and removes nothing that came between."""
    view = Definition("once_only", "sum", ("a",))
    publish(server, view, x=1)
    first = post(server, "once_only", "drop", **{"Idempotency-Key": "k"})
    server.world.fold()
    again = post(server, "once_only", "drop", **{"Idempotency-Key": "k"})
    assert again.status == 200
    assert again.json()["definitions"] == first.json()["definitions"]
    publish(server, view, x=7)
    assert post(server, "once_only", "drop", **{"Idempotency-Key": "k"}).status == 200
    server.world.fold()
    assert [row["value"] for row in server.view("once_only")["series"]] == [7]
    server.problem(422, post(server, "once_only", "drop", {"kind": "sum"}, **{"Idempotency-Key": "k"}))


@pytest.mark.parametrize("action", ["drop", "reset"])
def test_a_partition_is_as_before_or_as_after(server: Server, action: str) -> None:
    """A read never sees a part of a partition's series, whenever that partition carries the order out."""
    name = f"whole_{action}"
    view = Definition(name, "sum", ("a",))
    world = server.world
    for number in range(len(world.partitions)):
        world.append(number, view, {(f"{number}-{i}",): 1 for i in range(50)})
    world.fold()
    assert post(server, name, action).status == 200
    for number in range(len(world.partitions)):
        found = server.view(name)["series"]
        assert len(found) == 50 * (len(world.partitions) - number)
        world.fold(number)
    reply = server.get(f"/v1/views/{name}")
    assert reply.status == 404 if action == "drop" else reply.json()["series"] == []
