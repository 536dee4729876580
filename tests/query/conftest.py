"""A server for a module's tests."""

from collections.abc import Iterator

import pytest

from tests.query.support import Server, World, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A running server on an empty world, shared by the tests of a module: each uses view names of its own."""
    with serving(World()) as running:
        yield running
