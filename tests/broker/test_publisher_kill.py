"""Publishers on real Kafka, and the broker, are killed with kill -9 at random: each delta counts once."""

from pathlib import Path

import pytest

from tests.broker.kafka import Broker
from tests.broker.publisher_kill import on_kafka
from tests.support import LONG

KILLS = 30 if LONG else 3


@pytest.mark.long
@pytest.mark.timeout(300)
def test_publishers_killed_at_random(broker: Broker, tmp_path: Path) -> None:
    """Each delta counts once when publishers are killed while they start, record, send what others left, and close."""
    done = on_kafka(tmp_path, 1, KILLS, broker)
    assert done.kills >= KILLS
    assert done.doubts > 0 or not LONG, "no call was interrupted: nothing is shown"
