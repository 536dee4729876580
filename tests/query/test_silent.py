"""Reads of views without windows whose series expire when they are silent."""

import pytest

from pipeline.core.query import Query, parse_matcher
from pipeline.core.record import Definition
from pipeline.settings import WorkerSettings
from tests.query.support import World, scanned
from tests.support import HandClock

QUIET = Definition("v", "sum", ("a",), retention_s=60)
OTHER = Definition("v", "sum", ("a", "b"))
TICK = Definition("tick", "sum")
FAR_S = 1e18


@pytest.fixture
def world() -> World:
    """A world of two partitions, each of which deletes one expired entry with a commit."""
    return World(2, clock=HandClock(), worker=WorkerSettings(expired_entries_max=1))


def shown(world: World, **by: str) -> dict[tuple[str, ...], int]:
    """Return the answer of a scan, which must equal that of a point read."""
    query = Query("v", where=tuple(parse_matcher(f"{label}={value}") for label, value in by.items()))
    answer = scanned(world.reader, query)
    if by:
        assert world.reader.point(query) == answer
    assert world.reader.read(query, deadline_s=FAR_S) == answer
    return {tuple(series.labels.values()): series.value for series in answer}


def pass_time(world: World, seconds: float, *numbers: int) -> None:
    """Let time pass, and let these partitions note it."""
    assert isinstance(world.clock, HandClock)
    world.clock.s += seconds
    for number in numbers:
        world.append(number, TICK, {(): 1})
    world.fold(*numbers)


def test_expired_series_are_hidden_before_they_are_deleted(world: World) -> None:
    """Scans and point reads hide expired series from the commit that says so; a series that begins anew is shown."""
    for number in (0, 1):
        world.append(number, QUIET, {("x",): 1, ("y",): 2, ("z",): 4})
    world.fold()
    assert shown(world) == {("x",): 2, ("y",): 4, ("z",): 8}
    pass_time(world, 100, 0)
    assert shown(world) == {("x",): 1, ("y",): 2, ("z",): 4}
    assert shown(world, a="x") == {("x",): 1}
    pass_time(world, 1, 1)
    assert shown(world) == {}
    assert shown(world, a="z") == {}
    world.append(1, QUIET, {("z",): 16})
    world.fold(1)
    assert shown(world) == shown(world, a="z") == {("z",): 16}


def test_definitions_beside_it_do_not_expire(world: World) -> None:
    """A definition of the same view that has no retention never expires."""
    world.append(0, QUIET, {("x",): 1})
    world.append(0, OTHER, {("x", "w"): 2})
    world.fold()
    assert shown(world) == {("x", ""): 1, ("x", "w"): 2}
    pass_time(world, 100, 0, 1)
    assert shown(world) == shown(world, a="x", b="w") == {("x", "w"): 2}
    assert shown(world, a="x", b="") == {}


def test_the_listing_names_the_retention(world: World) -> None:
    """The list of views shows the retention of the definition."""
    world.append(0, QUIET, {("x",): 1})
    world.fold()
    assert [it.retention_s for it in world.reader.views().views] == [60]
