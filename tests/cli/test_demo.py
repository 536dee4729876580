"""`pipeline demo`: the whole way on real input, compared with a count of its own."""

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import pipeline.cli.machine as machine
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader
from pipeline.cli.demo import parse_duration_s
from pipeline.cli.recount import Recorder, differences, expected_answers
from pipeline.cli.screen import ShownSeries, fitting, value_text
from pipeline.core.answer import Answer, AsOf, Series
from pipeline.core.kinds import KIND_NAMES
from pipeline.core.record import Definition
from pipeline.errors import Invalid, NotFound, NotReady
from tests.support import PROGRAM, Program, pipeline, wait_until
from tests.terminal import frames, plain, record

_FRAMES = 3
"""Frames on a terminal of each size: the first may have been begun for the one before."""


def start(tmp_path: Path, *arguments: str) -> Program:
    """Start a demo that reports in JSON, on a free port."""
    return Program("demo", "--json", "--port", "0", *arguments, stderr=tmp_path / "stderr", cwd=tmp_path)


def end(demo: Program) -> tuple[int, dict[str, Any]]:
    """Stop a demo, and return its exit code and summary."""
    code = demo.wait()
    assert demo.process.stdout is not None
    return code, json.loads(demo.process.stdout.read().splitlines()[-1])


def read(ask: Callable[[], Any]) -> Any:
    """Return the result of a read, or None while the server is not that far."""
    try:
        return ask()
    except (NotFound, NotReady):
        return None


def test_every_answer_equals_its_own_count(tmp_path: Path) -> None:
    """A run reports its deltas, finds every answer equal, exits with 0 and leaves nothing behind."""
    done = pipeline("demo", "--for", "3s", cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert "http://127.0.0.1:" in lines[0]
    assert "/docs" in lines[0]
    assert "staleness" in lines[1], "a line now and then, where there is no terminal"
    for what in ("deltas recorded", "batches sent", "entries stored", "series compared"):
        (line,) = [line for line in lines if line.startswith(what)]
        assert int(line.removeprefix(what).split()[0].replace(",", "")) > 0, line
    assert any("all equal to the demo's own count" in line for line in lines)
    assert [*tmp_path.iterdir()] == []


def test_small_terminals() -> None:
    """At 80x24 every view is on the screen with its whole name, and none is too large for a terminal that gets smaller."""
    sizes = [(80, 24), (60, 24), (20, 4)]
    demo = [*PROGRAM, "demo", "--port", "0"]
    shown: list[bytes] = []

    def enough(text: bytes) -> bool:
        if text.count(b"busiest") > 1:  # the view that is there last: it has differences of samples
            shown.append(text)
        return bool(shown) and text.count(b"page ") >= _FRAMES

    texts, code = record(demo, *sizes, enough=enough)
    for (width, height), text in zip(sizes, texts, strict=True):
        lines = [plain(it) for it in frames(text) if "page " in it][-1].removesuffix("^C").rstrip("\n").split("\n")
        assert len(lines) <= height
        assert max(map(len, lines)) <= width
        if width > 20:
            lacking = {it.view for it in machine.VIEWS} - {line.split()[0] for line in lines if line[:1].isalpha()}
            assert lacking <= {"disk_bytes", "network_bytes", "switches"}, "a sandbox may hide these"
    assert code == 0, texts[-1][-2_000:]


def test_interrupted_and_kept(tmp_path: Path) -> None:
    """Ctrl-C ends a run as its time does; all kinds are used; with --data the state stays, and verifies."""
    kept = str(tmp_path / "kept")
    with start(tmp_path, "--data", kept) as demo, HttpReader(json.loads(demo.read_line())["url"]) as reader:
        wait_until(lambda: {view.kind for view in read(reader.views) or ()} == {*KIND_NAMES}, "a view of each kind")
        demo.signal(signal.SIGINT)
        code, summary = end(demo)
    assert (code, summary["equal"], summary["differences"]) == (0, True, [])
    assert summary["series_compared"] > 0
    assert pipeline("verify", "--data", kept).returncode == 0


def test_a_delta_too_many_is_found(tmp_path: Path) -> None:
    """A delta that the demo did not record, in one of its series or in others, makes it exit with 1."""
    with start(tmp_path) as demo:
        url = json.loads(demo.read_line())["url"]
        with HttpReader(url) as reader:
            wait_until(lambda: read(lambda: reader.get("samples").value()), "a sample")
        planted = [
            {"view": "samples", "kind": "sum", "value": 1},
            {"view": "cpu_ms", "kind": "sum", "labels": {"process": "planted"}, "value": 5},
            {"view": "planted", "kind": "max", "value": 7},
        ]
        request = urllib.request.Request(
            f"{url}/v1/deltas", json.dumps(planted).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            assert answer.status == 200
        demo.signal(signal.SIGTERM)
        code, summary = end(demo)
    assert (code, summary["equal"], len(summary["differences"])) == (1, False, 3)
    said = "\n".join(summary["differences"])
    assert "samples{}: counted " in said
    assert 'cpu_ms{process="planted"}: the answer is 5, but nothing was counted' in said
    assert "planted: this view was not recorded" in said


def test_data_must_be_new(tmp_path: Path) -> None:
    """State of an earlier run would not be in the count, so its folder is refused and left alone."""
    (tmp_path / "VERSION").write_text("1\n")
    done = pipeline("demo", "--for", "1s", "--data", str(tmp_path))
    assert done.returncode == 2
    assert "new or empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["VERSION"]


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("20s", 20), ("1.5s", 1.5), ("2m", 120), ("1h", 3600)])
def test_durations(text: str, seconds: float) -> None:
    """--for takes a number and a unit."""
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "20", "s", "-1s", "0s", "1d", "1 s s", "nans", "1e3s"])
def test_other_durations_are_refused(text: str) -> None:
    """--for takes nothing else."""
    with pytest.raises(Invalid, match="--for"):
        parse_duration_s(text)


# The readings


class Sink:
    """Keeps the recorded deltas."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, Any, tuple[str, ...]]] = []

    def record(self, view: str, value: Any, *labels: str) -> None:
        self.rows.append((view, value, labels))


def test_counters_grow_and_never_fall() -> None:
    """The first look is a base line; a counter that was reset has grown by its value; one that is gone is forgotten."""
    growth = machine.Growth()
    assert growth.of({("a", ""): 100, ("b", ""): 5}) == []
    assert growth.of({("a", ""): 130, ("b", ""): 5}) == [(("a", ""), 30)]
    assert growth.of({("a", ""): 7}) == [(("a", ""), 7)]
    assert growth.of({("a", ""): 7, ("b", ""): 1_000}) == []


def test_a_process_counts_from_its_start_to_its_end(tmp_path: Path) -> None:
    """A process that began between two looks counts whole, and one that has ended takes nothing back."""
    program = tmp_path / "busy-in-a-test"  # its name is the link's: no other process has it
    program.symlink_to(Path(sys.executable).resolve())
    sink, source = Sink(), machine.Processes()
    source.sample(sink)
    assert {view for view, _, _ in sink.rows} == {"processes_seen"}, "what was used before is not this run's"
    sink.rows.clear()
    with subprocess.Popen([program, "-S", "-c", "while True: pass"]) as busy:
        try:
            watched = psutil.Process(busy.pid)
            wait_until(lambda: watched.cpu_times().user >= 0.2, "200 ms of CPU")
            source.sample(sink)
            name = watched.name()
        finally:
            busy.kill()
    assert sum(value for _, value, labels in sink.rows if labels == (name,)) >= 200
    source.sample(sink)
    used = [value for view, value, _ in sink.rows if view == "cpu_ms"]
    assert all(type(value) is int and value > 0 for value in used)
    assert [value[1] for view, value, _ in sink.rows if view == "busiest"] == used
    seen = [value for view, value, _ in sink.rows if view == "processes_seen"]
    assert len({*seen}) == len(seen), "each process is new once"


def test_sources_record_what_is_declared() -> None:
    """Each sample of this machine goes to a declared view, with its labels, as a value that adds up without rounding."""
    views = {definition.view: definition for definition in machine.VIEWS}
    for source in machine.samplers(SystemClock()):
        sink = Sink()
        try:
            source.sample(sink)
            source.sample(sink)
        except machine.NoCounters:
            continue
        for view, value, labels in sink.rows:
            assert len(labels) == len(views[view].labels), (view, labels)
            number = value[1] if views[view].kind == "topk" else value
            assert type(number) in (int, str, bool) or (type(number) is float and (number * 64).is_integer()), (view, value)


def test_a_machine_without_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler without counters to read says so."""
    monkeypatch.setattr(psutil, "disk_io_counters", lambda **_: None)
    monkeypatch.setattr(psutil, "net_io_counters", lambda **_: {})
    for read in (machine.read_disks, machine.read_network):
        with pytest.raises(machine.NoCounters):
            machine.Counters("name", "view", read).sample(Sink())


def test_names_of_others_are_made_printable() -> None:
    """A process can call itself anything; a label is valid Unicode without control characters."""
    assert machine.printable("a\x1b[2Jb\udc80") == "a?[2Jb?"
    assert machine.printable("") == "?"


# The count


class AnyView:
    """The parts of a publisher's view, and of its bound series, that a recorder needs."""

    def __init__(self, definition: Definition) -> None:
        self.definition = definition
        self.taken: list[tuple[Any, ...]] = []

    def labels(self, *_: str) -> "AnyView":
        return self

    def add(self, *value: Any) -> None:
        if value == (13,):
            raise Invalid("no thirteens")
        self.taken.append(value)

    observe = set = add


DEFINITIONS = [Definition(f"v_{kind}", kind, ("k",)) for kind in ("sum", "min", "max", "mean", "last")]


def test_counts_of_threads_add_up() -> None:
    """The counts of several recorders make the answer that each kind promises."""
    views = {definition.view: AnyView(definition) for definition in DEFINITIONS}
    recorders = [Recorder(views, SystemClock()) for _ in range(2)]
    for values, recorder in zip(([4, -1, 7], [2.5, 3]), recorders, strict=True):
        for definition in DEFINITIONS[:4]:
            for value in values:
                recorder.record(definition.view, value, "a")
    for value in ("x", True, "last"):
        recorders[0].record("v_last", value, "a")
    assert expected_answers(DEFINITIONS, recorders) == {
        "v_sum": {("a",): 15.5},
        "v_min": {("a",): -1},
        "v_max": {("a",): 7},
        "v_mean": {("a",): 3.1},
        "v_last": {("a",): "last"},
    }
    assert sum(recorder.delta_count for recorder in recorders) == 23
    times = [ts_ms for _, ts_ms in views["v_last"].taken]
    assert times == sorted(set(times)), "no two of one time"


def test_windows_and_histograms_are_counted_too() -> None:
    """Each window has its own count, and a quantile may be off by the error that the answer states, and no more."""
    by_second = Definition("v", "sum", ("k",), window_s=1)
    row = Series({"k": "a"}, None, points=[(1_000, 3), (2_000, 4)])
    answer = Answer("v", "sum", None, [row], AsOf(0, {}))
    assert [*differences(by_second, {("a", "1000"): 3, ("a", "2000"): 5}, answer)] == [
        'v{k="a", window="2000"}: counted 5, the answer is 4'
    ]
    times = Definition("h", "histogram")
    for p90, least, wrong in ((91.0, 1, ""), (97.0, 1, "quantile 0.9 is 90, the answer is 97.0"), (91.0, 2, "counted ")):
        found = {"count": 100, "sum": 5_050, "min": least, "max": 100, "quantiles": {"0.9": p90}, "relative_error": 0.02}
        answer = Answer("h", "histogram", None, [Series({}, found)], AsOf(0, {}))
        lines = [*differences(times, {(): [*range(1, 101)]}, answer)]
        assert len(lines) == bool(wrong)
        assert wrong in "".join(lines)


def test_sketches_are_counted_too() -> None:
    """A topk must answer its items' exact counts, or bounds that hold; a distinct exactly, beyond 256 items nearly so."""
    top = Definition("t", "topk")
    views = {"t": AnyView(top), "d": AnyView(Definition("d", "distinct"))}
    recorders = [Recorder(views, SystemClock()) for _ in range(2)]
    for recorder in recorders:
        for item, count in (("a", 3), ("b", 1), ("a", 2)):
            recorder.record("t", (item, count))
            recorder.record("d", item)
    expected = expected_answers([top, views["d"].definition], recorders)
    assert expected == {"t": {(): {"a": 10, "b": 2}}, "d": {(): {"a", "b"}}}

    def wrong(definition: Definition, own: Any, **found: Any) -> str:
        return "".join(differences(definition, {(): own}, Answer("v", "", None, [Series({}, found)], AsOf(0, {}))))

    counts = expected["t"][()]
    a, b = {"item": "a", "count": 10, "upper": 10}, {"item": "b", "count": 1, "upper": 2}
    assert wrong(top, counts, total=12, items=[a, b]) == ""
    assert "counted 12, the answer is 13" in wrong(top, counts, total=13, items=[a, b])
    assert 'item "b": counted 2, the answer is 0 to 0' in wrong(top, counts, total=12, items=[a])
    assert 'item "c": counted 0' in wrong(top, counts, total=12, items=[a, b, {"item": "c", "count": 1, "upper": 1}])
    distinct = views["d"].definition
    assert wrong(distinct, {"a", "b"}, estimate=2) == ""
    assert "counted 2, the answer is 3" in wrong(distinct, {"a", "b"}, estimate=3)
    many = {str(it) for it in range(1_000)}
    assert wrong(distinct, many, estimate=1_050) == ""
    assert "counted 1000, the answer is 1200" in wrong(distinct, many, estimate=1_200)


def test_every_view_gets_a_row_first() -> None:
    """Each view has its first series on the screen before any has its second, if there is too little room."""
    rows = [
        ShownSeries(view, "sum", str(n), n, None) for view, count in (("a", 3), ("b", 2), ("c", 1)) for n in range(count)
    ]
    assert [(it.view, it.value) for it in fitting(rows, 4)] == [("a", 0), ("a", 1), ("b", 0), ("c", 0)]
    assert fitting(rows, 99) == rows
    assert fitting(rows, -1) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (2.5, "2.50"),
        ([0, 1, 2], "▁▅█"),
        ({"quantiles": {"0.5": 1000.0, "0.9": 2000.0, "0.99": 3000.0}}, "p50 1,000, p90 2,000"),
        ({"items": [{"item": "\x1b[2J", "count": 1_000}, {"item": "b" * 20, "count": 1}]}, "\\x1b[2J 1,000"),
        ({"estimate": 5, "lower": 5, "upper": 5}, "5"),
        ({"estimate": 500, "lower": 480, "upper": 520}, "500 (480 to 520)"),
    ],
)
def test_values_on_the_screen(value: Any, text: str) -> None:
    """Values of each kind as text, with as many of their parts as there is room for."""
    assert value_text(value, 24) == text


def test_what_is_refused_is_not_counted() -> None:
    """A delta that the publisher refuses was never recorded."""
    recorder = Recorder({"v_sum": AnyView(DEFINITIONS[0])}, SystemClock())
    recorder.record("v_sum", 1, "a")
    with pytest.raises(Invalid):
        recorder.record("v_sum", 13, "a")
    assert (recorder.own, recorder.delta_count) == ({("v_sum", ("a",)): 1}, 1)


def test_differences_name_the_series() -> None:
    """Missing, extra and different series are named; so is an int where a float was counted, and an answer cut short."""
    rows = [Series({"k": "same"}, 1), Series({"k": "other"}, 2), Series({"k": "type"}, 3.0), Series({"k": "extra"}, 4)]
    answer = Answer("v_sum", "sum", None, rows, AsOf(0, {}), truncated=True, series_total=9)
    expected = {("same",): 1, ("other",): 1, ("type",): 3, ("missing",): 5}
    assert [*differences(DEFINITIONS[0], expected, answer)] == [
        "v_sum: only 4 of 9 series could be read",
        'v_sum{k="extra"}: the answer is 4, but nothing was counted',
        'v_sum{k="missing"}: counted 5, but there is no such series',
        'v_sum{k="other"}: counted 1, the answer is 2',
        'v_sum{k="type"}: counted 3, the answer is 3.0',
    ]
