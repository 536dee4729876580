"""Reads that wait for a token: of the present topic, of a former one, or of another log's."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest

from pipeline import Reader, Token
from pipeline.core.record import Definition
from pipeline.errors import Invalid, NotReady, OtherTopic, Unavailable
from pipeline.query.ends import EndsPolled
from pipeline.query.reader import ViewReader
from pipeline.topics import DELTAS
from tests.query.support import Server, World, serving
from tests.support import wait_until

DEFINITION = Definition("v", "sum")
AT_ONCE_S = 15.0
"""Far less than reads wait by default, far more than an answer takes on a loaded machine."""


class Log:
    """The end offsets of a log whose topic can be made anew, and which can be away."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.topic_id = world.log.topic_id(DELTAS)
        self.away = False

    def source_id(self) -> str:
        if self.away:
            raise Unavailable("the log is away")
        return self.topic_id


@pytest.fixture
def log() -> Log:
    world = World()
    world.publish(DEFINITION, {(): 1})
    return Log(world)


@pytest.fixture
def server(log: Log) -> Iterator[Server]:
    """A server that asks the log every 50 ms."""
    world = log.world
    ends = EndsPolled(
        partial(world.log.end_offsets, DELTAS),
        partial(world.log.start_offsets, DELTAS),
        world.clock,
        interval_ms=50,
        source_id=log.source_id,
    )
    ends.start()
    world.reader = ViewReader(stores=world.stores, ends=ends, clock=world.clock, settings=world.settings)
    try:
        wait_until(lambda: ends().source_id, "a first look at the log")
        with serving(world) as running:
            yield running
    finally:
        ends.stop()


def test_a_token_of_another_topic_is_refused_at_once(server: Server) -> None:
    """A token of another topic is 409 with advice, whether its offsets are reached, too high, or of no known partition."""
    for token in (Token({0: 1}, "other"), Token({0: 10**9}, "other"), Token({99: 1}, "other"), Token({0: 0}, "other")):
        for query in ([], [("max_staleness_ms", 60_000)], [("by", "")]):
            started_s = time.monotonic()
            reply = server.get("/v1/views/v", ("after", token), *query)
            assert "Flush again for a new token, or read without `after`" in server.problem(409, reply)
            assert reply.json()["type"] == "urn:pipeline:error:OtherTopic"
            assert time.monotonic() - started_s < AT_ONCE_S


def test_the_reader_says_so(server: Server) -> None:
    """A reader raises `OtherTopic`, which is `Invalid`, with the server's words; the empty token waits for nothing."""
    with Reader(server.url) as reader:
        with pytest.raises(OtherTopic, match="topic other, but this server reads"):
            reader.get("v", after=Token({0: 1}, "other"))
        with pytest.raises(Invalid):
            reader.get("v", after="other~0-1")
        with pytest.raises(Invalid, match="not a token"):
            reader.get("v", after="0-1")
        assert reader.get("v", after=Token()).value() == 1


def test_a_topic_made_anew(server: Server, log: Log) -> None:
    """Tokens of the old topic are refused from then on; with a token of the new topic a read waits, although the old
    topic's position is far beyond it.
    """
    before = log.world.token({number: 1 for number in range(4) if log.world.log.end_offsets(DELTAS)[number]})
    with Reader(server.url) as reader:
        assert reader.get("v", after=before).value() == 1
        log.topic_id = "new"
        started_s = time.monotonic()
        with pytest.raises(NotReady, match="is at 0, not at 1, after 300 ms"):  # though asked before the server knew of it
            reader.get("v", after=Token(before.next_offsets, "new"), timeout_ms=300)
        with pytest.raises(OtherTopic):
            reader.get("v", after=before)
        assert time.monotonic() - started_s < AT_ONCE_S


def test_a_topic_made_anew_while_a_read_waits(server: Server, log: Log) -> None:
    """The read ends when the server learns of the new topic, not when its time is over."""
    with Reader(server.url) as reader:
        started_s = time.monotonic()

        def make_anew() -> None:
            log.topic_id = "new"

        threading.Timer(0.1, make_anew).start()
        with pytest.raises(OtherTopic):
            reader.get("v", after=log.world.token({0: 10**6}), timeout_ms=20_000)
        assert 0.1 <= time.monotonic() - started_s < 0.1 + AT_ONCE_S


def test_nobody_says_which_topic_is_there(server: Server, log: Log) -> None:
    """While the log is away a token of the former topic is served; another token may be newer: 503, and soon."""
    log.away = True
    with Reader(server.url) as reader:
        assert reader.get("v", after=log.world.token({0: 0}), timeout_ms=200).value() == 1
        with pytest.raises(NotReady, match="unknown while the log is away"):
            reader.get("v", after=Token({0: 1}, "new"), timeout_ms=200)
