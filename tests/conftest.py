"""Fixtures and options for every test: `--seeds`, hypothesis profiles, brokers, small fixtures."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import socket
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from tests.support import LONG

if TYPE_CHECKING:
    from tests.broker.kafka import App, Broker

# Tests start hundreds of Python processes, and each would compile the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts what runs in the background with SIGINT ignored, and so would be every process of a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

EXAMPLES = 100 if LONG else 15
settings.register_profile("local", deadline=None, max_examples=EXAMPLES)
settings.register_profile("ci", deadline=None, max_examples=EXAMPLES, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds",
        type=int,
        default=300 if LONG else 200,
        metavar="N",
        help="seeds the simulator runs in all (default: %(default)s)",
    )
    parser.addoption("--attack-s", type=int, default=60, help="seconds of all attacks at once, in a long run (default: 60)")
    parser.addoption("--quick", action="store_true", help="leave out what needs a broker or minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    quick = config.getoption("--quick")

    def is_left_out(item: pytest.Item) -> bool:
        return (quick and _is_long(item)) or (not LONG and item.get_closest_marker("long") is not None)

    config.hook.pytest_deselected(items=[item for item in items if is_left_out(item)])
    items[:] = _interleaved([item for item in items if not is_left_out(item)])


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking again and again at what stays loaded to the end."""
    gc.collect()
    gc.freeze()


def _interleaved(items: list[pytest.Item]) -> list[pytest.Item]:
    """Return the tests by file, the folders that take long spread over the first three quarters of the others.

    Tests with a broker wait more than they compute: beside others they cost little time. None of them begins last, so that
    all processes end at one time.
    """
    waiting, others = [], []
    for _, of_file in groupby(items, key=lambda item: item.path):
        tests = [*of_file]
        (waiting if any(map(_is_long, tests)) else others).append(tests)
    ordered = [((number + 1) / len(waiting) * 0.75, tests) for number, tests in enumerate(waiting)]
    ordered += [((number + 1) / len(others), tests) for number, tests in enumerate(others)]
    return [test for _, tests in sorted(ordered, key=itemgetter(0)) for test in tests]


LONG_FOLDERS = ("attack", "bench", "broker", "docs", "page", "process", "sim")
"""Folders that `--quick` leaves out."""


def _is_long(item: pytest.Item) -> bool:
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    return folder in LONG_FOLDERS or "kafka_jars" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest) -> int:
    """Number of seeds that the simulator runs in all."""
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


@pytest.fixture(scope="session")
def kafka_jars() -> Path:
    """Kafka's jars, for tests that start brokers: skips where that's impossible, or fails if PIPELINE_REQUIRE_KAFKA=1."""
    from tests.broker.jars import Missing, jars
    from tests.broker.kafka import absent

    try:
        return jars()
    except Missing as reason:
        absent(reason)


@pytest.fixture(scope="session")
def kafka(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """host:port of a Kafka for tests that leave it running: PIPELINE_TEST_KAFKA, or else one for each process of pytest."""
    from tests.broker.kafka import Broker

    if running := os.environ.get("PIPELINE_TEST_KAFKA"):
        yield running
        return
    request.getfixturevalue("kafka_jars")
    folder = tmp_path_factory.mktemp("kafka")
    with Broker(folder) as started:
        yield started.bootstrap
    shutil.rmtree(folder)


@pytest.fixture
def broker(kafka_jars: Path, tmp_path: Path) -> Iterator[Broker]:
    """A Kafka of the test's own, to stop, kill and pause."""
    from tests.broker.kafka import Broker

    with Broker(tmp_path / "kafka") as own:
        yield own


@pytest.fixture
def app(kafka: str) -> Iterator[App]:
    """Fresh names on `kafka`, without topics yet."""
    from tests.broker.kafka import delete_topics, new_app

    fresh = new_app(kafka)
    yield fresh
    if os.environ.get("PIPELINE_TEST_KAFKA"):
        delete_topics(kafka, fresh.app)
