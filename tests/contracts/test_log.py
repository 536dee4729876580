"""The contract of every log. No test relies on offsets without holes, or on a clock, so that a broker can join."""

import random
import threading
import time
from collections import Counter

import pytest

from pipeline.errors import Discontinuous, Displaced, Fenced, Invalid, RecordsLost, Unavailable
from pipeline.ports import LogReader, Message, MessageRun
from tests.contracts.support import (
    DEADLINE_S,
    PARTITIONS,
    LogLab,
    Row,
    append,
    appended,
    committed,
    poll,
    read,
    read_on,
    threads,
    until,
)


def values(rows: list[Row]) -> list[bytes | None]:
    return [row.value for row in rows]


def numbered(count: int, prefix: bytes = b"") -> list[bytes]:
    return [prefix + b"%d" % number for number in range(count)]


# Appending


def test_append_says_which_offset_covers_each_message(lab: LogLab) -> None:
    """A reader that has reached a message's next_offset has read the message, and did not have it before."""
    messages = [Message(lab.events, number % PARTITIONS, None, b"%d" % number) for number in range(40)]
    covering = appended(lab.log, messages)
    for partition in range(PARTITIONS):
        rows = read(lab.log, lab.events, partition)
        mine = [(c, m.value) for c, m in zip(covering, messages, strict=True) if m.partition == partition]
        assert values(rows) == [value for _, value in mine]
        assert [row.offset < covers for row, (covers, _) in zip(rows, mine, strict=True)] == [True] * 10
        assert all(row.offset >= covers for row, (covers, _) in zip(rows[1:], mine[:-1], strict=True))
        assert mine[-1][0] <= lab.log.watermarks(lab.events, partition).end_offset


def test_records_come_back_in_the_order_of_their_appends(lab: LogLab) -> None:
    """Order within a partition is the order of the messages, within an append and across appends."""
    expected = numbered(300)
    for first in range(0, 300, 7):
        append(lab.log, lab.events, 1, *expected[first : first + 7])
    assert values(read(lab.log, lab.events, 1)) == expected


@pytest.mark.parametrize("topic", ["events", "table"])
def test_records_come_back_as_they_were(lab: LogLab, topic: str) -> None:
    """Keys and values are any bytes: none, empty, NUL, 0xff, a megabyte."""
    some = [None, b"", b"\x00", b"\xff" * 9, b"text", bytes(range(256)), b"\x00" * 1_000_000]
    keys = some if topic == "events" else some[1:]  # a compacted topic is one with keys
    records = [(key, value) for key in keys for value in some]
    messages = [Message(getattr(lab, topic), 2, key, value) for key, value in records]
    for first in range(0, len(messages), 9):
        appended(lab.log, messages[first : first + 9])
    assert [(row.key, row.value) for row in read(lab.log, getattr(lab, topic), 2)] == records


def test_at_ms_never_falls(lab: LogLab) -> None:
    """Within a partition no record was accepted before an earlier one, whatever the log's clock does."""
    for _ in range(3):
        append(lab.log, lab.events, 0, *numbered(5))
    lab.set_clock_back()
    append(lab.log, lab.events, 0, *numbered(5))
    times = [row.at_ms for row in read(lab.log, lab.events, 0)]
    assert len(times) == 20
    assert times == sorted(times)
    assert times[0] > 1_600_000_000_000


def test_at_ms_never_falls_behind_what_has_expired(lab: LogLab) -> None:
    """A record's time is not below that of the newest earlier record, even when that one is gone."""
    append(lab.log, lab.events, 0, b"old")
    (newest,) = read(lab.log, lab.events, 0)
    lab.expire()
    lab.set_clock_back()
    for _ in range(30):
        lab.set_clock_back()
    append(lab.log, lab.events, 0, b"new")
    (row,) = read(lab.log, lab.events, 0)
    assert row.at_ms >= newest.at_ms


def test_nothing_appended_is_nothing(lab: LogLab) -> None:
    """An append of no messages has no answer, and adds no record."""
    assert lab.log.append([], timeout_s=DEADLINE_S) == []
    assert lab.log.transaction("empty").commit([], timeout_s=DEADLINE_S) == []
    assert read(lab.log, lab.events, 0) == []


def test_a_message_that_can_not_be_appended_harms_no_other(lab: LogLab) -> None:
    """Every message has its own result: Invalid for an unknown topic, an offset for its neighbours."""
    out = lab.log.append(
        [
            Message(lab.events, 0, None, b"first"),
            Message(lab.events, PARTITIONS, None, b"no such partition"),
            Message("no-such-topic", 0, None, b"no such topic"),
            Message(lab.events, 0, None, b"last"),
        ],
        timeout_s=DEADLINE_S,
    )
    assert [type(result) for result in out] == [int, Unavailable if lab.can_grow else Invalid, Invalid, int]
    assert values(read(lab.log, lab.events, 0)) == [b"first", b"last"]


def test_unknown_topics_and_partitions_are_invalid(lab: LogLab) -> None:
    """Every call for an unknown topic or partition raises Invalid."""
    for partition in (-1, PARTITIONS):
        with pytest.raises(Invalid):
            lab.log.watermarks(lab.events, partition)
        with pytest.raises(Invalid):
            lab.log.reader(lab.events).assign({0: 0, partition: 0})
    with pytest.raises(Invalid):
        lab.log.watermarks("no-such-topic", 0)
    with pytest.raises(Invalid):
        lab.log.partition_count("no-such-topic")
    with pytest.raises(Invalid):
        lab.log.reader("no-such-topic").assign({0: 0})
    assert lab.log.partition_count(lab.events) == PARTITIONS


def test_watermarks_hold_what_can_be_read(lab: LogLab) -> None:
    """start_offset <= every offset < end_offset; both are equal while a partition is empty; neither ever falls."""
    before = lab.log.watermarks(lab.events, 3)
    assert before.start_offset == before.end_offset
    for _ in range(5):
        covering = append(lab.log, lab.events, 3, *numbered(3))
        after = lab.log.watermarks(lab.events, 3)
        assert after.start_offset == before.start_offset
        assert after.end_offset >= covering[-1] > before.end_offset
        before = after
    assert lab.log.watermarks(lab.events, 2).end_offset == lab.log.watermarks(lab.events, 2).start_offset


def test_concurrent_appenders_lose_and_double_nothing(lab: LogLab) -> None:
    """Every acknowledged record is there once, under an offset of its own, in its appender's order."""
    acknowledged: list[tuple[int, int, bytes]] = []

    def appender(name: int) -> None:
        rng = random.Random(name)
        for number in range(0, 120, 3):
            messages = [
                Message(lab.events, rng.randrange(PARTITIONS), None, b"%d-%d" % (name, n)) for n in range(number, number + 3)
            ]
            for message, covers in zip(messages, appended(lab.log, messages), strict=True):
                acknowledged.append((message.partition, covers, message.value or b""))

    with threads(*(lambda name=name: appender(name) for name in range(4))):  # type: ignore[misc]
        pass
    assert len(acknowledged) == 480
    for partition in range(PARTITIONS):
        mine = sorted((covers, value) for at, covers, value in acknowledged if at == partition)
        assert len({covers for covers, _ in mine}) == len(mine)
        rows = read(lab.log, lab.events, partition)
        assert values(rows) == [value for _, value in mine]
        for name in range(4):
            order = [int(v.split(b"-")[1]) for _, v in mine if v.startswith(b"%d-" % name)]
            assert order == sorted(order)


# Reading


def test_a_reader_reads_what_it_was_assigned(lab: LogLab) -> None:
    """A reader reads exactly the assigned partitions from the given offsets; a later assignment replaces an earlier one."""
    covering = [append(lab.log, lab.events, partition, *numbered(10)) for partition in range(PARTITIONS)]
    reader = lab.log.reader(lab.events)
    assert reader.poll(record_count_max=10, bytes_max=2**20, timeout_s=0.05) == []
    reader.assign({1: covering[1][3], 2: covering[2][7]})
    seen: Counter[int] = Counter()
    while seen != {1: 6, 2: 2}:
        got = poll(reader, timeout_s=DEADLINE_S)
        assert got, f"only {seen} came"
        seen.update({partition: len(rows) for partition, rows in got.items()})
    reader.assign({3: covering[3][8]})
    assert {partition: values(rows) for partition, rows in poll(reader, timeout_s=DEADLINE_S).items()} == {3: [b"9"]}
    reader.assign({})
    assert poll(reader, timeout_s=0.05) == {}


@pytest.mark.parametrize("record_count_max", [1, 2, 7, 50, 1_000])
def test_small_polls_read_what_one_large_one_reads(lab: LogLab, record_count_max: int) -> None:
    """The limit on records bounds each answer and changes nothing else."""
    expected = numbered(60)
    append(lab.log, lab.events, 0, *expected[:50])
    append(lab.log, lab.events, 0, *expected[50:])
    assert values(read(lab.log, lab.events, 0, record_count_max=record_count_max)) == expected


def test_bytes_max_bounds_an_answer(lab: LogLab) -> None:
    """An answer exceeds the limit by one record and some at most, and has at least one record however small the limit is."""
    expected = [b"%d" % number * 100_000 for number in range(10)] * 3
    for first in range(0, 30, 10):
        append(lab.log, lab.events, 0, *expected[first : first + 10])
    reader = lab.log.reader(lab.events)
    for bytes_max in (1, 100_000, 1_000_000):
        reader.assign({0: lab.log.watermarks(lab.events, 0).start_offset})
        (rows,) = poll(reader, bytes_max=bytes_max, timeout_s=DEADLINE_S).values()
        assert 100_000 <= sum(len(row.value or b"") for row in rows) <= bytes_max + 500_000
        assert values(read(lab.log, lab.events, 0, bytes_max=bytes_max)) == expected


def test_any_offset_is_a_place_to_start(lab: LogLab) -> None:
    """Reading from an offset in the middle of an append gives the records from there on."""
    append(lab.log, lab.events, 0, *numbered(30, b"a"))
    append(lab.log, lab.events, 0, *numbered(30, b"b"))
    rows = read(lab.log, lab.events, 0)
    reader = lab.log.reader(lab.events)
    end = lab.log.watermarks(lab.events, 0).end_offset
    for row in rows:
        expected = [later for later in rows if later.offset >= row.offset]
        assert read_on(reader, 0, row.offset, end) == expected
        assert read_on(reader, 0, row.offset, end, record_count_max=17) == expected


def test_many_partitions_in_one_reader(lab: LogLab) -> None:
    """A reader of all partitions gets each of them whole and in order, also when it reads in small bites."""
    starts = {partition: lab.log.watermarks(lab.events, partition).start_offset for partition in range(PARTITIONS)}
    expected = {partition: numbered(20 * (partition + 1), b"%d/" % partition) for partition in range(PARTITIONS)}
    for partition, some in expected.items():
        append(lab.log, lab.events, partition, *some)
    reader = lab.log.reader(lab.events)
    reader.assign(starts)
    got: dict[int, list[bytes | None]] = {partition: [] for partition in range(PARTITIONS)}
    give_up_s = time.monotonic() + DEADLINE_S
    while got != expected:
        assert time.monotonic() < give_up_s
        for partition, rows in poll(reader, record_count_max=9).items():
            got[partition] += values(rows)


def test_poll_waits_no_longer_than_it_should(lab: LogLab) -> None:
    """A poll with nothing to read returns an empty answer after the timeout, and not long before or after it."""
    reader = lab.log.reader(lab.events)
    reader.assign({0: lab.log.watermarks(lab.events, 0).end_offset})
    for timeout_s, least_s in ((0.0, 0.0), (0.2, 0.15)):
        started_s = time.monotonic()
        assert poll(reader, timeout_s=timeout_s) == {}
        assert least_s <= time.monotonic() - started_s < timeout_s + 30


def test_poll_is_woken_by_an_append(lab: LogLab) -> None:
    """A poll that waits returns when the first record is there, long before its timeout."""
    reader = lab.log.reader(lab.events)
    reader.assign({0: lab.log.watermarks(lab.events, 0).end_offset})
    waiting = threading.Event()
    answers: list[bytes | None] = []

    def waiter() -> None:
        waiting.set()
        answers.extend(values(poll(reader, timeout_s=10 * DEADLINE_S)[0]))

    with threads(waiter):
        assert waiting.wait(DEADLINE_S)
        time.sleep(0.05)
        append(lab.log, lab.events, 1, b"of no interest")
        append(lab.log, lab.events, 0, b"here")
    assert answers == [b"here"]


def test_readers_have_cursors_of_their_own(lab: LogLab) -> None:
    """Nothing that one reader does, even its close, affects another."""
    start = lab.log.watermarks(lab.events, 0).start_offset
    append(lab.log, lab.events, 0, *numbered(10))
    one, other = lab.log.reader(lab.events), lab.log.reader(lab.events)
    one.assign({0: start})
    other.assign({0: start})
    assert len(poll(one, record_count_max=4, timeout_s=DEADLINE_S)[0]) == 4
    one.close()
    one.close()
    end = lab.log.watermarks(lab.events, 0).end_offset
    assert values(read_on(other, 0, start, end)) == numbered(10)


def test_following_while_others_append(lab: LogLab) -> None:
    """A reader that keeps polling gets every record once and in order, whoever appends meanwhile."""
    count = 400

    def writer() -> None:
        for number in range(count):
            append(lab.log, lab.events, 0, b"%d" % number)

    got: list[bytes | None] = []
    reader = lab.log.reader(lab.events)
    reader.assign({0: lab.log.watermarks(lab.events, 0).start_offset})
    with threads(writer):
        give_up_s = time.monotonic() + DEADLINE_S
        while len(got) < count and time.monotonic() < give_up_s:
            for rows in poll(reader, record_count_max=5).values():
                got += values(rows)
    assert got == numbered(count)


# Retention


def test_reading_below_the_start_is_a_loss(lab: LogLab) -> None:
    """A cursor below the log's start gets RecordsLost, again and again, until it is assigned anew; others read on."""
    covering = append(lab.log, lab.events, 0, *numbered(5))
    lab.expire()
    append(lab.log, lab.events, 0, b"kept")
    append(lab.log, lab.events, 1, b"other")
    watermarks = lab.log.watermarks(lab.events, 0)
    assert covering[-1] <= watermarks.start_offset < watermarks.end_offset
    reader = lab.log.reader(lab.events)
    for lost in (covering[0] - 1, covering[-1] - 1):
        reader.assign({1: lab.log.watermarks(lab.events, 1).start_offset, 0: lost})
        for _ in range(2):
            with pytest.raises(RecordsLost, match=f"{watermarks.start_offset - lost}"):
                reader.poll(record_count_max=10, bytes_max=2**20, timeout_s=DEADLINE_S)
    assert values(read(lab.log, lab.events, 0)) == [b"kept"]
    assert values(read(lab.log, lab.events, 1)) == [b"other"]


def test_a_start_at_the_end_is_no_loss(lab: LogLab) -> None:
    """With everything expired the end stays where it was, a cursor at it goes on, and offsets go on rising."""
    covering = append(lab.log, lab.events, 0, *numbered(5))
    lab.expire()
    watermarks = lab.log.watermarks(lab.events, 0)
    assert watermarks.start_offset == watermarks.end_offset >= covering[-1]
    assert read(lab.log, lab.events, 0) == []
    (later,) = append(lab.log, lab.events, 0, b"later")
    assert later > covering[-1]
    assert values(read(lab.log, lab.events, 0)) == [b"later"]
    assert values(read(lab.log, lab.notes, 0)) == []


# Transactions


def test_a_transaction_writes_to_several_topics(lab: LogLab) -> None:
    """All records are there soon after commit returns, under offsets that cover them, in order."""
    transaction = lab.log.transaction("t")
    messages = [
        Message((lab.table, lab.notes)[number % 2], number % 3, b"%d" % number, b"v%d" % number) for number in range(30)
    ]
    covering = committed(lab.log, transaction, *messages)
    for topic in (lab.table, lab.notes):
        for partition in range(3):
            mine = [(c, m) for c, m in zip(covering, messages, strict=True) if m.topic == topic and m.partition == partition]
            rows = read(lab.log, topic, partition)
            assert [(row.key, row.value) for row in rows] == [(m.key, m.value) for _, m in mine]
            assert all(row.offset < covers for row, (covers, _) in zip(rows, mine, strict=True))
    transaction.close()


def test_columns_are_messages(lab: LogLab) -> None:
    """Messages in columns are appended as those in a list are, keys and values of any bytes, in a transaction or not."""
    some = [b"", b"\x00", b"\xff" * 9, bytes(range(256)), b"text"]
    run = MessageRun(lab.table, 1, [key for key in some for _ in range(6)], [*some, None] * 5)
    messages = [*run]
    assert len(run) == len(messages) == 30
    assert messages[7] == run[7] == Message(lab.table, 1, b"\x00", b"\x00")
    assert [*run[3:9]] == messages[3:9]
    with pytest.raises(ValueError, match="1 keys, but 2 values"):
        MessageRun(lab.table, 1, [b"k"], [b"v"] * 2)
    transaction = lab.log.transaction("t")
    covering = [transaction.commit(run, timeout_s=DEADLINE_S), transaction.commit(messages, timeout_s=DEADLINE_S)]
    covering.append(appended(lab.log, run))
    transaction.close()
    assert covering[0][-1] + 30 <= covering[1][-1] <= covering[2][-1] - 30
    rows = [(it.key, it.value) for it in read(lab.log, lab.table, 1)]
    assert rows == [(it.key, it.value) for it in messages] * 3


def test_a_transaction_with_an_impossible_message_does_nothing(lab: LogLab) -> None:
    """The commit is Invalid, and none of the other records is or becomes visible; the transaction can go on."""
    transaction = lab.log.transaction("t")
    for bad in (Message(lab.table, PARTITIONS, b"k", b"v"), Message("no-such-topic", 0, b"k", b"v")):
        with pytest.raises(Invalid):
            transaction.commit([Message(lab.table, 0, b"k", b"v"), bad, Message(lab.notes, 0, b"k", b"v")], timeout_s=5)
    committed(lab.log, transaction, Message(lab.table, 0, b"k", b"good"))
    assert values(read(lab.log, lab.table, 0)) == [b"good"]
    assert read(lab.log, lab.notes, 0) == []


def test_a_new_owner_fences_the_old_one(lab: LogLab) -> None:
    """After transaction() returned, an older owner of the id gets Fenced for ever, and writes nothing."""
    old = lab.log.transaction("app-0")
    other = lab.log.transaction("app-1")
    committed(lab.log, old, Message(lab.table, 0, b"k", b"old"))
    new = lab.log.transaction("app-0")
    for _ in range(2):
        with pytest.raises(Fenced, match="app-0"):
            old.commit([Message(lab.table, 0, b"k", b"stale"), Message(lab.notes, 1, b"k", b"stale")], timeout_s=5)
    committed(lab.log, new, Message(lab.table, 0, b"k", b"new"))
    with pytest.raises(Fenced):
        old.commit([Message(lab.table, 0, b"k", b"stale")], timeout_s=DEADLINE_S)
    committed(lab.log, other, Message(lab.table, 0, b"k", b"other"))
    old.close()
    committed(lab.log, new, Message(lab.table, 0, b"k", b"last"))
    assert values(read(lab.log, lab.table, 0)) == [b"old", b"new", b"other", b"last"]
    assert read(lab.log, lab.notes, 1) == []


def test_a_commit_begins_where_it_has_to(lab: LogLab) -> None:
    """A commit must begin behind the last one's end and marker; no record of another one is ever visible.

    A displaced commit can be tried again, behind the records that are there.
    """
    transaction = lab.log.transaction("t")
    place, markers = (lab.table, 0), transaction.marker_count
    rows = [Message(lab.table, 0, b"%d" % number, b"v") for number in range(5)]
    begin, kept = 0, 0
    for count in (1, 5, 2):
        letter = Message(lab.notes, 0, b"k", b"v")
        covering = transaction.commit([letter, *rows[:count]], timeout_s=DEADLINE_S, begins={place: begin})
        assert covering[1:] == [begin + count] * count or covering[1:] == [*range(begin + 1, begin + count + 1)]
        begin, kept = begin + count + markers, kept + count
    append(lab.log, lab.table, 0, b"of somebody else", key=b"k")
    with pytest.raises(Displaced, match=f"begin at {begin + 1}, not at {begin}"):
        transaction.commit(rows, timeout_s=DEADLINE_S, begins={place: begin})
    (covers,) = transaction.commit([Message(lab.table, 0, b"k", b"fence")], timeout_s=DEADLINE_S)
    with pytest.raises(Discontinuous, match="went back from 1000 to"):
        transaction.commit(rows, timeout_s=DEADLINE_S, begins={place: 1_000})
    transaction.close()
    after = lab.log.transaction("t")
    (covers,) = committed(lab.log, after, Message(lab.table, 0, b"k", b"fence"))
    committed_rows = after.commit(rows, timeout_s=DEADLINE_S, begins={place: covers + markers})
    assert committed_rows[-1] == covers + markers + len(rows)
    until(lambda: lab.log.watermarks(*place).end_offset >= committed_rows[-1])
    assert len(read(lab.log, lab.table, 0)) == kept + 1 + 2 + len(rows)
    assert len(read(lab.log, lab.notes, 0)) == 3
    after.close()


def test_fencing_a_writer_in_full_flight(lab: LogLab) -> None:
    """In any interleaving of commits and takeovers, acknowledged commits are there and others never appear later."""
    committed: dict[int, list[bytes]] = {}
    ends: dict[int, int] = {}

    def writer(owner: int) -> None:
        transaction = lab.log.transaction("contested")
        ends[owner] = lab.log.watermarks(lab.table, 0).end_offset
        committed[owner] = []
        try:
            for number in range(1_000_000):
                value = b"%d-%d" % (owner, number)
                transaction.commit([Message(lab.table, 0, b"k", value), Message(lab.notes, 0, b"k", value)], timeout_s=5)
                committed[owner].append(value)
        except Fenced:
            return
        raise AssertionError("was never fenced")

    owners = 8
    for owner in range(owners):
        thread = threading.Thread(target=writer, args=(owner,), daemon=True)
        thread.start()
        until(lambda owner=owner: len(committed.get(owner, [])) >= 3)  # type: ignore[misc]
    lab.log.transaction("contested")
    end = lab.log.watermarks(lab.table, 0).end_offset
    thread.join(DEADLINE_S)
    rows = read(lab.log, lab.table, 0)
    assert lab.log.watermarks(lab.table, 0).end_offset == end
    assert values(rows) == values(read(lab.log, lab.notes, 0)) == [v for o in range(owners) for v in committed[o]]
    for row in rows:
        owner = int((row.value or b"").split(b"-")[0])
        assert row.offset >= ends[owner]
        assert owner + 1 == owners or row.offset < ends[owner + 1]


def test_a_reader_never_sees_a_part_of_a_transaction(lab: LogLab) -> None:
    """A partition never ends within a transaction, and a reader that sees one in one topic will see it in the other."""
    size, count = 7, 60
    stop = threading.Event()
    start = {topic: lab.log.watermarks(topic, 0).start_offset for topic in (lab.table, lab.notes)}

    def writer() -> None:
        transaction = lab.log.transaction("whole")
        for number in range(count):
            messages = [Message(t, 0, b"k%d" % i, b"%d" % number) for i in range(size) for t in (lab.table, lab.notes)]
            transaction.commit(messages, timeout_s=DEADLINE_S)
        stop.set()

    def whole(reader: LogReader, topic: str) -> int:
        end = lab.log.watermarks(topic, 0).end_offset
        counts = Counter(values(read_on(reader, 0, start[topic], end)))
        assert set(counts.values()) <= {size}, f"parts of transactions: {counts}"
        return len(counts)

    def follower() -> None:
        table, notes = lab.log.reader(lab.table), lab.log.reader(lab.notes)
        done = False
        while not done:
            done = stop.is_set()
            for first, first_topic, second, second_topic in (
                (table, lab.table, notes, lab.notes),
                (notes, lab.notes, table, lab.table),
            ):
                seen = whole(first, first_topic)
                until(lambda: whole(second, second_topic) >= seen)  # type: ignore[misc]  # noqa: B023

    with threads(writer, follower, follower):
        pass


# Compaction


def table_of(rows: list[Row]) -> dict[bytes | None, bytes | None]:
    return {row.key: row.value for row in rows}


@pytest.fixture
def filled(lab: LogLab) -> list[Row]:
    """50 keys in `table`, written 6 times and some of them deleted, in appends of many sizes."""
    rng = random.Random(1)
    messages = [
        Message(lab.table, 0, b"%d" % rng.randrange(50), None if rng.random() < 0.2 else b"%d" % number)
        for number in range(300)
    ]
    while messages:
        size = rng.randint(1, 40)
        appended(lab.log, messages[:size])
        messages = messages[size:]
    return read(lab.log, lab.table, 0)


def test_compaction_keeps_the_newest_record_of_every_key(lab: LogLab, filled: list[Row]) -> None:
    """Kept records keep offset, time and order; superseded records may go."""
    if not lab.compact():
        pytest.skip("this log can't be compacted at will")
    newest = {row.key: row for row in filled}
    rows = read(lab.log, lab.table, 0)
    assert rows == sorted(newest.values())
    assert lab.log.watermarks(lab.table, 0).end_offset > filled[-1].offset
    append(lab.log, lab.table, 0, b"later", key=b"later")
    assert read(lab.log, lab.table, 0)[:-1] == rows


def test_tombstones_go_in_the_end(lab: LogLab, filled: list[Row]) -> None:
    """A deleted key's tombstone goes once followers had their time; other keys stay, and the end does not fall."""
    (covers,) = append(lab.log, lab.table, 0, None, key=b"7")
    if not lab.compact(drop_tombstones=True):
        pytest.skip("this log can't be compacted at will")
    alive = {row.key: row for row in filled if row.key != b"7"}
    rows = [row for row in read(lab.log, lab.table, 0) if row.key != b"\xff\xff"]
    assert rows == sorted(row for row in alive.values() if row.value is not None)
    assert lab.log.watermarks(lab.table, 0).end_offset >= covers
    (later,) = append(lab.log, lab.table, 0, b"again", key=b"7")
    assert later > covers


def test_a_reader_goes_on_through_compaction(lab: LogLab, filled: list[Row]) -> None:
    """A reader that compaction overtakes still ends with the newest state of every key."""
    reader = lab.log.reader(lab.table)
    for first in range(0, 300, 37):
        reader.assign({0: filled[first].offset})
        before = poll(reader, record_count_max=5, timeout_s=DEADLINE_S)[0]
        assert before == filled[first : first + 5]
    if not lab.compact():
        pytest.skip("this log can't be compacted at will")
    end = lab.log.watermarks(lab.table, 0).end_offset
    for first in range(0, 300, 37):
        rest = read_on(reader, 0, filled[first].offset + 1, end, record_count_max=7)
        assert table_of(filled[: first + 1] + rest) == table_of(filled)


def test_compaction_leaves_other_topics_alone(lab: LogLab) -> None:
    """Records without a key, and records of topics that are not compacted, supersede nothing."""
    for topic, key in ((lab.events, b"same"), (lab.notes, b"same"), (lab.events, None)):
        append(lab.log, topic, 3, *numbered(20), key=key)
    lab.compact()
    assert len(read(lab.log, lab.events, 3)) == 40
    assert len(read(lab.log, lab.notes, 3)) == 20


# What is open


def test_the_high_watermark_is_the_end_where_nothing_is_open(lab: LogLab) -> None:
    """Without open transactions both ends are equal in every partition, from the moment of an acknowledgement."""
    for partition in range(PARTITIONS):
        (covers,) = append(lab.log, lab.events, partition, b"x")
        assert lab.log.high_watermarks(lab.events)[partition] >= covers
        committed(lab.log, lab.log.transaction(f"h-{partition}"), Message(lab.events, partition, None, b"y"))
    assert lab.log.high_watermarks(lab.events) == lab.log.end_offsets(lab.events)


@pytest.mark.parametrize("ends", ["commit", "abort"])
def test_an_open_transaction_ends_what_can_be_read_and_not_what_was_accepted(lab: LogLab, ends: str) -> None:
    """Nothing behind an open transaction's beginning is read, acknowledged or not; the high watermark shows what waits. When
    it ends, aborted records are never read, and a reader that has read all is at the end.
    """
    (before,) = append(lab.log, lab.events, 0, b"before")
    hanging = lab.leave_open(lab.events, 0, b"theirs")
    if hanging is None:
        assert lab.log.high_watermarks(lab.events) == lab.log.end_offsets(lab.events)
        return
    try:
        (covers,) = append(lab.log, lab.events, 0, b"behind")
        assert lab.log.end_offsets(lab.events)[0] == lab.log.watermarks(lab.events, 0).end_offset == before
        assert lab.log.high_watermarks(lab.events)[0] >= covers
        assert values(read(lab.log, lab.events, 0)) == [b"before"]
        append(lab.log, lab.events, 1, b"elsewhere")
        assert values(read(lab.log, lab.events, 1)) == [b"elsewhere"], "other partitions are not held up"
    finally:
        getattr(hanging, ends)()
    until(lambda: lab.log.end_offsets(lab.events)[0] > covers)  # its marker
    assert lab.log.high_watermarks(lab.events) == lab.log.end_offsets(lab.events)
    wanted = [b"before", *([b"theirs"] if ends == "commit" else []), b"behind"]
    assert values(read(lab.log, lab.events, 0)) == wanted
