"""Faust's membership on a real broker: assignments when members come, go, die, and come back."""

from __future__ import annotations

import asyncio
import inspect
import logging
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import pytest
from aiokafka.consumer.fetcher import Fetcher
from aiokafka.protocol.group import LeaveGroupRequest
from confluent_kafka import Producer

from pipeline.adapters.faust import app as adapter
from tests.broker.kafka import App, Port, admin_client, create_topics
from tests.broker.member import SESSION_MS, Heard, Inside, Outside, settled
from tests.support import wait_until

PARTITIONS = 4
ALL = frozenset(range(PARTITIONS))


class Cold(Inside):
    """A member whose standbys do not become warm by themselves."""

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        self.heard.append(Heard("assigned", time.monotonic(), actives, standbys, generation))


@pytest.fixture
def topics(app: App) -> App:
    """An app whose topics are there."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    return app


@pytest.mark.parametrize("owner", adapter.PRIVATE, ids=lambda it: f"{it.__module__}.{it.__qualname__}")
def test_private_names(owner: type) -> None:
    """Every undocumented name of faust and aiokafka that the adapter relies on exists."""
    missing = [name for name in sorted(adapter.PRIVATE[owner]) if not hasattr(owner, name)]
    assert not missing, f"{owner.__module__}.{owner.__qualname__} has no {', '.join(missing)}: read what became of them"


def test_aiokafka_looks_at_paused_partitions_as_often_as_it_is_told() -> None:
    """aiokafka's fetcher waits between two looks for as long as the attribute says that the adapter sets."""
    source = inspect.getsource(Fetcher)
    assert "self._fetcher_timeout = fetcher_timeout" in source
    assert "backoff = self._fetcher_timeout" in source


def test_two_share(topics: App) -> None:
    """Two members have half of the partitions each, and keep the other half warm; each knows of both."""
    with Inside(topics, "a") as one:
        settled(one, partitions=PARTITIONS)
        assert one.actives == ALL
        assert one.standbys == frozenset()
        with Inside(topics, "b", url="http://127.0.0.1:8081") as two:
            settled(one, two, partitions=PARTITIONS)
            assert (len(one.actives), len(two.actives)) == (2, 2)
            assert (one.standbys, two.standbys) == (two.actives, one.actives)
            expected = [
                ("a", "", one.actives, one.standbys, ""),
                ("b", "http://127.0.0.1:8081", two.actives, two.standbys, ""),
            ]
            for member in (one, two):
                wait_until(lambda it=member: [tuple(m) for m in it.membership.members()] == expected, "both to be known")


def test_private_attributes(topics: App) -> None:
    """All used attributes of live objects exist, partitions are assigned and never fetched, and no topic is created."""
    producer = Producer({"bootstrap.servers": topics.bootstrap})
    for number in range(PARTITIONS):
        for name in ("deltas", "changelog"):
            producer.produce(topics.topic(name), value=b"x" * 1000, key=b"k", partition=number)
    assert producer.flush(10) == 0
    with Inside(topics, "a") as one:
        settled(one, partitions=PARTITIONS)
        app: Any = one.membership._faust
        consumer = app.consumer._thread._consumer
        coordinator = consumer._coordinator
        parts = {
            coordinator: ("generation", "_coordination_task", "_pending_exception", "_group_instance_id"),
            consumer._client: ("_conns", "_request_timeout_ms"),
            app.assignor: ("_member_urls",),
            app.tables.recovery: ("_generation_id",),
        }
        assert not [(owner, name) for owner, names in parts.items() for name in names if not hasattr(owner, name)]
        wait_until(app.tables.recovery.completed.is_set, "recovery to be over")
        time.sleep(2)  # in which a fetch would be done several times over
        assert len(consumer.assignment()) == 2 * PARTITIONS
        assert consumer.paused() == consumer.assignment()
        assert not consumer._fetcher._records
        assert {coordinator._subscription.subscription.assignment.state_value(tp).position for tp in consumer.paused()} == {
            0
        }
    listed = admin_client(topics.bootstrap).list_topics(timeout=10).topics
    assert {name for name in listed if topics.app in name} == {
        topics.topic(it) for it in ("deltas", "changelog", "dead-letters")
    }


LONG_SESSION_S = 45
SESSION: Mapping[str, Any] = {"session_timeout_ms": LONG_SESSION_S * 1000}
LONG_SESSION: Mapping[str, Any] = {"static": True, **SESSION}
"""Settings of members that must be back within their session, on a machine that may be busy."""


def test_third_joins_and_leaves(topics: App) -> None:
    """A third member is given partitions, and gives them back at once when it leaves in order; the others keep theirs."""
    with Inside(topics, "a", **SESSION) as one, Inside(topics, "b", **SESSION) as two:
        settled(one, two, partitions=PARTITIONS)
        before = one.actives, two.actives
        three = Inside(topics, "c", **SESSION)
        began_s = time.monotonic()
        with three:
            settled(one, two, three, partitions=PARTITIONS)
            joined_s = time.monotonic() - began_s
            assert three.actives
            assert one.actives <= before[0]
            assert two.actives <= before[1]
            began_s = time.monotonic()
        settled(one, two, partitions=PARTITIONS)
        left_s = time.monotonic() - began_s
        print(f"joined {joined_s:.2f} s, left {left_s:.2f} s")
        assert three.heard[-1].call == "revoked"
        assert left_s < LONG_SESSION_S * 0.8


def test_killed(topics: App) -> None:
    """The standby of a member that was killed with kill -9 gets its partitions once the session is over."""
    with Inside(topics, "a") as one, Outside(topics, "b") as two:
        settled(one, two, partitions=PARTITIONS)
        assert one.standbys == two.actives
        two.kill()
        killed_s = time.monotonic()
        settled(one, partitions=PARTITIONS)
        print(f"moved after {time.monotonic() - killed_s:.2f} s")
        assert time.monotonic() - killed_s < SESSION_MS / 1000 + 40


@pytest.mark.long
def test_static_restart(topics: App) -> None:
    """A static member that is killed with kill -9 and back within its session keeps its partitions; no other is called."""
    with Inside(topics, "a", **LONG_SESSION) as one:
        with Outside(topics, "b", **LONG_SESSION) as two:
            settled(one, two, partitions=PARTITIONS)
            had = two.actives
            calls = len(one.heard)
            two.kill()
        began_s = time.monotonic()
        with Outside(topics, "b", **LONG_SESSION) as again:
            wait_until(lambda: again.actives == had, "its old partitions")
            print(f"back after {time.monotonic() - began_s:.2f} s")
            assert len(one.heard) == calls
            again.leave()
            began_s = time.monotonic()
            settled(one, partitions=PARTITIONS)
            assert time.monotonic() - began_s < LONG_SESSION_S * 0.8  # asked to leave, a static member does


@pytest.mark.long
def test_static_leader_restart(topics: App) -> None:
    """A leader that is killed and back within the session keeps its partitions, and no other member is called."""
    with Outside(topics, "a", **LONG_SESSION) as one:
        settled(one, partitions=PARTITIONS)
        with Inside(topics, "b", **LONG_SESSION) as two:
            settled(one, two, partitions=PARTITIONS)
            had = one.actives
            calls = len(two.heard)
            one.kill()
            with Outside(topics, "a", **LONG_SESSION) as again:
                wait_until(lambda: again.actives == had, "its old partitions")
                assert len(two.heard) == calls


def test_same_name(topics: App) -> None:
    """If two members share a name, the earlier is fenced, and does not take the name back."""
    with Outside(topics, "a", static=True) as one:
        settled(one, partitions=PARTITIONS)
        with Inside(topics, "a", static=True) as two:
            settled(two, partitions=PARTITIONS)
            wait_until(lambda: one.failure, "the earlier to be told")
            assert one.failure.endswith("gave way to another worker of the same name: each needs its own")
            time.sleep(1)  # in which the later would be told that its name is taken
            assert two.actives == ALL
            assert not two.failure


def test_stopped_for_long(topics: App) -> None:
    """A member that stood still for longer than its session learns when it wakes that it is fenced."""
    with Outside(topics, "b", static=True) as two, Inside(topics, "a", static=True) as one:
        settled(one, two, partitions=PARTITIONS)
        two.signal(signal.SIGSTOP)
        settled(one, partitions=PARTITIONS)
        two.signal(signal.SIGCONT)
        wait_until(lambda: two.failure, "the sleeper to be told")
        assert two.failure.endswith("stood still for longer than its session")
        assert one.actives == ALL


@pytest.mark.parametrize("static", [True, False])
def test_forgotten(topics: App, static: bool) -> None:
    """A member that the broker has forgotten, as it does one that stood still, joins again, and both go on."""
    with Inside(topics, "a", static=static) as one, Inside(topics, "b", static=static) as two:
        settled(one, two, partitions=PARTITIONS)
        before = one.heard[-1].generation
        for member in (one, two):
            _make_forgotten(member)
        wait_until(lambda: one.failure + two.failure or (one.last and one.last.generation > before), "another round")
        settled(one, two, partitions=PARTITIONS)
        assert not one.failure + two.failure


def _make_forgotten(member: Inside) -> None:
    app: Any = member.membership._faust
    coordinator, loop = app.coordinator, app.consumer._thread.thread_loop
    request = LeaveGroupRequest(coordinator.group_id, coordinator.member_id)
    asyncio.run_coroutine_threadsafe(coordinator._send_req(request), loop).result(10)


def test_slow_listener(topics: App) -> None:
    """A listener that does not return from `on_revoked` holds the group up for its deadline, no longer."""
    held = threading.Event()

    class Slow(Inside):
        def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
            held.wait(20)
            super().on_revoked(partitions, timeout_s)

    with Slow(topics, "a", revoke_timeout_ms=500) as one:
        settled(one, partitions=PARTITIONS)
        began_s = time.monotonic()
        with Inside(topics, "b") as two:
            wait_until(lambda: len(two.actives) == 2, "the other to have its share")
            assert time.monotonic() - began_s < 18
            held.set()
            settled(one, two, partitions=PARTITIONS)


def test_warm_while_the_group_is_joined(topics: App) -> None:
    """A member that becomes warm for a partition in the middle of a rebalance gets that partition, too."""
    cold = Cold(topics, "b")

    class Telling(Inside):
        def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
            super().on_revoked(partitions, timeout_s)
            if cold.membership._ours.announced_warm == {0}:  # the other has joined, and waits for this member
                cold.membership.set_warm(frozenset({0, 1}))
                faust: Any = cold.membership._faust
                wait_until(faust.coordinator._rejoin_needed_fut.done, "the request", 2)

    with Telling(topics, "a") as one:
        settled(one, partitions=PARTITIONS)
        with cold:
            wait_until(lambda: cold.last is not None and one.last is not None, "both to be in the group")
            assert (one.actives, cold.actives) == (ALL, frozenset())
            wait_until(lambda: len(cold.membership.members()) == 2, "the others to be known")
            cold.membership.set_warm(frozenset({0}))
            settled(one, cold, partitions=PARTITIONS)
            assert cold.actives == {0, 1}


def test_no_broker() -> None:
    """A member that finds no broker says so; nothing hangs."""
    with closing(Port()) as port, Inside(App(f"127.0.0.1:{port.number}", "none"), "a") as one:
        wait_until(lambda: one.failure, "the failure")
        assert one.failure.startswith("Unavailable: membership in group 'none' ended: KafkaConnectionError")


@pytest.mark.parametrize("where", ["app", "stop", "coordinator"])
def test_crash_is_told(topics: App, where: str) -> None:
    """The end of Faust or of aiokafka's coordination is reported to the listener once, and `stop` still works."""
    with Inside(topics, "a") as one:
        settled(one, partitions=PARTITIONS)
        app: Any = one.membership._faust
        if where == "app":
            asyncio.run_coroutine_threadsafe(app.crash(RuntimeError("by hand")), one.membership._loop)
        elif where == "stop":
            asyncio.run_coroutine_threadsafe(app.stop(), one.membership._loop)
        else:
            app.in_consumer_thread(lambda: setattr(app.coordinator, "_pending_exception", RuntimeError("by hand")))
        wait_until(lambda: one.failure, "the failure")
        assert ("Faust was stopped" if where == "stop" else "by hand") in one.failure
        assert one.stop()
        assert [it.call for it in one.heard].count("failed") == 1
        assert not any(it.name.startswith("_Thread") for it in threading.enumerate())


def test_logs(topics: App, caplog: pytest.LogCaptureFixture) -> None:
    """A join and a leave of another member log nothing, not even a warning."""
    with Inside(topics, "a") as one:
        settled(one, partitions=PARTITIONS)
        with Inside(topics, "b") as two:
            settled(one, two, partitions=PARTITIONS)
        settled(one, partitions=PARTITIONS)
    assert not [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
