"""kill -9 of publishers, thirty times at random: what their spool holds is sent by others, and each delta counts once."""

from pathlib import Path

import pytest

from tests.process.publisher_kill import on_embedded

KILLS = 30


@pytest.mark.timeout(300)
def test_thirty_kills_of_publishers(tmp_path: Path) -> None:
    """While they start, record, send what others left, and close, and while the server is killed too."""
    done = on_embedded(tmp_path, seed=1, rounds=KILLS)
    assert done.kills >= KILLS
    assert done.doubts > 0, "no call was interrupted: nothing is shown"
