"""What every test may use: the `--seeds` option, hypothesis profiles, small fixtures."""

import os
import socket
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds", type=int, default=2000, metavar="N", help="seeds the simulator runs in all (default: %(default)s)"
    )


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest) -> int:
    """How many seeds the simulator shall run in all."""
    count: int = request.config.getoption("--seeds")
    return count


@pytest.fixture
def free_port() -> int:
    """A TCP port of the loopback address that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def tmp_data(tmp_path: Path) -> Path:
    """An empty state folder."""
    return tmp_path
