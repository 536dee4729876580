"""A publisher on Kafka in a process of green threads: none of its waits, which are in C, stops the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.topics import DELTAS
from tests.broker.kafka import App, create_topics, new_app
from tests.broker.log import fold, raw_records
from tests.publisher.test_green import PATCHES
from tests.support import ROOT, environment

SCRIPT = """
import sys, time
from pipeline import Publisher, Unavailable

beats = 0

def beat():
    global beats
    while True:
        sleep(0.001)
        beats += 1

def work(i):
    for n in range(200):
        view.add(1, who=str(n % 10))
        cell.add(1)
        if n % 50 == i:
            pub.flush(30)
        if n % 20 == 0:
            sleep(0)

def beats_while(call):
    before, started = beats, time.monotonic()
    call()
    print((beats - before) / (time.monotonic() - started), end=" ")

def nobody_answers():
    away = Publisher("kafka://127.0.0.1:1", close_timeout_ms=100)
    away.sum("v").add(1)
    try:
        away.flush(1)
    except Unavailable:
        return
    raise AssertionError("flushed to nobody")

beating = spawn(beat)
pub = Publisher(sys.argv[1], flush_interval_ms=5)
view = pub.sum("v", labels=("who",))
cell = view.labels("all")
beats_while(lambda: [wait(task) for task in [spawn(work, i) for i in range(4)]])
beats_while(lambda: sleep(0.5))  # there is nothing to do but to poll
beats_while(nobody_answers)
beating.kill()
cell.add(1_000)  # sent at exit
"""


@pytest.fixture
def own(kafka: str) -> App:
    """Fresh topics on a broker."""
    fresh = new_app(kafka)
    create_topics(kafka, fresh.app, 2)
    return fresh


@pytest.mark.parametrize("library", PATCHES)
def test_green_threads_go_on(own: App, tmp_path: Path, library: str) -> None:
    """Several green threads record and flush, the rest is sent at exit: exact, while another is never held up for long."""
    script = tmp_path / "green.py"
    script.write_text(PATCHES[library] + SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), own.url],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    each_s = [*map(float, done.stdout.split())]
    assert min(each_s) > 20, f"beats per second while others flush, while nothing happens, while nobody answers: {each_s}"
    expected = {("v", str(n)): 80 for n in range(10)} | {("v", "all"): 1_800}
    assert fold(raw_records(own.bootstrap, own.topic(DELTAS))).totals == expected
