"""Tokens name the topic that acknowledged, also one that is made anew while a publisher runs."""

import threading
from collections.abc import Mapping, Sequence

import pytest

from pipeline.core.record import Definition
from pipeline.core.token import Token
from pipeline.errors import PipelineError, Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ports import Message, RawDelta
from pipeline.publisher.naming import Naming
from pipeline.settings import PublisherSettings
from pipeline.topics import DELTAS
from tests.producer.support import CLOCK, FaultyLog, memory_log, publisher


class Topics(FaultyLog):
    """A log whose topics can be made anew; `before_append` is called with each append."""

    def __init__(self) -> None:
        super().__init__(partitions=1)
        self.asked_count = 0
        self.before_append = lambda: None
        self.silent = False

    def make_anew(self) -> None:
        self.log = memory_log(1)

    def topic_id(self, topic: str) -> str:
        self.asked_count += 1
        if self.silent:
            raise Unavailable("nobody says")
        return super().topic_id(topic)

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        self.before_append()
        return super().append(messages, timeout_s=timeout_s)


def test_a_flush_names_the_topic() -> None:
    """What has no acknowledgement since asks nobody; closing returns the same."""
    log = Topics()
    pub = publisher(log)
    assert pub.flush() == Token()
    pub.sum("v").add(1)
    token = pub.flush(20)
    assert token == Token({0: 1}, log.topic_id(DELTAS))
    asked_count = log.asked_count
    assert pub.flush(20) == pub.close() == pub.close() == token
    assert log.asked_count == asked_count


def test_a_signal_handler_that_flushes_does_not_wait_for_its_own_thread() -> None:
    """In the midst of a flush that asks which topic it is: both return the token."""

    class Interrupted(Topics):
        def topic_id(self, topic: str) -> str:
            asked = super().topic_id(topic)
            if threading.current_thread() is flushing and not inner:
                inner.append(Token())
                inner[0] = pub.flush(20)
            return asked

    inner: list[Token] = []
    outer: list[Token] = []
    log = Interrupted()
    flushing = threading.Thread(target=lambda: outer.append(pub.flush(20)), daemon=True)
    with publisher(log) as pub:
        pub.sum("v").add(1)
        flushing.start()
        flushing.join(30)
        assert inner == outer == [Token({0: 1}, log.log.topic_id(DELTAS))]


def test_a_topic_made_anew_while_a_publisher_runs() -> None:
    """The next flush returns a token of the new topic: only what that acknowledged, though the old one was further."""
    log = Topics()
    with publisher(log) as pub:
        cell = pub.sum("v").labels()
        for _ in range(5):
            cell.add(1)
            old = pub.flush(20)
        assert old == Token({0: 5}, log.topic_id(DELTAS))
        log.make_anew()
        cell.add(1)
        new = pub.flush(20)
        assert new == Token({0: 1}, log.topic_id(DELTAS)) != old
        cell.add(1)
        assert pub.flush(20) == Token({0: 2}, log.topic_id(DELTAS))


def test_a_topic_made_anew_between_two_acknowledgements_of_a_flush() -> None:
    """A read with that token waits for what the new topic has, and for nothing that went with the old one."""
    log = Topics()
    with publisher(log) as pub:
        cell = pub.sum("v").labels()
        for _ in range(3):
            cell.add(1)
            pub.flush(20)
        log.silent = True
        cell.add(1)
        assert pub.flush(20).next_offsets == {0: 4}, "acknowledged is acknowledged, whoever can't be asked"
        log.make_anew()
        cell.add(1)
        pub.flush(20)
        log.silent = False
        cell.add(1)
        assert pub.flush(20) == Token({0: 2}, log.topic_id(DELTAS))


def test_nothing_is_sent_before_the_topic_is_known() -> None:
    """So that every acknowledgement can be named."""
    log = Topics()
    log.silent = True
    with publisher(log, flush_interval_ms=1) as pub:
        pub.sum("v").add(1)
        with pytest.raises(Unavailable, match="nobody says"):
            pub.flush(0.2)
        assert not log.attempts
        log.silent = False
        assert pub.flush(20) == Token({0: 1}, log.topic_id(DELTAS))


def test_a_gateway_names_the_topic_that_acknowledged() -> None:
    """Each answer has the topic of its own appends, also if the topic is made anew just before."""
    log = Topics()
    gate = Gateway(log, CLOCK, PublisherSettings(), lambda view: Definition(view, "sum"))
    delta = RawDelta("v", "sum", {}, 1)
    assert gate.deltas([delta]) == Token({0: 1}, log.topic_id(DELTAS))
    assert gate.deltas([delta]) == Token({0: 2}, log.topic_id(DELTAS))
    log.before_append = log.make_anew
    assert gate.deltas([delta]) == Token({0: 1}, log.topic_id(DELTAS))
    assert gate.deltas([]) == Token()


class _Asked:
    """A log that tells its id when it may, and counts how often it was asked."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.ids = iter("abcdefghij")
        self.count = 0

    def topic_id(self, topic: str) -> str:
        self.count += 1
        assert self.may.wait(20)
        return next(self.ids)

    def partition_count(self, topic: str) -> int:
        return 1

    message_bytes_max = partition_count

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return {}

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        return []

    def close(self) -> None:
        """Nothing to give back."""


def test_who_asks_at_once_shares_an_answer_that_is_new_enough() -> None:
    """No answer to a request that had begun before is taken; twenty threads cost two requests, or one more."""
    log = _Asked()
    naming = Naming(log)
    first: list[str] = []
    rest: list[str] = []
    asking = threading.Thread(target=lambda: first.append(naming._ask()))
    asking.start()
    while not log.count:
        pass
    threads = [threading.Thread(target=lambda: rest.append(naming._ask())) for _ in range(20)]
    for thread in threads:
        thread.start()
    log.may.set()
    for thread in (asking, *threads):
        thread.join(20)
    assert first == ["a"]
    assert len(rest) == 20
    assert "a" not in rest
    assert naming.before() == max(rest)
