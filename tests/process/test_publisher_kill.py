"""kill -9 of publishers, at random: other processes send their spools, and each delta counts once."""

from pathlib import Path

import pytest

from tests.process.publisher_kill import on_embedded
from tests.support import LONG

KILLS = 30 if LONG else 6


@pytest.mark.long
@pytest.mark.timeout(300)
def test_publishers_killed_at_random(tmp_path: Path) -> None:
    """Each delta counts once when publishers, and the server, are killed at any moment from start to close."""
    done = on_embedded(tmp_path, seed=1, rounds=KILLS)
    assert done.kills >= KILLS
    assert done.doubts > 0 or not LONG, "no call was interrupted: nothing is shown"
