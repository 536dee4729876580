"""The benchmarks run. Their numbers are for `pipeline bench`: a test has no quiet machine."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.bench.__main__ import BENCHMARKS, WITH_PLOTS, run
from tests.bench.measure import ROOT, Figure, at_least, at_least_times, at_most, at_most_times, cheaper

PIPELINE = [sys.executable, "-c", "from pipeline.cli import main; main()"]


QUICK = {"fold-unique", "heartbeat", "polling", "restore"}
"""Benchmarks that take least; the others are run before their numbers are written down."""


@pytest.mark.parametrize("name", [it if it in QUICK else pytest.param(it, marks=pytest.mark.long) for it in BENCHMARKS])
def test_a_benchmark_measures_something(name: str, tmp_path: Path) -> None:
    """Each benchmark runs at a small size, and has a baseline of its own; plots are SVG that loads nothing."""
    rows = run(name, quick=True, plots=tmp_path)
    assert rows
    plots = [*tmp_path.iterdir()]
    assert bool(plots) == (name in WITH_PLOTS)
    for plot in plots:
        assert ElementTree.parse(plot).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert not re.search(r"<script[^>]* (xlink:)?href|<link|<image|@import|url\([^#]", plot.read_text("utf-8"))
    for row in rows:
        assert row.measured.value > 0, row
        assert row.baseline.value > 0, row
        assert row.baseline.what, row


def test_targets_are_judged() -> None:
    """A target is met on its own side of the limit only."""
    five, ten = Figure(5, "ns"), Figure(10, "ns")
    assert [at_most("n", ten, five, limit).met for limit in (9, 10)] == [False, True]
    assert [at_least("n", ten, five, limit).met for limit in (10, 11)] == [True, False]
    assert [at_most_times("n", ten, five, limit).met for limit in (1.9, 2)] == [False, True]
    assert [at_least_times("n", ten, five, limit).met for limit in (2, 2.1)] == [True, False]
    assert [cheaper("n", five, ten, limit).met for limit in (2, 2.1)] == [True, False]


@pytest.mark.long
def test_the_command_prints_rows() -> None:
    """`pipeline bench --json` prints machine and rows; an unknown name is a usage error that lists the names."""
    done = subprocess.run([*PIPELINE, "bench", "restore", "--quick", "--json"], cwd=ROOT, capture_output=True, check=True)
    printed = json.loads(done.stdout)
    assert printed["machine"].keys() == {"cpu", "cores", "python", "system"}
    assert printed["rows"][0]["ratio"] > 0
    wrong = subprocess.run([*PIPELINE, "bench", "nothing"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "fold-unique" in wrong.stderr
