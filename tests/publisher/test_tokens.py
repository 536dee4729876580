"""Tokens name the topic that acknowledged, also one that is made anew while a publisher runs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest

from pipeline.core.record import Definition
from pipeline.core.token import Token
from pipeline.errors import PipelineError, Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ports import Message, RawDelta
from pipeline.publisher.tokens import TokenMaker
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS
from tests.publisher.support import CLOCK, FaultyLog, in_threads, memory_log, publisher, wait_until


class Topics(FaultyLog):
    """A log whose topics can be made anew; `before_append` is called with each append, `asked` with each question."""

    def __init__(self) -> None:
        super().__init__(partitions=1)
        self.asked_count = 0
        self.before_append = lambda: None
        self.asked: Callable[[], object] = lambda: None
        self.silent = False

    def make_anew(self) -> None:
        self.log = memory_log(1)

    def topic_id(self, topic: str) -> str:
        self.asked_count += 1
        if self.silent:
            raise Unavailable("nobody says")
        found = super().topic_id(topic)
        self.asked()
        return found

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        self.before_append()
        return super().append(messages, timeout_s=timeout_s)

    def token(self, next_offset: int) -> Token:
        return Token({0: next_offset}, self.log.topic_id(DELTAS))


def test_a_flush_names_the_topic() -> None:
    """Nothing is sent before the id is known. A flush without new acknowledgements asks nobody; closing returns the same."""
    log = Topics()
    log.silent = True
    pub = publisher(log, flush_interval_ms=1)
    assert pub.flush() == Token()
    pub.sum("v").add(1)
    wait_until(lambda: log.asked_count)
    with pytest.raises(Unavailable, match="nobody says"):
        pub.flush(0.2)
    assert not log.attempts
    log.silent = False
    assert pub.flush(20) == log.token(1)
    asked_count = log.asked_count
    assert pub.flush(20) == pub.close() == pub.close() == log.token(1)
    assert log.asked_count == asked_count


def test_what_is_acknowledged_while_a_token_is_made_is_in_the_next() -> None:
    """An acknowledgement that comes while the log is asked for the topic's id is not forgotten."""
    log = Topics()
    with publisher(log, flush_interval_ms=1) as pub:
        cell = pub.sum("v").labels()
        cell.add(1)
        assert pub.flush() == log.token(1)

        def acknowledge_one_more() -> None:
            log.asked = lambda: None
            cell.add(1)
            wait_until(lambda: pub.stats()["entries"] == 3)

        log.asked = acknowledge_one_more
        cell.add(1)
        assert pub.flush() == log.token(2)
        assert pub.flush() == log.token(3)


def test_a_signal_handler_that_flushes_does_not_wait_for_its_own_thread() -> None:
    """A handler's flush in the midst of a flush that asks for the topic's id does not block: both return the token."""
    found: list[Token] = []
    log = Topics()

    def interrupt() -> None:
        if threading.current_thread() is flushing:
            log.asked = lambda: None
            found.append(pub.flush(20))

    log.asked = interrupt
    flushing = threading.Thread(target=lambda: found.append(pub.flush(20)), daemon=True)
    with publisher(log) as pub:
        pub.sum("v").add(1)
        flushing.start()
        flushing.join(30)
        assert found == [log.token(1)] * 2


def test_a_topic_made_anew_while_a_publisher_runs() -> None:
    """The next flush returns a token of the new topic's acknowledgements only, though the old topic was further.

    So it does if the topic is made anew between two acknowledgements, and nobody can be asked meanwhile.
    """
    log = Topics()
    with publisher(log) as pub:
        cell = pub.sum("v").labels()

        def flushed() -> Token:
            cell.add(1)
            return pub.flush(20)

        assert [flushed() for _ in range(5)][-1] == log.token(5)
        log.make_anew()
        assert [flushed(), flushed()] == [log.token(1), log.token(2)]
        log.silent = True
        assert flushed().next_offsets == {0: 3}, "acknowledged is acknowledged, whoever can't be asked"
        log.make_anew()
        flushed()
        log.silent = False
        assert flushed() == log.token(2)


def test_a_gateway_names_the_topic_that_acknowledged() -> None:
    """Each answer has the topic of its own appends, also if the topic is made anew just before."""
    log = Topics()
    gate = Gateway(log, CLOCK, PublisherSettings(), lambda view, bounds: Definition(view, "sum"))
    delta = RawDelta("v", "sum", {}, 1)
    assert gate.deltas([delta]) == log.token(1)
    assert gate.deltas([delta]) == log.token(2)
    log.before_append = log.make_anew
    assert gate.deltas([delta]) == log.token(1)
    assert gate.deltas([]) == Token()


def test_who_asks_at_once_shares_an_answer_that_is_new_enough() -> None:
    """No answer to a request that had begun before is shared; twenty threads cost few requests."""
    log, may = Topics(), threading.Event()
    maker = TokenMaker(log)
    old = maker.topic_id_before()
    log.asked = lambda: may.wait(20)
    first: list[Token] = []
    rest: list[Token] = []
    asking = threading.Thread(target=lambda: first.append(maker.make({0: 1}, old)))
    asking.start()
    wait_until(lambda: log.asked_count == 2)
    log.make_anew()

    begun: list[int] = []

    def ask(i: int) -> None:
        if i:
            begun.append(i)
            rest.append(maker.make({0: 1}, old))
        else:
            wait_until(lambda: len(begun) == 20)
            may.set()

    in_threads(21, ask)
    asking.join(20)
    assert [token.topic_id for token in first] == [old]
    assert {token.topic_id for token in rest} <= {log.topic_id(DELTAS), ""}
    assert len(rest) == 20
    assert log.asked_count < 15, "they share answers, but for those that come late"
    assert maker.topic_id_before() == log.topic_id(DELTAS)
