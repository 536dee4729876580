"""Metrics pushed as text over HTTP: each good sample counts once; other lines are reported with their reasons."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.error import HTTPError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    delete_from_gateway,
    generate_latest,
    push_to_gateway,
    pushadd_to_gateway,
)
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from pipeline.core.record import NAME, Definition
from pipeline.core.token import Token
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Refusal
from pipeline.query.push_api import parse_grouping
from pipeline.settings import QuerySettings
from tests.query.support import Reply, Server, World, serving
from tests.support import LONG

PLAIN = "text/plain; version=0.0.4"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


def push(server: Server, text: str | bytes, content_type: str = PLAIN) -> Reply:
    body = text.encode() if isinstance(text, str) else text
    return server.request("POST", "/v1/openmetrics", body, {"Content-Type": content_type})


def pushed(server: Server, text: str | bytes, content_type: str = PLAIN) -> dict[str, Any]:
    """Post a text; return the answer, which must be 200."""
    reply = push(server, text, content_type)
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json()
    return answer


def series(server: Server, view: str, *labels: str) -> dict[tuple[str, ...], Any]:
    server.world.fold()
    rows = server.view(view)["series"]
    return {tuple(row["labels"][label] for label in labels): row["value"] for row in rows}


def metered(server: Server) -> Mapping[tuple[str, ...], float]:
    families = text_string_to_metric_families(server.get("/metrics").body.decode())
    return {
        tuple(sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
        if sample.name in ("pipeline_ingest_lines_total", "pipeline_ingest_malformed_total")
        and sample.labels["protocol"] == "openmetrics"
    }


@pytest.mark.parametrize(("generate", "content_type"), [(generate_latest, PLAIN), (generate_openmetrics, OPENMETRICS)])
def test_what_a_batch_job_counted(server: Server, generate: Any, content_type: str) -> None:
    """Pushes of two runs of a job, in either format: totals and buckets add up, and a gauge is the newest."""
    prefix = "om" if content_type == OPENMETRICS else "plain"
    for run in (1, 2):
        registry = CollectorRegistry()
        rows = Counter(f"{prefix}_rows", "x", ["table"], registry=registry)
        took = Histogram(f"{prefix}_took", "x", buckets=(1, 2.5), registry=registry)
        size = Summary(f"{prefix}_size", "x", registry=registry)
        done = Gauge(f"{prefix}_done", "x", registry=registry)
        rows.labels('a"b\\c\nd').inc(run)
        rows.labels("b").inc(0.5)
        took.observe(0.5 * run)
        took.observe(3)
        size.observe(10)
        done.set(run)
        answer = pushed(server, generate(registry), content_type)
        assert (answer["refused"], answer["first_refused"], answer["reasons"]) == (0, [], {})
        assert Token.parse(answer["token"]).next_offsets
    assert series(server, f"{prefix}_rows_total", "table") == {('a"b\\c\nd',): 3, ("b",): 1}
    assert series(server, f"{prefix}_took_bucket", "le") == {("1.0",): 2, ("2.5",): 2, ("+Inf",): 4}
    assert series(server, f"{prefix}_took_sum") == {(): 7.5}
    assert series(server, f"{prefix}_took_count") == {(): 4}
    assert series(server, f"{prefix}_size_sum") == {(): 20}
    assert series(server, f"{prefix}_done") == {(): 2}
    found = {view["name"]: view["monotone"] for view in server.get("/v1/views").json()["views"]}
    assert found[f"{prefix}_rows_total"] is found[f"{prefix}_took_bucket"] is found[f"{prefix}_size_count"] is True
    assert not [name for name in found if name.endswith("_created")]


def test_types_decide(server: Server) -> None:
    """A counter goes by either name, a gauge by its timestamp, an untyped sample as the newest; exemplars are left out."""
    text = (
        "# TYPE ty_old counter\nty_old 3\n# TYPE ty_new_total counter\nty_new_total 4\nty_new 9\n"
        "# TYPE ty_g gauge\nty_g 1 2000\nty_g 7 1000\nty_free -2.5\n"
    )
    assert pushed(server, text)["accepted"] == 6
    om = '# TYPE ty_ex counter\nty_ex_total{a="x # {y"} 2 # {trace="z"} 1 5.5\n'
    om += "# TYPE ty_t gauge\nty_t 1 2.0\nty_t 2 1.999\n# EOF\n"
    assert pushed(server, om, OPENMETRICS)["accepted"] == 3
    assert [series(server, view) for view in ("ty_old_total", "ty_new_total", "ty_new", "ty_g", "ty_free", "ty_t")] == [
        {(): 3}, {(): 4}, {(): 9}, {(): 1}, {(): -2.5}, {(): 1},
    ]  # fmt: skip
    assert series(server, "ty_ex_total", "a") == {("x # {y",): 2}


@pytest.mark.parametrize("content_type", [PLAIN, OPENMETRICS])
@pytest.mark.parametrize("declared", ["{}", "{}_total"])
def test_a_counter_is_a_sum_by_any_of_its_names(server: Server, content_type: str, declared: str) -> None:
    """A sample with the name that is declared, or with `_total` behind it, is added to the view with `_total`."""
    base = f"cn_{len(content_type)}_{len(declared)}"
    name = declared.format(base)
    for _ in range(2):
        text = f'# TYPE {name} counter\n{name} 5\n{base}_total 1 # {{x=" # {{"}} NaN z\n{base}_created 1\n# EOF\n'
        assert pushed(server, text, content_type)["refused"] == 0
    assert series(server, f"{base}_total") == {(): 12}


def test_paths_of_a_pushgateway(server: Server) -> None:
    """prometheus_client pushes to the server as to a Pushgateway: what the path groups by is labels of all samples."""
    registry = CollectorRegistry()
    Counter("pg_rows", "x", ["table", "instance"], registry=registry).labels("users", "own").inc(3)
    Gauge("pg_done", "x", registry=registry).set(7)
    push_to_gateway(server.url, "back up/1", registry, {"instance": "ä+b c", "empty": ""})
    pushadd_to_gateway(server.url, "other", registry, compression=None)
    rows = series(server, "pg_rows_total", "job", "table", "instance")
    assert rows == {("back up/1", "users", "ä+b c"): 3, ("other", "users", "own"): 3}
    assert series(server, "pg_done", "job", "instance") == {("back up/1", "ä+b c"): 7, ("other", ""): 7}
    with pytest.raises(HTTPError, match="405"):
        delete_from_gateway(server.url, "other")
    for path in (
        "job",
        "job/",
        "job/a/b",
        "x/y",
        "job/a/job/b",
        "job/a/1/b",
        "job/a/le/1",
        "job/a/b@zip/c",
        "job@base64/*",
        "job/%ff",
    ):
        reply = server.request("PUT", f"/metrics/{path}", b"a 1\n", {"Content-Type": PLAIN})
        assert server.problem(400, reply)


PATHS = st.lists(
    st.sampled_from(["job", "job@base64", "a", "/", "%2F", "@base64", "%", "%ff", "=", "a-_", "é", "YQ"]), max_size=12
)


@pytest.mark.timeout(1_800)  # of 10,000 examples on a busy machine
@settings(max_examples=10_000 if LONG else 60, deadline=None)
@given(PATHS.map("/".join) | PATHS.map("".join) | st.text(max_size=40))
def test_any_path_is_a_grouping_or_invalid(path: str) -> None:
    """No path raises anything but `Invalid`; labels have names of labels and texts of UTF-8, and the job has a name."""
    try:
        labels = parse_grouping(f"/metrics/{path}")
    except Invalid:
        return
    assert labels["job"]
    assert all(NAME.match(name) and text.encode() is not None for name, text in labels.items())


@pytest.mark.parametrize("to_gateway", [push_to_gateway, pushadd_to_gateway])
def test_a_group_that_is_pushed_again(to_gateway: Any) -> None:
    """A program may push its totals again and again, as to a Pushgateway: each increase counts once. After a restart of the
    server what it had before is refused, with words, and it goes on from there; a program that starts anew counts whole.
    """

    def counts(server: Server) -> list[Any]:
        views = ("again_rows_total", "again_took_count", "again_took_sum", "again_size_sum", "again_done")
        return [series(server, view).get(()) for view in views] + [series(server, "again_took_bucket", "le")[("1.0",)]]

    class Program:
        def __init__(self) -> None:
            self.registry = CollectorRegistry()
            self.rows = Counter("again_rows", "x", registry=self.registry)
            self.took = Histogram("again_took", "x", buckets=[1], registry=self.registry)
            self.size = Summary("again_size", "x", registry=self.registry)
            self.done = Gauge("again_done", "x", registry=self.registry)

        def count(self, value: int) -> None:
            self.rows.inc(value)
            self.took.observe(value)
            self.size.observe(value)
            self.done.inc()

        def push(self, server: Server) -> None:
            to_gateway(server.url, "again", self.registry, {"instance": "a"})

    world = World()
    with serving(world) as server:
        first, second = Program(), Program()
        for value in (1, 2, 3):
            first.count(value)
            first.push(server)
            first.push(server)
        assert counts(server) == [6, 3, 6, 6, 3, 1]
        second.count(10)
        second.push(server)
        first.push(server)
        first.rows.reset()
        first.rows.inc(4)
        first.push(server)
        assert counts(server) == [20, 4, 16, 16, 3, 1]
    world.reader = world.new_reader()
    with serving(world) as server:
        first.count(5)
        first.push(server)
        assert counts(server) == [20, 4, 16, 16, 4, 1]
        (left_out,) = server.get("/v1/status").json()["ingest_left_out"]
        assert (left_out["reason"], left_out["count"]) == ("baseline", 7)
        first.count(1)
        first.push(server)
        third = Program()
        third.count(100)
        third.push(server)
        assert counts(server) == [121, 6, 117, 117, 1, 2]


class _Slow:
    """An ingest that gives other threads time."""

    def __init__(self, ingest: Any) -> None:
        self._ingest = ingest

    def fitting(self, deltas: Any, key: Any = None, bounds: Any = None) -> Any:
        time.sleep(0.005)
        return self._ingest.fitting(deltas, key, bounds)


def test_pushes_of_one_program_at_once() -> None:
    """Threads of a program that count, and push its registry to one group all at once, are exact."""
    failed: list[HTTPError] = []
    world = World()
    world.ingest = _Slow(world.ingest)  # type: ignore[assignment]
    with serving(world) as server:
        registry = CollectorRegistry()
        rows = Counter("together_rows", "x", registry=registry)

        def work() -> None:
            for _ in range(5):
                rows.inc()
                try:
                    push_to_gateway(server.url, "together", registry)
                except HTTPError as error:
                    failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert all("falls" in error.read().decode() for error in failed)  # a push that was overtaken
        push_to_gateway(server.url, "together", registry)
        assert series(server, "together_rows_total") == {(): 40}


def test_a_total_that_tells_no_start_is_refused(server: Server) -> None:
    """Nothing tells a repeat without `_created` from a new run, so no such push is taken. One that was overtaken, or that
    has a series twice, changes nothing.
    """

    def push_group(text: str, content_type: str = PLAIN, **headers: str) -> Reply:
        return server.request("PUT", "/metrics/job/untold", text.encode(), {"Content-Type": content_type, **headers})

    at = time.time()
    for _ in range(2):
        problem = server.problem(400, push_group("# TYPE untold counter\nuntold_total 5\n"))
        assert "created: untold_total: a total without _created" in problem
        assert "POST /v1/openmetrics takes increases" in problem
    text = f"# TYPE untold counter\nuntold_created {at}\nuntold_total %s\n"
    token = push_group(text % 5).json()["token"]
    assert Token.parse(token).next_offsets
    for value, reason in ((8, None), (5, "falls"), (9, None), (9, None), ("NaN", "value"), ("9" * 1_000, "value")):
        reply = push_group(text % value)
        assert reply.status == (400 if reason else 200)
        assert f"{reason}: " in reply.json().get("detail", "None: ")
    assert push_group(text % 9 + "untold_total 10\nuntold_g 1\n").json()["reasons"] == {"twice": 1}
    for _ in range(2):  # the key of a request is not that of its totals
        gauge = f"# TYPE untold counter\nuntold_total 11\nuntold_created {at}\n# TYPE untold_g gauge\nuntold_g 2\n# EOF\n"
        assert push_group(gauge, OPENMETRICS, **{"Idempotency-Key": "totals"}).json()["accepted"] == 2
    assert series(server, "untold_total", "job") == {("untold",): 11}
    assert series(server, "untold_g", "job") == {("untold",): 2}


def test_totals_of_groups_need_a_server_that_gets_all_of_them() -> None:
    """A server that may not see every push of a group refuses its totals, and takes its gauges."""
    registry = CollectorRegistry()
    with serving(World(), takes_totals=False) as server:
        Counter("alone_rows", "x", registry=registry).inc(3)
        with pytest.raises(HTTPError, match="400"):
            push_to_gateway(server.url, "alone", registry)
        Gauge("alone_done", "x", registry=registry).set(7)
        push_to_gateway(server.url, "alone", registry)
        assert series(server, "alone_done") == {(): 7}
        assert server.get("/v1/views/alone_rows_total").status == 404
        assert [it["reason"] for it in server.get("/v1/status").json()["ingest_left_out"]] == ["cumulative"]


def test_labels_come_and_go(server: Server) -> None:
    """An empty label is no label, as in Prometheus; a view has all labels that the push names or that it had before."""
    assert pushed(server, 'lab{a="1"} 1 1\nlab{b="2"} 2 1\nlab{c=""} 3 1\n')["refused"] == 0
    server.world.fold()
    answer = pushed(server, 'lab{b="9",a="1"} 4 1\nlab 5 2\nlab{z="1"} 6\nlab{z=""} 7 3\n')
    assert (answer["accepted"], answer["refused"]) == (4, 0)
    assert series(server, "lab", "a", "b", "z") == {
        ("1", "", ""): 1, ("", "2", ""): 2, ("", "", ""): 7, ("1", "9", ""): 4, ("", "", "1"): 6,
    }  # fmt: skip
    definitions = [it["labels"] for it in server.get("/v1/views").json()["views"] if it["name"] == "lab"]
    assert sorted(definitions) == [["a", "b"], ["a", "b", "z"]]  # one for each set of labels would be six


def test_bad_lines_stop_nothing(server: Server) -> None:
    """Each bad line is counted by its reason; the answer names the first few bad lines."""
    before = metered(server)
    lines = [
        "# TYPE bad_c counter", "bad_c_total 1", "bad_c_total -1", "bad_c_total NaN", "bad_c_total +Inf",
        "# TYPE bad_c nonsense",
        "bad_s{quantile=\"0.5\"} 1", "# TYPE bad_q summary", 'bad_q{quantile="0.5"} 1', "# TYPE bad_h histogram",
        "bad_h_bucket 1", 'bad_h_bucket{le="x"} 1', "bad_h 3", "bad{", "bad value", "bad:colon 1", 'bad{a="1",a="2"} 1',
        "bad_t 1 9e999", "x" * 9_000 + " 1", "bad_s 1", 'bad_w{a="' + "y" * 4_097 + '"} 1', "bad_c_total 1",
    ]  # fmt: skip
    body = "\n".join(lines).encode() + b'\nbad_u{a="\xff"} 1\n\n'
    answer = pushed(server, body)
    assert answer["accepted"] == 4
    assert answer["reasons"] == {
        "value": 3, "type": 1, "quantile": 1, "le": 2, "suffix": 1, "syntax": 3, "view": 1, "timestamp": 1,
        "line_long": 1, "labels": 1, "utf8": 1,
    }  # fmt: skip
    assert answer["refused"] == sum(answer["reasons"].values())
    assert [it["line"] for it in answer["first_refused"]] == [3, 4, 5, 6, 9, 11, 12, 13, 14, 15]
    assert all(it["detail"] and len(it["detail"]) <= 2_000 for it in answer["first_refused"])
    assert series(server, "bad_c_total") == {(): 2}
    after = metered(server)
    assert after[("openmetrics",)] - before.get(("openmetrics",), 0) == 4 + answer["refused"]
    for reason, count in answer["reasons"].items():
        assert after["openmetrics", reason] - before.get(("openmetrics", reason), 0) == count
    shown = {it["reason"]: it for it in server.get("/v1/status").json()["ingest_left_out"]}
    assert {reason: it["count"] for reason, it in shown.items()} == {
        reason: count for (_, *by), count in after.items() for reason in by
    }
    assert shown["line_long"]["first"] == "line 19: 9002 bytes; at most 8192"


def test_openmetrics_ends_with_eof(server: Server) -> None:
    """OpenMetrics text without `# EOF`, or with lines behind it, is reported; the samples before it count."""
    assert pushed(server, "eof_a 1\n", OPENMETRICS)["reasons"] == {"eof": 1}
    assert pushed(server, "eof_b 1\n# EOF\neof_b 2\n", OPENMETRICS)["reasons"] == {"eof": 1}
    assert pushed(server, "eof_c 1\n# EOF\neof_c 2\n", PLAIN)["reasons"] == {}
    assert series(server, "eof_b") == {(): 1}


def test_nothing_is_fine(server: Server) -> None:
    """A push without samples has an empty token; only OpenMetrics' own media type calls for a closing `# EOF`."""
    for text in ("", "\n\n", "# a comment\n# HELP x y\n"):
        answer = pushed(server, text, PLAIN)
        assert (answer["accepted"], answer["refused"], answer["token"]) == (0, 0, "")
    assert pushed(server, "# EOF\n", OPENMETRICS)["accepted"] == 0


@pytest.mark.parametrize("text", [b'[{"view":"v"}]', b"\xff\xfe", b"\0", b"{}", b"<html>", b"# TYPE x y\n", b"a" * 20_000])
def test_what_makes_no_sense_at_all_is_a_problem(server: Server, text: bytes) -> None:
    """A text of bad lines only is answered with 400 and the first line's reason, and nothing is taken."""
    before = [server.world.log.watermarks("deltas", number).end_offset for number in range(4)]
    for content_type in (PLAIN, OPENMETRICS):
        assert "nothing could be taken; line 1: " in server.problem(400, push(server, text, content_type))
    assert [server.world.log.watermarks("deltas", number).end_offset for number in range(4)] == before


def test_a_view_stays_what_it_is(server: Server) -> None:
    """A sample of another kind belongs to another definition: it is taken, and the view answers as before."""
    server.world.publish(Definition("is_sum", "sum", ()), {(): 5})
    server.world.publish(Definition("may_fall_total", "sum", ()), {(): 5})
    assert pushed(server, "is_sum 1\n# TYPE may_fall counter\nmay_fall_total 1\nfine 1\n")["refused"] == 0
    server.world.fold()
    answer = server.view("is_sum")
    assert (answer["kind"], answer["series"][0]["value"], answer["also"]) == ("sum", 5, [{"kind": "last", "window_s": 0}])
    assert server.view("may_fall_total")["series"][0]["value"] == 6


def test_limits() -> None:
    """Too large a body and too many samples are 413; a line that is too long is left out."""
    with serving(World(settings=QuerySettings(body_bytes_max=1_024, deltas_max=3, openmetrics_line_bytes_max=64))) as server:
        assert pushed(server, "a 1\nb 1\nc 1\n")["accepted"] == 3
        assert "at most 3" in server.problem(413, push(server, "a 1\nb 1\nc 1\nd 1\n"))
        assert "at most 3" in server.problem(413, push(server, "a 1\nb\nc\nd\n"))
        assert pushed(server, "a 1\nb 1\nc 1\n", OPENMETRICS)["reasons"] == {"eof": 1}
        server.problem(413, push(server, "a 1\n" + " " * 1_024))
        assert pushed(server, f"a 1\na{'x' * 70} 1\n")["reasons"] == {"line_long": 1}
        reply = server.request("POST", "/v1/openmetrics", b"x", {"Content-Encoding": "gzip"})
        server.problem(415, reply)
        assert push(server, "x" * 100 + "\n" * 900).status == 400


def test_pushed_twice_counts_twice(server: Server) -> None:
    """A push without a key has no identity, so each repeat counts."""
    for _ in range(2):
        pushed(server, "# TYPE twice counter\ntwice_total 3\n")
    assert series(server, "twice_total") == {(): 6}


def test_many_at_once_are_exact(server: Server) -> None:
    """Concurrent pushes are all taken, also those that define the view at the same moment with different labels."""
    text = "# TYPE atonce counter\n" + 'atonce_total{{{}="x"}} 1\n' * 5
    results: list[dict[str, Any]] = []
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait(30)
        for _ in range(5):
            reply = push(server, text.format(*["a" if number % 2 else "b"] * 5)).json()
            results.append(reply)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    accepted = sum([it.get("accepted", 0) for it in results])
    assert len(results) == 40
    assert accepted == 200
    server.world.fold()
    (row,) = server.view("atonce_total", ("by", ""))["series"]
    assert row["value"] == accepted
    assert not server.world.log.watermarks("dead-letters", 0).end_offset


class _Away:
    def fitting(self, deltas: Any, key: Any = None, bounds: Any = None) -> tuple[Token, list[Refusal]]:
        raise Unavailable("the log is away")


def test_a_log_that_is_away() -> None:
    """While the log is away a push is answered with 503 and a time to come back."""
    world = World()
    world.ingest = _Away()  # type: ignore[assignment]
    with serving(world) as server:
        reply = push(server, "a 1\n")
        assert "away" in server.problem(503, reply)
        assert "retry-after" in reply.headers
    world.ingest = None
    with serving(world) as server:
        assert push(server, "a 1\n").status == 405


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server of this module's own, whose metrics the tests count."""
    with serving(World()) as running:
        yield running
