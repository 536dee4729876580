"""The exactness drive in its short form: things fail under load, and every answer is exact."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import Token
from pipeline.core.answer import Answer, AsOf, Series
from pipeline.core.record import Batch, Control, Definition, Group, series_suffix
from tests.broker.chaos.__main__ import parse, plan
from tests.broker.chaos.ledger import PartitionLedger
from tests.broker.chaos.load import Acked, Came, History
from tests.broker.chaos.scenarios import ALL
from tests.broker.chaos.watch import Commits, Problems, Reads
from tests.broker.kafka import App
from tests.support import LONG, ROOT, environment

SHORT = ("--deltas=30000", "--commit-interval-ms=400", "--only", "kill", "broker_kill")
WHAT = ("--minutes=1.5", "--judge-pauses") if LONG else SHORT
SEED = 1
TIMEOUT_S = 540


@pytest.mark.timeout(TIMEOUT_S + 60)
@pytest.mark.usefixtures("kafka_jars")
def test_a_short_drive(tmp_path: Path) -> None:
    """The most frequent troubles, under load on 20,000 series, leave every answer exact, however long a drive takes."""
    command = [sys.executable, "-m", "tests.broker.chaos", f"--seed={SEED}", f"--keep={tmp_path}", *WHAT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment(), cwd=ROOT) as drive:
        try:
            out, _ = drive.communicate(timeout=TIMEOUT_S)
        except BaseException:
            drive.send_signal(signal.SIGTERM)  # so that it ends what it has started
            try:
                drive.wait(30)
            finally:
                drive.kill()
            raise
    print(out.decode(errors="replace"))
    assert drive.returncode == 0


def test_short_drives_have_what_matters_most() -> None:
    """A short drive begins with the required scenarios, whatever the seed; a long one has all, in any order."""
    for brokers in ("1", "3"):
        for seed in map(str, range(20)):
            fitting = [it for it in ALL if it.brokers in (0, int(brokers))]
            short = plan(parse(["--seed", seed, "--brokers", brokers, "--minutes", "3"]))
            first = [it for it in fitting if it.first]
            assert short[: len(first)] == first
            assert {it.name for it in short} == {it.name for it in fitting}
            long = plan(parse(["--seed", seed, "--brokers", brokers, "--minutes", "30"]))
            assert {it.name for it in long} == {it.name for it in fitting}


HISTORY = ((10.0, 5, 2, 1), (11.0, 9, 4, 3), (12.0, 20, 7, 8))
"""Acknowledgements: time, total, amount of one series, and next offset of partition 0."""


@pytest.fixture
def history() -> History:
    found = History()
    found.total = 25
    found.acked = [Acked(at_s, total, {("0", "0"): one}, Token({0: end}, "deltas")) for at_s, total, one, end in HISTORY]
    return found


def total(value: int, stale_ms: int | None) -> Answer:
    return Answer("chaos", "sum", [], [Series({}, value)], AsOf(stale_ms, {}))


def one(value: int, stale_ms: int) -> Answer:
    return Answer("chaos", "sum", None, [Series({"group": "0", "series": "0"}, value)], AsOf(stale_ms, {}))


@pytest.mark.parametrize(
    ("group", "answers", "wrong"),
    [
        (None, [total(9, 400), total(9, 400), total(20, 400), total(25, 0)], ""),
        (None, [total(9, 400), total(8, 2_000)], "went back"),
        (None, [total(8, 500)], "9 was acknowledged"),
        (None, [total(8, 600)], ""),
        (None, [total(26, 0)], "ever recorded"),
        (None, [total(20, None)], "without staleness"),
        ("0", [one(4, 400), one(4, 400), one(7, 0)], ""),
        ("0", [one(4, 400), one(3, 2_000)], "went back"),
        ("0", [one(3, 500)], "4 was acknowledged"),
        ("0", [one(3, 600)], ""),
        ("0", [one(4, 400), Answer("chaos", "sum", None, [], AsOf(2_000, {}))], "went back"),
    ],
)
def test_wrong_answers_are_noticed(history: History, group: str | None, answers: list[Answer], wrong: str) -> None:
    """Answers that go back, lack deltas acknowledged before their staleness began, or exceed the total are faults."""
    problems = Problems(print)
    reads = Reads("http://127.0.0.1:1", history, problems, 1)
    for answer in answers:
        reads.judge(group, answer, 11.55)
    assert len(problems.found) == bool(wrong)
    assert wrong in "".join(problems.found)


def test_two_owners_are_noticed(history: History) -> None:
    """A commit that does not go beyond the one before it is a fault."""
    problems = Problems(print)
    commits = Commits(App("127.0.0.1:1", "a"), 2, history, problems)
    for partition, position in ((0, 3), (0, 4), (1, 3), (1, 5)):
        commits.note(partition, position, 1.0)
    assert commits.positions() == {0: 4, 1: 5}
    assert commits.lag() == 4
    assert not problems.found
    commits.note(0, 4, 2.0)
    assert problems.found == ["partition 0 was committed at 4 behind 4"]


def test_a_new_owner_repairs(history: History) -> None:
    """A new owner's first commit may fold nothing; a second one that folds nothing, or one that goes back, is a fault."""
    problems = Problems(print)
    commits = Commits(App("127.0.0.1:1", "a"), 1, history, problems)
    for position, owner_id in ((3, "first"), (3, "second"), (4, "second")):
        commits.note(0, position, 1.0, owner_id)
    assert not problems.found
    commits.note(0, 4, 2.0, "second")
    commits.note(0, 3, 2.0, "third")
    assert problems.found == [f"partition 0 was committed at {position} behind 4" for position in (4, 3)]


def batch(sequence: int, amount: int = 0, *controls: Control, labels: tuple[str, ...] = ("n",)) -> Batch:
    """Return a batch of one delta, or none, of one series, or of orders."""
    group = Group(Definition("orders", "sum", labels), [series_suffix(("a",) * len(labels))], [amount])
    return Batch("p", 0, 0, sequence, 0, 0, [group] if amount else [], controls=[*controls])


def test_ledgers_go_by_the_order_of_the_log() -> None:
    """An order concerns what precedes it in the log; a delta or an order that comes again is not counted again."""
    drop, reset = Control("drop", "orders", "sum", ("n",)), Control("reset", "orders")
    found = PartitionLedger({"orders"})
    wide = ("n", "region")
    series = (("n", "a"),), (("n", "a"), ("region", "a"))
    steps: list[tuple[Batch, list[int | None]]] = [
        (batch(0, 5), [5, None]),
        (batch(1, 7, labels=wide), [5, 7]),
        (batch(0, 5), [5, 7]),
        (batch(2, 0, drop), [None, 7]),
        (batch(3, 1), [1, 7]),
        (batch(2, 0, drop), [1, 7]),
        (batch(4, 0, reset), [None, None]),
        (batch(1, 7, labels=wide), [None, None]),
        (batch(5, 2, labels=wide), [None, 2]),
        (batch(6, 0, Control("drop", "others")), [None, 2]),
    ]
    for step, wanted in steps:
        found.fold(step)
        states = {labels: state for mine in found.states.values() for labels, state in mine.items()}
        assert [states.get(it) for it in series] == wanted


@pytest.mark.parametrize(
    ("came", "since_s", "until_s", "pause_s"),
    [
        ([], 0.0, 9.0, 0.0),
        ([], 0.0, 30.0, 20.0),
        ([], 15.0, 30.0, 15.0),
        ([Came(10.5, 1), Came(11.25, 3), Came(14.0, 8)], 0.0, 30.0, 2.0),
        ([Came(10.5, 1), Came(11.25, 3), Came(14.0, 8)], 13.5, 30.0, 0.5),
        ([Came(10.5, 1), Came(11.25, 2)], 0.0, 30.0, 18.75),
    ],
)
def test_pauses_are_measured(history: History, came: list[Came], since_s: float, until_s: float, pause_s: float) -> None:
    """A pause is time with lag and without a commit, within the event; a partition without lag does not pause."""
    assert history.pauses({0: came}, since_s, until_s) == {0: pause_s}
