"""`pipeline publish`: each row of the file or pipe is in the view, once."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher, Reader, Token
from tests.cli.conftest import Here
from tests.support import PROGRAM, Terminal, UpProcess, environment, pipeline

BIG = 2**70
ROWS: Sequence[tuple[str, int | float, int]] = [
    ("eu", 5, 30), ("us", -7, 10), ("eu", BIG, 20), ("us", 0.25, 40), ("eu", 1, 10), ("us", 3, 50), ("a,\"b\"\nc", 12, 1),
]  # fmt: skip


def csv_of(rows: Sequence[tuple[str, Any, int]]) -> str:
    cells = [('"' + region.replace('"', '""') + '"', str(value), str(at)) for region, value, at in rows]
    return "region,value,at\n" + "".join(",".join(row) + "\n" for row in cells)


def ndjson_of(rows: Sequence[tuple[str, Any, int]]) -> str:
    return "".join(json.dumps({"at": at, "value": value, "region": region}) + "\n" for region, value, at in rows)


def answer_of(server: UpProcess, view: str, token: str, **options: Any) -> dict[str, Any]:
    with Reader(server.url) as reader:
        answer = reader.get(view, after=token, timeout_ms=20_000, **options)
    return {"/".join(series.labels.values()): series.value for series in answer.series}


def publish_ok(server: UpProcess, *arguments: str, **options: Any) -> dict[str, Any]:
    return report_of(pipeline("publish", *arguments, "--to", server.url, "--json", **options))


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    report: dict[str, Any] = json.loads(done.stdout)
    assert (report["complete"], report["error"], report["bad_lines"]) == (True, None, 0)
    return report


def naive(rows: Sequence[tuple[str, Any, int]], count: Callable[[list[tuple[Any, int]]], Any]) -> dict[str, Any]:
    by_region: dict[str, list[tuple[Any, int]]] = {}
    for region, value, at in rows:
        by_region.setdefault(region, []).append((value, at))
    return {region: count(values) for region, values in by_region.items()}


@pytest.mark.parametrize("format_", ["csv", "ndjson"])
@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("sum", lambda run: sum(value for value, _ in run)),
        ("min", lambda run: min(value for value, _ in run)),
        ("max", lambda run: max(value for value, _ in run)),
        ("mean", lambda run: sum(value for value, _ in run) / len(run)),
        ("last", lambda run: max((at, value) for value, at in run)[1]),
    ],
)
def test_every_kind_from_a_file(
    here: Here,
    server: UpProcess,
    tmp_path: Path,
    kind: str,
    format_: str,
    count: Callable[[list[tuple[Any, int]]], Any],
) -> None:
    """The view equals a naive count of the rows, for each kind and format; ints are exact at any size."""
    file = tmp_path / f"rows.{format_}"
    file.write_text(csv_of(ROWS) if format_ == "csv" else ndjson_of(ROWS))
    view = f"file_{kind}_{format_}"
    options = ["--ts", "at"] if kind == "last" else []
    arguments = ("--kind", kind, "--value", "value", "--labels", "region", *options, str(file))
    report = report_of(here("publish", view, "--to", server.url, "--json", *arguments))
    assert (report["lines"], report["deltas"]) == (len(ROWS), len(ROWS))
    assert report["acknowledged_line"] == report["last_line"] == file.read_text().count("\n")
    assert report["batches"] == len(Token.parse(report["token"]).next_offsets)
    assert answer_of(server, view, report["token"]) == naive(ROWS, count)


def test_a_pipe_and_the_text_report(server: UpProcess) -> None:
    """Standard input works as a file does; the report has lines, deltas, batches and the token."""
    arguments = ("publish", "piped", "--to", server.url, "--value", "value", "--labels", "region", "-")
    done = pipeline(*arguments, input=csv_of(ROWS))
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    assert first.startswith("published piped: 7 lines, 7 deltas in 3 entries of ")
    token = second.removeprefix("token ")
    assert answer_of(server, "piped", token) == naive(ROWS, lambda run: sum(value for value, _ in run))


def test_standard_input_can_be_a_file(server: UpProcess, tmp_path: Path) -> None:
    """`< FILE` is read from its present position, twice, as FILE is."""
    file = tmp_path / "rows"
    file.write_text("not,this\n" + csv_of(ROWS))
    with file.open("rb") as stream:
        stream.readline()
        script = ("publish", "redirected", "--to", server.url, "--value", "value", "--json", "-")
        done = _with_stdin(script, stream.tell(), file)
    assert done["complete"]
    assert answer_of(server, "redirected", done["token"]) == {"": sum(value for _, value, _ in ROWS)}


def _with_stdin(arguments: Sequence[str], offset: int, file: Path) -> dict[str, Any]:
    fd = os.open(file, os.O_RDONLY)
    try:
        os.lseek(fd, offset, os.SEEK_SET)
        done = subprocess.run(
            [*PROGRAM, *arguments], stdin=fd, capture_output=True, env=environment(), timeout=60, check=True
        )
    finally:
        os.close(fd)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def test_without_a_value_lines_are_counted(server: UpProcess) -> None:
    """A sum without --value counts 1 a row; labels may be named other than their columns."""
    report = publish_ok(server, "counted", "--labels", "where=region", "--format", "ndjson", "-", input=ndjson_of(ROWS))
    assert answer_of(server, "counted", report["token"]) == naive(ROWS, len)
    with Reader(server.url) as reader:
        assert [view.labels for view in reader.views() if view.name == "counted"] == [("where",)]


@pytest.mark.parametrize("format_", ["csv", "ndjson"])
def test_items_from_a_pipe(server: UpProcess, format_: str) -> None:
    """A cell, or a JSON text or int, is an item unchanged; any other value is a bad line."""
    text = "user\ntea\n7\n07\ntea\n" if format_ == "csv" else '{"user":"tea"}\n{"user":7}\n{"user":"07"}\n{"user":"tea"}\n'
    for kind in ("distinct", "topk"):
        view = f"items_{kind}_{format_}"
        options = ("--to", server.url, "--kind", kind, "--value", "user", "--format", format_, "--json", "-")
        done = pipeline("publish", view, *options, input=text)
        assert done.returncode == 0, done.stderr
        value = answer_of(server, view, json.loads(done.stdout)["token"])[""]
        items = [{"item": "tea", "count": 2, "upper": 2}, {"item": "07", "count": 1, "upper": 1}]
        assert value in (
            {"estimate": 3, "lower": 3, "upper": 3},
            {"total": 4, "items": [*items, {"item": "7", "count": 1, "upper": 1}]},
        )
        bad = pipeline("publish", view, *options, input="user\n" + "x" * 300 if format_ == "csv" else '{"user":1.5}')
        assert bad.returncode == 1
        assert "an item" in bad.stderr


def test_values_of_kind_last(server: UpProcess) -> None:
    """Values are text, numbers, bools and null, from either format."""
    values = {"a": "on", "b": 12, "c": 0.5, "d": True, "e": None, "f": "12", "g": BIG}
    csv_text = f'k,v\na,on\nb,12\nc,0.5\nd,true\ne,null\nf,"""12"""\ng,{BIG}\n'
    ndjson = "".join(json.dumps({"k": key, "v": value}) + "\n" for key, value in values.items())
    for view, format_, text in (("last_csv", "csv", csv_text), ("last_ndjson", "ndjson", ndjson)):
        options = ("--kind", "last", "--value", "v", "--labels", "k", "--format", format_, "-")
        report = publish_ok(server, view, *options, input=text)
        found = answer_of(server, view, report["token"])
        assert [(key, repr(value)) for key, value in found.items()] == [(key, repr(value)) for key, value in values.items()]


@pytest.mark.parametrize("ts", [None, 5])
def test_of_lines_of_one_time_the_later_wins(server: UpProcess, ts: int | None) -> None:
    """The later line wins, whichever value is larger, within and across runs; also when the file has the time."""
    view = f"newest_{ts}"
    for first, second in (("running", "done"), ("done", "running"), (1, 0), (0, 1)):
        text = "".join(json.dumps({"k": "x", "v": value, "t": ts or 0}) + "\n" for value in (first, second))
        options = (
            "--kind",
            "last",
            "--value",
            "v",
            "--labels",
            "k",
            *(["--ts", "t"] if ts else []),
            "--format",
            "ndjson",
            "-",
        )
        report = publish_ok(server, view, *options, input=text)
        assert answer_of(server, view, report["token"]) == {"x": second}


def test_a_line_far_ahead_of_now_is_bad(server: UpProcess, tmp_path: Path) -> None:
    """A time far ahead would silence its series: the line is reported before anything is sent, or left out."""
    file = tmp_path / "ahead.csv"
    file.write_text(f"v,t\n1,5\n2,{2**53}\n3,2100-01-01T00:00:00Z\n")
    arguments = ("publish", "ahead", "--to", server.url, "--kind", "last", "--value", "v", "--ts", "t", str(file))
    done = pipeline(*arguments)
    assert done.returncode == 1
    assert f"line 3: column t: {2**53} is too far ahead of now" in done.stderr
    assert "line 4: column t: 4102444800000 is too far ahead of now" in done.stderr
    done = pipeline(*arguments, "--skip-bad", "--json")
    report = json.loads(done.stdout)
    assert (report["lines"], report["bad_lines"]) == (1, 2)
    assert answer_of(server, "ahead", report["token"]) == {"": 1}


def test_many_lines_arrive_once(server: UpProcess, tmp_path: Path) -> None:
    """With more lines than any buffer or batch holds the view is exact, and each line is one delta."""
    count = 120_000
    file = tmp_path / "many.csv"
    file.write_text("n,k\n" + "".join(f"{n},{n % 5000}\n" for n in range(count)))
    limits = ("--set", "batch_bytes_max=8192", "--set", "buffer_bytes_max=2000000", "--set", "flush_interval_ms=20")
    report = publish_ok(server, "many", "--value", "n", "--labels", "k", *limits, str(file))
    assert (report["lines"], report["deltas"], report["last_line"]) == (count, count, count + 1)
    found = answer_of(server, "many", report["token"])
    assert found == {str(key): sum(range(key, count, 5000)) for key in range(5000)}


def test_a_view_that_is_there_is_kept(server: UpProcess) -> None:
    """Labels may come in another order; another kind, or other labels, are refused before anything is sent."""
    text = "a,b,v\nx,y,1\n"
    publish_ok(server, "kept", "--value", "v", "--labels", "a,b", "-", input=text)
    report = publish_ok(server, "kept", "--value", "v", "--labels", "b,a", "-", input=text)
    assert answer_of(server, "kept", report["token"]) == {"x/y": 2}
    for options, other in ((("--kind", "mean", "--labels", "a,b"), "mean(a, b)"), (("--labels", "a"), "sum(a)")):
        done = pipeline("publish", "kept", "--to", server.url, "--value", "v", *options, "-", input=text)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"pipeline: view kept is sum(a, b) at {server.url}, not {other}\n"


def test_a_view_with_several_definitions(server: UpProcess) -> None:
    """A run publishes to its own definition of a view beside others."""
    text = "a,b,v\nx,y,1\n"
    publish_ok(server, "several", "--value", "v", "--labels", "a", "-", input=text)
    with Publisher(server.url) as publisher:
        publisher.sum("several", labels=("a", "b")).add(10, a="x", b="y")
    with Publisher(server.url) as publisher:
        publisher.max("several").observe(5)
    for labels in ("a", "a,b"):
        report = publish_ok(server, "several", "--value", "v", "--labels", labels, "-", input=text)
    assert answer_of(server, "several", report["token"]) == {"x/": 2, "x/y": 11}
    done = pipeline("publish", "several", "--to", server.url, "--value", "v", "--labels", "b", "-", input=text)
    assert done.returncode == 2
    assert f"at {server.url}, not sum(b)" in done.stderr


@pytest.mark.parametrize("format_", ["csv", "ndjson"])
def test_a_view_with_windows(server: UpProcess, format_: str) -> None:
    """Each row is in the window of its time, or of now; a run without window and retention has the view's."""
    view = f"visits_{format_}"
    rows = [
        ("x", 1, "2026-01-01T00:00:59Z"),
        ("x", 2, "2026-01-01T00:01:00+00:00"),
        ("x", 4, 1767225660001),
        ("y", 8, 1767225719999),
    ]
    if format_ == "csv":
        text = "page,n,at\n" + "".join(f"{page},{n},{at}\n" for page, n, at in rows)
    else:
        text = "".join(json.dumps({"page": page, "n": n, "at": at}) + "\n" for page, n, at in rows)
    plain = ("--value", "n", "--labels", "page", "--format", format_, "-")
    windows = ("--window-s", "60", "--retention-s", "1000000000")
    publish_ok(server, view, *windows, "--ts", "at", *plain, input=text)
    publish_ok(server, view, "--window-s", "60", "--ts", "at", *plain, input=text)
    report = publish_ok(server, view, *plain, input=text)
    with Reader(server.url) as reader:
        answer = reader.get(
            view, start="2026-01-01T00:00:00Z", end="2026-01-01T00:02:00Z", after=report["token"], timeout_ms=20_000
        )
        (listed,) = [it for it in reader.views() if it.name == view]
        assert (listed.window_s, listed.retention_s, listed.series_count) == (60, 10**9, 5)
        first = 1767225600000
        points = {series.labels["page"]: [list(point) for point in series.points] for series in answer.series}
        assert points["x"] == [[first, 2], [first + 60_000, 12]]
        assert points["y"] == [[first + 60_000, 16]]
    for options in (
        ("--window-s", "10"),
        ("--window-s", "0"),
        ("--retention-s", "5"),
        ("--window-s", "60", "--retention-s", "0"),
    ):
        done = pipeline("publish", view, "--to", server.url, *options, *plain, input=text)
        assert done.returncode == 2
        assert (
            f"view {view} is sum(page) in windows of 60 s, kept for 1000000000 s at {server.url}, not sum(page)"
            in done.stderr
        )
    ahead = pipeline(
        "publish", view, "--to", server.url, "--window-s", "60", "--ts", "at", *plain, input=text.replace("2026", "2099")
    )
    assert ahead.returncode == 1
    assert "is too far ahead of now" in ahead.stderr


def test_a_monotone_view(server: UpProcess) -> None:
    """--monotone defines a monotone view; a call that differs means another view; a negative value is a bad line."""
    text = "v\n1\n2.5\n"
    report = publish_ok(server, "rising", "--value", "v", "--monotone", "-", input=text)
    assert answer_of(server, "rising", report["token"]) == {"": 3.5}
    done = pipeline("publish", "rising", "--to", server.url, "--value", "v", "-", input=text)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"pipeline: view rising is monotone sum() at {server.url}, not sum()\n"
    done = pipeline("publish", "rising", "--to", server.url, "--value", "v", "--monotone", "-", input="v\n-1\n")
    assert done.returncode == 1
    assert "line 2: column v: a monotone sum takes no negative number" in done.stderr
    done = pipeline("publish", "risen", "--to", server.url, "--value", "v", "--kind", "max", "--monotone", "-", input=text)
    assert (done.returncode, "a max cannot be monotone" in done.stderr) == (2, True)
    listed = pipeline("get", "--from", server.url).stdout
    assert ["rising", "monotone", "sum", "1"] in [line.split() for line in listed.splitlines()]


def test_going_on_at_a_line(server: UpProcess) -> None:
    """--start-line takes the header from line 1 and the rows from line N, and ignores the lines in between."""
    report = publish_ok(server, "late", "--value", "v", "--start-line", "4", "-", input="v\n1\nbad\n4\n8\n")
    assert (report["lines"], report["last_line"]) == (2, 5)
    assert answer_of(server, "late", report["token"]) == {"": 12}


def test_nothing_to_publish(server: UpProcess) -> None:
    """A header, or an NDJSON file, without rows publishes nothing and succeeds."""
    for options, text in ((("--value", "v"), "v\n"), (("--format", "ndjson"), "")):
        report = publish_ok(server, "nothing", *options, "-", input=text)
        assert (report["lines"], report["batches"], report["token"]) == (0, 0, "")


def test_into_a_folder_that_a_server_folds_later(tmp_path: Path) -> None:
    """`embedded:DIR` needs no server; the next `pipeline up` on it has everything. A folder in use is refused."""
    folder = tmp_path / "data"
    arguments = ("publish", "offline", "--to", f"embedded:{folder}", "--value", "v", "--json", "-")
    done = pipeline(*arguments, input="v\n1\n2\n")
    assert done.returncode == 0, done.stderr
    with UpProcess(folder) as up:
        assert answer_of(up, "offline", json.loads(done.stdout)["token"]) == {"": 3}
        refused = pipeline(*arguments, input="v\n1\n")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert f"in use by process {up.program.process.pid}" in refused.stderr


@pytest.mark.parametrize("piped", [False, pytest.param(True, marks=pytest.mark.long)])
def test_progress_on_a_terminal(server: UpProcess, tmp_path: Path, piped: bool) -> None:
    """A file shows its progress, lines, rate and time left; a pipe, whose end is unknown, lines and rate."""
    file = tmp_path / "rows.csv"
    file.write_text("v\n" + "1\n" * 200_000)
    arguments = ["publish", f"shown_{piped}", "--to", server.url, "--value", "v", "--json", "-" if piped else str(file)]
    terminal = Terminal()
    env = environment({"TERM": "xterm", "COLUMNS": "120"})
    command = ["bash", "-c", 'cat "$0" | "$@"', str(file)] if piped else []
    done = subprocess.run(
        [*command, *PROGRAM, *arguments], stdin=terminal.fd, stdout=subprocess.PIPE, stderr=terminal.fd, env=env, timeout=60,
        check=True,
    )  # fmt: skip
    shown = terminal.close()
    assert json.loads(done.stdout)["lines"] == 200_000
    rate = r"[\d,]+ lines, [\d,]+/s"
    if piped:
        assert re.search(rf"publishing {rate}\s", shown), shown
    else:
        for doing in ("checking", "publishing"):
            assert re.search(rf"{doing} \S*━\S* +[\d.]+/[\d.]+ \w+ {rate} +(\d+:\d\d:\d\d|-:--:--)", shown), shown
