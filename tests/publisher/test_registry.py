"""A publisher's own metrics in a registry of the app: any number of publishers, processes and forks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest

from pipeline import Invalid, Publisher
from tests.publisher.support import ROOT, Meter, wait_until


@pytest.fixture
def url(tmp_path: Path) -> str:
    """URL of a log that needs no server."""
    return f"embedded:{tmp_path / 'data'}"


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


def value(registry: CollectorRegistry, name: str, publisher: int, **labels: str) -> float | None:
    return registry.get_sample_value(f"pipeline_publisher_{name}", {**labels, "publisher": str(publisher)})


def test_publishers_share_a_registry(url: str, registry: CollectorRegistry) -> None:
    """Each publisher has its own series, by a number that is free again once it is closed; its counters never fall."""
    first, second = Publisher(url, registry=registry), Publisher(url, registry=registry, buffer_bytes_max=70_000)
    for pub, count in ((first, 3), (second, 5)):
        view = pub.sum(f"v{count}", labels=("a",))
        for i in range(count):
            view.add(1, a=str(i))
        pub.flush()
    assert [value(registry, "deltas_total", number) for number in (0, 1)] == [3, 5]
    assert [value(registry, "buffer_bytes_max", number) for number in (0, 1)] == [67_108_864, 70_000]
    assert value(registry, "dropped_total", 0, reason="rejected") == 0
    wait_until(lambda: value(registry, "series", 1) == 5)
    shown = generate_latest(registry).decode()
    assert 'pipeline_publisher_acknowledge_seconds_count{publisher="0"} ' in shown
    first.close()
    assert value(registry, "deltas_total", 0) == 3
    assert [value(registry, "series", number) for number in (0, 1)] == [0, 5]
    with Publisher(url, registry=registry) as third:
        third.sum("v3", labels=("a",)).add(1, a="0")
        third.flush()
        assert value(registry, "deltas_total", 0) == 4
        assert value(registry, "deltas_total", 2) is None
    second.close()
    assert "pipeline_publisher" not in generate_latest(REGISTRY).decode()  # other people's registries are theirs


def test_what_can_not_be_shown_is_refused(url: str, registry: CollectorRegistry) -> None:
    """Names that the app has, two places at once, and an object that is no registry are refused without a trace."""
    Counter("pipeline_publisher_retries", "The app's own.", registry=registry)
    before = generate_latest(registry)
    with pytest.raises(Invalid, match="registry: Duplicated timeseries"):
        Publisher(url, registry=registry)
    assert generate_latest(registry) == before
    other = CollectorRegistry()
    with pytest.raises(Invalid, match="metrics and registry"):
        Publisher(url, registry=other, metrics=Meter())
    with pytest.raises(Invalid, match="one of prometheus_client is needed, got int"):
        Publisher(url, registry=1)  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="unknown URL"):
        Publisher("nonsense:", registry=other)
    with Publisher(url, registry=other):
        assert value(other, "deltas_total", 0) == 0
        assert value(other, "deltas_total", 1) is None


def test_a_bridge_of_the_registry_leaves_them_out(url: str, registry: CollectorRegistry) -> None:
    """A bridge would change the publisher's metrics by publishing them, and would never be at rest."""
    jobs = Counter("jobs", "x", registry=registry)
    with Publisher(url, registry=registry) as pub:
        bridge = pub.bridge(registry, interval_ms=3_600_000)
        jobs.inc()
        bridge.collect()
        pub.flush()
        assert pub.local().keys() == {"jobs_total"}
        assert 'thread="bridge"' in generate_latest(registry).decode()


HEAD = """
import multiprocessing, os, signal, sys, threading
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from pipeline import Publisher
"""
CHILDREN = """
def work(publisher):
    publisher.sum("v").add(1)
    publisher.flush()

def child(url):
    work(Publisher(url, registry=REGISTRY, buffer_bytes_max=70_000))

if __name__ == "__main__":
    with Publisher("embedded:data", registry=REGISTRY, buffer_bytes_max=100_000) as publisher:
        work(publisher)
        for number in range(3):
            process = multiprocessing.get_context("spawn").Process(target=child, args=(f"embedded:data{number}",))
            process.start()
            process.join()
            assert process.exitcode == 0
            if number:
                mark_process_dead(process.pid)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        found = generate_latest(registry).decode()
        assert 'pipeline_publisher_deltas_total{publisher="0"} 4.0' in found, found
        assert 'pipeline_publisher_buffer_bytes_max{publisher="0"} 100000.0' in found, found
"""
FULL = """
registry = CollectorRegistry()
pub = Publisher("http://127.0.0.1:1", registry=registry, buffer_bytes_max=65_536, on_full="drop_newest")
view = pub.sum("v", labels=("a",))
count = 0

def drop(*_):
    global count
    view.add(1, a=os.urandom(8).hex())  # there is no room for one more: it is counted as dropped
    count += 1

def dropped():
    return registry.get_sample_value("pipeline_publisher_dropped_total", {"publisher": "0", "reason": "buffer_full"})
"""
FORKS = """
def drop_on():
    while True:
        drop()

for i in range(4):
    threading.Thread(target=drop_on, daemon=True).start()
sys.setswitchinterval(1e-6)
for i in range(100):
    pid = os.fork()
    if not pid:
        signal.alarm(20)  # a child that hangs ends with it
        generate_latest(registry)  # takes each lock there is
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0, f"child {i} hangs"
os._exit(0)
"""
SIGNALS = """
while not dropped():
    drop()
before, count = dropped(), 0
signal.signal(signal.SIGALRM, drop)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for i in range(10_000):
    view.add(1, a=os.urandom(8).hex())
signal.setitimer(signal.ITIMER_REAL, 0)
drop()
assert count > 10 and dropped() - before == 10_000 + count, (count, dropped() - before)
os._exit(0)
"""


@pytest.mark.parametrize("code", [CHILDREN, FULL + FORKS, FULL + SIGNALS], ids=["children", "fork", "signal"])
def test_multiprocess_mode(tmp_path: Path, code: str) -> None:
    """Counters add up over processes, gauges over those that live; forks and signal handlers find no lock taken.

    In this mode one lock of prometheus_client guards all metrics, for so long that a few forks would meet it.
    """
    script, files = tmp_path / "app.py", tmp_path / "metrics"
    script.write_text(HEAD + code)
    files.mkdir()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PROMETHEUS_MULTIPROC_DIR": str(files)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]
    assert "Traceback" not in done.stderr
