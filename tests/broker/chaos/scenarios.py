"""Scenarios: things that happen to workers and broker, and what must come of them; exactness is checked after each."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from tests.broker.chaos.anew import anew_changelog, anew_deltas
from tests.broker.chaos.drive import Drive
from tests.broker.chaos.fleet import SESSION_MS
from tests.broker.chaos.hostile import clocks, garbage, noise, open_on_changelog, open_on_deltas, opinions, orders
from tests.broker.kafka import Broker
from tests.broker.throttled import OPEN_MS, WRITE_MS
from tests.support import wait_until

MOVED_S = 60.0
EXIT_S = 30.0
STALL_S = 18.0
BROKER_STOP_S = 12.0
AWAY_S = 3.0
"""Time for which a killed broker stays away."""
BLINK_S = (2.5, 4.5)
"""Slightly longer than brokers may be silent."""
STORM_S = 20.0
SLOW_S = 10.0
SLOW = {WRITE_MS: "300", OPEN_MS: "1000"}
AGAIN = 60


class Scenario(NamedTuple):
    """A scenario's name, its function and its number of brokers; 0: any."""

    name: str
    run: Callable[[Drive], None]
    brokers: int = 0
    first: bool = False
    """True if a short drive has the scenario."""


def duplicates(d: Drive) -> None:
    """Batches are sent again while nothing else happens: workers count exactly so many duplicates."""
    d.fleet.have(2)
    d.quiet()
    before = d.counted_duplicates()
    ends = d.again.send(AGAIN)
    d.wait_folded(ends)
    wait_until(lambda: d.counted_duplicates() - before >= AGAIN, "duplicates to be counted", MOVED_S)
    time.sleep(0.5)
    counted = d.counted_duplicates() - before
    assert counted == AGAIN, f"{AGAIN} batches were sent again, {counted} were counted as duplicates"
    d.say(f"  {AGAIN} batches sent again, {counted:g} duplicates counted")


def join(d: Drive) -> None:
    """A second and a third worker get their share."""
    d.fleet.have(1)
    for name in ("w2", "w3"):
        with d.event(f"join of {name}", 3.0):
            d.fleet.start(name)
            d.fleet.settled()


def leave(d: Drive) -> None:
    """A worker is asked to leave, commits, hands over and ends with 0."""
    d.fleet.have(3)
    for name in d.rng.sample(d.fleet.running, 2):
        numbers = d.fleet.owned(name).keys()
        with d.event(f"leave of {name}", 5.0, numbers):
            d.fleet.leave(name)
            d.fleet.settled()


def roll(d: Drive) -> None:
    """Each worker in turn is stopped and started again, as a deployment does."""
    d.fleet.have(2)
    for name in ("w1", "w2"):
        with d.event(f"roll of {name}", 5.0):
            d.fleet.leave(name)
            d.fleet.start(name)
            d.fleet.settled()


def kill(d: Drive) -> None:
    """A worker is killed with kill -9: its standby goes on once the session is over."""
    d.fleet.have(2)
    name = d.rng.choice(d.fleet.running)
    positions = d.fleet.owned(name)
    with d.event(f"kill -9 of {name}, a standby takes over", 10.0, positions):
        d.fleet.kill(name)
        d.wait_moved(positions)
        d.fleet.settled()
    with d.event(f"{name} is back", 3.0):
        d.fleet.start(name)
        d.fleet.settled()


def restart(d: Drive) -> None:
    """A worker is killed with kill -9 and started: back within its session, on a quick machine, it keeps its partitions."""
    before = d.fleet.have(2)
    name = d.rng.choice(d.fleet.running)
    positions = d.fleet.owned(name)
    with d.event(f"kill -9 and start of {name}", 4.0, positions):
        d.fleet.kill(name)
        d.fleet.start(name)
        d.wait_moved(positions)
    after = d.fleet.settled()
    in_time = d.pauses[-1].took_s < SESSION_MS / 1000
    assert after == before or not in_time, f"partitions moved from {before} to {after}"


def kill_two(d: Drive) -> None:
    """Two of three workers are killed with kill -9, and come back some seconds later."""
    d.fleet.have(3)
    names = d.rng.sample(d.fleet.running, 2)
    with d.event(f"kill -9 of {' and '.join(names)}"):
        d.fleet.kill(*names)
        time.sleep(d.rng.uniform(0.0, 8.0))
        for name in names:
            d.fleet.start(name)
        d.fleet.settled()


def kill_all(d: Drive) -> None:
    """All workers are killed with kill -9, and come back, one without its disk."""
    d.fleet.have(2)
    names = d.fleet.running
    with d.event("kill -9 of all"):
        d.fleet.kill(*names)
        lost = d.rng.choice(names)
        d.fleet.lose_disk(lost)
        for name in names:
            d.fleet.start(name)
        d.fleet.settled()


def stall(d: Drive) -> None:
    """An owner stands still for longer than its session, and wakes: it is fenced and ends with 3, and is started again."""
    d.fleet.have(2)
    name = d.rng.choice(d.fleet.running)
    worker = d.fleet.workers[name]
    positions = d.fleet.owned(name)
    worker.again, worker.excused = False, frozenset({3})
    with d.event(f"SIGSTOP of {name} for {STALL_S:g} s", 10.0, positions):
        began_s = time.monotonic()
        d.fleet.signal(name, signal.SIGSTOP)
        d.wait_moved(positions)
        time.sleep(max(0.0, STALL_S - (time.monotonic() - began_s)))
        d.fleet.signal(name, signal.SIGCONT)
        d.fleet.wait_exit(name, 3, EXIT_S)
        wait_until(lambda: not worker.wanted, "the supervisor to notice", EXIT_S)
    worker.again, worker.excused = True, frozenset()
    d.fleet.start(name)
    d.fleet.settled()


def same_name(d: Drive) -> None:
    """Two workers have one name: one ends with 3, and the other goes on."""
    d.fleet.have(2)
    name = d.rng.choice(d.fleet.running)
    first, second = d.fleet.workers[name], d.fleet.make(f"{name}-too", bears=name)
    pair = (first, second)
    for it in pair:
        it.again, it.excused = False, frozenset({3})
    with d.event(f"a second {name}"):
        d.fleet.add(second)
        wait_until(lambda: not all(it.wanted for it in pair), "one of two to end", EXIT_S)
        d.fleet.settled()
        assert sum(it.wanted for it in pair) == 1, "both have ended"
    survivor = next(it for it in pair if it.wanted)
    d.say(f"  {survivor.name} goes on")
    d.fleet.leave(survivor.name)
    d.fleet.discard(second.name)
    first.again, first.excused = True, frozenset()
    d.fleet.start(name)
    d.fleet.settled()


def slow_disk(d: Drive) -> None:
    """A worker on a slow disk joins, folds its share slowly, and leaves."""
    d.fleet.have(2)
    worker = d.fleet.make("w3-slow", slow=SLOW)
    with d.event("join of a worker on a slow disk"):
        d.fleet.add(worker)
        d.fleet.settled()
        positions = wait_until(lambda: d.fleet.owned(worker.name), "it to fold", MOVED_S)
        time.sleep(SLOW_S)
        d.wait_moved(positions)
    with d.event("leave of the worker on a slow disk"):
        d.fleet.leave(worker.name)
        d.fleet.settled()
    d.fleet.discard(worker.name)


def storm(d: Drive) -> None:
    """Workers are killed, asked to leave and started at random moments, also while partitions move."""
    d.fleet.have(3)
    with d.event("storm"):
        deadline_s = time.monotonic() + STORM_S
        names = d.fleet.running
        while time.monotonic() < deadline_s:
            name = d.rng.choice(names)
            if name not in d.fleet.running:
                d.fleet.start(name)
            elif d.rng.random() < 0.3:
                d.fleet.signal(name, signal.SIGTERM)
                d.fleet.workers[name].again = True
                d.fleet.workers[name].excused = frozenset({0, 3, -signal.SIGTERM, 128 + signal.SIGTERM})
            else:
                d.fleet.kill(name)
            time.sleep(d.rng.choice((0.1, 0.5, 2.0, 4.0)) * d.rng.random())
        for name in names:
            if name not in d.fleet.running:
                d.fleet.start(name)
        d.fleet.settled()
    for name in names:
        d.fleet.workers[name].excused = frozenset()


def broker_kill(d: Drive) -> None:
    """The broker dies and comes back: workers wait for it, or end with 3 and are started again."""
    d.fleet.have(2)
    with d.broker_trouble(), d.event("kill -9 of the broker", None) as event:
        d.broker.kill()
        d.say("  the broker is killed")
        time.sleep(d.rng.uniform(0.0, AWAY_S))
        d.broker.start()
        event.restart("the broker is back")
        d.wait_all_moved()
        d.fleet.settled()


def broker_stop(d: Drive) -> None:
    """The broker stands still and wakes."""
    d.fleet.have(2)
    with d.broker_trouble(), d.event(f"SIGSTOP of the broker for {BROKER_STOP_S:g} s", None) as event:
        d.broker.pause()
        d.say("  the broker stands still")
        time.sleep(BROKER_STOP_S)
        d.broker.resume()
        event.restart("the broker is awake")
        d.wait_all_moved()
        d.fleet.settled()


def _each_broker(d: Drive, what: str, happen: Callable[[Broker], object], *, settle: bool = True) -> None:
    """Call `happen` with each broker in random order; then wait until it is in sync, and, with `settle`, the group."""
    d.fleet.have(2)
    for broker in d.rng.sample(d.brokers, len(d.brokers)):
        with d.event(what.format(broker.node)):
            happen(broker)
            d.wait_in_sync()
            d.wait_all_moved()
            if settle:
                d.fleet.settled()


def each_broker(d: Drive) -> None:
    """Each of three brokers is killed in turn and comes back; no worker ends."""

    def happen(broker: Broker) -> None:
        broker.kill()
        d.say(f"  broker {broker.node} is killed")
        d.wait_all_moved()
        broker.start()
        d.say(f"  broker {broker.node} is back")

    _each_broker(d, "kill -9 of broker {}, and back", happen)


def each_broker_stopped(d: Drive) -> None:
    """Each of three brokers stands still in turn; no worker ends."""

    def happen(broker: Broker) -> None:
        broker.pause()
        d.say(f"  broker {broker.node} stands still")
        time.sleep(BROKER_STOP_S)
        broker.resume()

    _each_broker(d, f"SIGSTOP of broker {{}} for {BROKER_STOP_S:g} s", happen)


def brokers_blink(d: Drive) -> None:
    """Each of three brokers stands still until others lead its partitions, and then wakes; no worker ends."""

    def happen(broker: Broker) -> None:
        broker.pause()
        time.sleep(d.rng.uniform(*BLINK_S))
        broker.resume()

    _each_broker(d, "broker {} blinks", happen, settle=False)
    d.fleet.settled()


ALL = (
    Scenario("join", join, first=True),
    Scenario("noise", noise, first=True),
    Scenario("leave", leave, first=True),
    Scenario("restart", restart, first=True),
    Scenario("orders", orders, first=True),
    Scenario("duplicates", duplicates, first=True),
    Scenario("kill", kill, first=True),
    Scenario("stall", stall, first=True),
    Scenario("broker_kill", broker_kill, 1, first=True),
    Scenario("broker_stop", broker_stop, 1, first=True),
    Scenario("each_broker", each_broker, 3, first=True),
    Scenario("same_name", same_name, first=True),
    Scenario("kill_all", kill_all, first=True),
    Scenario("opinions", opinions),
    Scenario("garbage", garbage),
    Scenario("open_on_deltas", open_on_deltas),
    Scenario("open_on_changelog", open_on_changelog),
    Scenario("clocks", clocks),
    Scenario("anew_deltas", anew_deltas),
    Scenario("anew_changelog", anew_changelog),
    Scenario("kill_two", kill_two),
    Scenario("each_broker_stopped", each_broker_stopped, 3),
    Scenario("brokers_blink", brokers_blink, 3),
    Scenario("slow_disk", slow_disk),
    Scenario("roll", roll),
    Scenario("storm", storm),
)
"""All scenarios: those of a short drive first, in an order in which little has to be started in between."""
