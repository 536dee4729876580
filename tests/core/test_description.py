"""Descriptions of bytes for a person: every field, no producer id, and a description of any bytes."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli.record_text import definition_words, series_words
from pipeline.core import codec
from pipeline.core.codec import DeadLetter, DefinitionEntry
from pipeline.core.description import (
    RAW_BYTES_MAX,
    OrderText,
    SeriesText,
    describe_batch,
    describe_entry,
    describe_letter,
    describe_record,
)
from pipeline.core.kinds import KINDS
from pipeline.core.record import (
    FENCE_KEY,
    POSITION_KEY,
    Batch,
    Control,
    Definition,
    Fence,
    Group,
    Origin,
    Position,
    definition_id,
    definition_key,
    fingerprint,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.core.sequence import Folded

TEA = Definition("revenue", "sum", ("product", "region"))
MEAN = Definition("ms", "mean")
SECRET = "the-id-of-a-producer"
LETTER = "letter:3-17-0"


def batch(**changes: Any) -> Batch:
    groups = [
        Group(TEA, [series_suffix(("tea", "eu")), series_suffix(("tea", "us"))], [12, (0.5, 2.0**-60)]),
        Group(MEAN, [series_suffix(())], [(10, 4)]),
    ]
    whole = Batch(SECRET, 2, 3, 7, 5, 99, groups, controls=[Control("drop", "old", "sum", ("a",))])
    return msgspec.structs.replace(whole, **changes)


def known(*definitions: Definition) -> Any:
    return {definition_key(it): it for it in definitions}.get


def test_a_batch_is_told_with_all_that_is_in_it() -> None:
    """A batch is described with header, controls, and each series with labels by name, state and answer."""
    told = describe_batch(codec.encode_batch(batch()))
    assert (told.producer, told.epoch, told.partition, told.sequence, told.floor) == (fingerprint(SECRET), 2, 3, 7, 5)
    assert (told.created_at_ms, told.closing, told.origin, told.letter) == (99, False, None, "")
    assert told.controls == [OrderText("drop", "old", "sum", ("a",))]
    revenue, ms = told.groups
    assert revenue.definition is not None
    assert revenue.definition.definition_id == definition_id(TEA).hex()
    assert (revenue.view, revenue.series_count, revenue.definition.labels) == ("revenue", 2, ("product", "region"))
    assert revenue.series[0] == SeriesText({"product": "tea", "region": "eu"}, 12, 12)
    assert revenue.series[1].state == (0.5, 2.0**-60)
    assert revenue.series[1].answer == 0.5
    assert ms.series == [SeriesText({}, (10, 4), 2.5)]


def test_a_batch_that_replays_is_told_as_one() -> None:
    """A replaying batch is described with its letter, and with the fingerprint of the lost batch's producer."""
    told = describe_batch(codec.encode_batch(batch(producer_id=LETTER, origin=Origin(SECRET, 4), closing=True)))
    assert (told.letter, told.closing) == ("3-17-0", True)
    assert told.origin is not None
    assert (told.origin.producer, told.origin.sequence) == (fingerprint(SECRET), 4)


def test_what_is_wrong_with_one_group_is_told_of_that_one() -> None:
    """An error of one group is described with that group, also one of its suffixes, which only a task checks."""
    wrong = Group(TEA, [series_suffix(("only one",))], [1])
    told = describe_batch(codec.encode_batch(batch(groups=[wrong, *batch().groups])))
    assert [(it.index, it.view, bool(it.reason), it.series_count) for it in told.groups] == [
        (0, "revenue", True, 0),
        (1, "revenue", False, 2),
        (2, "ms", False, 1),
    ]
    assert "label values" in told.groups[0].reason


def test_of_a_large_group_some_series_are_told() -> None:
    """Some series of a large group are described, and their number is stated."""
    (group, _) = describe_batch(codec.encode_batch(batch()), series_max=1).groups
    assert (len(group.series), group.series_count) == (1, 2)


def test_a_record_that_is_no_batch_says_why() -> None:
    """A record that is no batch is described with the reason and its first bytes, as is one for another partition."""
    bad = describe_record(0, 5, 6, b"\x1b[2J" * 100)
    assert "version byte 1b" in bad.reason
    assert bad.batch is None
    assert bad.size_bytes == 400
    assert bad.raw == (b"\x1b[2J" * 100)[:RAW_BYTES_MAX].hex() + "..."
    assert describe_record(0, 5, 6, None).reason
    lost = describe_record(0, 5, 6, codec.encode_batch(batch()))
    assert lost.batch is not None
    assert "partition 3" in lost.reason
    assert describe_record(3, 5, 6, codec.encode_batch(batch())).reason == ""


def test_a_letter_is_told_with_what_it_holds() -> None:
    """A letter's batch is described decoded if possible, else as bytes."""
    letter = DeadLetter(3, 17, 5, "refused", "ms", codec.encode_batch(batch()))
    told = describe_letter(b"3-17-0", codec.encode_letter(letter))
    assert (told.key, told.offset, told.reason, told.view) == ("3-17-0", 17, "refused", "ms")
    assert told.batch is not None
    assert told.batch.sequence == 7
    assert told.raw == ""
    told = describe_letter(b"3-17", codec.encode_letter(msgspec.structs.replace(letter, value=b"\xff")))
    assert (told.batch, told.raw, told.raw_size_bytes) == (None, "ff", 1)
    told = describe_letter(b"3-17", codec.encode_letter(msgspec.structs.replace(letter, value=None)))
    assert (told.batch, told.raw, told.raw_size_bytes) == (None, "", 0)


def test_every_kind_of_entry_is_told() -> None:
    """Every kind of entry is described: series, definitions, producers by fingerprint, positions, and tombstones."""
    key, (value,) = series_prefix(TEA) + series_suffix(("tea", "eu")), codec.encode_states(KINDS["sum"], [12])
    told = describe_entry(key, value, known(TEA))
    assert (told.what, told.view, told.tombstone) == ("series", "revenue", False)
    assert told.series == SeriesText({"product": "tea", "region": "eu"}, 12, 12)
    gone = describe_entry(key, None, known(TEA))
    assert (gone.what, gone.tombstone) == ("series", True)
    assert gone.series is not None
    assert gone.series.labels == {"product": "tea", "region": "eu"}
    unknown = describe_entry(key, value, known())
    assert unknown.series is not None
    assert unknown.series.labels == {"0": "tea", "1": "eu"}

    entry = codec.encode_definition(DefinitionEntry(TEA, 5, 7))
    told = describe_entry(definition_key(TEA), entry, known())
    assert told.definition is not None
    assert told.definition.kind == "sum"
    assert (told.what, told.fields) == ("definition", {"series_count": 5, "defined_at_ms": 7})
    assert describe_entry(definition_key(MEAN), entry, known()).what == "foreign"
    assert describe_entry(definition_key(TEA), None, known()).tombstone

    told = describe_entry(producer_key(SECRET), codec.encode_folded(Folded(1, 4, [(6, 8)], 9, 10, True)), known())
    assert (told.what, told.producer, told.fields["beyond"]) == ("producer", fingerprint(SECRET), [(6, 8)])
    position = Position(5, 6, 7, "topic", 2)
    told = describe_entry(FENCE_KEY, codec.encode_fence(Fence("owner", 5)), known())
    assert (told.what, told.fields) == ("fence", {"owner_id": "owner", "at_ms": 5})
    told = describe_entry(POSITION_KEY, codec.encode_position(position), known())
    assert (told.what, told.fields) == ("position", msgspec.structs.asdict(position))


def test_expiry_is_told() -> None:
    """The description says when a silent series expires, how long a definition keeps data, and what has expired."""
    seen = Definition("seen", "max", ("who",), retention_s=600)
    (value,) = codec.encode_states(KINDS["max"], [12], 1_700_000_600_000)
    told = describe_entry(series_prefix(seen) + series_suffix(("me",)), value, known(seen))
    assert told.series == SeriesText({"who": "me"}, 12, 12, expires_at_ms=1_700_000_600_000)
    assert series_words(told.series) == '{who="me"} = 12, expires 2023-11-14 22:23:20'
    hour = Definition("hour", "max", (), 3_600, retention_s=600)
    told = describe_entry(definition_key(hour), codec.encode_definition(DefinitionEntry(hour, 5, 7, 3_600_000)), known())
    assert told.fields == {"series_count": 5, "defined_at_ms": 7, "expired_before_ms": 3_600_000}
    assert told.definition is not None
    assert definition_words(told.definition) == "max() in windows of 3600 s kept for 600 s"
    (value,) = codec.encode_states(KINDS["max"], [12], 2**64 - 1)
    told = describe_entry(series_prefix(seen) + series_suffix(("me",)), value, known(seen))
    assert told.series is not None
    assert "expires" in series_words(told.series), "a foreign record can say anything"


anything = st.binary(max_size=60) | st.builds(
    lambda tag, rest: bytes((tag,)) + rest, st.integers(0, 5), st.binary(max_size=40) | st.just(series_prefix(TEA)[1:])
)


@given(key=st.none() | anything, value=st.none() | anything)
def test_whatever_the_bytes_are_they_are_told(key: bytes | None, value: bytes | None) -> None:
    """Any bytes have a description in JSON without control characters, which never holds the bytes of a producer's id."""
    for told in (describe_entry(key, value, known(TEA)), describe_record(0, 1, 2, value)):
        text = msgspec.json.encode(told).decode()
        assert not any(ord(c) < 32 for c in text)


@given(producer=st.text(st.characters(categories=["Ll", "Nd"]), min_size=12, max_size=40))
def test_no_id_of_a_producer_is_told(producer: str) -> None:
    """A producer's id is never shown: its holder can send in that producer's name."""
    told: list[Any] = [
        describe_batch(codec.encode_batch(batch(producer_id=producer))),
        describe_batch(codec.encode_batch(batch(origin=Origin(producer, 1)))),
        describe_entry(producer_key(producer), None, known()),
        describe_entry(producer_key(producer), codec.encode_folded(Folded()), known()),
        describe_entry(producer_key(producer), b"noise", known()),
    ]
    assert producer not in msgspec.json.encode(told).decode()
    assert producer.encode().hex() not in msgspec.json.encode(told).decode()
