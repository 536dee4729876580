"""Server-sent events are parsed however their bytes are cut."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.events import EventParser, ServerEvent
from pipeline.errors import BadRecord

STREAM = (
    b": a comment\n\nid: a-1\nevent: answer\ndata: {}\n\nevent:update\r\ndata: one\r\ndata:two\r\n\r\n"
    b"id: no\0\nid: n\ro\nretry: 5\nstrange\ndata\n\nevent: nothing\n\nid\ndata: \xc3\xbc\n\ndata: cut off\n"
)
EVENTS = [
    ServerEvent("answer", b"{}", "a-1"),
    ServerEvent("update", b"one\ntwo", "a-1"),
    ServerEvent("message", b"", "a-1"),
    ServerEvent("message", b"\xc3\xbc", ""),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=8))
def test_events_do_not_depend_on_cuts(cuts: list[int]) -> None:
    """The bytes of a stream make the same events in one piece and in many; one without its end is none."""
    ends = [0, *sorted(cuts), len(STREAM)]
    parser = EventParser(10_000)
    assert [event for a, b in pairwise(ends) for event in parser.feed(STREAM[a:b])] == EVENTS


def test_a_long_event_in_many_pieces() -> None:
    """Time is in proportion to the bytes: pieces that are known to hold no line end are not searched again."""
    parser = EventParser(10_000_000)
    parser.feed(b"data: ")
    for _ in range(5_000):
        assert parser.feed(b"x" * 1_000) == []
    assert [len(event.data) for event in parser.feed(b"\n\n")] == [5_000_000]


def test_an_event_without_end() -> None:
    """An event of one endless line, or of endless lines, is refused at the bound; comments between events count anew."""
    parser = EventParser(10_000)
    for _ in range(1_000):
        assert parser.feed(b": a comment of the server, again and again\n\n") == []
    for part in (b"x" * 1_000, b"data:\n" * 50, b"id: 1\n" * 50, b"event: " + b"e" * 1_000):
        parser = EventParser(10_000)
        for _ in range(2):
            parser.feed(part)
        with pytest.raises(BadRecord, match="an event of over 10000 bytes"):
            parser.feed(part * 20)
