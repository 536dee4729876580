"""Everything at once, with threads switched as often as the interpreter can: the totals are exact."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.publisher.modes import MODES, SPOOL, send_spools, settings_of
from tests.publisher.support import FileLog, fold, run_script, same

SECONDS = 2.5

STRESS = """
import json, random
from collections import Counter
from pipeline.errors import Invalid

SERIES = 1_500
sys.setswitchinterval(1e-6)
pub = publisher(log, flush_interval_ms=2, flush_interval_min_ms=1, series_idle_ms=5, snapshot_interval_ms=5, **SETTINGS)
total, lowest = pub.sum("total", labels=("s",)), pub.min("lowest", labels=("s",))
mean, newest = pub.mean("mean", labels=("s",)), pub.last("newest", labels=("s",))
forked = total.labels("forked")
kept = [total.labels(str(i)) for i in range(50)]     # held for ever; the others come and go
end_s = time.monotonic() + SECONDS
sums, lows, means, stamps = Counter(), {}, {}, {}
lock = threading.Lock()
numbers = iter(range(10**9))
failures = []
tally = {}           # by thread: how often it began to add to "all", and how often that was done


def live(number):
    "A thread's whole life: some thousand deltas by every kind of handle, counted by itself, and handed in at the end."
    rng = random.Random(number)
    own, ended = Counter(), time.monotonic() + rng.random() * 0.1
    bound = total.labels(str(number % SERIES))
    mine = tally[number] = [0, 0]
    values = []
    while time.monotonic() < ended:
        for _ in range(40):
            s = rng.randrange(SERIES)
            v = rng.choice((1, -2, 2**70, 10**6) if s % 2 else (0.25, -3.5, 1, 1000.0))  # floats whose sums are exact
            (kept[s].add if s < 50 else total.labels(str(s)).add)(v)
            own[str(s)] += v
            for _ in range(20): bound.add(7)
            own[str(number % SERIES)] += 140
        mine[0] += 1
        total.add(1, s="all")
        mine[1] += 1
        label, value = str(s % 20), rng.randrange(-1000, 1000)
        lowest.observe(value, s=label)
        mean.labels(label).observe(value)
        values.append((label, value))
        if rng.random() < 0.02:
            pub.flush(30)
    newest.set(f"thread {number}", ts_ms=number + 1, s="only")
    with lock:
        for s, v in own.items(): sums[s] += v
        sums["all"] += mine[1]
        for label, value in values:
            lows[label] = min(value, lows.get(label, value))
            means.setdefault(label, []).append(value)
        stamps[number + 1] = f"thread {number}"


def come_and_go():
    while time.monotonic() < end_s:
        threads = [threading.Thread(target=live, args=(next(numbers),)) for _ in range(3)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()


def flush():
    while time.monotonic() < end_s:
        pub.flush(30)


def look():
    "Snapshots never fall, hold all that was recorded before they were taken, and nothing that was not recorded."
    last = 0
    while time.monotonic() < end_s:
        done, since_s = sum([mine[1] for mine in [*tally.values()]]), time.monotonic()
        wait_until(lambda: (time.monotonic() - since_s) * 1000 > total.local().age_ms, 60)
        now = total.local().get(("all",), 0)
        begun = sum([mine[0] for mine in [*tally.values()]])
        assert max(last, done) <= now <= begun, (last, done, now, begun)
        last = now
        time.sleep(0.001)


def open_and_close():
    "Publishers that close while others record to them: what `add` took before is sent, and then it raises."
    count = 0
    while time.monotonic() < end_s:
        other = publisher(log, **OTHER)
        cell = other.sum("closing").labels()
        taken = [0, 0]
        def record(i):
            try:
                while True:
                    cell.add(1)
                    taken[i] += 1
            except Invalid:
                pass
        threads = [threading.Thread(target=record, args=(i,)) for i in range(2)]
        for thread in threads: thread.start()
        wait_until(lambda: sum(taken) > 100)
        other.close(30)
        for thread in threads: thread.join()
        count += 1
        with lock: sums["taken"] += sum(taken)
    with lock: sums["closed"] = count


def fork():
    count = 0
    mine = forked
    while time.monotonic() < end_s:
        time.sleep(0.05)
        child = os.fork()
        if not child:
            signal.alarm(30)
            assert not total.local()
            mine.add(100)
            forked.add(1)
            total.add(10, s="forked")
            if count % 3 == 0: pub.flush(30)
            pub.close(30)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        count += 1
    with lock: sums["forked"] += 111 * count


def guarded(work):
    try:
        work()
    except BaseException as error:
        failures.append(repr(error))
        raise


works = [come_and_go, come_and_go, flush, flush, look, open_and_close, fork]
threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
for thread in threads: thread.start()
for thread in threads:
    thread.join(100)
    assert not thread.is_alive()
assert not failures, failures
pub.flush(30)
wait_until(lambda: total.local()["all",] == sums["all"], 60)
pub.close(30)
assert len(stamps) > 20 and sums["forked"] >= 111, (len(stamps), sums["forked"])
json.dump([sums, lows, {s: sum(v) / len(v) for s, v in means.items()}, stamps[max(stamps)]], sys.stdout)
"""


@pytest.mark.parametrize("mode", MODES)
def test_threads_flushes_closes_and_forks_at_once_are_exact(tmp_path: Path, mode: str) -> None:
    """Threads that come and go, by every handle, while others flush, close and fork: no delta is lost or sent twice."""
    path = tmp_path / "log"
    words = {
        "SECONDS": str(SECONDS),
        "SETTINGS": repr(settings_of(mode, tmp_path)),
        "OTHER": repr(settings_of(mode, tmp_path / "other")),
    }
    script = STRESS
    for word, text in words.items():
        script = script.replace(word, text)
    done = run_script(path, script, timeout_s=110)
    sums, lows, means, newest = json.loads(done.stdout)
    taken, closed = sums.pop("taken"), sums.pop("closed")
    send_spools(tmp_path / "spool", FileLog(path))
    send_spools(tmp_path / "other" / "spool", FileLog(path))
    found = fold(FileLog(path).read())
    assert not found.dead
    assert not found.duplicates or SPOOL in MODES[mode].values()
    totals = {s: total for (s,), total in found.of("total").items()}
    assert taken - 2 * closed <= found.of("closing")[()] <= taken  # each of two threads can be in the midst of an `add`
    same({s: total for s, total in totals.items() if total or s in sums}, sums)
    same({s: low for (s,), low in found.of("lowest").items()}, lows)
    same({s: value for (s,), value in found.of("mean").items()}, means)
    assert found.of("newest") == {("only",): newest}
