"""Distinct and topk over HTTP: recorded by publishers and as JSON, answered with bounds, grouped, ranked and scraped."""

from collections.abc import Iterator

import pytest

from pipeline.core.kinds import KINDS, State
from pipeline.core.record import Definition
from tests.query.support import Server, World, serving
from tests.query.test_api_write import post

DISTINCT, TOPK = KINDS["distinct"], KINDS["topk"]


def users(*numbers: int) -> State:
    return DISTINCT.collect([DISTINCT.check(number) for number in numbers])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    world = World()
    overlapping = {("a", "eu"): users(*range(100)), ("b", "eu"): users(*range(50, 130)), ("a", "us"): users(1, 2)}
    world.publish(Definition("users", "distinct", ("page", "region")), overlapping)
    bought = {("eu",): TOPK.collect([("tea", 5), ("milk", 3)]), ("us",): TOPK.collect([("milk", 4), ("bun", 1)])}
    world.publish(Definition("products", "topk", ("region",)), bought)
    with serving(world) as running:
        yield running


def test_groups_are_unions(server: Server) -> None:
    """An item that is in several series of a group counts once."""
    answer = server.get("/v1/views/users?by=region").json()
    assert answer["kind"] == "distinct"
    assert [(it["labels"], it["value"]) for it in answer["series"]] == [
        ({"region": "eu"}, {"estimate": 130, "lower": 130, "upper": 130}),
        ({"region": "us"}, {"estimate": 2, "lower": 2, "upper": 2}),
    ]
    (total,) = server.get("/v1/views/users?by=").json()["series"]
    assert total["value"]["estimate"] == 130
    top = server.get("/v1/views/users?top=1").json()
    assert [it["labels"] for it in top["series"]] == [{"page": "a", "region": "eu"}]


def test_items_are_in_the_order_of_their_counts(server: Server) -> None:
    """The counts of all series of a group add up; `top` ranks series by their totals."""
    (total,) = server.get("/v1/views/products?by=").json()["series"]
    items = [{"item": "milk", "count": 7, "upper": 7}, {"item": "tea", "count": 5, "upper": 5}]
    assert total["value"] == {"total": 13, "items": [*items, {"item": "bun", "count": 1, "upper": 1}]}
    top = server.get("/v1/views/products?top=1").json()
    assert [it["labels"] for it in top["series"]] == [{"region": "eu"}]


def test_quantiles_are_for_histograms(server: Server) -> None:
    """A quantile of a view that is no histogram is 400, with the kind that the view has."""
    for view, kind in (("users", "distinct"), ("products", "topk")):
        assert f"a {kind} has no quantiles" in server.problem(400, server.get(f"/v1/views/{view}?q=0.5"))


def test_deltas_are_items(server: Server) -> None:
    """A delta's value is a text or an int; anything else is refused, and nothing of its request is taken."""
    body = '[{"view":"seen","kind":"distinct","value":"tea"},{"view":"seen","kind":"distinct","value":7},'
    body += '{"view":"seen","kind":"distinct","value":"7"},{"view":"most","kind":"topk","value":"tea"}]'
    reply = post(server, body)
    assert reply.status == 200, reply.body
    server.world.fold()
    assert server.get("/v1/views/seen").json()["series"][0]["value"]["estimate"] == 2
    for value in ("1.5", "true", "null", '"' + "x" * 300 + '"'):
        refused = post(server, f'[{{"view":"seen","kind":"distinct","value":{value}}}]')
        assert "delta 0: an item" in server.problem(400, refused)


def test_estimates_are_scraped_as_gauges(server: Server) -> None:
    """`GET /v1/openmetrics` has the estimate of a distinct view; the items of a topk are no samples."""
    text = server.get("/v1/openmetrics").body.decode()
    assert 'users{page="a",region="us"} 2' in text
    assert "# TYPE users gauge" in text
    assert "products{" not in text
