"""A broker with logins, one for each file that asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from tests.broker.kafka import Broker, admin_client
from tests.broker.users import PROPERTIES, Own, login


@pytest.fixture(scope="module")
def broker_with_logins(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, AdminClient]]:
    """Address of the broker, and a client of its administrator."""
    with Broker(tmp_path_factory.mktemp("kafka"), PROPERTIES, client=login("admin")) as broker:
        yield broker.bootstrap, admin_client(broker.bootstrap, **login("admin"))


@pytest.fixture
def own(broker_with_logins: tuple[str, AdminClient]) -> Own:
    """An app of the test's own there, and nobody's permissions yet. Files with another sort of broker have another `own`."""
    return Own(*broker_with_logins)
