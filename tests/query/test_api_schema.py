"""The API conforms to `/openapi.json`, also for requests that nobody thought of."""

import functools
import http.client
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from pipeline.adapters.read_parameters import QueryKeywords
from pipeline.core.derive import FUNCTIONS
from pipeline.core.kinds import KIND_NAMES
from pipeline.core.record import Definition
from pipeline.core.span import FILLS, AskedRange
from pipeline.query.controls import DefinitionChoice
from pipeline.query.dead_letters_api import LIST_MAX, REPLAY_MAX, ReplayOrder
from pipeline.query.deltas import _Delta
from pipeline.query.idempotency import KEY_LENGTH_MAX, KEY_PATTERN
from pipeline.query.openapi import openapi_document
from pipeline.query.params import PER_QUERY, WAITS
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving
from tests.support import examples


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with one view, whose reads do not wait for long."""
    world = World(settings=QuerySettings(timeout_ms_default=40, timeout_ms_max=50))
    world.publish(Definition("revenue", "sum", ("region",)), {("eu",): 1, ("us",): 2.5})
    world.append(0, Definition("minutes", "sum", ("region",), window_s=60), {("eu",): 1, ("us",): 2.5}, 600_000)
    world.fold()
    with serving(world) as running:
        yield running


@pytest.fixture(scope="module")
def api_schema(server: Server) -> Any:
    """The schema that the server publishes."""
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_head_is_answered_where_get_is(server: Server) -> None:
    """HEAD has the status and the headers of GET and no body, and the connection goes on, also behind a stream's."""
    paths = [path for path, methods in server.get("/openapi.json").json()["paths"].items() if "get" in methods]
    paths = [path.replace("{view}", "revenue").replace("{key}", "no-such") for path in [*paths, "/", "/docs", "/none"]]
    assert len(paths) > 10
    changing = ("date", "content-length", "transfer-encoding", "pipeline-staleness-ms")
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    for path in paths:
        seen = []
        for method in ("HEAD", "GET"):
            connection.request(method, path)
            response = connection.getresponse()
            seen.append((response.status, {k: v for k, v in response.getheaders() if k not in changing}))
            assert method == "GET" or response.read() == b"", path
            if path.endswith("/stream") and method == "GET":
                connection.close()
            else:
                response.read()
        assert seen[0] == seen[1], path
    connection.close()


def conforms(operation: Any, mode: schemathesis.GenerationMode, examples: int) -> None:
    """Make requests from the schema, and check the answers against it.

    Requests that the schema allows may still be refused: it cannot say which labels a view has, or what makes a batch.
    """

    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        response = case.call()
        assert response.status_code < 500 or response.status_code == 503
        case.validate_response(response, excluded_checks=[positive_data_acceptance, not_a_server_error])

    run()


@pytest.mark.parametrize("mode", [*schemathesis.GenerationMode], ids=str)
@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("get", "/v1/views/{view}"),
        ("post", "/v1/query"),
        ("get", "/v1/openmetrics"),
        ("post", "/v1/deltas"),
        ("post", "/v1/openmetrics"),
        ("post", "/v1/views/{view}/drop"),
        ("post", "/v1/views/{view}/reset"),
        ("get", "/v1/dead-letters"),
        ("get", "/v1/dead-letters/{key}"),
        ("post", "/v1/dead-letters/replay"),
    ],
)
def test_requests_are_answered_as_documented(
    api_schema: Any, verb: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    """Status codes, media types and bodies are those of the document; wrong requests are refused; nothing is 500."""
    conforms(api_schema[path][verb], mode, examples(45))


@pytest.mark.parametrize("mode", [*schemathesis.GenerationMode], ids=str)
def test_reads_of_windows_are_answered_as_documented(api_schema: Any, mode: schemathesis.GenerationMode) -> None:
    """Answers to ranges of a view with windows have points, and wrong ranges are refused."""
    operation = api_schema["/v1/views/{view}"]["get"]

    @settings(max_examples=40, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.path_parameters = {"view": "minutes"}
        response = case.call()
        assert response.status_code < 500 or response.status_code == 503
        excluded = [positive_data_acceptance, not_a_server_error, negative_data_rejection]
        case.validate_response(response, excluded_checks=excluded)

    run()


def test_any_bytes_are_answered_as_documented(api_schema: Any) -> None:
    """Bodies that are hardly ever batches are refused, as the document says."""
    conforms(api_schema["/v1/batches"]["post"], schemathesis.GenerationMode.POSITIVE, 30)


@pytest.mark.parametrize("path", ["/v1/views", "/v1/status", "/healthz", "/readyz", "/metrics"])
def test_plain_answers_are_as_documented(api_schema: Any, path: str) -> None:
    """Operations without parameters answer in their documented shape."""
    conforms(api_schema[path]["get"], schemathesis.GenerationMode.POSITIVE, 3)


def test_the_document_is_whole(server: Server) -> None:
    """The document has every operation, with its problems, and every reference leads somewhere."""
    document = server.get("/openapi.json").json()
    operations = {(verb, path) for path, verbs in document["paths"].items() for verb in verbs}
    assert operations == {
        ("post", "/api/v1/read"),
        ("get", "/v1/views"),
        ("get", "/v1/views/{view}"),
        ("get", "/v1/views/{view}/stream"),
        ("post", "/v1/query"),
        ("post", "/v1/views/{view}/drop"),
        ("post", "/v1/views/{view}/reset"),
        ("post", "/v1/deltas"),
        ("post", "/v1/batches"),
        ("get", "/v1/dead-letters"),
        ("get", "/v1/dead-letters/{key}"),
        ("post", "/v1/dead-letters/replay"),
        ("post", "/v1/views/{view}/drop"),
        ("post", "/v1/views/{view}/reset"),
        ("get", "/v1/status"),
        ("get", "/healthz"),
        ("get", "/readyz"),
        ("get", "/metrics"),
        ("get", "/v1/openmetrics"),
        ("post", "/v1/openmetrics"),
    }
    parameters = resolved(document, document["paths"]["/v1/views/{view}"]["get"]["parameters"])
    assert {parameter["name"] for parameter in parameters} == {
        "view",
        "where",
        "by",
        "q",
        "kind",
        "window_s",
        *(name.removesuffix("_ms") for name in AskedRange.__struct_fields__),
        "fn",
        "top",
        "bottom",
        "limit",
        "after",
        "max_staleness_ms",
        "timeout_ms",
        "cursor",
        "If-None-Match",
        "allow_partial",
    }
    for reference in references(document):
        resolved(document, [{"$ref": reference}])
    limits = {parameter["name"]: parameter["schema"] for parameter in parameters}
    assert (limits["timeout_ms"]["maximum"], limits["timeout_ms"]["default"]) == (50, 40)
    assert limits["limit"] == {"type": "integer", "minimum": 1, "maximum": 1_000_000, "default": 10_000}
    assert limits["where"]["maxItems"] == QuerySettings().matchers_max
    assert limits["kind"] == {"enum": [*KIND_NAMES]}
    assert limits["fill"] == {"enum": [*FILLS]}
    assert limits["fn"] == {"enum": [*FUNCTIONS]}


@pytest.mark.parametrize(
    ("path", "bodies"),
    [
        ("/v1/deltas", {"application/json", "application/x-ndjson"}),
        ("/v1/openmetrics", {"text/plain", "application/openmetrics-text"}),
        ("/v1/views/{view}/drop", {"application/json"}),
        ("/v1/views/{view}/reset", {"application/json"}),
    ],
)
def test_writes_take_a_key(server: Server, path: str, bodies: set[str]) -> None:
    """The document has the header Idempotency-Key, the bodies, and the refusals of each write."""
    document = server.get("/openapi.json").json()
    operation = document["paths"][path]["post"]
    names = {parameter["name"] for parameter in resolved(document, operation["parameters"])}
    assert names == {"Idempotency-Key"} | ({"view"} if "{view}" in path else set())
    assert {*operation["requestBody"]["content"]} == bodies
    refusals = {"400", "413", "415", "422", "503"} | ({"404"} if "{view}" in path else set())
    assert operation["responses"].keys() == {"200"} | refusals


def test_the_document_is_what_requests_are_held_to() -> None:
    """Kinds, fields and limits in the document are those of the code."""
    document = openapi_document([("get", "/v1/dead-letters")], QuerySettings())
    assert [*document["paths"]] == ["/v1/dead-letters"]
    schemas = document["components"]["schemas"]
    assert schemas["Delta"]["properties"]["kind"] == {"enum": [*KIND_NAMES]}
    assert schemas["DefinitionChoice"]["properties"]["kind"] == {"enum": [*KIND_NAMES, None]}
    query = schemas["Query"]["properties"]
    assert {*query} == {"view", "where", "by", "q", *PER_QUERY} == {*QueryKeywords.__annotations__}
    assert (query["kind"], query["fn"]) == ({"enum": [*KIND_NAMES, None]}, {"enum": [*FUNCTIONS, None]})
    assert query["fill"] == {"enum": [*FILLS, None]}
    assert {*schemas["Queries"]["properties"]} == {"queries", *WAITS}
    for name, kind in (("Delta", _Delta), ("DefinitionChoice", DefinitionChoice), ("ReplayOrder", ReplayOrder)):
        assert {*schemas[name]["properties"]} == {*kind.__struct_fields__}
    replay, listed = schemas["ReplayOrder"]["properties"], document["paths"]["/v1/dead-letters"]["get"]["parameters"]
    assert (replay["limit"]["maximum"], replay["keys"]["maxItems"]) == (REPLAY_MAX, REPLAY_MAX)
    assert next(it["schema"]["maximum"] for it in listed if it["name"] == "limit") == LIST_MAX
    key = document["components"]["parameters"]["Idempotency-Key"]["schema"]
    assert (key["pattern"], key["maxLength"]) == (KEY_PATTERN, KEY_LENGTH_MAX)


def resolved(document: Any, nodes: list[Any]) -> list[Any]:
    """Return the list with its references replaced by what they lead to."""
    found = []
    for node in nodes:
        if "$ref" in node:
            place = node["$ref"].removeprefix("#/").split("/")
            node = functools.reduce(lambda at, part: at[part], place, document)
        found.append(node)
    return found


def references(node: Any) -> list[str]:
    if isinstance(node, list):
        return [reference for item in node for reference in references(item)]
    if isinstance(node, dict):
        here = [node["$ref"]] if "$ref" in node else []
        return here + [reference for item in node.values() for reference in references(item)]
    return []
