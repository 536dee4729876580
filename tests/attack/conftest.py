"""One `pipeline up` with default settings for the attacks of a module."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.attack.support import up_process
from tests.support import UpProcess


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    """A `pipeline up` that an attack leaves as it was."""
    with up_process(tmp_path_factory.mktemp("attack") / "data") as started:
        yield started
