"""Users' agents on a real broker: every event they read is counted, whatever ends the worker."""

from __future__ import annotations

import asyncio
import itertools
import random
import signal
import time
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

import pipeline as pipeline_package
from pipeline.adapters.faust import agents as adapter
from pipeline.adapters.faust.app import Ours
from pipeline.core.codec import FORMAT
from tests.broker.agents import BOTH, FORMATS, PARTITIONS, SHOP, WAIT_S, Source, counted, metric, wait_counted
from tests.broker.drive import Role, server, wait_exit
from tests.broker.kafka import App, Broker, new_app
from tests.broker.test_workers import member, status
from tests.support import LONG, again_and_again, pipeline, wait_until

FAILING = """
import os, pipeline
app = pipeline.faust_app(on_error={on_error!r})
seen = app.publisher.sum("seen", labels=("id",))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"))
async def record(stream):
    async for order in stream:
        if order.get("bad"):
            raise KeyError("bad order")
        seen.add(1, id=str(order["id"]))
"""


def sending(source: Source, *, pause_s: float = 0.04) -> AbstractContextManager[None]:
    """Send events all the time, in rounds."""
    rounds = (range(number, number + 10) for number in itertools.count(0, 10))
    return again_and_again(lambda: source.send(next(rounds)), pause_s)


@pytest.mark.parametrize("owner", adapter.PRIVATE, ids=lambda it: f"{it.__module__}.{it.__qualname__}")
def test_private_names(owner: type) -> None:
    """Every undocumented name of faust and aiokafka that agents rely on exists."""
    missing = [name for name in sorted(adapter.PRIVATE[owner]) if not hasattr(owner, name)]
    assert not missing, f"{owner.__module__}.{owner.__qualname__} has no {', '.join(missing)}: read what became of them"


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_graceful_stop_counts_exactly(app: App, tmp_path: Path) -> None:
    """After SIGTERM, while events come and two agents work on one each, exactly what was recorded is committed."""
    source = Source(app, tmp_path, BOTH.format(pause_s=0.005))
    worker = source.worker("one", revoke_timeout_ms=20_000)  # agents are slow on a machine that is busy
    with server(app, tmp_path / "server") as reads, worker, sending(source):
        for last in (*[False] * (2 if LONG else 1), True):
            count = len(counted(reads))
            wait_until(lambda n=count: len(counted(reads)) > n + 100, "events to be counted", WAIT_S)
            worker.program.signal(signal.SIGTERM)
            assert wait_exit(worker, 30) == 0, worker.tail()
            worker.kill()
            done = sum(source.committed())
            wait_until(lambda n=done: sum(counted(reads).values()) >= n, "the last commit to be followed", WAIT_S)
            if last:
                break
            worker.start()
    source.write(BOTH.format(pause_s=0))
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        for view in ("seen", "also"):
            assert wait_counted(reads, source.places, worker, view=view) == dict.fromkeys(source.places, 1)


def test_private_attributes() -> None:
    """All attributes of live Faust objects that agents use exist."""

    async def look() -> None:
        app = pipeline_package.faust_app()
        loop = asyncio.get_running_loop()
        app.join("g", ours=Ours("deltas", "changelog", lambda _: None, FORMAT), loop=loop, broker="kafka://127.0.0.1:1")
        stream = app.stream(app.channel())
        parts = {
            app: ("_consumer", "_default_options", "_conf", "flow_control", "consumer_generation_id"),
            app.flow_control: ("_queues",),
            app.consumer: ("_unacked_messages", "_n_acked", "flow_active", "_not_ours"),
            app.consumer._thread: ("tp_last_committed_at", "thread_loop"),
            stream.channel.queue: ("_queue",),
            stream: (
                *(
                    "_skipped_value",
                    "_processors",
                    "_active_agens",
                    "_finalized",
                    "_passive",
                    "current_event",
                    "events_total",
                ),
                *("_on_stream_event_in", "_on_stream_event_out", "_on_message_out"),
            ),
        }
        missing = [f"{owner}.{name}" for owner, names in parts.items() for name in names if not hasattr(owner, name)]
        assert not missing

    asyncio.run(look())


@pytest.mark.long
@pytest.mark.timeout(120)
def test_formats(app: App, tmp_path: Path) -> None:
    """Agents read bytes, a record, and a codec of the app's own, one by one or in batches, from one topic."""
    source = Source(app, tmp_path, FORMATS)
    source.send(range(300))
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        for view in ("raw", "record", "codec"):
            assert wait_counted(reads, source.places, worker, view=view) == dict.fromkeys(source.places, 1)
        wait_until(source.all_committed, "everything to be committed", WAIT_S)


@pytest.mark.timeout(120)
def test_an_agent_that_returns(app: App, tmp_path: Path) -> None:
    """A worker whose agent returns, and so would read nothing more, exits with 3 and says so."""
    source = Source(app, tmp_path, SHOP.format(pause_s=0).replace("await asyncio.sleep(0)", "return"))
    source.send(range(5))
    with ExitStack() as ends:
        worker = source.worker("one")
        ends.callback(worker.__exit__)
        worker.start(wait_ready=False)
        assert wait_exit(worker, 60) == 3, worker.tail()
        assert "agent shop.record returned" in worker.tail()


@pytest.mark.timeout(120)
def test_a_full_buffer_slows_agents_down(app: App, tmp_path: Path) -> None:
    """With a buffer much smaller than what agents record nothing is refused, dropped or lost."""
    source = Source(app, tmp_path)
    source.send(range(2_000))
    small = {"buffer_bytes_max": 65_536, "batch_bytes_max": 4_096, "flush_interval_ms": 100}
    with server(app, tmp_path / "server") as reads, source.worker("one", **small) as worker:
        assert wait_counted(reads, source.places, worker) == dict.fromkeys(source.places, 1)
        assert metric(worker, "pipeline_agent_errors_total") == 0
        print(metric(worker, "pipeline_publisher_blocked_total"), "times blocked")


@pytest.mark.timeout(180)
def test_killed_at_random(app: App, tmp_path: Path) -> None:
    """No event is lost by kill -9, and only those that were not committed at a kill are counted twice."""
    chance = random.Random(1)
    source = Source(app, tmp_path, SHOP.format(pause_s=0.001))
    bounds: list[list[int]] = []
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        with sending(source):
            for _ in range(3 if LONG else 2):
                before = sum(source.committed())
                wait_until(lambda n=before: sum(source.committed()) > n, "a commit", WAIT_S)
                time.sleep(chance.uniform(0, 1.5))
                bounds.append(source.committed())
                worker.kill()
                worker.start(wait_ready=False)
        found = wait_counted(reads, source.places, worker)
        wait_until(source.all_committed, "everything to be committed", WAIT_S)
    twice = [number for number, times in found.items() if times != 1]
    print(f"{len(found)} events, {len(twice)} counted more than once, commits at kills {bounds}")
    assert min(found.values()) >= 1
    for number in twice:
        partition, offset = source.places[number]
        assert any(offset >= bound[partition] for bound in bounds), (number, partition, offset, bounds)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_two_workers_share_a_topic(app: App, tmp_path: Path) -> None:
    """A second worker gets its share of a topic with another partition count, and gives it back: all counts are exact."""
    source = Source(app, tmp_path, SHOP.format(pause_s=0.001))
    with server(app, tmp_path / "server") as reads, source.worker("one") as one, sending(source):
        wait_until(lambda: len(counted(reads)) > 100, "the first to count", WAIT_S)
        with source.worker("two") as two:
            wait_until(lambda: _recorded(two) > 50, "the second to count", WAIT_S)
            so_far = _recorded(one)
            wait_until(lambda: _recorded(one) > so_far + 50, "the first to go on", WAIT_S)
            two.program.signal(signal.SIGTERM)
            assert wait_exit(two, 30) == 0, two.tail()
        before = len(counted(reads))
        wait_until(lambda: len(counted(reads)) > before + 100, "the first to go on alone", WAIT_S)
        one.program.signal(signal.SIGTERM)
        assert wait_exit(one, 30) == 0, one.tail()
    with server(app, tmp_path / "server") as reads, source.worker("one") as one:
        found = wait_counted(reads, source.places, one)
    assert found == dict.fromkeys(source.places, 1)


def _shared(*roles: Role) -> None:
    def done() -> bool:
        held = [len(status(role).get("partitions", [])) for role in roles]
        return sum(held) == PARTITIONS and max(held) <= min(held) + 1

    wait_until(done, "the partitions to be shared", WAIT_S)


def _recorded(role: Any) -> int:
    return int(metric(role, "pipeline_publisher_deltas_total"))


@pytest.mark.long
@pytest.mark.timeout(120)
def test_raising_and_undecodable_are_told(app: App, tmp_path: Path) -> None:
    """Events at which an agent raises, and bytes that it can't decode, are logged with their place, counted, and done.

    However many such events come in a row, the worker goes on to the events after them.
    """
    source = Source(app, tmp_path, FAILING.format(on_error="skip"))
    source.send(range(20))
    source.send_raw(b"{", 3)
    source.send([1_000], bad=True)
    source.send(range(20, 40))
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        wanted = {*source.places} - {"1000"}
        assert wait_counted(reads, wanted, worker) == dict.fromkeys(wanted, 1)
        ends = [9, 8, 8, 9, 8]
        wait_until(lambda: source.committed() == ends, "the bad ones to be done", WAIT_S)
        assert metric(worker, "pipeline_agent_errors_total") == 2
        said = worker.program.stderr()
        assert f"agent shop.record failed at {source.topic}-0 offset 4: KeyError('bad order'); it counts as done" in said
        assert f"the value of {source.topic}-3 offset 4 can't be decoded" in said
        source.send(range(1_000, 4_000), bad=True)
        source.send(range(40, 60))
        wanted |= {*map(str, range(40, 60))}
        assert wait_counted(reads, wanted, worker) == dict.fromkeys(wanted, 1)
        wait_until(source.all_committed, "the burst to be done", WAIT_S)
        assert worker.exit_code is None


FILTERING = """
import os, pipeline
app = pipeline.faust_app()
single, taken = (app.publisher.sum(name, labels=("id",)) for name in ("single", "taken"))

def good(order):
    return 1 / (1 - order.get("bad", 0))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"))
async def record(stream):
    async for order in stream.filter(good):
        single.add(1, id=str(order["id"]))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"))
async def record_batches(stream):
    async for batch in stream.filter(good).take(10, within=0.2):
        for order in batch:
            taken.add(1, id=str(order["id"]))
"""


@pytest.mark.timeout(120)
def test_a_filter_that_raises(app: App, tmp_path: Path) -> None:
    """An event at which a filter raises is done, one by one and with `take`: later events are counted and committed."""
    source = Source(app, tmp_path, FILTERING)
    source.send(range(20))
    source.send([1_000], bad=1)
    source.send(range(20, 40))
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        wanted = {*source.places} - {"1000"}
        for view in ("single", "taken"):
            assert wait_counted(reads, wanted, worker, view=view) == dict.fromkeys(wanted, 1)
        wait_until(source.all_committed, "the bad one to be done", 20)
        assert worker.program.stderr().count(f" at {source.topic}-0 offset 4: ZeroDivisionError") == 2


class _Hung:
    async def flush(self) -> None:
        await asyncio.Event().wait()


def test_what_agents_sent_holds_no_rebalance_up() -> None:
    """A rebalance does not wait for Faust's producer to be flushed, which could take 20 minutes."""

    async def look() -> None:
        app = pipeline_package.faust_app()
        ours = Ours("deltas", "changelog", lambda _: None, format=1, revoke_timeout_s=0.05)
        app.join("g", ours=ours, loop=asyncio.get_running_loop(), broker="kafka://127.0.0.1:1")
        app._producer = _Hung()
        async with asyncio.timeout(5):
            await app._producer_flush(app.log)

    asyncio.run(look())


def test_a_rebalance_while_the_worker_leaves_begins_nothing() -> None:
    """Partitions that are revoked during a shutdown do not let agents begin anything after all."""

    async def look() -> None:
        app = pipeline_package.faust_app()
        ours = Ours("deltas", "changelog", lambda _: None, FORMAT)
        app.join("g", ours=ours, loop=asyncio.get_running_loop(), broker="kafka://127.0.0.1:1")
        consumer = app.consumer
        under_way = asyncio.Event()
        consumer._unacked_messages.add(under_way)
        leaving = asyncio.ensure_future(app.settle(60))
        await asyncio.sleep(0)
        assert consumer.settling
        await consumer.on_partitions_revoked(set())
        assert consumer.settling
        assert not app.settled
        leaving.cancel()

    asyncio.run(look())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["failed", pytest.param("decoded", marks=pytest.mark.long)])
def test_an_error_can_stop_the_worker(app: App, tmp_path: Path, what: str) -> None:
    """With on_error="stop" the worker exits 3 before the event, which is read again when the agent can do it."""
    source = Source(app, tmp_path, FAILING.format(on_error="stop"))
    source.send(range(20))
    if what == "failed":
        source.send([1_000], bad=True)
    else:
        source.send_raw(b"{", 0)
    source.send(range(20, 40))
    with server(app, tmp_path / "server") as reads, ExitStack() as ends:
        worker = source.worker("one")
        ends.callback(worker.__exit__)
        worker.start(wait_ready=False)
        assert wait_exit(worker, 60) == 3, worker.tail()
        told = {
            "failed": f"agent shop.record failed at {source.topic}-0 offset 4: KeyError('bad order'); the worker ends",
            "decoded": f"the value of {source.topic}-0 offset 4 can't be decoded",
        }
        assert told[what] in worker.program.stderr()
        assert source.committed()[0] <= 4
        worker.kill()
        source.write(SHOP.format(pause_s=0))
        worker.start()
        wait_counted(reads, source.places, worker)


TAKING = """
import asyncio, os, pipeline
app = pipeline.faust_app(on_error="stop")
seen = app.publisher.sum("seen", labels=("id",))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"))
async def record(stream):
    async for batch in stream.take(10, within=0.2):
        for order in batch:
            if order.get("bad"):
                raise KeyError("bad order")
            await asyncio.sleep(1e6 if order.get("slow") else 0)
            seen.add(1, id=str(order["id"]))
"""


@pytest.mark.long
@pytest.mark.timeout(120)
def test_an_error_at_a_batch_can_stop_the_worker(app: App, tmp_path: Path) -> None:
    """A batch from `take` at which an agent raises, and the worker ends, is read again as a whole."""
    source = Source(app, tmp_path, TAKING)
    source.send([1_000], bad=True)
    source.send(range(5, 45, 5))  # of the same partition: the same batch
    with server(app, tmp_path / "server") as reads, ExitStack() as ends:
        worker = source.worker("one")
        ends.callback(worker.__exit__)
        worker.start(wait_ready=False)
        assert wait_exit(worker, 60) == 3, worker.tail()
        assert source.committed()[0] == 0
        worker.kill()
        source.write(SHOP.format(pause_s=0))
        worker.start()
        wait_counted(reads, source.places, worker)


@pytest.mark.timeout(120)
def test_a_batch_at_which_an_agent_raises(app: App, tmp_path: Path) -> None:
    """A batch at which an agent raises is done as a whole; later batches are counted, and committed once they are done."""
    source = Source(app, tmp_path, TAKING.replace('"stop"', '"skip"'))
    source.send([1_000], bad=True)
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        wait_until(lambda: metric(worker, "pipeline_agent_errors_total") == 1, "the bad one", WAIT_S)
        for number in range(3):
            source.send(range(20 * number, 20 * number + 20))
            wanted = {*map(str, range(20 * number + 20))}
            assert wait_counted(reads, wanted, worker) == dict.fromkeys(wanted, 1)
        wait_until(source.all_committed, "all to be done", 20)
        before = source.committed()
        source.send([10_000], slow=True)
        source.send(range(60, 80))
        time.sleep(3)  # some commits
        assert source.committed() == before, "an agent is at them"


UNFIT = {
    "taken:app": "faust_app(broker=...): `pipeline worker` decides that",
    "absent:app": "agent absent.record reads topic nowhere-at-all, which does not exist",
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("where", UNFIT)
def test_apps_that_cannot_run(app: App, tmp_path: Path, where: str) -> None:
    """An app that a worker can't run is a usage error that says what to do."""
    Source(app, tmp_path)
    agent = "@app.agent(app.topic('nowhere-at-all'))\nasync def record(stream): ...\n"
    (tmp_path / "taken.py").write_text("import pipeline\napp = pipeline.faust_app(broker='kafka://elsewhere')")
    (tmp_path / "absent.py").write_text(f"import pipeline\napp = pipeline.faust_app()\n{agent}")
    arguments = ("worker", "--from", app.url, "--name", "one", "--data", str(tmp_path / "d"), "--port", "0", "-A", where)
    done = pipeline(*arguments, cwd=tmp_path)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert UNFIT[where] in " ".join(done.stderr.split()), done.stderr


FLUSHING = """
import os, time, pathlib, pipeline
app = pipeline.faust_app()
seen = app.publisher.sum("seen", labels=("id",))
recorded, flush, folder = 0, app.publisher.flush, pathlib.Path(os.environ["FOLDER"])

def slow_flush(timeout_s=10.0):
    before = recorded
    time.sleep(0.5)
    if (folder / "fail").exists():
        raise pipeline.Unavailable("as the test wants it")
    flush(timeout_s)
    with open(folder / "flushed", "a") as file:
        file.write(f"{before}\\n")

app.publisher.flush = slow_flush

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"))
async def record(stream):
    global recorded
    async for order in stream:
        seen.add(1, id=str(order["id"]))
        recorded += 1
"""


@pytest.mark.long
@pytest.mark.timeout(120)
def test_nothing_is_committed_before_its_flush(app: App, tmp_path: Path) -> None:
    """Only events recorded before a flush began are committed; while flushes fail none is, and the failure is logged."""
    source = Source(app, tmp_path, FLUSHING)
    flushed = tmp_path / "flushed"
    flushed.touch()
    env = {"FOLDER": str(tmp_path)}
    with server(app, tmp_path / "server") as reads, source.worker("one", env=env) as worker:
        with sending(source, pause_s=0.01):
            for _ in range(40):
                committed = sum(source.committed())
                covered = max(map(int, flushed.read_text().split()), default=0)
                assert committed <= covered, f"{committed} committed, and a flush of {covered} acknowledged"
                time.sleep(0.1)
            assert committed > 0
            (tmp_path / "fail").touch()
            time.sleep(1)  # for a flush that was under way
            committed = source.committed()
            wait_until(lambda: metric(worker, "pipeline_agent_commits_failed_total") > 2, "failures", WAIT_S)
            assert source.committed() == committed
            (tmp_path / "fail").unlink()
        wait_until(source.all_committed, "everything to be committed", WAIT_S)
        assert wait_counted(reads, source.places, worker) == dict.fromkeys(source.places, 1)
        assert "offsets are not committed yet: as the test wants it" in worker.program.stderr()


CONCURRENT = """
import asyncio, os, pipeline
app = pipeline.faust_app()
seen = app.publisher.sum("seen", labels=("id",))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"), concurrency=4)
async def record(stream):
    async for order in stream:
        await asyncio.sleep(1e6 if order["id"] == 6 else 0)
        seen.add(1, id=str(order["id"]))
"""


@pytest.mark.long
@pytest.mark.timeout(120)
def test_an_event_that_is_overtaken_is_not_done(app: App, tmp_path: Path) -> None:
    """With concurrency, nothing is committed beyond an event that is still under way."""
    source = Source(app, tmp_path, CONCURRENT)
    source.send(range(60))
    with server(app, tmp_path / "server") as reads, source.worker("one") as worker:
        rest = {*source.places} - {"6"}
        wait_counted(reads, rest, worker)
        wait_until(lambda: source.committed() == [12, 1, 12, 12, 12], "the others to be committed", WAIT_S)
        time.sleep(2.5)  # two more commits
        assert source.committed()[1] == 1
        worker.program.signal(signal.SIGTERM)
        assert wait_exit(worker, 30) == 0, worker.tail()
        assert source.committed()[1] == 1
        worker.kill()
        source.write(SHOP.format(pause_s=0))
        worker.start()
        wait_counted(reads, source.places, worker)
        wait_until(lambda: sum(counted(reads).values()) == 70, "what was not committed to be counted again", WAIT_S)
        found = counted(reads)
    assert sorted(number for number, times in found.items() if times == 2) == sorted(str(6 + 5 * n) for n in range(1, 11))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_broker_is_away(broker: Broker, tmp_path: Path) -> None:
    """Through kill -9 of the broker and its return no worker ends, and no event is lost; few are counted twice."""
    source = Source(new_app(broker.bootstrap), tmp_path)
    patient = {
        "commit_timeout_ms": 120_000,
        "transaction_timeout_ms": 120_000,
    }  # on a machine that is busy a broker takes long to start
    with server(source.app, tmp_path / "server") as reads, source.worker("one", **patient) as worker:
        source.send(range(1_000))
        wait_counted(reads, source.places, worker)
        source.send(range(1_000, 3_000))
        broker.kill()
        time.sleep(3)
        broker.start()
        source.send(range(3_000, 3_100))
        found = wait_counted(reads, source.places, worker)
        wait_until(source.all_committed, "everything to be committed", WAIT_S)
        assert worker.exit_code is None, worker.tail()
        assert min(found.values()) >= 1
        print(sum(times > 1 for times in found.values()), "counted more than once")


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_worker_without_agents_beside_it(app: App, tmp_path: Path) -> None:
    """Members that run agents and members that do not share the deltas; the topics of agents go to those that run them."""
    source = Source(app, tmp_path)
    source.send(range(500))
    with server(app, tmp_path / "server") as reads, member(app, tmp_path, "plain") as plain, source.worker("one") as one:
        wait_counted(reads, source.places, one)
        _shared(plain, one)
        with source.worker("two") as two:
            _shared(plain, one, two)
            source.send(range(500, 1_000))
            wait_counted(reads, source.places, one, two)
            wait_until(lambda: _recorded(one) > 0 and _recorded(two) > 0, "both to have recorded", WAIT_S)
            assert plain.exit_code is None
