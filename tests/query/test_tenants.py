"""A token that is bound to views and labels sees, writes and learns of nothing else, on every way in and out."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import Publisher, Reader
from pipeline.adapters.prometheus import render_views
from pipeline.core.answer import MemberStatus, PartitionStatus, Status
from pipeline.core.codec import DeadLetter, encode_batch, encode_letter
from pipeline.core.frames import encode_frames
from pipeline.core.grants import Bounds
from pipeline.core.record import Batch, Definition, Group, canonical, producer_id_of, series_suffix
from pipeline.errors import Forbidden
from pipeline.ports import Message
from pipeline.query.gather_api import create_gather_app
from pipeline.query.tenants import status_within
from pipeline.roles.gather import Gatherer
from pipeline.settings import QuerySettings
from pipeline.topics import DEAD_LETTERS
from tests.query.support import SECRET, Reply, Server, World, running, serving
from tests.query.test_access import access_of, entry, write
from tests.query.test_remote_read import HEADERS, read_body, results
from tests.support import again_and_again, examples

MINUTE_MS = 60_000
SHOP = {"views": ("shop_*",)}
TOKENS = {
    "all": {},
    "a": {**SHOP, "labels": {"team": "a"}},
    "b": {**SHOP, "labels": {"team": "b"}},
    "shop": SHOP,
    "label": {"labels": {"team": "a"}},
}
HITS = Definition("shop_hits", "sum", ("path", "team"))
MINUTES = Definition("shop_minutes", "sum", ("team", "zone"), window_s=60)
LATENCY = Definition("shop_latency", "histogram", ("team",), window_s=60)
PLAIN = Definition("shop_plain", "sum", ("path",))
OTHER = Definition("other_hits", "sum", ("team",))
HIDDEN_MINUTES = [Definition("other_minutes", "sum", ("team",), window_s=60), Definition("shop_bare", "sum", window_s=60)]
FIRST, SECOND = Definition("shop_first", "sum", ("path",)), Definition("shop_first", "max", ("team",))
MIXED = [Definition("shop_mixed", "sum", labels) for labels in (("path",), ("path", "team"), ("team",))]
HIDDEN = ("shop_plain", "other_hits", "shop_nothing")
"""Views that are not there for token `a`: without its label, outside its views, and not there at all."""


def published_hits(world: World) -> None:
    """Put series of three teams into every partition."""
    for number in range(len(world.partitions)):
        world.append(number, HITS, {(path, team): 10**number * (1 + ord(path)) for path in "xyz" for team in "abc"})
    world.fold()


def published(world: World) -> None:
    """Fill a world with views of two teams, and of nobody."""
    published_hits(world)
    for number in range(len(world.partitions)):
        starts = (0, MINUTE_MS, 3 * MINUTE_MS)
        for start_ms in starts:
            rows = {(team, zone): start_ms // 1_000 + number + ord(team) for team in "ab" for zone in ("1", "2")}
            world.append(number, MINUTES, rows, start_ms)
    for definition in HIDDEN_MINUTES:
        world.append(0, definition, {("a",) * len(definition.labels): 1}, MINUTE_MS)
    world.append(0, PLAIN, {("x",): 7})
    world.append(0, OTHER, {("a",): 8})
    world.append(0, FIRST, {("x",): 9})
    world.fold()
    world.append(1, SECOND, {("a",): 5, ("b",): 6})
    world.append(1, MIXED[0], {("x",): 1})
    world.append(2, MIXED[1], {("x", "a"): 10, ("x", "b"): 100, ("y", "a"): 1_000})
    world.append(3, MIXED[2], {("a",): 10_000, ("b",): 100_000})
    world.fold()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    write(path, *[entry(name, f"token-{name}", "read", "publish", "admin", **more) for name, more in TOKENS.items()])
    return path


class Tenants(Server):
    """A server of which tokens are asked for by name."""

    def ask(self, who: str, path: str, *query: tuple[str, object], body: Any = None, **headers: str) -> Reply:
        """Send a request with a token; a body that is no bytes is sent as JSON."""
        more = {"Authorization": f"Bearer token-{who}", "Content-Type": "application/json"}
        more |= {name.replace("_", "-"): value for name, value in headers.items()}
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        path += "?" + urlencode(query, quote_via=quote) if query else ""
        return self.request("GET" if body is None else "POST", path, sent, more)


@pytest.fixture(scope="module")
def server(tokens: Path) -> Iterator[Tenants]:
    world = World(settings=QuerySettings(stream_heartbeat_ms=100))
    published(world)
    with serving(world, access=access_of(tokens)) as at:
        yield Tenants(world, at.port)


@pytest.fixture(scope="module")
def gathered(tokens: Path) -> Iterator[Tenants]:
    """A server that merges two others, each of which has two partitions."""
    world, config = World(), QuerySettings(gather_interval_ms=20)
    published(world)
    with ExitStack() as stack:
        parts = [stack.enter_context(serving(world.part(*numbers))) for numbers in ((0, 1), (2, 3))]
        it = Gatherer([part.url for part in parts], query_settings=config)
        app = create_gather_app(it.service, config, world.metrics, render_views, access_of(tokens))
        yield Tenants(world, stack.enter_context(running(app)))


def said(reply: Reply) -> Any:
    """Return what an answer says but for how stale it is, or the status of an error."""
    if reply.status != 200:
        return reply.status
    return without(
        json.loads(reply.body), "as_of", "final_before_ms", "end_ms", "start_ms", "token", "next_cursor", "series_count"
    )


def without(it: Any, *names: str) -> Any:
    if isinstance(it, list):
        return [without(item, *names) for item in it]
    return {name: without(value, *names) for name, value in it.items() if name not in names} if isinstance(it, dict) else it


WHERE = st.sampled_from(["team=a", "team=b", "team!=a", "team=~.*", "team!~b|c", "path=x", "path!=x", "zone=1", "team="])
QUERIES = st.fixed_dictionaries(
    {"view": st.sampled_from(["shop_hits", "shop_minutes", "shop_mixed", "shop_first"])},
    optional={
        "where": st.lists(WHERE, max_size=3),
        "by": st.lists(st.sampled_from(["team", "path", "zone"]), max_size=2, unique=True),
        "top": st.integers(1, 4),
        "limit": st.integers(1, 4),
        "kind": st.sampled_from(["sum", "max"]),
        "start": st.sampled_from([0, MINUTE_MS]),
        "end": st.just(4 * MINUTE_MS),
        "step": st.sampled_from(["60s", "120s"]),
        "compare": st.just("60s"),
        "fn": st.sampled_from(["rate", "share", "cumulative"]),
        "fill": st.sampled_from(["zero", "null"]),
    },
)


def pairs(query: dict[str, Any], *more: str) -> list[tuple[str, object]]:
    found: list[tuple[str, object]] = [("where", it) for it in (*query.get("where", ()), *more)]
    for name, value in query.items():
        if name in ("by",):
            found += [(name, it) for it in value] or [(name, "")]
        elif name not in ("view", "where"):
            found.append((name, value))
    return found


@pytest.mark.parametrize("which", ["server", "gathered"])
def test_a_read_of_a_tenant_is_that_of_everybody_with_its_matcher(which: str, request: pytest.FixtureRequest) -> None:
    """To any query, in any order, a tenant's answer is the unbound one with its matcher; else both are refused."""
    server: Tenants = request.getfixturevalue(which)

    @settings(max_examples=examples(60), deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(query=QUERIES, who=st.sampled_from("ab"), after=st.sampled_from(["all", "a", "b"]))
    def run(query: dict[str, Any], who: str, after: str) -> None:
        path = f"/v1/views/{query['view']}"
        known = server.ask(after, path, *pairs(query))  # an answer of another token that may be kept
        tag = known.headers.get("etag", "none")
        mine = server.ask(who, path, *pairs(query), If_None_Match="none" if who == after else tag)
        kind = ("sum", "max")[query["view"] == "shop_first"]  # the kind that the tenant sees first
        reference = server.ask("all", path, *pairs({"kind": kind, **query}, f"team={who}"))
        expected = said(reference)
        if expected == 400 and query.get("kind") not in (None, kind):
            expected = 404  # the definition of that kind lacks the label: there is none
        assert without(said(mine), "also") == without(expected, "also"), (mine.body, reference.body)
        together = server.ask(who, "/v1/query", body={"queries": [without(query)]})
        if mine.status == 200 and "compare" not in query:
            assert without(said(together)["answers"][0], "also") == without(said(mine), "also")

    run()


def test_no_matcher_widens_the_bounds(server: Tenants) -> None:
    """Conditions on the bound label can only leave less: also where they pin every label, so that a few keys answer."""
    for where in (["team=b"], ["team=b", "path=x"], ["path=x", "team=b", "team=a"], ["team=b", "team=b", "path=x"]):
        reply = server.ask("a", "/v1/views/shop_hits", *[("where", it) for it in where])
        assert reply.json()["series"] == []
    (series,) = server.ask("a", "/v1/views/shop_hits", ("where", "path=x")).json()["series"]
    assert series["labels"] == {"path": "x", "team": "a"}


@pytest.mark.parametrize("who", ["a", "label"])
def test_answers_are_not_shared_beyond_the_bounds(server: Tenants, who: str) -> None:
    """Equal reads of different tokens, at the same commit, each get their own, and tags of others match nothing."""
    path, query = "/v1/views/shop_hits", [("by", "team")]
    teams = {"all": {"a", "b", "c"}, who: {"a"}, "b": {"b"}}
    tags: dict[str, str] = {}
    for _ in range(3):
        for name, expected in teams.items():
            reply = server.ask(name, path, *query)
            tags[name] = reply.headers["etag"]
            assert {it["labels"]["team"] for it in reply.json()["series"]} == expected
    assert len({*tags.values()}) == len(tags)
    for name in teams:
        for other, tag in tags.items():
            assert server.ask(name, path, *query, If_None_Match=tag).status == (304 if name == other else 200)


def test_tenants_at_once_never_meet(tokens: Path) -> None:
    """While commits come and equal reads share what is computed, each answer has series of its own tenant only."""
    world = World(2, settings=QuerySettings(stream_heartbeat_ms=100))
    published_hits(world)
    wrong: list[object] = []
    with serving(world, access=access_of(tokens)) as at, ExitStack() as stack:
        market = Tenants(world, at.port)

        def read(who: str, expected: set[str]) -> None:
            for number in range(40):
                query = [("by", "team")] if number % 2 else [("where", "team=~.*"), ("limit", "2"), ("cursor", "")]
                reply = market.ask(who, "/v1/views/shop_hits", *query, Accept="application/json")
                found = {it["labels"]["team"] for it in reply.json()["series"]}
                if not found or not found <= expected:
                    wrong.append((who, found))

        def commit() -> None:
            world.append(0, HITS, {("x", team): 1 for team in "abc"})
            world.fold()

        stack.enter_context(again_and_again(commit, 0.01))
        threads = [threading.Thread(target=read, args=it) for it in (("a", {"a"}), ("b", {"b"}), ("all", {*"abc"})) * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("which", ["server", "gathered"])
@pytest.mark.parametrize("who", ["a", "label"])
def test_views_outside_are_as_if_they_were_not_there(which: str, who: str, request: pytest.FixtureRequest) -> None:
    """For a view outside the bounds every answer is that for a name nobody has used, to the letter."""
    server: Tenants = request.getfixturevalue(which)
    hidden = [it for it in HIDDEN if it != "other_hits" or who == "a"]
    answers: dict[str, list[Any]] = {}
    for view in hidden:
        body = {"queries": [{"view": view}]}
        replies = [
            server.ask(who, f"/v1/views/{view}"),
            server.ask(who, f"/v1/views/{view}", ("where", "path=x")),
            server.ask(who, f"/v1/views/{view}", ("kind", "max")),
            server.ask(who, "/v1/query", body=body),
            server.ask(who, "/v1/openmetrics", ("view", view)),
            server.ask(who, f"/v1/views/{view}/stream"),
        ]
        if which == "server":
            replies.append(server.ask(who, f"/v1/views/{view}", ("cursor", "")))
        assert {it.status for it in replies} == {404}
        answers[view] = [(it.status, it.body.decode().replace(view, "VIEW")) for it in replies]
        assert not any(re.search(r"is it|shop_(hits|plain)|other_", text) for _, text in answers[view])
    assert all(it == answers[hidden[0]] for it in answers.values())


@pytest.mark.parametrize("which", ["server", "gathered"])
def test_lists_have_what_is_within_bounds(which: str, request: pytest.FixtureRequest) -> None:
    """The list of views has only definitions with the label, without counts of series; views alone bound names only."""
    server: Tenants = request.getfixturevalue(which)
    listed = server.ask("a", "/v1/views").json()["views"]
    names = ["shop_first", "shop_hits", "shop_minutes", "shop_mixed", "shop_mixed"]
    assert [it["name"] for it in listed] == names
    assert all("team" in it["labels"] and it["answers"] for it in listed)
    assert not any({"series_count", "series_count_max"} & it.keys() for it in listed)
    whole = server.ask("shop", "/v1/views").json()["views"]
    assert {it["name"] for it in whole} == {*names, "shop_plain", "shop_bare"}
    assert all(it["series_count"] for it in whole)
    assert "other_hits" in {it["name"] for it in server.ask("label", "/v1/views").json()["views"]}


@pytest.mark.parametrize("which", ["server", "gathered"])
def test_scrapes_have_what_is_within_bounds(which: str, request: pytest.FixtureRequest) -> None:
    """A scrape has the samples of the tenant, and no name of another view, also not among those that are left out."""
    server: Tenants = request.getfixturevalue(which)
    text = server.ask("a", "/v1/openmetrics").body.decode()
    samples = [it for it in text.splitlines() if it and not it.startswith("#") and not it.startswith("pipeline_")]
    assert samples
    assert all('team="a"' in it for it in samples)
    assert not re.search("shop_plain|shop_bare|other_", text)
    everything = server.ask("all", "/v1/openmetrics").body.decode()
    own = [it for it in everything.splitlines() if re.match(r"shop_(hits|minutes)\b.*team=\"a\"", it)]
    assert own
    assert [it for it in samples if re.match(r"shop_(hits|minutes)\b", it)] == own


def test_remote_reads_have_what_is_within_bounds(server: Tenants) -> None:
    """Prometheus gets the series of the tenant, whatever it asks for."""
    bearer = {**HEADERS, "Authorization": "Bearer token-a"}
    everything, others = [[("__name__", "=~", ".+")], [("team", "=", "b")]]
    body = read_body((0, 2**50, everything), (0, 2**50, others), (0, 2**50, [("__name__", "=", "shop_minutes")]))
    found = results(server.request("POST", "/api/v1/read", body, bearer))
    assert found[1] == {}
    assert str(found[0]) == str(found[2])  # NaN is not itself
    assert {*found[0]} == {"shop_minutes{team=a},{zone=1}", "shop_minutes{team=a},{zone=2}"}
    unbound = results(server.request("POST", "/api/v1/read", body, {**HEADERS, "Authorization": "Bearer token-all"}))
    own = {name: it for name, it in unbound[0].items() if re.match("shop_.*team=a", name)}
    assert str(own) == str(found[0])
    for who in ("b", "all", "label", "a", "shop", "all"):  # the list of views is kept for each tenant
        bearer["Authorization"] = f"Bearer token-{who}"
        names = {re.split("{", name)[0] for name in results(server.request("POST", "/api/v1/read", body, bearer))[0]}
        assert ("other_minutes" in names) is (who in ("all", "label"))
        assert ("shop_bare" in names) is (who in ("all", "shop"))


def test_a_cursor_is_of_its_token(server: Tenants) -> None:
    """Pages are of the tenant's series only, and the cursor of one token is refused to another."""
    path, query = "/v1/views/shop_hits", [("limit", 1)]
    first = server.ask("a", path, *query, ("cursor", "")).json()
    assert first["series_total"] == 3
    second = server.ask("a", path, *query, ("cursor", first["next_cursor"])).json()
    assert [it["labels"]["team"] for it in first["series"] + second["series"]] == ["a", "a"]
    for who in ("b", "all", "shop", "label"):
        for more in ([], [("where", "team=a")]):
            assert server.ask(who, path, *query, *more, ("cursor", first["next_cursor"])).status == 400


@pytest.mark.parametrize("which", ["server", "gathered"])
def test_a_watch_sees_what_is_within_bounds(which: str, request: pytest.FixtureRequest) -> None:
    """Streams of the same read have a channel for each tenant."""
    server: Tenants = request.getfixturevalue(which)
    readers = {who: Reader(server.url, token=f"token-{who}") for who in ("all", "a", "b")}
    watches = {who: reader.watch("shop_hits", by=["team"]) for who, reader in readers.items()}
    for _ in range(2):
        teams = {who: {it.labels["team"] for it in next(watch)} for who, watch in watches.items()}
        assert teams == {"all": {"a", "b", "c"}, "a": {"a"}, "b": {"b"}}
    for reader in readers.values():
        reader.close()


def test_what_concerns_everybody_is_refused(server: Tenants) -> None:
    """Dead letters, states and the program's own metrics are not for a bound token, and its status is cut."""
    for who in ("a", "shop", "label"):
        assert server.ask(who, "/metrics").status == 403
        letters = [server.ask(who, it).status for it in ("/v1/dead-letters", "/v1/dead-letters/1f2e3d4c.0-17-2")]
        assert letters == ([200, 404] if who == "shop" else [403, 403])
        assert server.ask(who, "/v1/dead-letters/replay", body={}).status == 403
        assert server.ask(who, "/v1/states", body=b"", Content_Type="application/vnd.pipeline.states").status == 403
        status = server.ask(who, "/v1/status").json()
        assert {*status} <= {"ready", "partition_count", "partitions", "role", "at_ms", "topic_id"}
        assert len(status["partitions"]) == 4


def test_dead_letters_of_other_views_are_not_there(tokens: Path) -> None:
    """A token of some views lists and shows the letters of these; others, whole records and replayed ones are not there."""
    world = World(1)
    of_views = {"0-1-0": "shop_hits", "0-2-0": "other_hits", "0-3": "", "0-4-0": "shop_hits"}
    for offset, (key, view) in enumerate(of_views.items()):
        value = encode_letter(DeadLetter(0, offset, 0, "why", view, b"bytes"))
        world.log.append([Message(DEAD_LETTERS, 0, key.encode(), value)], timeout_s=1)
    world.log.append([Message(DEAD_LETTERS, 0, b"0-4-0", None)], timeout_s=1)
    with serving(world, access=access_of(tokens)) as at:
        market = Tenants(world, at.port)
        everything = market.ask("all", "/v1/dead-letters").json()
        assert [it["key"] for it in everything["letters"]] == ["0-1-0", "0-2-0", "0-3"]
        for query in ([], [("view", "other_hits")]):
            found = market.ask("shop", "/v1/dead-letters", *query).json()
            own = ["0-1-0"] if not query else []
            assert ([it["key"] for it in found["letters"]], found["letter_count"]) == (own, len(own))
        assert market.ask("shop", "/v1/dead-letters/0-1-0").json()["view"] == "shop_hits"
        answers = {}
        for key in ("0-2-0", "0-3", "0-4-0", "0-9-0"):
            reply = market.ask("shop", f"/v1/dead-letters/{key}")
            answers[key] = reply.status, reply.body.decode().replace(key, "KEY")
        assert {*answers.values()} == {answers["0-9-0"]}
        assert answers["0-9-0"][0] == 404
        assert market.ask("shop", "/v1/dead-letters/replay", body={}).status == 403


def test_views_are_dropped_within_bounds_only(server: Tenants, tokens: Path) -> None:
    """A view outside the bounds is not there to be dropped; and a tenant of labels drops no view."""
    for action in ("drop", "reset"):
        answers = [server.ask("shop", f"/v1/views/{view}/{action}", body={}) for view in ("other_hits", "other_nothing")]
        texts = [it.body.decode().replace("other_hits", "V").replace("other_nothing", "V") for it in answers]
        assert (answers[0].status, texts[0]) == (404, texts[1])
        for view in (*HIDDEN, "shop_hits"):
            assert server.ask("a", f"/v1/views/{view}/{action}", body={}).status == 403
    assert server.ask("all", "/v1/views/shop_hits").status == 200


# Writes


@contextmanager
def shop(tokens: Path) -> Iterator[Tenants]:
    world = World(1)
    world.publish(Definition("shop_hits", "sum", ("path", "team")), {("x", "b"): 1})
    with serving(world, access=access_of(tokens)) as at, world.folding():
        yield Tenants(world, at.port)


@pytest.fixture(scope="module")
def market(tokens: Path) -> Iterator[Tenants]:
    with shop(tokens) as it:
        yield it


def delta(view: str, **labels: str) -> dict[str, Any]:
    return {"view": view, "kind": "sum", "labels": labels, "value": 1}


OUTSIDE = [
    delta("shop_clicks", team="b"),
    delta("shop_clicks"),
    delta("shop_clicks", team=""),
    delta("shop_clicks", Team="a"),
    delta("shop_clicks", team="a "),
    delta("other_clicks", team="a"),
    delta("shop", team="a"),
    delta("shop_clicks", team="__overflow__"),
]


def names_of(server: Tenants) -> set[str]:
    return {it["name"] for it in server.ask("all", "/v1/views").json()["views"]}


def token_of(reply: Reply) -> str:
    assert reply.status == 200, reply.body
    token: str = reply.json()["token"]
    return token


@pytest.mark.parametrize("wrong", OUTSIDE, ids=[json.dumps([it["view"], it["labels"]]) for it in OUTSIDE])
@pytest.mark.parametrize("lines", [False, True], ids=["json", "ndjson"])
def test_deltas_outside_are_refused_all_together(market: Tenants, wrong: dict[str, Any], lines: bool) -> None:
    """One delta of another tenant, or of a view outside, and nothing of the request counts; no view is made."""
    before = names_of(market)
    deltas = [delta("shop_never", team="a"), wrong]
    body = "\n".join(map(json.dumps, deltas)).encode() if lines else json.dumps(deltas).encode()
    kind = "application/x-ndjson" if lines else "application/json"
    for headers in ({}, {"Idempotency_Key": f"key-{json.dumps(wrong).encode().hex()[:100]}"}):
        reply = market.ask("a", "/v1/deltas", body=body, Content_Type=kind, **headers)
        assert reply.status == 403
        assert reply.json()["detail"].startswith("delta 1: view ")
    token = token_of(market.ask("a", "/v1/deltas", body=[delta("shop_seen", team="a")]))
    market.ask("all", "/v1/views/shop_seen", ("after", token))
    assert names_of(market) == before | {"shop_seen"}


def test_a_key_is_of_its_tenant(market: Tenants) -> None:
    """One Idempotency-Key of two tenants stands for two requests, and both count once."""
    for _ in range(2):
        for who in "ab":
            body = [delta("shop_keyed", team=who)]
            token = token_of(market.ask(who, "/v1/deltas", body=body, Idempotency_Key="one"))
    found = market.ask("all", "/v1/views/shop_keyed", ("after", token)).json()["series"]
    assert {it["labels"]["team"]: it["value"] for it in found} == {"a": 1, "b": 1}
    assert market.ask("a", "/v1/deltas", body=[delta("shop_keyed", team="a")] * 2, Idempotency_Key="one").status == 422


def test_a_key_and_a_body_are_of_their_tenant(market: Tenants) -> None:
    """Tenants whose bounds overlap, and who say the same under one Idempotency-Key, have sent two requests."""
    for _ in range(2):
        for who in ("a", "shop"):
            token = token_of(market.ask(who, "/v1/deltas", body=[delta("shop_twice", team="a")], Idempotency_Key="alike"))
    found = market.ask("all", "/v1/views/shop_twice", ("after", token)).json()["series"]
    assert [it["value"] for it in found] == [2]


def sealed(sequence: int, *groups: tuple[Definition, list[tuple[str, ...]]]) -> bytes:
    made = [Group(canonical(it), [series_suffix(row) for row in rows], [1] * len(rows)) for it, rows in groups]
    return encode_batch(Batch(producer_id_of(SECRET), 0, 0, sequence, 0, 0, made))


CLICKS = Definition("shop_batched", "sum", ("path", "team"))


@pytest.mark.parametrize(
    ("definition", "rows"),
    [
        (CLICKS, [("x", "a"), ("x", "b")]),
        (CLICKS, [("x", "")]),
        (Definition("shop_batched", "sum", ("path",)), [("a",)]),
        (Definition("other_batched", "sum", ("team",)), [("a",)]),
        (CLICKS, [("__overflow__", "__overflow__")]),
    ],
)
def test_batches_outside_name_their_groups(
    market: Tenants, definition: Definition, rows: list[tuple[str, ...]], request: pytest.FixtureRequest
) -> None:
    """A batch with a group outside is refused as a whole, and the answer names the group, so that others can be sent."""
    body = encode_frames([sealed(99, (CLICKS, [("x", "a")]), (definition, rows))])
    more = {"Content_Type": "application/octet-stream", "Pipeline_Producer": SECRET}
    reply = market.ask("a", "/v1/batches", body=body, **more)
    assert reply.status == 403
    problem = reply.json()
    assert problem["type"] == "urn:pipeline:error:GroupsForbidden"
    assert [(it["group"], it["view"]) for it in problem["groups"]] == [(1, definition.view)]
    assert "shop_batched" not in names_of(market) or "other_batched" not in names_of(market)


def test_a_publisher_goes_on_without_what_is_outside(market: Tenants) -> None:
    """Deltas of another tenant are given up and counted, and all others of the same publisher arrive."""
    with Publisher(market.url, token="token-a") as publisher:
        views = [publisher.sum(name, labels=("team",)) for name in ("shop_own", "shop_foreign", "other_own")]
        views[0].add(1, team="a")
        views[1].add(1, team="b")
        views[2].add(1, team="a")
        with pytest.raises(Exception, match=r"bound to team=a|outside the token's bounds"):
            publisher.flush(10)
        views[0].add(1, team="a")
        token = publisher.flush(10)
        assert publisher.stats()["rejected"]
    with Reader(market.url, token="token-all") as reader:
        assert reader.get("shop_own", after=token).value() == 2
        assert not {"shop_foreign", "other_own"} & {it.name for it in reader.views()}
    with Reader(market.url, token="token-label") as reader, pytest.raises(Forbidden, match="series"):
        reader.fetch("/v1/views/shop_own/drop", body=b"{}")


def test_pushed_metrics_outside_are_left_out(market: Tenants) -> None:
    """Samples outside the bounds are left out and counted, as other samples that can't be taken; with a key all are."""
    text = b'shop_push{team="a"} 1\nshop_push{team="b"} 2\nother_push{team="a"} 3\nshop_push 4\n'
    reply = market.ask("a", "/v1/openmetrics", body=text, Content_Type="text/plain; version=0.0.4")
    assert (reply.status, reply.json()["accepted"], reply.json()["reasons"]) == (200, 1, {"bounds": 3})
    found = market.ask("all", "/v1/views/shop_push", ("after", token_of(reply))).json()["series"]
    assert [it["labels"] for it in found] == [{"team": "a"}]
    assert "other_push" not in names_of(market)
    grouped = market.ask("a", "/metrics/job/x/team/b", body=b"shop_group 1\n", Content_Type="text/plain; version=0.0.4")
    assert grouped.status == 403
    keyed = market.ask("a", "/v1/openmetrics", body=text, Content_Type="text/plain; version=0.0.4", Idempotency_Key="p")
    assert keyed.status == 403
    none = market.ask("a", "/v1/openmetrics", body=b"other_push 1\n", Content_Type="text/plain; version=0.0.4")
    assert none.status == 403


def test_writes_take_nothing_over_from_definitions_outside(market: Tenants) -> None:
    """A tenant's delta gets what it leaves out from definitions with the tenant's label: no label or window of others."""
    hidden = {"view": "shop_taken", "kind": "last", "labels": {"customer": "x"}, "value": 1, "window_s": 60}
    first = market.ask("all", "/v1/deltas", body=[hidden])
    text = {"Content_Type": "text/plain; version=0.0.4"}
    assert market.ask("a", "/v1/openmetrics", body=b'shop_taken{team="a"} 1\n', **text).status == 200
    market.ask("all", "/v1/views/shop_taken", ("after", token_of(first)))
    assert market.ask("a", "/v1/openmetrics", body=b'shop_taken{team="a"} 1\n', **text).status == 200
    plain = {"view": "shop_taken", "kind": "last", "labels": {"team": "a"}, "value": 2}
    reply = market.ask("a", "/v1/deltas", body=[plain])
    found = market.ask("a", "/v1/views/shop_taken", ("after", token_of(reply)))
    assert [(it["labels"], it["value"]) for it in found.json()["series"]] == [({"team": "a"}, 2)]
    listed = [it for it in market.ask("a", "/v1/views").json()["views"] if it["name"] == "shop_taken"]
    assert [(it["labels"], it["window_s"]) for it in listed] == [(["team"], None)]


@given(
    view=st.text("ab_*", min_size=1, max_size=4),
    views=st.lists(st.text("ab_", min_size=1, max_size=3).map(lambda it: it + "*") | st.text("ab_", min_size=1), max_size=2),
    labels=st.dictionaries(st.sampled_from("xy"), st.sampled_from("12"), max_size=2),
    bound=st.dictionaries(st.sampled_from("xy"), st.sampled_from("12"), max_size=2),
)
def test_bounds_are_what_they_say(view: str, views: list[str], labels: dict[str, str], bound: dict[str, str]) -> None:
    """A series is within bounds if its view is named, or begins as one with `*`, and it has each label with its value."""
    bounds = Bounds(tuple(views), tuple(sorted(bound.items())))
    named = not views or any(view.startswith(it[:-1]) if it.endswith("*") else it == view for it in views)
    assert (bounds.refusal(view, labels) == "") is (named and bound.items() <= labels.items())
    assert bounds.has(Definition(view, "sum", tuple(labels))) is (named and bound.keys() <= labels.keys())


def test_a_status_is_cut() -> None:
    """A tenant learns how far partitions are, and no name of an app, a worker, a server or a member."""
    partition = PartitionStatus(partition=0, phase="folding", next_offset=7, lag=1, owner="w1", topic_id="t")
    member = MemberStatus("w1", "http://10.0.0.1", [0])
    status = Status(ready=True, partition_count=1, partitions=[partition], app="shop", name="w1", members=[member])
    assert status_within(status, None) is status
    cut = msgspec.json.encode(status_within(status, Bounds(("shop_*",))))
    assert json.loads(cut) == {
        "ready": True,
        "partition_count": 1,
        "partitions": [{"partition": 0, "phase": "folding", "next_offset": 7, "lag": 1, "topic_id": "t"}],
    }
