"""The contract of every membership with the worker that listens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pytest
from confluent_kafka.admin import NewPartitions

from pipeline.adapters.static_membership import StaticMembership
from pipeline.errors import LogCorrupt, PipelineError, Unavailable
from pipeline.ports import Membership
from tests.support import wait_until

PARTITIONS = 3


class Listener:
    """Notes all calls."""

    def __init__(self) -> None:
        self.assigned: list[tuple[frozenset[int], frozenset[int], int]] = []
        self.heard: list[str] = []
        self.failures: list[PipelineError] = []

    def on_revoked(self, partitions: frozenset[int], timeout_s: float) -> None:
        self.heard.append("revoked")

    def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
        self.heard.append("assigned")
        self.assigned.append((actives, standbys, generation))

    def on_failed(self, error: PipelineError) -> None:
        self.heard.append("failed")
        self.failures.append(error)


class Lab(Protocol):
    """A membership that has not been started, the only one of its group, and a way to add a partition."""

    membership: Membership

    def grow(self) -> None: ...


class StaticLab:
    def __init__(self) -> None:
        self.count = PARTITIONS
        self.membership: Membership = StaticMembership(lambda: self.count)

    def grow(self) -> None:
        self.count += 1


class FaustLab:
    def __init__(self, bootstrap: str) -> None:
        from pipeline.adapters.faust.membership import FaustMembership
        from tests.broker.kafka import admin_client, create_topics, new_app

        self.app = new_app(bootstrap)
        self._admin = admin_client(bootstrap)
        self._topics = {name: self.app.topic(name) for name in ("deltas", "changelog")}
        create_topics(bootstrap, self.app.app, PARTITIONS)
        self.membership: Membership = FaustMembership(
            bootstrap, self.app.app, name="a", session_timeout_ms=10_000, metadata_refresh_ms=500, **self._topics
        )

    def grow(self) -> None:
        more = [NewPartitions(topic, PARTITIONS + 1) for topic in self._topics.values()]
        for made in self._admin.create_partitions(more).values():
            made.result(10)


@pytest.fixture(params=["static", "faust"])
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    made: Lab = StaticLab() if request.param == "static" else FaustLab(request.getfixturevalue("kafka"))
    yield made
    made.membership.stop(leave=True, timeout_s=20)


def test_one_that_is_alone_has_all(lab: Lab) -> None:
    """The first call gives a lone member all partitions, none of them as a copy."""
    listener = Listener()
    lab.membership.start(listener)
    wait_until(lambda: listener.assigned, "an assignment")
    assert listener.heard[0] == "assigned"
    assert listener.assigned[0][:2] == (frozenset(range(PARTITIONS)), frozenset())


def test_new_partitions_are_its_too(lab: Lab) -> None:
    """A later generation gives the new partitions along with all the earlier ones."""
    listener = Listener()
    lab.membership.start(listener)
    wait_until(lambda: listener.assigned, "an assignment")
    lab.grow()
    wait_until(lambda: len(listener.assigned[-1][0]) == PARTITIONS + 1, "the new partition")
    generations = [generation for _, _, generation in listener.assigned]
    assert generations == sorted({*generations})


def test_it_can_be_told_and_asked_at_any_time(lab: Lab) -> None:
    """A membership can be told and asked before it is started, while it runs, and after its end."""
    listener = Listener()
    for _ in range(2):
        lab.membership.set_warm(frozenset({0}))
        assert isinstance(lab.membership.members(), list)
        if not listener.heard:
            lab.membership.start(listener)
            wait_until(lambda: listener.assigned, "an assignment")
    assert lab.membership.stop(leave=True, timeout_s=20)
    lab.membership.set_warm(frozenset({1}))
    assert isinstance(lab.membership.members(), list)


def test_after_its_end_it_is_silent(lab: Lab) -> None:
    """`stop` is idempotent, and the listener gets no call after it."""
    listener = Listener()
    lab.membership.start(listener)
    wait_until(lambda: listener.assigned, "an assignment")
    assert lab.membership.stop(leave=True, timeout_s=20)
    heard = [*listener.heard]
    lab.grow()
    assert lab.membership.stop(leave=True, timeout_s=20)
    assert listener.heard == heard
    assert not listener.failures


def test_one_that_was_never_started_can_be_stopped(lab: Lab) -> None:
    """A membership that was never started can be stopped."""
    assert lab.membership.stop(leave=True, timeout_s=20)


@pytest.mark.parametrize(("error", "tells"), [(Unavailable("away"), False), (LogCorrupt("made anew"), True)])
def test_one_that_does_not_know_what_there_is(error: PipelineError, tells: bool) -> None:
    """A membership asks again after Unavailable, and fails on any other error."""
    failures = [error]

    def count() -> int:
        if failures:
            raise failures.pop()
        return PARTITIONS

    listener = Listener()
    membership = StaticMembership(count)
    membership.start(listener)
    wait_until(lambda: listener.heard, "a word")
    assert listener.heard == (["failed"] if tells else ["assigned"])
    assert membership.stop(leave=True, timeout_s=20)


def test_what_its_listener_raises_is_no_secret(lab: Lab) -> None:
    """Partitions whose assignment a listener failed to handle are given again, or the member fails."""

    class Broken(Listener):
        def on_assigned(self, actives: frozenset[int], standbys: frozenset[int], generation: int) -> None:
            super().on_assigned(actives, standbys, generation)
            if len(self.assigned) == 1:
                raise RuntimeError("a bug")

    listener = Broken()
    lab.membership.start(listener)
    wait_until(lambda: len(listener.assigned) > 1 or listener.failures, "another try, or a failure")
    if listener.failures:
        assert "a bug" in str(listener.failures[0])
    else:
        assert listener.assigned[0] == listener.assigned[1]
