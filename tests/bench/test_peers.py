"""Foundations of the comparison with other tools: equal deltas, totals that are counted apart, and processes that end."""

import struct
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.core.codec import encode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import Definition, series_prefix, series_suffix
from tests.bench import growth
from tests.bench.children import Asked, Child, Failed
from tests.bench.peers import report, run
from tests.bench.peers.measurement import Measured, check
from tests.bench.peers.tools import TOOLS
from tests.bench.peers.work import VIEW, Work, expected, key, labels, value

TOTALS = {"region-1|product-0000001": 4, "warm-0|product-0000000": 5}


def test_expected_totals_are_those_of_a_naive_count() -> None:
    """Every delta of the warm-up and of the work counts once; with `once`, every series comes once."""
    for work in (Work(7, 100), Work(20, 20, once=True)):
        counted: dict[str, int] = {}
        for part, warm in ((work.warm_up(), True), (work, False)):
            for i in part.chosen():
                name = key(labels(i, warm=warm))
                counted[name] = counted.get(name, 0) + value(i)
        assert expected(work) == counted
        assert len(work.chosen()) == work.delta_count
    assert sorted(Work(20, 20, once=True).chosen()) == [*range(20)]


def test_one_wrong_total_fails_a_tool() -> None:
    """A total that is off by one, is missing, or belongs to no series fails the measurement."""
    swapped = dict(zip(TOTALS, reversed(TOTALS.values()), strict=True))
    check(dict(TOTALS), TOTALS)
    for wrong in ({**TOTALS, "region-1|product-0000001": 5}, {"warm-0|product-0000000": 5}, {**TOTALS, "more": 1}, swapped):
        with pytest.raises(Failed, match="WRONG TOTALS"):
            check(wrong, TOTALS)


def test_totals_are_read_from_each_tools_changelog() -> None:
    """The last entry of a key is its total, in the encoding of every tool; entries of other kinds are left out."""
    prefix = series_prefix(Definition(VIEW, "sum", ("product", "region")))
    ours = [
        (prefix + series_suffix(("product-0000001", "region-1")), 3),
        (prefix + series_suffix(("product-0000001", "region-1")), 4),
        (prefix + series_suffix(("product-0000000", "warm-0")), 5),
    ]
    keys = ["region-1|product-0000001", "region-1|product-0000001", "warm-0|product-0000000"]
    numbers = [3, 4, 5]
    written = {
        "ours, native": [(name, encode_states(KINDS["sum"], [state])[0]) for name, state in ours] + [(b"\x00", b"position")],
        "Kafka Streams": [(it.encode(), struct.pack(">q", n)) for it, n in zip(keys, numbers, strict=True)],
        "Quix Streams": [(f'{it}|"total"'.encode(), b"%d" % n) for it, n in zip(keys, numbers, strict=True)],
        "Faust": [(f'"{it}"'.encode(), b"%d" % n) for it, n in zip(keys, numbers, strict=True)],
    }
    for tool in TOOLS:
        if tool.name in written:
            assert tool.read(written[tool.name]) == TOTALS, tool.name


def test_a_report_holds_medians_ratios_and_what_failed(tmp_path: Path) -> None:
    """Figures are medians of the rounds; a skipped or failed tool stays in the report, with its reason."""
    found = report.Report("2026-01-01", "command", {"cores": "2", "cpu": "c", "python": "p", "system": "s"}, quick=False)
    found.says = {"ours, native": "here", "Faust": "stock"}
    runs = [Measured(1_000_000, 1, worker_s, 1, 2, 3, 4, restored=600, restore_cpu_s=2) for worker_s in (1, 9, 2)]
    found.measured = {"100 series": {"ours, native": runs, "Faust": [Measured(1_000, 0.01, 0.05, 0, 1, 3, 4)]}}
    found.latency_ms = {"Faust": [1.0, 2.0, 9.0]}
    found.skipped, found.failed = {"Quix Streams": "no pip"}, {("Faust", "latency"): "ended"}
    text = report.text(found)
    for line in (
        "| 100 series | ours, native | 1,000,000 | 3.00 | 1 | 1.00 | 2.00 | 1.00 | 3 | 4 | 500,000 |",
        "| 100 series | Faust | 1,000 | 60.00 | 20 |",
        "| ours, native | 600 | 300 | 1 |",
        "| Faust | 2.0 | 9.0 | 3 |",
        "- Quix Streams: skipped: no pip",
        "- Faust, latency: FAILED: ended",
    ):
        assert line in text, text
    report.save(found, text, tmp_path)
    assert ElementTree.parse(tmp_path / "peers.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"


def test_a_growing_cost_is_marked() -> None:
    """A cost over 1.5 times that of the reference size is marked in the table."""
    sizes = [
        growth.Size(100_000, 4, new_us=2),
        growth.Size(1_000_000, 4, new_us=2.9),
        growth.Size(10_000_000, 4, new_us=3.1),
    ]
    lines = growth.text(sizes, "command", quick=False).splitlines()[-3:]
    assert [" !" in line for line in lines] == [False, False, True]


def test_a_child_that_ends_is_an_error_and_none_is_left(tmp_path: Path) -> None:
    """A wait for a child ends when the child does, with its last words; the end of the context ends the child."""
    dies = "import sys; sys.exit('last words')"
    for kind in (Child, Asked):
        with kind("dies", tmp_path, [sys.executable, "-c", dies]) as child, pytest.raises(Failed, match="last words"):
            child.line(30)
    with Child("lives", tmp_path, [sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"]) as child:
        assert child.line(30) == "1"
        assert child.cpu_s() >= 0 < child.memory_mb("VmHWM")
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 30
    assert not Path(f"/proc/{child.pid}").exists()


@pytest.mark.long
def test_peers_and_growth_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Both benchmarks run at a tiny size on a broker, without tools that are fetched, and write tables and plots."""
    assert run.main(["--quick", "--tools", "ours", "--out", str(tmp_path)]) == 0
    assert "ours, plain" in capfd.readouterr().out
    assert growth.main(["--quick", "--out", str(tmp_path)]) == 0
    assert {it.name for it in tmp_path.iterdir()} >= {"peers.md", "peers.json", "peers.svg", "growth.md", "growth.json"}
