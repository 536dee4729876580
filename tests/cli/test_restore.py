"""Deleting the stores, but not the log, costs a restore and nothing else."""

import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

from pipeline.adapters.http import HttpReader
from pipeline.connect import Publisher
from tests.support import PROGRAM, Terminal, UpProcess, environment, everything, pipeline

SERIES = 6_000
PARTITIONS = 2


def fill(url: str) -> None:
    with Publisher(url) as publisher:
        revenue = publisher.sum("revenue", labels=("region", "product"))
        latency = publisher.mean("latency", labels=("host",))
        for n in range(SERIES):
            revenue.add(n, region=f"r{n % 7}", product=f"p{n}")
            latency.observe(n / 4, host=f"h{n % 11}")


def answers(url: str, *views: str) -> list[Any]:
    """Return every series of these views, once the whole log is folded."""
    with HttpReader(url) as reader:
        after = everything(reader)
        return [reader.get(view, limit=1_000_000, after=after).series for view in views]


def test_deleted_stores_come_back(tmp_path: Path) -> None:
    """On a terminal a restore shows entries, rate and time left of each partition; the state is equal afterwards."""
    data = tmp_path / "data"
    with UpProcess(data, "--partitions", str(PARTITIONS)) as up:
        fill(up.url)
        before = answers(up.url, "latency", "revenue")
        assert up.terminate() == 0
    assert [len(series) for series in before] == [11, SERIES]
    shutil.rmtree(data / "stores")

    terminal = Terminal()
    command = [*PROGRAM, "up", "--data", str(data), "--port", "0", "--json", "--set", "restore_fetch_count_max=200"]
    env = environment({"TERM": "xterm", "COLUMNS": "120"})
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=terminal.fd, env=env, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.search(r"http://[\d.:]+", process.stdout.readline())
            assert url is not None
            assert answers(url.group(), "latency", "revenue") == before
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()
    shown = terminal.close()
    for partition in range(PARTITIONS):
        assert re.search(rf"restore {partition} \S*━\S* [\d,]+ entries, [\d,]+/s +(\d+:\d\d:\d\d|-:--:--)", shown), shown
        done = re.search(rf"restored partition {partition}: ([\d,]+) entries in [\d.]+ s, [\d,]+/s", shown)
        assert done is not None, shown
        assert int(done[1].replace(",", "")) >= SERIES // PARTITIONS // 2
    assert re.search(r"\d:\d\d:\d\d", shown), "time left"
    verified = pipeline("verify", "--data", str(data))
    assert (verified.returncode, verified.stdout.count(": equal, ")) == (0, PARTITIONS), verified.stdout


def test_without_a_terminal_a_line_says_it(tmp_path: Path) -> None:
    """Without a terminal, a line for each partition says how many entries were restored; status shows none to come."""
    data = tmp_path / "data"
    with UpProcess(data, "--partitions", str(PARTITIONS)) as up:
        with Publisher(up.url) as publisher:
            publisher.sum("revenue", labels=("region",)).add(1, region="eu")
        before = answers(up.url, "revenue")
        up.kill()
        shutil.rmtree(data / "stores")
        up.start()
        assert "restored partition" in up.program.stderr()
        assert answers(up.url, "revenue") == before
        with HttpReader(up.url) as reader:
            assert all("restore" not in partition for partition in reader.status()["partitions"])
