"""The contract of every log about a topic's id."""

import re
from pathlib import Path

from pipeline.adapters.memory import MemoryLog
from tests.contracts.support import PARTITIONS, EmbeddedLab, KafkaLab, LogLab, append, until


def test_a_topic_has_an_id_of_its_own(lab: LogLab) -> None:
    """Each topic has one id at each call, whatever is appended, which can stand in a token, and so in a URL."""
    ids = [lab.log.topic_id(topic) for topic in (lab.events, lab.notes, lab.table)]
    append(lab.log, lab.events, 0, b"x")
    assert [lab.log.topic_id(topic) for topic in (lab.events, lab.notes, lab.table)] == ids
    assert len(set(ids)) == 3
    for topic_id in ids:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{1,63}", topic_id), topic_id


def test_what_is_acknowledged_is_below_the_high_watermark(lab: LogLab) -> None:
    """The high watermark covers an acknowledged record at once."""
    for partition in range(PARTITIONS):
        assert append(lab.log, lab.events, partition, b"x", b"y")[-1] == lab.log.high_watermarks(lab.events)[partition]


def test_an_id_stays_with_the_folder(tmp_path: Path) -> None:
    """A topic keeps its id when it is opened again; in another folder, or after the folder was emptied, it has another."""
    one, two = EmbeddedLab(tmp_path / "one"), EmbeddedLab(tmp_path / "two")
    topic_id = one.log.topic_id(one.events)
    assert two.log.topic_id(two.events) != topic_id
    one.reopen()
    assert one.log.topic_id(one.events) == topic_id
    for lab in (one, two):
        lab.embedded.close()


def test_two_logs_in_memory_are_two() -> None:
    """Two logs in memory have different ids, though their topics have the same names."""
    first, second = (MemoryLog({"t": 1}, lambda: 0) for _ in range(2))
    assert first.topic_id("t") != second.topic_id("t")


def test_a_topic_that_is_made_anew_has_another_id(kafka: str) -> None:
    """A topic made anew has another id for publishers, too, which ask in their own way, and get the servers' id."""
    lab = KafkaLab(kafka)
    try:
        writer = lab.kafka._writer
        before = lab.log.topic_id(lab.events)
        assert writer.topic_id(lab.events) == before
        append(lab.log, lab.events, 1, b"x", b"y")
        assert writer.high_watermarks(lab.events) == {0: 0, 1: 2, 2: 0, 3: 0}
        lab.make_anew(lab.events)
        until(lambda: lab.log.topic_id(lab.events) != before)
        assert writer.topic_id(lab.events) == lab.log.topic_id(lab.events) != before
    finally:
        lab.close()
