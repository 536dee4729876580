"""What was drained from the table is handed over once: not lost, and not sent twice, whatever comes in between."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import pipeline.publisher.fork as fork
from pipeline.errors import BufferFull, Invalid, Unavailable
from tests.producer.support import (
    FaultyLog,
    FileLog,
    fold,
    hurried_threads,
    in_threads,
    memory_log,
    partition_of,
    publisher,
    run_script,
    wait_until,
)


def test_a_fork_between_draining_and_sealing(tmp_path: Path) -> None:
    """What is in no batch yet is sent by the parent, once, and not by the child."""
    path = tmp_path / "log"
    run_script(
        path,
        """
pub = publisher(log)
view = pub.sum("v", labels=("who",))
main = view.labels("main")
main.add(1)
pub.flush()
delivery = pub._running.delivery
seal, held, go_on = delivery.seal_drafts, threading.Event(), threading.Event()

def stalled(drafts, now_ms):
    drafts = [*drafts]
    if drafts:
        held.set()
        assert go_on.wait(20)
    return seal(drafts, now_ms)

delivery.seal_drafts = stalled
main.add(10)
assert held.wait(20)
main.add(100)  # waits in the table
child = os.fork()
if not child:
    view.labels("child").add(1_000)
    main.add(10_000)
    pub.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
go_on.set()
pub.close()
""",
    )
    views = fold(FileLog(path).read())
    assert views.of("v") == {("main",): 10_111, ("child",): 1_000}
    assert views.duplicates == 0


def test_a_signal_handler_may_fork(tmp_path: Path) -> None:
    """It can come in the midst of recording; the child goes on from there with a table of its own."""
    path = tmp_path / "log"
    done = run_script(
        path,
        """
pub = publisher(log)
view = pub.sum("v", labels=("who",))
main, big = view.labels("main"), pub.sum("big").labels()
forks, in_child = 0, False

def fork(*_):
    global forks, in_child
    if in_child or forks == 12:
        return
    if os.fork() == 0:
        in_child = True
        view.labels("child").add(1)
    else:
        forks += 1
        signal.setitimer(signal.ITIMER_REAL, 0.003)

signal.signal(signal.SIGALRM, fork)
signal.setitimer(signal.ITIMER_REAL, 0.003)
count = 0
while not in_child and forks < 12:
    main.add(1)
    big.add(2**70)  # merged by a call
    count += 1
if not in_child:
    for _ in range(forks):
        assert os.wait()[1] == 0
pub.close()
if in_child:
    os._exit(0)
print(count, forks)
""",
    )
    count, forks = map(int, done.stdout.split())
    views = fold(FileLog(path).read())
    found = views.of("v")
    assert found["child",] == forks == 12
    assert count <= found["main",] <= count + forks  # a child repeats what it was in the midst of
    assert count <= views.of("big")[()] / 2**70 <= count + forks
    assert views.duplicates == 0


def test_two_threads_that_fork_release_what_they_hold_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when their hooks run in turns."""

    class Member:
        def __init__(self) -> None:
            self.holders: list[int] = []

        def hold(self) -> None:
            self.holders.append(threading.get_ident())

        def release(self) -> None:
            self.holders.remove(threading.get_ident())

        def close(self) -> None:
            raise AssertionError

        start_clean = close

    member = Member()
    monkeypatch.setattr(fork, "_all", lambda: [member])
    held, go_on = threading.Event(), threading.Event()

    def other() -> None:
        fork._before_fork()
        held.set()
        assert go_on.wait(20)
        fork._after_fork_in_parent()

    thread = threading.Thread(target=other)
    fork._before_fork()
    thread.start()
    assert held.wait(20)
    fork._after_fork_in_parent()
    assert member.holders == [thread.ident]
    go_on.set()
    thread.join(20)
    assert not member.holders


@pytest.mark.parametrize("way", ["bound", "keyed", "new series", "batch"])
def test_closing_while_threads_record(way: str) -> None:
    """Every delta whose call returned is in the log, whatever threads were in the midst of."""
    for _ in range(5):
        log = memory_log()
        pub = publisher(log, flush_interval_ms=1)
        view = pub.sum("v", labels=("a", "i"))
        recorded = [0] * 6
        begun = threading.Event()

        def work(t: int, view: Any = view, pub: Any = pub, recorded: Any = recorded, begun: Any = begun) -> None:
            if t == 0:
                assert begun.wait(20)
                pub.close()
                return
            series = view.labels(str(t), "0")
            i = 0
            while True:
                i += 1
                try:
                    if way == "bound":
                        series.add(1)
                    elif way == "keyed":
                        view.add(1, a=str(t), i=str(i % 10))
                    elif way == "new series":
                        view.add(1, a=str(t), i=str(i))
                    else:
                        recorded[t] += pub.record_batch(view, {"a": str(t), "i": [str(i)], "value": 1})
                        continue
                except Invalid:
                    return
                recorded[t] += 1
                if i == 200:
                    begun.set()

        if way == "batch":
            begun.set()
        with hurried_threads():
            in_threads(6, work)
        views = fold(log)
        assert sum(views.of("v").values()) == sum(recorded)
        assert views.duplicates == 0


def test_threads_that_wait_for_memory_when_it_closes() -> None:
    """They go on or are refused; what they recorded is in the log."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log, buffer_bytes_max=65_536, block_timeout_ms=20_000)
    view = pub.sum("v", labels=("t", "i"))
    recorded, refused = [0] * 4, [0] * 4

    def work(t: int) -> None:
        for i in range(2_000):
            try:
                view.add(1, t=str(t), i=str(i))
            except (Invalid, BufferFull):
                refused[t] += 1
            else:
                recorded[t] += 1

    threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    wait_until(lambda: pub._running.account.starved or sum(recorded) > 50)
    log.away = False
    wait_until(lambda: sum(recorded) > 2_000)
    pub.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sum(recorded) + sum(refused) == 8_000
    assert fold(log.log).total("v") == sum(recorded)


def test_a_flush_waits_for_partitions_that_have_enough_waiting() -> None:
    """Its barrier is behind what could not be drained at once."""
    log = FaultyLog()
    log.fate = lambda n, batch: Unavailable("away") if batch.partition == 0 else "kept"
    pub = publisher(log, flush_interval_ms=1)
    view = pub.sum("v", labels=("a",))
    stuck = next(str(i) for i in range(100) if partition_of(view, str(i)) == 0)
    other = next(str(i) for i in range(100) if partition_of(view, str(i)) == 1)
    count = 0
    while pub.stats()["waiting"] < 16:
        view.add(1, a=stuck)
        count += 1
    for _ in range(50):  # no further batch is sealed for it
        view.add(1, a=stuck)
        view.add(1, a=other)
    with pytest.raises(Unavailable):
        pub.flush(0.2)
    assert fold(log.log).of("v") == {(other,): 50}
    log.fate = lambda n, batch: "kept"
    pub.flush()
    assert fold(log.log).of("v") == {(stuck,): count + 50, (other,): 50}
    pub.close()


def test_what_could_not_be_sealed_is_counted_as_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """A close that gives up says so of what was drained too."""
    log = memory_log()
    pub = publisher(log, flush_interval_ms=1)

    def failing(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr("pipeline.publisher.batching.encode_drafted", failing)
    pub.sum("v").add(1)
    wait_until(lambda: pub._running.delivery._drafts)
    with pytest.raises(Unavailable):
        pub.close(0.1)
    assert pub._metrics.values[("pipeline_publisher_dropped_total", "closed")] == 1  # type: ignore[attr-defined]
