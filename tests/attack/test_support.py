"""The bystander of attacks sees what happens to a server."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.attack.support import attacked
from tests.support import UpProcess


def test_a_bystander_is_served(up: UpProcess) -> None:
    """Without an attack every answer is right and in time, also from another address and for a second time."""
    for address in ("127.0.0.1", "127.0.0.2"):
        with attacked(up, address=address) as bystander:
            time.sleep(0.5)
        bystander.check(grown_bytes_max=50_000_000)
        assert not bystander.failures


def test_a_bystander_notices_a_server_that_stands_still(up: UpProcess) -> None:
    """A server that answers nothing for a second fails the check by the time of its health."""
    pid = up.program.process.pid
    with attacked(up) as bystander:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1.2)
        os.kill(pid, signal.SIGCONT)
    with pytest.raises(AssertionError, match="longest"):
        bystander.check(grown_bytes_max=50_000_000)
