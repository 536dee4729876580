"""`pipeline watch`: a table with whole numbers on any terminal, lines in a pipe, and a lost connection that is said."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pipeline import Publisher, Reader
from pipeline.cli.live import ChangedLines
from pipeline.cli.live_table import LiveTable, Numbers, fit
from pipeline.core.answer import Answer, AsOf, Series
from pipeline.errors import Unavailable
from tests.cli.conftest import Here
from tests.preloaded import PROGRAM
from tests.support import HandClock, Program, UpProcess, wait_until
from tests.terminal import plain, record

BIG = 10**12 + 7


@pytest.fixture(scope="module")
def publisher(server: UpProcess) -> Iterator[Publisher]:
    with Publisher(server.url) as publisher:
        yield publisher


def sales(server: UpProcess, publisher: Publisher, name: str) -> Any:
    """Publish a view of two series of one label, and wait until both can be read."""
    view = publisher.sum(name, labels=("region",))
    view.add(BIG, region="eu")
    view.add(2, region="us\x1b[31m\t")
    with Reader(server.url) as reader:
        reader.get(name, after=publisher.flush())
    return view


def cells(program: Program) -> list[str]:
    return program.read_line().rstrip("\n").split("\t")


def test_changes_line_by_line(server: UpProcess, publisher: Publisher, tmp_path: Path) -> None:
    """In a pipe each new value is a line with its staleness, one that is gone is empty, and Ctrl-C ends it with code 0."""
    view = sales(server, publisher, "lines")
    with Program("watch", "lines", "--top", "1", "--from", server.url, stderr=tmp_path / "stderr") as program:
        assert cells(program) == ["region", "sum", "staleness_ms"]
        first = cells(program)
        assert (first[:2], first[2].isdecimal()) == (["eu", str(BIG)], True)
        view.add(1, region="eu")
        publisher.flush()
        assert cells(program)[:2] == ["eu", str(BIG + 1)]
        view.add(2 * BIG, region="us\x1b[31m\t")
        publisher.flush()
        assert cells(program)[:2] == ["us\\x1b[31m\\t", str(2 * BIG + 2)]
        assert cells(program)[:2] == ["eu", ""]
        program.signal(signal.SIGINT)
        assert (program.wait(), program.stderr()) == (0, "")


def test_json_lines(server: UpProcess, publisher: Publisher, tmp_path: Path) -> None:
    """With --json each line is a whole answer; `| head` ends the command silently."""
    view = sales(server, publisher, "as_json")
    with Program("watch", "as_json", "--total", "--json", "--from", server.url, stderr=tmp_path / "stderr") as program:
        assert json.loads(program.read_line())["series"] == [{"labels": {}, "value": BIG + 2}]
        view.add(3, region="ap")
        publisher.flush()
        while json.loads(program.read_line())["series"] != [{"labels": {}, "value": BIG + 5}]:
            continue
        assert program.process.stdout is not None
        program.process.stdout.close()
        view.add(3, region="ap")
        publisher.flush()
        assert (program.wait(), program.stderr()) == (1, "")


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("nothing_of_this_name",), 2, "no view 'nothing_of_this_name'"),
        (("wrong", "--by", "colour"), 2, "view wrong has no label 'colour'"),
        (("wrong", "--total", "--by", "region"), 2, "--total is one number"),
        (("wrong", "--start", "0"), 2, "view wrong has no windows"),
        (("wrong", "--after", "yesterday"), 2, "not a token"),
        (("wrong", "--from", "http://127.0.0.1:1"), 1, "http://127.0.0.1:1: ConnectionRefusedError"),
        (("wrong", "--from", "embedded:/nowhere"), 2, "not a data directory"),
        ((), 2, "VIEW"),
    ],
)
def test_a_wrong_call(
    here: Here, server: UpProcess, publisher: Publisher, arguments: tuple[str, ...], code: int, said: str
) -> None:
    """One line on standard error says what is wrong; exit code 2 if the call is wrong, 1 if the server can't answer."""
    sales(server, publisher, "wrong")
    done = here("watch", *arguments, *(() if "--from" in arguments else ("--from", server.url)))
    assert (done.returncode, done.stdout) == (code, "")
    assert said in done.stderr


def test_a_lost_connection(here: Here, tmp_path: Path) -> None:
    """A server that is killed and started again is said once each; what changed is printed. Stopped, it is printed once."""
    with UpProcess(tmp_path / "data") as up, Publisher(up.url) as publisher:
        view = sales(up, publisher, "lost")
        with Program("watch", "lost", "--total", "--from", up.url, stderr=tmp_path / "stderr") as program:
            assert [cells(program)[0] for _ in range(2)] == ["sum", str(BIG + 2)]
            up.kill()
            wait_until(lambda: "trying again, what was printed grows older" in program.stderr(), "it says that it is lost")
            up.start()
            view.add(1, region="eu")
            publisher.flush()
            assert cells(program)[0] == str(BIG + 3)
            wait_until(lambda: "answers come again" in program.stderr(), "it says that it is back")
            assert program.stderr().count("\n") == 2
            publisher.close()
            up.terminate()
        done = here("watch", "lost", "--total", "--from", f"embedded:{tmp_path / 'data'}")
    assert (done.returncode, done.stdout.split()[:3], done.stderr) == (0, ["sum", "staleness_ms", str(BIG + 3)], "")


def test_a_real_terminal(server: UpProcess, publisher: Publisher) -> None:
    """Each frame fits, at 80 columns and after a change to 60, with whole numbers; Ctrl-C leaves the last one behind."""
    view = sales(server, publisher, "shown")
    published = False

    def enough(written: bytes) -> bool:
        nonlocal published
        frame = plain(written.decode(errors="replace").rpartition("\x1b[H")[2])
        if not published and f"{BIG:,}" in frame:
            published = True
            view.add(5, region="eu")
            publisher.flush()
        return f"{BIG + 5:,}" in frame and any(it in frame for it in "▁▂▃▄▅▆▇█")

    (at_80, at_60), code = record([*PROGRAM, "watch", "shown", "--from", server.url], (80, 24), (60, 24), enough=enough)
    assert code == 0
    assert ((at_80 + at_60).count("\x1b[?1049h"), at_60.count("\x1b[?1049l")) == (1, 1)
    last = plain(at_60.partition("\x1b[?1049l")[2])
    assert f"{BIG + 5:,}" in last
    assert max(map(cell_len, last.splitlines())) <= 60
    assert max(cell_len(it) for frame in at_80.split("\x1b[H") for it in plain(frame).splitlines()) <= 80
    assert "us\\x1b[31m\\t" in last
    for word in plain(at_80.partition("\x1b[?1049h")[2] + " " + at_60).split():
        assert not word.startswith("1,0") or word in (f"{BIG:,}", f"{BIG + 5:,}")


def drawn(answer: Answer, width: int, height: int = 24, seconds: int = 3, problem: Any = None) -> list[str]:
    """Return the lines of a table that has shown an answer for some seconds."""
    clock = HandClock()
    with pytest.MonkeyPatch.context() as patch:
        console = Console(file=io.StringIO(), width=width, height=height, force_terminal=True, color_system=None)
        patch.setattr("pipeline.cli.console.out", console)
        table = LiveTable("http://127.0.0.1:8080", clock)
        table._newest = answer, problem, clock.monotonic_s()
        for _ in range(seconds):
            table.render()
            clock.s += 1
        with console.capture() as capture:
            console.print(table.render())
    return capture.get().splitlines()


HISTOGRAM = {"count": 10**6, "sum": 1.5, "min": -0.001, "max": 1e18, "mean": 1 / 3, "relative_error": 0.01}
HISTOGRAM["quantiles"] = {"0.5": 1234567.891, "0.9": 0.00001, "0.99": 5}  # type: ignore[assignment]
ITEMS = [{"item": f"item {i}" * 5, "count": 10**i, "upper": 10**i} for i in range(9, 0, -1)]
LABELS = {"route": "/a/long/one" * 9, "x": "\x1b[31m"}
KINDS: dict[str, Any] = {
    "sum": [2**200, -(2**300), 0.1, 12345.678],
    "max": [-1e300],
    "last": [None, True, "text" * 50, 7],
    "histogram": [HISTOGRAM],
    "distinct": [{"estimate": 1019, "lower": 987, "upper": 1054}],
    "topk": [{"total": 13, "items": ITEMS}, {"total": 0, "items": []}],
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [20, 40, 60, 80, 200])
def test_every_kind_on_every_terminal(kind: str, width: int) -> None:
    """No line is wider than the terminal, nothing steers it, and the value of each series is there."""
    series = [Series({**LABELS, "n": str(i)}, value=value) for i, value in enumerate(KINDS[kind])]
    answer = Answer("v" * 90, kind, None, series, AsOf(3, {}), series_total=10**6)
    points = [Series(it.labels, points=[(0, it.value), (1_000, it.value)]) for it in series]
    windowed = Answer("v", kind, None, points, AsOf(None, {}), start_ms=0, end_ms=3_000, step_ms=1_000, over_ms=1_000)
    for lines in (drawn(answer, width), drawn(windowed, width)):
        assert max(map(cell_len, lines)) <= width
        assert "\x1b" not in "".join(lines)
        rows = lines[-len(series) :]
        assert all(len(row.split()) >= 2 for row in rows[:1]), lines
    shown = "\n".join(drawn(answer, width))
    if kind == "sum":
        assert (f"{2**200:,}" if width == 200 else " 1.606e+60") in shown
        assert (f"{-(2**300):,}" if width == 200 else " -2.037e+90") in shown
    if kind == "histogram" and width >= 40:
        assert ("1,234,567.89" in shown, "1e-05" in shown) == (True, True)
    if kind == "topk" and width >= 60:
        assert "item 9item 9item… 1,000,000,000" in shown


def test_the_head_says_how_stale_and_how_much() -> None:
    """Staleness grows while no answer comes; series that find no room are counted, and a problem has its line."""
    answer = Answer("v", "sum", None, [Series({"n": f"{i}"}, value=i) for i in range(50)], AsOf(1_500, {}))
    lines = drawn(answer, 60, height=10, seconds=3, problem=Unavailable("http://127.0.0.1:8080: the connection was lost"))
    assert lines[1].rstrip() == "at most 5 s stale, 6 of 50 series"
    assert lines[2].startswith("trying again: http://127.0.0.1:8080: the connection")
    assert len(lines) == 10
    unknown = Answer("v", "sum", None, answer.series, AsOf(None, {}))
    assert drawn(unknown, 60)[1].startswith("staleness unknown, 20 of 50")
    assert "0 series" in drawn(Answer("v", "sum", (), [], AsOf(0, {})), 60)[1]


def test_rates_of_sums() -> None:
    """Changes per second are those between looks a second apart; in the time without answers there are none."""
    clock = HandClock()
    table = LiveTable("url", clock)
    for value, problem in ((0, None), (10, None), (10, Unavailable()), (10, Unavailable()), (40, None)):
        table._newest = Answer("v", "sum", None, [Series({}, value=value)], AsOf(0, {})), problem, clock.monotonic_s()
        table.render()
        clock.s += 1
    (samples,) = table._samples.values()
    assert [*samples.drawn] == [None, 10, 10]


@given(
    st.integers(0, 200),
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(12, 200),
)
def test_columns_fit(natural: int, widths: list[int], width: int) -> None:
    """Columns are left out until the rest fits; bars are there or at least eight wide; the first number always stays."""
    numbers = [Numbers(f"c{i}", ["9" * it]) for i, it in enumerate(widths)]
    first = numbers[0]
    name_width, bars_width = fit(natural, numbers, width, dispensable=("c2", "c1"))
    assert numbers[0] is first
    assert bars_width == 0 or 8 <= bars_width <= 40
    used = name_width + sum(it.width + 2 for it in numbers) + (bars_width + 2 if bars_width else 0)
    assert used <= width or (len(numbers) == 1 and first.width + 10 > width)
    assert name_width <= natural


def test_lines_of_points(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """Each new or changed point of a view with windows is a line; one that left the range is none; true is no 1."""
    lines = ChangedLines()
    head: dict[str, Any] = {"start_ms": 0, "end_ms": 3_000, "step_ms": 1_000, "over_ms": 1_000}
    for points in ([(0, 1), (1_000, None)], [(1_000, 1), (2_000, 7)], [(1_000, True), (2_000, 7)]):
        lines.take(Answer("v", "last", None, [Series({"x": "a"}, points=points)], AsOf(None, {}), **head))
    stamps = ["1970-01-01T00:00:00Z", "1970-01-01T00:00:01Z", "1970-01-01T00:00:02Z"]
    assert [it.split("\t") for it in capfdbinary.readouterr().out.decode().splitlines()] == [
        ["x", "start", "last", "staleness_ms"],
        ["a", stamps[0], "1", "unknown"],
        ["a", stamps[1], "null", "unknown"],
        ["a", stamps[1], "1", "unknown"],
        ["a", stamps[2], "7", "unknown"],
        ["a", stamps[1], "true", "unknown"],
    ]


def test_lines_of_points_without_a_value(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    """The titles come first, and the staleness of a row stands below its title, also if the row has no value."""
    head: dict[str, Any] = {"start_ms": 0, "end_ms": 3_000, "step_ms": 1_000, "over_ms": 1_000}
    for kind, value, fn in (("histogram", HISTOGRAM, None), ("sum", 1.5, "rate"), ("sum", None, "rate")):
        points = [(0, None), (1_000, value), (2_000, None)]
        ChangedLines().take(Answer("v", kind, None, [Series({"x": "a"}, points=points)], AsOf(5, {}), fn=fn, **head))
        titles, *rows = [it.split("\t") for it in capfdbinary.readouterr().out.decode().splitlines()]
        assert (titles[0], titles[-1]) == ("x", "staleness_ms")
        assert [(len(row), row[-1]) for row in rows] == [(len(titles), "5")] * 3
