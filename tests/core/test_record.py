"""Definitions, label values and the layout of keys."""

from enum import StrEnum
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.core.kinds import KIND_NAMES
from pipeline.core.record import (
    DEFINITION_ID_BYTES,
    LABEL_COUNT_MAX,
    LABEL_VALUE_BYTES_MAX,
    NAME_BYTES_MAX,
    OVERFLOW,
    POSITION_KEY,
    STORE_META_KEY,
    SUFFIX_BYTES_MAX,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    WINDOW_NONE,
    Definition,
    check_definition,
    check_label_values,
    check_suffix,
    check_suffixes,
    definition_id,
    definition_key,
    definitions_prefix,
    expired_before_ms,
    fingerprint,
    overflow_suffix,
    parse_suffix,
    prefix_end,
    producer_key,
    series_prefix,
    series_suffix,
    split_key,
    start_of_window_ms,
    travelling,
    view_prefix,
)
from pipeline.errors import BadRecord, Invalid
from tests.core import strategies as some

label_tuples = st.lists(some.label_values, max_size=5).map(tuple)


# Definitions


@given(definition=some.definitions())
def test_good_definitions(definition: Definition) -> None:
    """A definition has Prometheus names, any known kind, up to 32 labels."""
    check_definition(definition, KIND_NAMES)


@pytest.mark.parametrize("name", ["a", "_", "A9", "v" * NAME_BYTES_MAX, "__", "sum"])
def test_good_names(name: str) -> None:
    """Every name that Prometheus accepts is accepted, as view and as label, up to the limit."""
    check_definition(Definition(name, "sum", (name,)), KIND_NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "9a",
        "a-b",
        "a b",
        "a.b",
        "é",
        "a\n",
        "\n",
        "a\0",
        "\0",
        "v" * (NAME_BYTES_MAX + 1),
        "x" * 1_000_000,
        "a:b",
        "a\u0661",
        "\ud800",
    ],
    ids=lambda name: f"{name!r:.12}",
)
def test_bad_names(name: str) -> None:
    """Any other view or label name is `Invalid`, named in a short message."""
    for definition, what in ((Definition(name, "sum"), "view name"), (Definition("v", "sum", ("a", name)), "label name")):
        with pytest.raises(Invalid, match=what) as caught:
            check_definition(definition, KIND_NAMES)
        assert len(str(caught.value)) < 1_500


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        (Definition("v", "median"), "unknown kind 'median'"),
        (Definition("v", ""), "unknown kind"),
        (Definition("v", "SUM"), "unknown kind"),
        (Definition("v", "k" * 1_000_000), "unknown kind"),
        (Definition("v", "sum", ("a", "b", "a")), "twice"),
        (Definition("v", "sum", tuple(f"l{i}" for i in range(LABEL_COUNT_MAX + 1))), "33 labels"),
        (Definition("v", "sum", ("a",) * 100_000), "100000 labels"),
        (Definition("v", "sum", (), -1), "window_s"),
        (Definition("v", "sum", (), 10**9 + 1), "window_s"),
        (Definition("v", "sum", (), retention_s=-1), "retention_s"),
        (Definition("v", "sum", (), 60, retention_s=10**100), "retention_s"),
        (Definition("v", "sum", parameters=(("precision", 12),)), "no parameters"),
    ],
    ids=lambda value: f"{value!r:.40}",
)
def test_bad_definitions(definition: Definition, reason: str) -> None:
    """A definition that this version can't hold is `Invalid`; the short message names what is wrong."""
    with pytest.raises(Invalid, match=reason) as caught:
        check_definition(definition, KIND_NAMES)
    assert len(str(caught.value)) < 500


def test_the_most_labels() -> None:
    """32 labels are allowed."""
    check_definition(Definition("v", "sum", tuple(f"l{i}" for i in range(LABEL_COUNT_MAX))), KIND_NAMES)


# Label values

ONE = Definition("v", "sum", ("a",))


@pytest.mark.parametrize(
    "value",
    ["", "\0", "a\0b", "x" * LABEL_VALUE_BYTES_MAX, "é" * (LABEL_VALUE_BYTES_MAX // 2), "\U0001f600", "\n", "\uffff"],
    ids=lambda value: f"{value!r:.12}",
)
def test_good_label_values(value: str) -> None:
    """Any text is a label value, NUL included, up to 4,096 bytes of UTF-8; what a publisher may send, a task takes."""
    assert check_label_values(ONE, [value]) == (value,)
    suffix = series_suffix((value,))
    check_suffix(ONE, suffix)
    assert parse_suffix(suffix) == (0, (value,))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ((), "got 0 values"), (("a", "b"), "got 2 values"), ((1,), "text expected, got int"), ((None,), "NoneType"),
        ((b"a",), "bytes"), ((["a"],), "list"), (("\ud800",), "surrogate"),
        (("x" * (LABEL_VALUE_BYTES_MAX + 1),), "4097 bytes"),
        (("é" * (LABEL_VALUE_BYTES_MAX // 2 + 1),), "4098 bytes"), (("x" * 2**20,), "1048576 bytes"),
        (("\0" * 2**20,), "1048576 bytes"),
    ],
    ids=lambda value: f"{value!r:.20}",
)  # fmt: skip
def test_bad_label_values(values: tuple[Any, ...], reason: str) -> None:
    """Label values too many, too few, too long, or not Unicode text are `Invalid`, with a short message and the label."""
    with pytest.raises(Invalid, match=reason) as caught:
        check_label_values(ONE, values)
    assert len(str(caught.value)) < 300


def test_label_values_together_are_limited() -> None:
    """Label values whose total is too long are refused, although each is short enough."""
    definition = Definition("v", "sum", tuple(f"l{i}" for i in range(LABEL_COUNT_MAX)))
    fits = ["x" * 1_020] * LABEL_COUNT_MAX
    rest = SUFFIX_BYTES_MAX - len(series_suffix(fits))
    fits[0] += "x" * rest
    assert len(series_suffix(check_label_values(definition, fits))) == SUFFIX_BYTES_MAX
    check_suffix(definition, series_suffix(fits))
    fits[1] += "x"
    with pytest.raises(Invalid, match="32769 bytes"):
        check_label_values(definition, fits)
    with pytest.raises(BadRecord, match="32769 bytes"):
        check_suffix(definition, series_suffix(fits))


def test_text_like_label_values_become_text() -> None:
    """A StrEnum, or any subclass of str, is stored as the text that it is."""

    class Region(StrEnum):
        EU = "eu"

    class Text(str):
        __slots__ = ()

        def __str__(self) -> str:
            return "another"

    for value in (Region.EU, Text("eu")):
        (found,) = check_label_values(ONE, [value])
        assert found == "eu"
        assert type(found) is str


@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        (b"", "series key"), (b"\x91\xa1a", "series key"), (bytes(7), "series key"), (bytes(8), "series key"),
        (bytes(8) + b"\x90", "0 label values"), (bytes(8) + b"\x92\xa1a\xa1b", "2 label values"),
        (bytes(7) + b"\x01\x91\xa1a", "window"), (b"\xff" * 8 + b"\x91\xa1a", "window"),
        (bytes(8) + b"\x91\x01", "series key"),
        (bytes(8) + b"\x91\xc4\x01a", "series key"), (bytes(8) + b"\x91\xa1\xff", "series key"),
        (bytes(8) + b"\x91\xa3\xed\xa0\x80", "series key"), (bytes(8) + b"\x91\xd9\x01a", "canonical"),
        (bytes(8) + b"\x91\xa1a\x00", "series key"), (bytes(8) + b"\x81\xa1a\xa1b", "series key"),
        (series_suffix(("x" * (LABEL_VALUE_BYTES_MAX + 1),)), "4096"), (bytes(8) + b"\x91\xc0", "series key"),
        (series_suffix(("é" * (LABEL_VALUE_BYTES_MAX // 2 + 1),)), "4096"), (bytes(8) + b"\x91\xa1", "series key"),
        (series_suffix(("x" * 2**20,)), "1048590 bytes"),
    ],
    ids=lambda value: f"{value!r:.50}",
)  # fmt: skip
def test_bad_suffixes(suffix: bytes, reason: str) -> None:
    """A suffix that is not a series of its view is `BadRecord`, whatever is wrong with it."""
    with pytest.raises(BadRecord, match=reason):
        check_suffix(ONE, suffix)


SUFFIX_PIECES = [
    bytes(8),
    bytes(7),
    b"\x91\xa1a",
    b"\x91\xa0",
    b"\x90",
    b"\x91",
    b"\xa1",
    b"a",
    b"\xd9\x01a",
    b"\x92\xa1a\xa1b",
    b"\x01",
    b"\xc0",
    b"\xc0" + bytes(8),
]


@given(
    width=st.integers(0, 2),
    suffixes=st.lists(
        st.lists(st.sampled_from(SUFFIX_PIECES), max_size=4).map(b"".join)
        | st.lists(some.label_values, max_size=2).map(series_suffix)
        | st.just(series_suffix(("a",)))
        | st.just(series_suffix(("x" * (LABEL_VALUE_BYTES_MAX + 1),))),
        max_size=4,
    ),
)
def test_many_suffixes_are_checked_as_each_is(width: int, suffixes: list[bytes]) -> None:
    """All suffixes pass together exactly if each passes alone: no suffix can borrow bytes from its neighbour."""
    definition = Definition("v", "sum", ("a", "b")[:width])
    try:
        for suffix in suffixes:
            check_suffix(definition, suffix)
    except BadRecord:
        with pytest.raises(BadRecord):
            check_suffixes(definition, suffixes)
    else:
        check_suffixes(definition, suffixes)


GOOD = b"\x91\xa1a"


@pytest.mark.parametrize(
    "neighbours",
    [
        [b"\x91", b"\xa1a"],
        [b"\x91\xa1", b"a"],
        [b"\x91\xa1a\x91", b"\xa1b"],
        [b"", GOOD * 2],
        [b"\x91\xd9\x01a"],
        [b"\xc0"],
        [b"\xc0", GOOD * 2],
        *([b"", GOOD + gap + GOOD] for gap in (b"\xc0", b"\xc0\xc0")),
        *([GOOD + gap + GOOD, b""] for gap in (b"\xc0", b"\xc0\xc0")),
        *([b"\x91\xd9", b"x" * size + gap + GOOD] for size in (191, 192, 193) for gap in (b"\xc0", b"\xc0\xc0")),
        *([b"\x91\xda\x00", b"x" * size + gap + GOOD] for size in (191, 192) for gap in (b"\xc0", b"\xc0\xc0")),
        [b"\x91\xa2", GOOD],
    ],
    ids=lambda value: f"{value!r:.60}",
)
def test_neighbours_are_not_joined(neighbours: list[bytes]) -> None:
    """Two halves of suffixes, or two suffixes in the place of one, are bad, also behind a good one."""
    bad = [bytes(8) + half for half in neighbours]
    for suffixes in (bad, [bytes(8) + GOOD, *bad]):
        with pytest.raises(BadRecord):
            check_suffixes(ONE, suffixes)


@pytest.mark.parametrize("start_ms", [1, 59_999, 60_001, 2**53 // 60_000 * 60_000 + 60_000, 2**64 - 1])
def test_a_window_begins_at_a_multiple_of_its_length(start_ms: int) -> None:
    """A start that is no multiple of the window, or beyond all times, is no series of the definition."""
    definition = Definition("v", "sum", ("a",), 60)
    good = [series_suffix((name,), start) for name in ("x", "y") for start in (0, 60_000, 1_700_000_040_000)]
    check_suffixes(definition, good)
    for check in (lambda it: check_suffix(definition, it), lambda it: check_suffixes(definition, [*good, it])):
        with pytest.raises(BadRecord, match="no start of a window"):
            check(series_suffix(("x",), start_ms))


@given(ts_ms=st.integers(0, 2**53), window_s=st.integers(1, 10**9), retention_s=st.integers(1, 10**10))
def test_windows_expire_so_long_after_their_end(ts_ms: int, window_s: int, retention_s: int) -> None:
    """The oldest window that is kept ends less than the retention ago; the previous one does not."""
    definition = Definition("v", "sum", (), window_s, retention_s=retention_s)
    oldest, window_ms, retention_ms = expired_before_ms(definition, ts_ms), window_s * 1_000, retention_s * 1_000
    assert oldest % window_ms == 0
    assert oldest + window_ms + retention_ms > ts_ms
    assert oldest == 0 or oldest + retention_ms <= ts_ms
    assert expired_before_ms(definition, start_of_window_ms(definition, ts_ms)) <= start_of_window_ms(definition, ts_ms)


@pytest.mark.parametrize("window", [bytes(7) + b"\x01", b"\x01" + bytes(7)])
def test_many_suffixes_have_no_window(window: bytes) -> None:
    """A window start in one of many suffixes is noticed."""
    with pytest.raises(BadRecord, match="window"):
        check_suffixes(ONE, [bytes(8) + GOOD, window + b"\x91\xa1b"])


@given(labels=label_tuples)
def test_publisher_and_task_agree_on_label_values(labels: tuple[str, ...]) -> None:
    """Label values that pass `check_label_values` make suffixes that pass `check_suffix`."""
    definition = Definition("v", "sum", tuple(f"l{i}" for i in range(len(labels))))
    check_suffix(definition, series_suffix(check_label_values(definition, labels)))


# Keys


@given(labels=label_tuples, window_start_ms=st.integers(0, 2**64 - 1))
def test_parse_suffix_is_the_inverse(labels: tuple[str, ...], window_start_ms: int) -> None:
    """parse(suffix(window, labels)) = window, labels; equal labels have equal suffixes."""
    suffix = series_suffix(labels, window_start_ms)
    assert parse_suffix(suffix) == (window_start_ms, labels)
    assert series_suffix(list(labels), window_start_ms) == suffix
    assert suffix.startswith(WINDOW_NONE) == (window_start_ms == 0)


definitions = some.definitions(st.sampled_from(["sum", "last"]))


@given(
    one=st.tuples(definitions, st.integers(0, 3), label_tuples),
    two=st.tuples(definitions, st.integers(0, 3), label_tuples),
)
def test_different_series_have_different_keys(
    one: tuple[Definition, int, tuple[str, ...]], two: tuple[Definition, int, tuple[str, ...]]
) -> None:
    """Keys are equal only if definition, window and labels are."""
    for first, second in ((one, two), (one, (two[0], *one[1:])), (one, (one[0], *two[1:]))):
        key, other = (series_prefix(it) + series_suffix(labels, window) for it, window, labels in (first, second))
        assert (key == other) == (first == second)


@given(definition=definitions, window=st.integers(0, 2**64 - 1), labels=label_tuples)
def test_a_key_says_what_it_is_of(definition: Definition, window: int, labels: tuple[str, ...]) -> None:
    """View, id and suffix come back from the key of a series, and of a definition, which has no suffix."""
    suffix, identity = series_suffix(labels, window), definition_id(definition)
    assert split_key(series_prefix(definition) + suffix) == (definition.view, identity, suffix)
    assert split_key(definition_key(definition)) == (definition.view, identity, b"")
    assert definition_key(definition)[1:] == series_prefix(definition)[1:]


@pytest.mark.parametrize(
    "key",
    [
        b"", b"\x00", b"\x01", b"\x02", b"\x03p", b"\xff", b"\x02v", b"\x02v\x00", b"\x02v\x00" + bytes(7),
        b"\x02" + bytes(5),
        b"\x05v\x00" + bytes(8), b"\x02\xff\x00" + bytes(8), b"\x02\xc3\xa9\x00" + bytes(8), b"\x01v\x00" + bytes(9),
        b"\x02v\x00" + bytes(8), b"\x02v\x00" + bytes(16),
    ],
)  # fmt: skip
def test_other_keys_are_bad(key: bytes) -> None:
    """A key of no series and no definition is `BadRecord`: in a changelog it is foreign."""
    with pytest.raises(BadRecord, match="key"):
        split_key(key)


@given(
    short=some.names, more=st.text("abz_AZ09", max_size=3), other=some.names, definition=definitions,
    labels=st.lists(label_tuples, min_size=1), window=st.sampled_from([0, 1, 2**64 - 1]),
)  # fmt: skip
def test_all_series_of_a_view_are_one_range(
    short: str, more: str, other: str, definition: Definition, labels: list[tuple[str, ...]], window: int
) -> None:
    """A view's keys fill the range of its prefix, whatever their definitions, and no other view's key lies in it, even if
    one name starts the other. The same holds for the entries of its definitions.
    """
    mine = [msgspec.structs.replace(definition, view=short, kind=kind) for kind in ("sum", "last")]
    foreign = [msgspec.structs.replace(definition, view=view) for view in {short + more, other} - {short}]
    for values in labels:
        suffix = series_suffix(values, window)
        keys = [series_prefix(it) + suffix for it in mine]
        others = [series_prefix(it) + suffix for it in foreign]
        assert_range(view_prefix(short), keys, others)
        assert_range(series_prefix(mine[0]), keys[:1], [*keys[1:], *others])
    assert_range(definitions_prefix(short), [*map(definition_key, mine)], [*map(definition_key, foreign)])


def assert_range(prefix: bytes, inside: list[bytes], outside: list[bytes]) -> None:
    end = prefix_end(prefix)
    for key in inside:
        assert prefix <= key < end
    for key in outside:
        assert not prefix <= key < end


@given(windows=st.lists(st.integers(0, 2**64 - 1), min_size=2, max_size=2, unique=True), one=label_tuples, two=label_tuples)
def test_windows_are_in_the_order_of_time(windows: list[int], one: tuple[str, ...], two: tuple[str, ...]) -> None:
    """Within a definition keys are sorted by window start first, so that a window, or all that expired, is one range."""
    early, late = sorted(windows)
    assert series_suffix(one, early) < series_suffix(two, late)


@given(definition=definitions, producer_id=some.producer_ids, labels=label_tuples)
def test_kinds_of_entries_do_not_mix(definition: Definition, producer_id: str, labels: tuple[str, ...]) -> None:
    """Position, definitions, series, producers and the store's meta have keys apart from each other, in this order."""
    keys = [
        POSITION_KEY, definition_key(definition), series_prefix(definition) + series_suffix(labels),
        producer_key(producer_id), STORE_META_KEY,
    ]  # fmt: skip
    assert keys == sorted(set(keys))
    for tag, key in zip((TAG_DEFINITION, TAG_SERIES, TAG_PRODUCER), keys[1:], strict=False):
        assert tag <= key < prefix_end(tag)


@given(prefix=st.binary(), tail=st.binary(max_size=3), key=st.binary())
def test_prefix_end(prefix: bytes, tail: bytes, key: bytes) -> None:
    """Exactly the keys that start with a prefix are between it and its end, also if it ends in 0xff bytes."""
    assume(prefix.strip(b"\xff"))
    for whole in (prefix, prefix + b"\xff", prefix + b"\xff" * 8):
        for candidate in (key, whole + key, whole[:-1] + tail, whole + b"\xff" * 9):
            assert (whole <= candidate < prefix_end(whole)) == candidate.startswith(whole)


# Identities of definitions


@given(definition=definitions, data=st.data())
def test_an_id_is_of_what_a_definition_says(definition: Definition, data: st.DataObject) -> None:
    """The id depends on everything in a definition but the order of its labels."""
    shuffled = msgspec.structs.replace(definition, labels=tuple(data.draw(st.permutations(definition.labels))))
    identity = definition_id(definition)
    assert len(identity) == DEFINITION_ID_BYTES
    assert definition_id(shuffled) == identity
    assert definition_id(msgspec.structs.replace(definition)) == identity
    changes: list[dict[str, Any]] = [
        {"view": definition.view + "_"}, {"kind": "min"}, {"labels": (*definition.labels, "zz")}, {"window_s": 60},
        {"monotone": not definition.monotone}, {"retention_s": 60}, {"parameters": (("precision", 12),)},
    ]  # fmt: skip
    others = [definition_id(msgspec.structs.replace(definition, **change)) for change in changes]
    assert len({identity, *others}) == len(changes) + 1


def test_what_a_definition_leaves_out_when_it_travels() -> None:
    """A definition travels without default fields at its end, so that a new field changes no existing id."""
    full = Definition("v", "sum", ("a",), 60, True, 3_600, (("p", 1),))
    assert travelling(full) == msgspec.structs.astuple(full)
    assert travelling(Definition("v", "sum")) == ("v", "sum", ())
    assert travelling(Definition("v", "sum", ("a",), monotone=True)) == ("v", "sum", ("a",), 0, True)
    assert travelling(Definition("v", "sum", retention_s=5)) == ("v", "sum", (), 0, False, 5)


def test_an_overflow_series_is_one_a_window() -> None:
    """An overflow series has `__overflow__` for all labels, and is otherwise like any other of its definition."""
    definition = Definition("v", "sum", ("a", "b"))
    assert overflow_suffix(definition) == series_suffix((OVERFLOW, OVERFLOW))
    assert overflow_suffix(definition, (60_000).to_bytes(8, "big")) == series_suffix((OVERFLOW, OVERFLOW), 60_000)
    check_suffix(definition, overflow_suffix(definition))


def test_a_fingerprint_tells_producers_apart_and_nothing_of_their_ids() -> None:
    """A fingerprint has eight hex digits, the same everywhere and for ever, that reveal nothing of the id."""
    assert fingerprint("p") == "148de9c5"
    assert len({fingerprint(f"p-{i}") for i in range(1_000)}) == 1_000
