"""Agents that react to a view's changes, on a real broker: whatever ends the worker, the changes add up to the view."""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher
from tests.broker.agents import PARTITIONS, WAIT_S, Source, metric
from tests.broker.drive import PUBLISHER, server
from tests.broker.kafka import App
from tests.broker.test_workers import status
from tests.support import again_and_again, wait_until

WATCH = """
import asyncio, json, os, pipeline
app = pipeline.faust_app()

@app.agent(app.changes("revenue"))
async def watch(changes):
    async for change in changes:
        with open(os.environ["SEEN"], "a") as file:
            file.write(json.dumps(change._asdict()) + "\\n")
        await asyncio.sleep(0.0005)
"""


class Seen:
    """Changes that agents have written to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def changes(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def totals(self, *, once: bool = True) -> dict[str, int]:
        """Return the totals of the changes by region; changes with the same place count once."""
        found = self.changes()
        if once:
            found = [*{(it["partition"], it["offset"]): it for it in found}.values()]
        totals: Counter[str] = Counter()
        for it in found:
            totals[it["labels"]["region"]] += it["new"] - (it["old"] or 0)
        return dict(totals)

    def wait(self, expected: dict[str, int]) -> None:
        """Wait until the changes add up to this."""
        try:
            wait_until(lambda: self.totals() == expected, "the changes to add up", WAIT_S)
        except AssertionError:
            assert self.totals() == expected
            raise

    def check_order(self) -> None:
        """Check that each `old` is the `new` of the change before it."""
        known: dict[tuple[str, int], dict[int, Any]] = {}
        for it in self.changes():
            place = it["labels"]["region"], it["partition"]
            before = [offset for offset in known.setdefault(place, {}) if offset < it["offset"]]
            assert it["old"] == (known[place][max(before)] if before else None), it
            known[place][it["offset"]] = it["new"]


class Load:
    """Adds to series of one view, in a thread, until it is left."""

    def __init__(self, app: App) -> None:
        self.expected: Counter[str] = Counter()
        self._app = app

    @contextmanager
    def running(self) -> Iterator[None]:
        with Publisher(self._app.url, **PUBLISHER) as publisher:
            revenue = publisher.sum("revenue", labels=("region",))
            other = publisher.sum("other", labels=("region",))

            numbers = itertools.count(1)

            def add() -> None:
                number = next(numbers)
                region = f"r{number * number % 17}"
                revenue.add(number, region=region)
                other.add(1, region=region)
                self.expected[region] += number

            try:
                with again_and_again(add, 0.01):
                    yield
            finally:
                publisher.flush(timeout_s=WAIT_S)


@pytest.mark.long
@pytest.mark.timeout(180)
def test_killed_at_random(app: App, tmp_path: Path) -> None:
    """Changes add up to the view under kill -9 again and again, and those that come twice have the same place."""
    chance = random.Random(3)
    source, seen, load = Source(app, tmp_path, WATCH), Seen(tmp_path / "seen"), Load(app)
    with source.worker("one", env={"SEEN": str(seen.path)}) as worker:
        with load.running():
            for _ in range(10):
                wait_until(lambda: _took_in(worker) > 20, "changes to be taken in", WAIT_S)
                time.sleep(chance.uniform(0, 2))
                worker.kill()
                worker.start(wait_ready=False)
        seen.wait(dict(load.expected))
    places = Counter((it["partition"], it["offset"]) for it in seen.changes())
    print(f"{len(places)} changes, {places.total() - len(places)} came again")
    seen.check_order()


@pytest.mark.long
@pytest.mark.timeout(180)
def test_moved(app: App, tmp_path: Path) -> None:
    """A second worker goes on where the first got to, in order or after kill -9; a new agent gets all changes."""
    source, seen, load = Source(app, tmp_path, WATCH), Seen(tmp_path / "seen"), Load(app)
    with load.running():
        wait_until(lambda: sum(load.expected.values()) > 10_000, "load", WAIT_S)
    env = {"SEEN": str(seen.path)}
    with source.worker("one", env=env) as one, server(app, tmp_path / "server"), ExitStack() as stack:
        seen.wait(dict(load.expected))
        with load.running():
            two = stack.enter_context(source.worker("two", env=env))
            wait_until(lambda: _took_in(two) > 20, "the second to take in changes", WAIT_S)
            two.program.signal(15)
            assert two.program.wait(30) == 0, two.tail()
            two.kill()
            graceful = Counter((it["partition"], it["offset"]) for it in seen.changes())
            assert set(graceful.values()) == {1}
            two.start()
            wait_until(lambda: _took_in(two) > 20, "the second to take in changes again", WAIT_S)
            two.kill()
            before = _took_in(one)
            wait_until(lambda: _took_in(one) > before + 50, "the first to go on", WAIT_S)
            wait_until(lambda: len(status(one)["partitions"]) == PARTITIONS, "the first to have all partitions", WAIT_S)
        seen.wait(dict(load.expected))
    places = Counter((it["partition"], it["offset"]) for it in seen.changes())
    print(f"{len(places)} changes, {places.total() - len(places)} came again")
    seen.check_order()


def _took_in(role: Any) -> float:
    with suppress(OSError):
        return metric(role, "pipeline_changes_total")
    return 0.0
