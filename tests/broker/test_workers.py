"""Workers that share the partitions of one app, and show who has which. `tests.broker.chaos` does worse to them."""

from __future__ import annotations

import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.broker.drive import Role, Sender, check, finish, loaded, server, wait_exit, worker
from tests.broker.kafka import App, create_topics
from tests.support import pipeline, wait_until

PARTITIONS = 6
SESSION_MS = 6_000
"""Shortest session that brokers allow."""


def member(app: App, scratch: Path, name: str) -> Role:
    """Return a worker of that name, on a directory of that name."""
    return worker(app, scratch / name, "--name", name, "--log-level", "info", session_timeout_ms=SESSION_MS)


def status(role: Role) -> dict[str, Any]:
    """Return a role's status; empty if it does not answer."""
    with suppress(OSError), urllib.request.urlopen(f"{role.url}/v1/status", timeout=5) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found
    return {}


def folded(role: Role) -> dict[int, int]:
    """Return the positions of the partitions that a role folds."""
    return {it["partition"]: it["next_offset"] for it in status(role).get("partitions", []) if it["phase"] != "assigned"}


def shared(*roles: Role) -> dict[str, set[int]]:
    """Wait until roles have about as many partitions each, and, if several, warm copies of all."""

    def done() -> dict[str, set[int]]:
        held = {role.data.name: {*folded(role)} for role in roles}
        assert all(role.exit_code is None for role in roles), "\n".join(role.tail() for role in roles)
        counts = [*map(len, held.values())]
        if sorted(n for numbers in held.values() for n in numbers) != [*range(PARTITIONS)] or max(counts) > min(counts) + 1:
            return {}
        copies = [it for role in roles for it in status(role)["standbys"] if it["phase"] == "following"]
        return held if len(roles) == 1 or len({it["partition"] for it in copies}) == PARTITIONS else {}

    try:
        found: dict[str, set[int]] = wait_until(done, "the partitions to be shared", 40)
    except AssertionError as error:
        raise AssertionError(f"{error}\n" + "\n".join(f"{status(role)}\n{role.tail()}" for role in roles)) from None
    return found


def wait_moved(role: Role, positions: dict[int, int], timeout_s: float) -> float:
    """Wait until a role has folded partitions beyond these positions, and return how long that took."""
    began_s = time.monotonic()

    def done() -> bool:
        now = folded(role)
        return all(now.get(number, -1) > position for number, position in positions.items())

    try:
        wait_until(done, f"{positions} to move", timeout_s)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{status(role)}\n{role.tail()}") from None
    return time.monotonic() - began_s


class Drive:
    """Load, a reader, and a naive count to compare with at the end."""

    def __init__(self, app: App, scratch: Path) -> None:
        self.app, self.scratch = app, scratch
        create_topics(app.bootstrap, app.app, PARTITIONS)

    @contextmanager
    def running(self, roles: ExitStack | None = None) -> Iterator[None]:
        """Run roles, check at the end that every answer is exact, and end them."""
        with (
            roles or ExitStack(),
            Sender(self.app, "s", self.scratch) as sender,
            server(self.app, self.scratch / "server") as reads,
            loaded(self.app) as (publisher, loads),
        ):
            yield
            sender.wait_round()
            load = finish(publisher, loads)
            check(self.app, [reads], self.scratch, load=load, senders=[sender])


@pytest.fixture
def drive(app: App, tmp_path: Path) -> Drive:
    return Drive(app, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_join_and_leave(app: App, tmp_path: Path, drive: Drive) -> None:
    """A second worker is given its share under load, and the first hands over all it has: exact, and both exit with 0."""
    one, two = member(app, tmp_path, "one"), member(app, tmp_path, "two")
    stack = ExitStack()
    with drive.running(stack):
        stack.enter_context(one)
        shared(one)
        stack.enter_context(two)
        held = shared(one, two)
        assert {it["name"]: {*it["partitions"]} for it in status(one)["members"]} == held
        assert [it["name"] for it in status(two)["members"]] == sorted(held)
        shown = pipeline("status", "--from", two.url)
        assert shown.returncode == 0, shown.stderr
        for role in (one, two):
            numbers = ", ".join(map(str, sorted(held[role.data.name])))
            assert f"member {role.data.name} {role.url}: partitions {numbers}, standbys " in shown.stdout
        assert shown.stdout.count("standby, following") == len(status(two)["standbys"])
        positions = folded(one)
        one.program.signal(signal.SIGTERM)
        print(f"handed over after {wait_moved(two, positions, 60):.2f} s")
        assert wait_exit(one, 30) == 0, one.tail()
        shared(two)
        said = one.program.stderr()
        assert ": partitions [0, 1, 2, 3, 4, 5], standbys []" in said, "each assignment is logged"
        assert "Starting..." not in said, "and the services of Faust are not"
