"""`pipeline get` and `pipeline status`: the server's answers, as a table or unchanged."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import Publisher
from pipeline.adapters.http import HttpLogWriter
from pipeline.cli.read import _points
from pipeline.core.answer import Answer, AsOf, Series
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, producer_id_of, series_suffix
from pipeline.ports import Message
from pipeline.topics import DELTAS
from tests.cli.conftest import Here
from tests.query.support import World, serving
from tests.support import PROGRAM, UpProcess, environment

BIG = 2**80


@pytest.fixture(scope="module")
def token(server: UpProcess) -> Iterator[str]:
    """Publish two views, and return the token that covers them."""
    with Publisher(server.url) as publisher:
        revenue = publisher.sum("revenue", labels=("region", "product"))
        for region, product, value in (("eu", "tea", 5), ("eu", "pie", 7), ("us", "tea", BIG), ("us", "jam", 0.5)):
            revenue.add(value, region=region, product=product)
        state = publisher.last("state", labels=("host",))
        state.set("up\x1b[31m", host="a\nb\x1b]0;title\x07")
        state.set(None, host="ü")
        publisher.sum("total").add(3)
        slow = publisher.histogram("slow", labels=("route",))
        for n in range(1, 5):
            slow.observe(n, route="/")
        users, most = publisher.distinct("users", labels=("page",)), publisher.topk("most", labels=("page",))
        for n in range(3):
            users.observe(n, page="/")
            most.add(f"a{n}\x9b", 2 + n, page="/")
        publish_hits(server.url)
        many = publisher.sum("many", labels=("n",))
        for n in range(3000):
            many.add(n, n=f"{'wide' * 50}{n}")
        yield str(publisher.flush())


MINUTE = 1_700_000_040_000


def publish_hits(url: str) -> None:
    """Publish a view of ten windows, of which the sixth is empty."""
    definition = Definition("hits", "sum", ("path",), window_s=60)
    suffixes = {series_suffix((path,), MINUTE + i * 60_000): i for path in ("/", "/a") for i in range(10) if i != 5}
    batch = Batch(producer_id_of("hits"), 0, 0, 0, 0, MINUTE, [Group(definition, [*suffixes], [*suffixes.values()])])
    writer = HttpLogWriter(url)
    writer.introduce("hits")
    assert [type(it) for it in writer.append([Message(DELTAS, 0, None, encode_batch(batch))], timeout_s=20)] == [int]
    writer.close()


def table(here: Here, server: UpProcess, *arguments: str) -> list[list[str]]:
    """Return the words of each line of a table, without the last line."""
    done = here("get", *arguments, "--from", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    return [line.split() for line in done.stdout.splitlines()[:-1]]


def test_a_view_as_a_table(here, server: UpProcess, token: str) -> None:
    """A table has label columns, the value to the right, and a last line with the series and the bound on staleness."""
    done = here("get", "revenue", "--after", token, "--from", server.url)
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["product", "region", "sum"],
        ["jam", "us", "0.5"],
        ["pie", "eu", "7"],
        ["tea", "eu", "5"],
        ["tea", "us", str(BIG)],
    ]
    assert lines[-1].startswith("4 series, at most ")
    assert lines[-1].endswith(" ms stale")
    assert len({len(line) for line in lines[:-1]}) == 1


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (("--by", "region"), [["region", "sum"], ["eu", "12"], ["us", str(float(BIG))]]),
        (("--by", "product,region", "--top", "1"), [["product", "region", "sum"], ["tea", "us", str(BIG)]]),
        (("--where", "product=~t.*", "--where", "region!=us"), [["product", "region", "sum"], ["tea", "eu", "5"]]),
        (("--total", "--where", "region=eu"), [["sum"], ["12"]]),
        (("--top", "1", "--by", "product"), [["product", "sum"], ["tea", str(BIG + 5)]]),
        (("--where", "region=none"), [["sum"]]),
    ],
)  # fmt: skip
def test_options_of_get(here: Here, server: UpProcess, token: str, arguments: Sequence[str], rows: list[list[str]]) -> None:
    """Each option is the API's parameter of its name."""
    found = table(here, server, "revenue", "--after", token, *arguments)
    assert [[word.replace("e+", "e") for word in row] for row in found] == [
        [w.replace("e+", "e") for w in row] for row in rows
    ]


def test_estimates_as_tables(here: Here, server: UpProcess, token: str) -> None:
    """A distinct has its bounds beside it, a topk its total and first items; no item steers the terminal."""
    assert table(here, server, "users", "--after", token) == [["page", "estimate", "lower", "upper"], ["/", "3", "3", "3"]]
    assert table(here, server, "most", "--after", token) == [
        ["page", "total", "most", "frequent"],
        ["/", "9", "a2\\x9b", "4,", "a1\\x9b", "3,", "a0\\x9b", "2"],
    ]


def test_a_cut_answer_says_so(here: Here, server: UpProcess, token: str) -> None:
    """The last line of a cut table names both numbers of series; cells are not cut, however wide."""
    done = here("get", "many", "--after", token, "--limit", "5", "--from", server.url)
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("5 of 3,000 series (--limit, --top, --bottom), at most ")
    assert lines[1].split() == ["wide" * 50 + "0", "0"]
    whole = here("get", "many", "--all", "--limit", "1000", "--from", server.url).stdout.splitlines()
    assert whole[-1].startswith("3,000 series, at most ")
    assert len(whole) == 3_002
    rows = here("get", "many", "--all", "--limit", "1000", "--csv", "--from", server.url).stdout.splitlines()
    assert (rows[0], len(rows)) == ("n,value", 3_001)
    parsed = json.loads(here("get", "many", "--all", "--limit", "1000", "--json", "--from", server.url).stdout)
    assert (len(parsed["series"]), "truncated" in parsed, "next_cursor" in parsed) == (3_000, False, False)


def test_json_is_the_answer_as_it_came(here: Here, server: UpProcess, token: str) -> None:
    """--json prints the document of the API, to the last digit of a number."""
    done = here("get", "revenue", "--after", token, "--json", "--from", server.url)
    with urllib.request.urlopen(f"{server.url}/v1/views/revenue", timeout=20) as answer:
        expected = json.load(answer)
    found = json.loads(done.stdout)
    assert (found.pop("as_of").keys(), found) == (expected.pop("as_of").keys(), expected)
    assert found["series"][3]["value"] == BIG
    for arguments, path in ((("get",), "/v1/views"), (("status",), "/v1/status")):
        shown = json.loads(here(*arguments, "--from", server.url, "--json").stdout)
        with urllib.request.urlopen(server.url + path, timeout=20) as answer:
            assert shown.keys() == json.load(answer).keys()


RANGE = ("--start", str(MINUTE), "--end", str(MINUTE + 600_000))


def test_points_in_a_pipe(here: Here, server: UpProcess, token: str) -> None:
    """Each point has a line, and a last line has the range and the time up to which it is final."""
    done = here("get", "hits", *RANGE, "--step", "5m", "--after", token, "--from", server.url)
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[:-1]] == [
        ["path", "start", "sum"],
        ["/", "2023-11-14T22:14:00Z", "10"],
        ["/", "2023-11-14T22:19:00Z", "30"],
        ["/a", "2023-11-14T22:14:00Z", "10"],
        ["/a", "2023-11-14T22:19:00Z", "30"],
    ]
    assert lines[-1].startswith("2 series, 2023-11-14T22:14:00Z to 2023-11-14T22:24:00Z in steps of 5m, final before 20")
    assert table(here, server, "hits", "--at", str(MINUTE + 600_000), "--over", "10m", "--total") == [
        ["start", "sum"], ["2023-11-14T22:14:00Z", "80"],
    ]  # fmt: skip
    assert table(here, server, "hits", *RANGE, "--fill", "zero", "--fn", "rate", "--by", "path")[6] == [
        "/", "2023-11-14T22:19:00Z", "0",
    ]  # fmt: skip
    compared = ("--step", "5m", "--total", "--compare", "5m")
    assert table(here, server, "hits", *RANGE, *compared) == [
        ["start", "sum", "5m", "before"], ["2023-11-14T22:14:00Z", "20", "null"], ["2023-11-14T22:19:00Z", "60", "20"],
    ]  # fmt: skip
    last = here("get", "hits", "--last", "2h", "--step", "1h", "--json", "--from", server.url)
    found = json.loads(last.stdout)
    assert found["step_ms"] == 3_600_000
    assert found["end_ms"] - found["start_ms"] in (7_200_000, 10_800_000)


def test_points_as_csv(here: Here, server: UpProcess, token: str) -> None:
    """--csv prints the answer of the API unchanged."""
    done = here("get", "hits", *RANGE, "--step", "10m", "--csv", "--after", token, "--from", server.url)
    assert done.stdout.split() == ["path,start_ms,value", f"/,{MINUTE},40", f"/a,{MINUTE},40"]


def test_points_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each series has a line of bars at its place in the range, with the least, most and newest value."""
    monkeypatch.setattr("pipeline.cli.console.out", Console(force_terminal=True))
    series = [Series({"path": "/\x1b"}, points=[(0, 1), (20, 4)]), Series({"path": "b"}, points=[(10, 2)])]
    made = _points(
        Answer("v", "sum", None, series, AsOf(3, {}), start_ms=10, end_ms=40, step_ms=10, over_ms=20, final_before_ms=5)
    )
    assert made._rows == [("/\\x1b", "▃ █", "1", "4", "4"), ("b", " █ ", "2", "2", "2")]


def test_histograms_as_a_table(here: Here, server: UpProcess, token: str) -> None:
    """Count, extremes, mean and the requested quantiles have a column each."""
    assert table(here, server, "slow", "--q", "0", "--q", "0.25") == [
        ["route", "count", "min", "mean", "0", "0.25", "max"],
        ["/", "4", "1", "2.5", "1", "1", "4"],
    ]
    assert table(here, server, "slow", "--total")[0] == ["count", "min", "mean", "0.5", "0.9", "0.99", "max"]
    done = here("get", "total", "--q", "0.5", "--from", server.url)
    assert (done.returncode, "a sum has no quantiles" in done.stderr) == (2, True)


def test_without_a_view_all_are_listed(here: Here, server: UpProcess, token: str) -> None:
    """The list has name, kind, labels and number of series of each view."""
    assert here("get", "total", "--after", token, "--from", server.url).returncode == 0
    assert table(here, server)[0] == ["view", "kind", "labels", "series"]
    assert [row[:-1] for row in table(here, server)[1:]] == [
        ["hits", "sum", "path"], ["many", "sum", "n"], ["most", "topk", "page"], ["revenue", "sum", "product,", "region"],
        ["slow", "histogram", "route"], ["state", "last", "host"],
        ["total", "sum"], ["users", "distinct", "page"],
    ]  # fmt: skip


def test_what_others_publish_does_not_steer_the_terminal(here: Here, server: UpProcess, token: str) -> None:
    """Control characters in labels and values are spelled out; other languages are not."""
    rows = table(here, server, "state", "--after", token)
    assert rows[1:] == [["a\\nb\\x1b]0;title\\x07", "up\\x1b[31m"], ["ü", "null"]]


def test_status(here: Here, server: UpProcess, token: str) -> None:
    """Each partition has one line, with the API's numbers."""
    assert here("get", "total", "--after", token, "--from", server.url).returncode == 0
    done = here("status", "--from", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["partition", "phase", "next_offset", "end_offset", "lag", "commit", "staleness", "restore"]
    with urllib.request.urlopen(f"{server.url}/v1/status", timeout=20) as answer:
        partitions = json.load(answer)["partitions"]
    assert [line.split()[:5] for line in lines[1:-1]] == [
        [str(it["partition"]), "folding", str(it["next_offset"]), str(it["end_offset"]), "0"] for it in partitions
    ]
    assert lines[-1] == "ready, lag 0 records"


def test_status_names_who_committed(here: Here) -> None:
    """A server that follows workers says whose commit is the last one of each partition; a name can't steer the terminal."""
    world = World(partition_count=2, name="a:\x1b[2J")
    world.append(1, Definition("v", "sum"), {(): 1})
    world.fold()
    with serving(world) as other:
        lines = here("status", "--from", other.url).stdout.splitlines()
    assert lines[0].split()[:3] == ["partition", "phase", "committed_by"]
    assert [line.split()[1:3] for line in lines[1:3]] == [["folding", "0"], ["folding", "a:\\x1b[2J"]]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("get", "nothing_of_this_name"), 2, "no view 'nothing_of_this_name'"),
        (("get", "revenue", "--by", "colour"), 2, "view revenue has no label 'colour'; its labels: product, region"),
        (("get", "revenue", "--where", "region"), 2, "'region' is not label=value"),
        (("get", "revenue", "--where", "region=~("), 2, "is not a regular expression"),
        (("get", "revenue", "--total", "--by", "region"), 2, "--total is one number"),
        (("get", "revenue", "--limit", "0"), 2, "limit"),
        (("get", "revenue", "--top", "many"), 2, "--top"),
        (("get", "revenue", "--after", "yesterday"), 2, "not a token: 'yesterday'"),
        (("get", "revenue", "--after", "0-999999"), 2, "not a token: '0-999999'"),
        (("get", "revenue", "--after", "other~0-1", "--timeout-ms", "60000"), 2, "the topic was made anew since, or"),
        (("get", "revenue", "--after", "TOPIC~0-999999", "--timeout-ms", "50"), 1, "not at 999999, after 50 ms"),
        (("get", "--top", "5"), 2, "pipeline get VIEW"),
        (("get", "--last", "1h"), 2, "pipeline get VIEW"),
        (("get", "hits", "--last", "1 h"), 2, "--last: a length above 0"),
        (("get", "hits", "--last", "1h", "--end", "5"), 2, "--last ends now"),
        (("get", "hits", "--step", "90s"), 2, "no multiple of the view's window of 1m; the nearest is 2m"),
        (("get", "hits", "--start", "now"), 2, "start: ms since 1970 or RFC 3339"),
        (("get", "revenue", "--last", "1h"), 2, "view revenue has no windows"),
        (("get", "revenue", "--csv", "--json"), 2, "one of them"),
        (("get", "hitz"), 2, "no view 'hitz'; is it hits?"),
        (("get", "revenue", "--from", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1: ConnectionRefusedError"),
        (("status", "--from", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1: ConnectionRefusedError"),
        (("status", "--from", "127.0.0.1"), 2, "not a server's address: '127.0.0.1'; it looks like http://host:8080"),
        (("gett", "revenue"), 2, "gett"),
    ],
)
def test_a_wrong_call(here: Here, server: UpProcess, token: str, arguments: Sequence[str], code: int, said: str) -> None:
    """One line on standard error says what is wrong; exit code 2 if the call is wrong, 1 if the server can't answer."""
    to = () if "--from" in arguments or arguments[0] == "gett" else ("--from", server.url)
    done = here(*[it.replace("TOPIC", token.partition("~")[0]) for it in arguments], *to)
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_the_reader_of_a_pipe_may_leave(server: UpProcess, token: str, tmp_path: Path, options: Sequence[str]) -> None:
    """`| head -c 100` ends the command silently."""
    with (tmp_path / "stderr").open("wb") as errors:
        process = subprocess.Popen(
            [*PROGRAM, "get", "many", *options, "--from", server.url, "--after", token],
            stdout=subprocess.PIPE, stderr=errors, env=environment(),
        )  # fmt: skip
        assert process.stdout is not None
        head: Any = process.stdout.read(100)
        process.stdout.close()
        assert process.wait(30) == 1
    assert len(head) == 100
    assert (tmp_path / "stderr").read_text() == ""
