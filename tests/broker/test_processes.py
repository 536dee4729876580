"""`pipeline worker --processes N` on a broker: a group of its own, which outlives any of its members."""

from __future__ import annotations

import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.broker.kafka import App, create_topics
from tests.support import Program, pipeline, wait_until

PARTITIONS = 4
NAMES = ["w-0", "w-1"]


def partitions_by_member(app: App) -> dict[str, list[int]]:
    """Return each member's partitions; empty while they move, and unless all members are ready."""
    done = pipeline("status", "--from", app.url, "--json")
    found: dict[str, Any] = json.loads(done.stdout or '{"group_state": "", "members": []}')
    settled = found["group_state"] == "Stable" and all(it["ready"] for it in found["members"])
    return {it["name"]: it["partitions"] for it in found["members"]} if settled else {}


@pytest.mark.long
@pytest.mark.timeout(300)
def test_they_share_die_come_back_and_leave(app: App, tmp_path: Path) -> None:
    """Every process is a member with a folder; a killed one returns under its name; SIGTERM ends all in order, with 0."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    arguments = ("--from", app.url, "--data", str(tmp_path / "d"), "--port", "0", "--name", "w", "--processes", "2")
    with Program("worker", *arguments, "--set", "session_timeout_ms=6000", stderr=tmp_path / "stderr") as program:
        out = program.process.stdout
        assert out is not None

        def wait_said(pattern: str) -> str:
            for line in out:
                if found := re.search(pattern, line.decode()):
                    return str(found[1])
            raise AssertionError(f"it ended: {program.stderr()}")

        pid = int(wait_said(r"w-1 started, pid (\d+)"))
        shared = wait_until(lambda: len(found := partitions_by_member(app)) == 2 and found, "two members", 60)
        assert sorted(shared) == NAMES
        assert sorted(number for numbers in shared.values() for number in numbers) == [*range(PARTITIONS)]
        assert sorted(it.name for it in (tmp_path / "d").iterdir()) == ["0", "1"]
        os.kill(pid, signal.SIGKILL)
        wait_said(r"w-1 was ended by (SIGKILL); again in 0.5 s")

        def seen() -> str:
            return pipeline("status", "--from", app.url, "--json").stdout + program.stderr()

        wait_until(
            lambda: sorted(found := partitions_by_member(app)) == NAMES and found["w-1"], "it to be back", 120, seen=seen
        )
        program.signal(signal.SIGTERM)
        assert program.wait(60) == 0, program.stderr()

    def left() -> bool:
        return "has no members" in pipeline("status", "--from", app.url).stderr

    wait_until(left, "the group to know that all have left", 30)
