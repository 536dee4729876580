"""`pipeline status --from kafka://...`: all workers of an app, found through their group, whatever state they are in."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher
from tests.broker.drive import PUBLISHER, Role, worker
from tests.broker.kafka import App, create_topics
from tests.support import pipeline, wait_until

PARTITIONS = 4
SESSION_MS = 20_000
"""Long enough for a dead member to be still in the group when it is looked at."""


def member(app: App, scratch: Path, name: str) -> Role:
    given = {"session_timeout_ms": SESSION_MS, "mirror_interval_ms": 50}
    return worker(app, scratch / name, "--name", name, **given)


def status(app: App, code: int = 0) -> dict[str, Any]:
    """Return the status as JSON."""
    done = pipeline("status", "--from", app.url, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def settled(app: App) -> dict[str, Any]:
    """Wait until two members share the partitions, each with warm copies of the other's, and all is folded."""

    def done() -> dict[str, Any] | None:
        found = status(app)
        held = [len(it["partitions"]) for it in found["members"]]
        warm = [copy["phase"] for it in found["partitions"] for copy in it["standbys"]]
        folded = [it["phase"] == "folding" and it["lag"] == 0 for it in found["partitions"]]
        return found if held == [2, 2] and warm == ["following"] * PARTITIONS and all(folded) else None

    found: dict[str, Any] = wait_until(done, "two members that share the partitions", 60)
    return found


def publish(app: App) -> None:
    """Publish something to every partition."""
    with Publisher(app.url, **PUBLISHER) as publisher:
        for number in range(100):
            publisher.sum("v", labels=("n",)).add(1, n=str(number))
        publisher.flush(timeout_s=60)


@pytest.mark.timeout(180)
def test_all_members(app: App, tmp_path: Path) -> None:
    """The group tells the assignment and each member its state; a stopped or killed member hides none of the others."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with member(app, tmp_path, "one") as one, member(app, tmp_path, "two") as two:
        publish(app)
        found = settled(app)
        assert (found["app"], found["group_state"], found["notes"]) == (app.app, "Stable", [])
        assert [(it["name"], it["url"]) for it in found["members"]] == [("one", one.url), ("two", two.url)]
        for it in found["members"]:
            assert (it["error"], it["ready"], it["fenced_count"], it["lag"]) == (None, True, 0, 0)
            assert not {*it["partitions"]} & {*it["standbys"]}
        for it in found["partitions"]:
            owner, (copy,) = it["member"], it["standbys"]
            assert {owner, copy["member"]} == {"one", "two"}
            assert it["end_offset"] == it["next_offset"] > 0
            assert 0 <= it["commit_age_ms"] < 60_000
        shown = pipeline("status", "--from", app.url)
        assert shown.stdout.splitlines()[-1] == "2 members, lag 0 records"
        assert shown.stdout.count("standby, following") == PARTITIONS

        by_name = {it["name"]: it for it in found["members"]}
        two.program.signal(signal.SIGSTOP)
        found = status(app)
        assert "no answer" in unreachable(found, "two") or "timed out" in unreachable(found, "two")
        assert unreachable(found, "one") is None
        held = {it["partition"]: it for it in found["partitions"] if it["member"] == "two"}
        assert sorted(held) == by_name["two"]["partitions"]
        assert all((it["phase"], it["commit_age_ms"]) == ("unknown", None) for it in held.values())
        shown = pipeline("status", "--from", app.url)
        assert "unreachable: " in shown.stdout

        one.kill()
        two.kill()
        found = status(app, code=1)
        assert "refused" in unreachable(found, "one").lower()
        assert all(it["lag"] == 0 for it in found["partitions"]), "the mirrored positions say so"


def unreachable(found: dict[str, Any], name: str) -> Any:
    (it,) = (it for it in found["members"] if it["name"] == name)
    return it["error"]


@pytest.mark.timeout(120)
def test_a_member_that_is_back_elsewhere(app: App, tmp_path: Path) -> None:
    """A member that is killed, and started within its session on another port, is asked there."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    with member(app, tmp_path, "one") as before:
        before.kill()
        with member(app, tmp_path, "one") as after:
            assert before.url != after.url

            def there() -> bool:
                (it,) = status(app)["members"]
                return (it["url"], it["ready"], len(it["partitions"])) == (after.url, True, PARTITIONS)

            wait_until(there, "its new address", 60)


def test_nobody_is_there(app: App) -> None:
    """Without members, without topics and without a broker, one line says so; exit code 1, or 2 if the call is wrong."""
    done = pipeline("status", "--from", app.url)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"there is no topic {app.topic('deltas')}" in done.stderr
    create_topics(app.bootstrap, app.app, PARTITIONS)
    done = pipeline("status", "--from", app.url)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"group {app.app} has no members" in done.stderr
    assert "pipeline status --from http://" in done.stderr
    done = pipeline("status", "--from", "kafka://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "no broker answers at 127.0.0.1:1" in line
