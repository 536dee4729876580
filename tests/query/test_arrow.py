"""Answers as Arrow IPC streams: typed columns, or 406 where the server has no pyarrow."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pytest

from pipeline.adapters.http import HttpReader
from pipeline.core.record import Definition
from pipeline.query import media
from pipeline.query.media import ARROW, CSV, JSON
from tests.query.support import Server, World, serving


@pytest.fixture(scope="module")
def shop() -> Iterator[Server]:
    with serving(World()) as server:
        server.world.publish(Definition("sales", "sum", ("region",)), {("eu",): 1.5, ("us",): 2})
        server.world.publish(Definition("state", "last", ("host",)), {("a",): (1, 0, "up"), ("b",): (2, 0, None)})
        server.world.append(0, Definition("minutes", "sum", ("region",), window_s=60), {("eu",): 2**70}, 600_000)
        server.world.fold()
        yield server


def table(server: Server, path: str, **headers: str) -> Any:
    reply = server.request("GET", path, headers={"Accept": ARROW, **headers})
    assert (reply.status, reply.headers["content-type"]) == (200, ARROW)
    assert int(reply.headers["pipeline-staleness-ms"]) < 5_000
    with pa.ipc.open_stream(reply.body) as stream:
        return stream.read_all()


@pytest.mark.parametrize(
    "path",
    ["sales", "sales?by=", "sales?where=region=eu", "sales?where=region=none", "state", "minutes?start=600000&end=720000"],
)
def test_a_stream_has_the_columns_of_to_arrow(shop: Server, path: str) -> None:
    """Types and values are those of `Answer.to_arrow()`: by a scan, by a key, and where nothing matches."""
    view, _, query = path.partition("?")
    found = table(shop, f"/v1/views/{path}")
    with HttpReader(shop.url) as reader:
        body = reader.fetch(f"/v1/views/{view}" + (f"?{query}" if query else ""))
    expected = media.Answer.to_arrow(media.msgspec.json.decode(body, type=media.Answer))
    assert found.schema == expected.schema
    assert found.to_pylist() == expected.to_pylist()


def test_a_stream_that_is_kept_is_unchanged_until_a_commit(shop: Server) -> None:
    """ETag and 304 as for other media types."""
    first = shop.request("GET", "/v1/views/sales", headers={"Accept": ARROW})
    again = shop.request("GET", "/v1/views/sales", headers={"Accept": ARROW, "If-None-Match": first.headers["etag"]})
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize(
    ("accept", "found"),
    [
        (f"{ARROW}, {JSON};q=0.5", ARROW),
        (f"{ARROW};q=0.5, {CSV}", CSV),
        (f"{ARROW};q=0", JSON),
        ("application/*", JSON),
        ("application/vnd.apache.arrow.file", JSON),
    ],
)
def test_the_stream_is_one_of_the_media_types(accept: str, found: str) -> None:
    """The preferred one is chosen; JSON if there is no preference."""
    assert media.preferred(accept) == found


def test_without_pyarrow(shop: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """406 names what to install; a client that also takes another media type gets that."""
    monkeypatch.setattr(media, "has_arrow", lambda: False)
    reply = shop.request("GET", "/v1/views/sales", headers={"Accept": ARROW})
    assert "pip install pyarrow" in shop.problem(406, reply)
    reply = shop.request("GET", "/v1/views/sales", headers={"Accept": f"{ARROW}, {CSV};q=0.1"})
    assert (reply.status, reply.headers["content-type"].split(";")[0]) == (200, CSV)
    shop.view("sales")
