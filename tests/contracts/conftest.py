"""Every implementation of a port, for its one suite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contracts.support import EmbeddedLab, KafkaLab, LogLab, MemoryLab, MemoryStoreLab, RocksStoreLab, StoreLab


@pytest.fixture(params=["memory", "embedded", "embedded-fsync", "kafka"])
def lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LogLab]:
    """A fresh log."""
    if request.param == "memory":
        yield MemoryLab()
        return
    if request.param == "kafka":
        kafka = KafkaLab(request.getfixturevalue("kafka"))
        yield kafka
        kafka.close()
        return
    embedded = EmbeddedLab(tmp_path / "log", fsync=request.param.endswith("fsync"))
    yield embedded
    embedded.embedded.close()


@pytest.fixture(params=["memory", "rocks"])
def store_lab(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[StoreLab]:
    """Fresh stores."""
    made: StoreLab = MemoryStoreLab() if request.param == "memory" else RocksStoreLab(tmp_path / "stores")
    yield made
    made.stores.close()
