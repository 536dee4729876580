"""kill -9 of a real process that records, drains and commits: what it was told is recorded is found, exactly."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

from pipeline.core.sequence import Outbox
from pipeline.producer.sealing import seal
from pipeline.producer.spool.leftover import Leftover, leftovers
from tests.producer.spool.recorder import THREADS
from tests.producer.spool.support import Task, claim, loaded, suffix
from tests.producer.support import ROOT

ROUNDS = 10


def _round(folder: Path, producer_id: str, live_s: float) -> Counter[int]:
    """Let a process record for so long, and kill it; how many deltas each thread was told are recorded."""
    out, into = os.pipe()
    counts: Counter[int] = Counter()
    with subprocess.Popen(
        [sys.executable, "-m", "tests.producer.spool.recorder", str(folder), producer_id, str(into)],
        cwd=ROOT,
        pass_fds=[into],
    ) as process:
        os.close(into)
        started = threading.Event()

        def read() -> None:
            while data := os.read(out, 65536):
                counts.update(data)
                started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(60)
        time.sleep(live_s)
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
        told += _round(folder, f"p{n}", 0.02 + 0.03 * n)
        for path in leftovers(folder):
            leftover = claim(path)
            assert not leftover.report.corrupt
            assert not leftover.report.bad_count
            outbox = Outbox.restored(leftover.producer_id, leftover.epoch, leftover.next_sequences, loaded(leftover))
            if n % 3 == 0 and path.name == f"p{n}":
                leftover.release()  # for the next round
                continue
            leftover.commit(seal(leftover.pending, outbox, partition_count=2, batch_bytes_max=10**6, now_ms=1))
            for sealed in [*outbox.pending()]:
                task.fold(leftover.load(sealed.partition, sealed.sequence))
                leftover.acknowledge([(sealed.partition, sealed.sequence)])
            leftover.remove()
    [path] = leftovers(folder)
    leftover = claim(path)
    task.take(loaded(leftover))
    counted = dict(task.states)
    for merged in leftover.pending:
        counted[merged.suffix] += merged.state
    leftover.release()
    for n in range(THREADS):
        # A delta can be recorded while its thread had no time to say so.
        assert 0 <= counted[suffix(n)] - told[n] <= ROUNDS, (n, counted, told)
