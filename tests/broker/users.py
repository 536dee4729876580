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
from tests.support import wait_until

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

ID, GROUP, MEMBERS = "transactional id", "group", "group of members"
LEAST = {
    "publisher": {(DELTAS, "WRITE")},
    "worker": {
        (DELTAS, "READ"),
        (CHANGELOG, "READ"),
        (CHANGELOG, "WRITE"),
        (DEAD_LETTERS, "WRITE"),
        (ID, "WRITE"),
    },
    "server": {
        (DELTAS, "DESCRIBE"),
        (CHANGELOG, "READ"),
        (CHANGELOG, "DESCRIBE_CONFIGS"),
        (DEAD_LETTERS, "DESCRIBE"),
    },
    "operator": {
        (topic, operation)
        for topic in (DELTAS, CHANGELOG, DEAD_LETTERS)
        for operation in ("DESCRIBE", "DESCRIBE_CONFIGS", "CREATE", "ALTER", "ALTER_CONFIGS")
    },
}
"""Permissions that each role needs: (resource, operation)."""
LEAST_OF_MEMBER = LEAST["worker"] | {(MEMBERS, "READ")}
"""Permissions that a worker with a name needs."""


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
