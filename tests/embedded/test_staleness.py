"""Staleness under load, against a clock outside; `tests.embedded.staleness` has the long form."""

from __future__ import annotations

from pathlib import Path

from tests.embedded.staleness import embedded, measure


def test_no_read_understates_how_stale_it_is(tmp_path: Path) -> None:
    """An answer holds all that was acknowledged before the read began less the staleness that it states."""
    with embedded(str(tmp_path / "data")) as (publishers, read):
        found = measure(publishers, read, 400)
    assert found.reads == 400
    assert found.behind > 100, "the bound was hardly put to the test"
    assert found.understated == []
