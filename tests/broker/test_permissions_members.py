"""Workers with a name at a broker with logins: the least that the docs name suffices; a missing permission is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import NewTopic

from pipeline import Publisher
from tests.broker.agents import wait_counted
from tests.broker.drive import PUBLISHER, Role, server, wait_exit, worker
from tests.broker.inside import folding
from tests.broker.kafka import admin_client
from tests.broker.test_permissions import folded
from tests.broker.users import (
    CHANGES,
    GROUP,
    LEAST,
    LEAST_OF_AGENTS,
    LEAST_OF_MEMBER,
    MEMBERS,
    Own,
    flags,
    given,
    login,
    user,
)
from tests.support import pipeline, wait_until

WAIT_S = 60.0
SESSION_MS = 6_000


def member(own: Own, scratch: Path, name: str, who: str = "worker") -> Role:
    return worker(own.app, scratch / name, "--name", name, *flags(who), session_timeout_ms=SESSION_MS)


@pytest.mark.timeout(120)
def test_the_least_permissions(own: Own, tmp_path: Path) -> None:
    """With the permissions of LEAST_OF_MEMBER, and no more, two workers share the partitions, and each delta counts once."""
    own.create_topics(2)
    own.grant("worker", *LEAST_OF_MEMBER)
    with member(own, tmp_path, "one") as one, member(own, tmp_path, "two") as two:
        with Publisher(own.app.url, kafka=login("admin"), **PUBLISHER) as publisher:
            for number in range(50):
                publisher.sum("v", labels=("n",)).add(1, n=str(number))

        def both_fold() -> bool:
            done = pipeline("status", "--from", own.app.url, *flags("worker"))
            assert done.returncode == 0, done.stderr
            return "restoring" not in done.stdout and done.stdout.count("  folding  ") == 2

        wait_until(both_fold, "two that fold", WAIT_S)
        for role in (one, two):
            assert "is missing" not in role.program.stderr(), role.tail()
            assert role.terminate() == 0, role.tail()


AGENTS = """
import os, pipeline
app = pipeline.faust_app()
seen = app.publisher.sum("seen", labels=("id",))
grown = app.publisher.sum("grown", labels=("id",))

@app.agent(app.topic(os.environ["ORDERS"], value_serializer="json"))
async def record(stream):
    async for order in stream:
        seen.add(1, id=str(order["id"]))

@app.agent(app.changes("seen"))
async def follow(stream):
    async for change in stream:
        grown.add(1, id=change.labels["id"])
"""


@pytest.mark.long
@pytest.mark.timeout(120)
def test_the_least_permissions_of_agents(own: Own, tmp_path: Path) -> None:
    """With the permissions of LEAST_OF_AGENTS, those of groups of changes and READ on its topic a worker's agents record."""
    own.create_topics(2)
    orders = own.app.topic("orders")
    admin = admin_client(own.app.bootstrap, **login("admin"))
    admin.create_topics([NewTopic(orders, 1, 1)])[orders].result(30)
    own.grant("worker", *LEAST_OF_AGENTS, (CHANGES, "READ"), ("orders", "READ"))
    own.grant("server", *LEAST["server"])
    (tmp_path / "shop.py").write_text(AGENTS)
    role = worker(own.app, tmp_path / "one", "--name=one", "-A", "shop:app", *flags("worker"), session_timeout_ms=SESSION_MS)
    role._env, role._cwd = {"ORDERS": orders}, tmp_path
    with role, server(own.app, tmp_path / "server", *flags("server")) as reads:
        producer = Producer({**login("admin"), "bootstrap.servers": own.app.bootstrap})
        producer.produce(orders, b'{"id": 1}')
        assert producer.flush(WAIT_S) == 0
        assert wait_counted(reads, ["1"], role) == {"1": 1}
        assert wait_counted(reads, ["1"], role, view="grown") == {"1": 1}
        assert role.terminate() == 0, role.tail()
        assert "is missing" not in role.program.stderr(), role.tail()


def test_a_member_may_not_use_the_group(own: Own, tmp_path: Path) -> None:
    """A worker that lacks READ on the group ends with code 2 and names it; once that is granted every delta counts."""
    own.create_topics()
    own.publish(3)
    own.grant("worker", *(LEAST_OF_MEMBER - {(MEMBERS, "READ")}))
    role = member(own, tmp_path, "one")
    role.start(wait_ready=False)
    try:
        assert wait_exit(role, WAIT_S) == 2, role.tail()
        last = role.program.stderr().splitlines()[-1]
        assert f"READ on the group {own.app.app} is missing: grant it with kafka-acls" in last
        assert "Traceback" not in role.tail()
    finally:
        role.kill()
    own.grant("worker", (MEMBERS, "READ"))
    with folding(own.app, tmp_path / "one", kafka=user("worker")) as again:
        assert folded(again) == 3


def test_status_may_not_see_the_group(own: Own) -> None:
    """`status` names the missing permission; it needs DESCRIBE on both groups, and shows the rest without positions'."""
    own.create_topics()
    own.grant("server", ("deltas", "DESCRIBE"))
    done = pipeline("status", "--from", own.app.url, *flags("server"))
    assert (done.returncode, done.stdout) == (2, "")
    assert f"DESCRIBE on the group {own.app.app} is missing: grant it with kafka-acls" in done.stderr
    own.grant("server", (MEMBERS, "DESCRIBE"))
    done = pipeline("status", "--from", own.app.url, *flags("server"))
    assert done.returncode == 1
    assert f"group {own.app.app} has no members" in done.stderr
    assert (GROUP, "READ") not in LEAST_OF_MEMBER


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sasl.mechanism": "GSSAPI"}, "sasl.mechanism GSSAPI is not for workers with --name"),
        (
            {"sasl.mechanism": "OAUTHBEARER"},
            "sasl.mechanism OAUTHBEARER needs sasl.oauthbearer.token_file or sasl.oauthbearer.method=oidc",
        ),
        ({"sasl.oauthbearer.config": "x"}, "sasl.oauthbearer.config is not for workers with --name"),
        ({"sasl.password": "wrong"}, "check sasl.* in the setting `kafka`"),
    ],
)
def test_options_that_members_cannot_have(own: Own, tmp_path: Path, options: dict[str, str], said: str) -> None:
    """An unsupported option is refused with code 2 before anything is done, and named."""
    every = given({**login("worker"), **options})
    done = pipeline("worker", "--from", own.app.url, f"--data={tmp_path}/d", "--port=0", "--name=one", *every)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
