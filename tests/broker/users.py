"""A broker with logins and an authorizer, and the least permissions of each role."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from pipeline import Publisher
from pipeline.secret import is_secret_option
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS
from tests.broker.drive import PUBLISHER
from tests.broker.kafka import App, create_topics, new_app
from tests.support import ROOT, wait_until

WAIT_S = 60.0
PASSWORD = "p"
USERS = ("publisher", "worker", "server", "operator")
PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"
PROPERTIES = {
    "listeners": "SASL_PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}",
    "advertised.listeners": "SASL_PLAINTEXT://127.0.0.1:{port}",
    "inter.broker.listener.name": "SASL_PLAINTEXT",
    "sasl.enabled.mechanisms": "PLAIN",
    "sasl.mechanism.inter.broker.protocol": "PLAIN",
    "listener.name.sasl_plaintext.plain.sasl.jaas.config": (
        f'{PLAIN} username="admin" password="{PASSWORD}" '
        + " ".join(f'user_{name}="{PASSWORD}"' for name in ("admin", *USERS))
        + ";"
    ),
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:admin;User:ANONYMOUS",
}

ID, GROUP, MEMBERS, CHANGES = "transactional id", "group", "group of members", "groups of changes"
_OTHERS = {
    "transactional ids `APP-*`": ID,
    "group `APP`": MEMBERS,
    "group `APP-position`": GROUP,
    "groups `APP` and `APP-position`": MEMBERS,
    "groups `APP-changes-*`": CHANGES,
}
Permissions = set[tuple[str, str]]


def documented() -> dict[str, Permissions]:
    """Return the permissions that the page on Kafka gives to each role and command: (resource, operation)."""
    page = (ROOT / "pipeline" / "docs" / "kafka.md").read_text()
    section = page.partition("## Permissions\n")[2].partition("\n## ")[0]
    found: dict[str, Permissions] = {}
    above = ""
    for line in section.splitlines():
        if not line.startswith("| ") or line.startswith("| who"):
            continue
        who, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        topics = zip((DELTAS, CHANGELOG, DEAD_LETTERS), cells, strict=False)
        own = {(topic, operation) for topic, cell in topics for operation in cell.split(", ") if operation}
        operation, _, others = cells[3].partition(" on ")
        own |= {(name, operation) for text, name in _OTHERS.items() if others.startswith(text)}
        if "and `APP-position`" in others:
            own.add((GROUP, operation))
        if who.startswith("and "):
            own |= found[above]
        else:
            above = who
        found[who] = own
    return found


_TABLE = documented()
LEAST = {
    "publisher": _TABLE["publisher, `spool drain`"],
    "worker": _TABLE["`worker`"],
    "server": _TABLE["`serve`"],
    "operator": _TABLE["`topics apply`"],
}
"""Permissions that each role needs, by the docs."""
LEAST_OF_MEMBER = _TABLE["and with `--name`"]
"""Permissions that a worker with a name needs."""
LEAST_OF_AGENTS = _TABLE["and with agents"]
"""Permissions that a worker with agents needs, beside those on the agents' own topics."""
LEAST_OF_COMMANDS = {who.strip("`"): _TABLE[who] for who in _TABLE if who.startswith("`")}
"""Permissions of roles and commands, by their first words."""


def login(name: str, password: str = PASSWORD) -> dict[str, str]:
    """Return a login as options of librdkafka."""
    plain = {"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}
    return {**plain, "sasl.username": name, "sasl.password": password}


def user(name: str) -> dict[str, Any]:
    """Return Kafka settings with a login."""
    return {"kafka": login(name)}


def flags(name: str, password: str = PASSWORD) -> list[str]:
    """Return a login as flags of a command."""
    return given(login(name, password))


_FILES = TemporaryDirectory(prefix="pipeline-secrets-")


def given(options: Mapping[str, str]) -> list[str]:
    """Return options of librdkafka as flags of a command, which takes secrets from files only."""
    found = []
    for name, value in options.items():
        if is_secret_option(name, value):
            file = Path(_FILES.name) / blake2b(value.encode()).hexdigest()
            file.write_text(f"{value}\n")
            found.append(f"--set=kafka.{name}_file={file}")
        else:
            found.append(f"--set=kafka.{name}={value}")
    return found


class Own:
    """One app, without topics yet, and the permissions on its names."""

    def __init__(self, bootstrap: str, admin: AdminClient) -> None:
        self.app: App = new_app(bootstrap)
        self._admin = admin

    def _rule(self, kind: Any, user: str, name: str, operation: str) -> Any:
        resource, full, pattern = ResourceType.TOPIC, self.app.topic(name), ResourcePatternType.LITERAL
        if name == ID:
            resource, full, pattern = ResourceType.TRANSACTIONAL_ID, f"{self.app.app}-", ResourcePatternType.PREFIXED
        elif name == GROUP:
            resource, full = ResourceType.GROUP, f"{self.app.app}-position"
        elif name == MEMBERS:
            resource, full = ResourceType.GROUP, self.app.app
        elif name == CHANGES:
            resource, full, pattern = ResourceType.GROUP, f"{self.app.app}-changes-", ResourcePatternType.PREFIXED
        return kind(resource, full, pattern, f"User:{user}", "*", AclOperation[operation], AclPermissionType.ALLOW)

    def grant(self, user: str, *permissions: tuple[str, str]) -> None:
        """Grant permissions, which hold from now on: the broker that lists the rules is the one that applies them."""
        for done in self._admin.create_acls([self._rule(AclBinding, user, *it) for it in permissions]).values():
            done.result(WAIT_S)
        for it in permissions:
            rule = self._rule(AclBindingFilter, user, *it)
            wait_until(lambda rule=rule: self._admin.describe_acls(rule).result(WAIT_S), f"{it} of {user}", WAIT_S)

    def revoke(self, user: str, *permissions: tuple[str, str]) -> None:
        """Revoke permissions, which takes a moment."""
        for done in self._admin.delete_acls([self._rule(AclBindingFilter, user, *it) for it in permissions]).values():
            done.result(WAIT_S)

    def create_topics(self, partitions: int = 1) -> None:
        """Create all three topics."""
        create_topics(self.app.bootstrap, self.app.app, partitions, client=login("admin"))

    def publish(self, amount: int = 1) -> None:
        """Add to the sum `v`, and wait until it is acknowledged."""
        with Publisher(self.app.url, kafka=login("admin"), **PUBLISHER) as publisher:
            publisher.sum("v").add(amount)
