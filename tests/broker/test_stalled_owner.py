"""Two owners of the same partitions: the later one counts, and the earlier one can do no harm, however it was stalled."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline import Publisher, Reader
from pipeline.publisher.views import SumSeries
from tests.broker.drive import PUBLISHER, Role, Sender, check, finish, loaded, server, torn_commits, wait_exit, worker
from tests.broker.kafka import App, create_topics

SEED = 44
PARTITIONS = 4
ATTEMPTS = 300
EXIT_S = 30.0
SERIES = 12_000
"""Number of series in a view that makes commits large, so that most of the time one is open."""


@pytest.mark.timeout(120)
def test_stalled_with_an_open_transaction(app: App, tmp_path: Path) -> None:
    """A worker that wakes up when another has taken over writes nothing and exits 3; back on its own store it is exact."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    small = {"kafka.batch.size": 4_096}  # many requests a commit, so that it can be stopped in the midst of them
    stalled, other = worker(app, tmp_path / "a", **small), worker(app, tmp_path / "b")
    with (
        stalled,
        Sender(app, "s", tmp_path) as sender,
        server(app, tmp_path / "server") as reads,
        Publisher(app.url, **PUBLISHER) as large,
    ):
        wide = large.sum("wide", labels=("n",))
        cells = [wide.labels(str(n)) for n in range(SERIES)]
        sender.wait_round()
        with loaded(app) as (publisher, loads):
            rounds = _stop_in_transaction(stalled, app, large, cells)
            with other:
                large.flush()
                _read(reads, large, rounds)  # what the stalled one had open is folded by the other
                stalled.program.signal(signal.SIGCONT)
                assert wait_exit(stalled, EXIT_S) == 3, stalled.tail()
                assert "Fenced" in stalled.tail() or "fenced" in stalled.tail(), stalled.tail()
                assert other.exit_code is None, other.tail()
                _read(reads, large, rounds)

                stalled.kill()
                stalled.start()  # on the store of its first life
                assert wait_exit(other, EXIT_S) == 3, other.tail()
                for cell in cells:
                    cell.add(1)
                load = finish(publisher, loads)
                check(app, [reads], tmp_path, load=load, senders=[sender])
                _read(reads, large, rounds + 1)
                assert stalled.exit_code is None, stalled.tail()


def _stop_in_transaction(role: Role, app: App, large: Publisher, cells: Sequence[SumSeries]) -> int:
    """Send SIGSTOP in the midst of a commit; return how often each of `cells` was added to."""
    rng = random.Random(SEED)
    rounds = 0
    for _ in range(ATTEMPTS):
        if rounds < 5 or rng.random() < 0.3:
            rounds += 1
            for cell in cells:
                cell.add(1)
            large.flush()
        time.sleep(rng.uniform(0.0, 0.05))
        role.program.signal(signal.SIGSTOP)
        if torn_commits(app, PARTITIONS):
            time.sleep(0.2)  # the broker may be about to end it
            if torn_commits(app, PARTITIONS):
                return rounds
        role.program.signal(signal.SIGCONT)
    raise AssertionError(f"no commit was open in {ATTEMPTS} attempts; {role.tail()}")


def _read(role: Role, large: Publisher, rounds: int) -> None:
    """Check that every series of the large view is exact."""
    with Reader(role.url) as reader:
        answer = reader.get("wide", after=large.flush(), limit=SERIES, timeout_ms=30_000)
    wrong = [series for series in answer.series if series.value != rounds]
    assert not wrong, f"{len(wrong)} series are not {rounds}, such as {wrong[:3]}"
    assert len(answer.series) == SERIES
