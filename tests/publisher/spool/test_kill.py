"""kill -9 of a real process that records, drains and commits: what it was told is recorded is found, exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from pipeline.publisher.spool.leftover import Leftover, leftovers
from tests.publisher.spool.recorder import THREADS
from tests.publisher.spool.support import Task, claim, suffix

ROOT = Path(__file__).resolve().parents[3]
ROUNDS = 10


def run(folder: Path, producer_id: str, count: int) -> Counter[int]:
    """Let a process record so many deltas, and kill it; how many each thread was told are recorded."""
    out, into = os.pipe()
    counts: Counter[int] = Counter()
    enough = threading.Event()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.publisher.spool.recorder", str(folder), producer_id, str(into)],
        cwd=ROOT,
        pass_fds=[into],
    ) as process:
        os.close(into)

        def read() -> None:
            while data := os.read(out, 65536):
                counts.update(data)
                if counts.total() > count:
                    enough.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert enough.wait(60)
        assert Leftover.claim(folder / producer_id) is None
        process.kill()
        process.wait()
        reader.join()
    os.close(out)
    return counts


def test_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    """Ten processes, killed at some time: of each series exactly what was acknowledged, and at most one more per thread."""
    folder, task, told = tmp_path / "s", Task(), Counter[int]()
    for n in range(ROUNDS):
        told += run(folder, f"p{n}", 1 + 997 * n)
        for path in leftovers(folder):
            leftover = claim(path)
            assert not leftover.report.corrupt
            assert not leftover.report.bad_count
            if n % 3 == 0 and path.name == f"p{n}":
                leftover.release()  # for the next round
            else:
                task.finish(leftover)
    for path in leftovers(folder):
        task.finish(claim(path))
    for n in range(THREADS):
        # A delta can be recorded while its thread had no time to say so.
        assert 0 <= task.states[suffix(n)] - told[n] <= ROUNDS, (n, task.states, told)
