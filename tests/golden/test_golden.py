"""Bytes that were written once must be read for ever: every file here decodes to the same value, and back to itself.

A file belongs to the version in its folder's name and never changes. For a new case, or a new kind, add it below and
run `python -m tests.golden.test_golden --write`: it writes the files that are missing, and touches no other. Of version 1,
which nobody has run, the files stay to show that it is refused.
"""

import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pipeline.core import codec, frames
from pipeline.core.codec import DeadLetter, DefinitionEntry
from pipeline.core.kinds import KINDS, Kind
from pipeline.core.record import (
    POSITION_KEY,
    Batch,
    Control,
    Definition,
    Group,
    Origin,
    Position,
    definition_id,
    definition_key,
    parse_suffix,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.core.sequence import Folded
from pipeline.core.token import Token
from pipeline.errors import BadRecord, NewerFormat

FOLDER = Path(__file__).parent
LINE = 64


class Case(NamedTuple):
    """One file, and the values that its lines decode to."""

    values: list[Any]
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


STATES: dict[str, list[Any]] = {
    "sum": [
        0,
        1,
        -1,
        127,
        128,
        -33,
        2**63,
        -(2**63),
        2**64 - 1,
        2**64,
        -(2**63) - 1,
        10**30,
        -(10**30),
        0.5,
        -0.0,
        1e300,
        (1e16, 1.0),
        (-0.1, 2.7755575615628914e-18),
        (1e308, -5e-324),
    ],
    "min": [0, -(2**70), 2**70, 2.5, -1e-300, 5e-324],
    "max": [0, -(2**70), 2**70, 2.5, 1.7976931348623157e308],
    "mean": [(0, 1), (12.5, 3), (2**64, 2), (-(10**30), 2**40), ((1e16, 1.0), 3)],
    "last": [
        (0, 0, None),
        (1_700_000_000_000, 1_700_000_000_000_000_001, "text"),
        (1, 0, ""),
        (2, 1, "a\0\u00e9\U0001f600"),
        (3, 2**32, True),
        (4, 0, False),
        (5, 0, 42),
        (6, 0, -0.5),
        (7, 0, 2**64),
        (8, 0, -(2**200)),
        (2**53, 2**63 - 1, "x" * 40),
    ],
    "histogram": [
        (0, 0, 0, 8, 1, {}, {}),
        (1, 1, 1, 8, 0, {-1: 1}, {}),
        (1.5, -0.5, 1.0, 8, 2**64, {-301: 127, -300: 1, -1: 2**70}, {-200_000: 2**63, -257: 128}),
        ((1e16, 1.0), -0.0, 2**1024 - 1, 0, 3, {-997: 70_000, 1023: 1}, {}),
        (-(2**70), -(2**70), -1e-9, -5, 0, {}, {-1: 2**32, 2: 255}),
    ],
    "distinct": [
        frozenset([0]),
        frozenset([KINDS["distinct"].check("tea"), KINDS["distinct"].check(7), -(2**63), 2**63 - 1, -1]),
        KINDS["distinct"].collect([KINDS["distinct"].check(number) for number in range(257)]),
    ],
    "topk": [
        (1, 0, {"": 1}),
        (2**64 + 6, 0, {"tea": 2**64, "x" * 40: 1, "\u00e9": 5}),
        (257 * 300, 300, {}),
        (10**6, 2, {"a\0b": 70_000, "\U0001f600": 128}),
    ],
}
"""Several states of every kind, with every way in which msgpack writes their parts."""

FIRST_KINDS = ("sum", "min", "max", "mean", "last")
"""Kinds of version 1, which are in the first file of batches."""

LABELS = [("eu", "tea"), ("", "\0"), ("\u00e9", "x" * 40)]

MONOTONE = Definition("requests", "sum", ("method", "path"), monotone=True)
REVENUE = Definition("revenue", "sum", ("product", "region"))


def group(kind: str, states: list[Any]) -> Group:
    """Return states in the series n=0, n=1, ... of a view that is called as its kind."""
    return Group(Definition(kind, kind, ("n",)), [series_suffix((str(i),)) for i in range(len(states))], states)


def of_kind(kind: Kind) -> Case:
    return Case(
        STATES[kind.name],
        lambda state: codec.encode_states(kind, [state])[0],
        lambda value: codec.decode_states(kind, [value])[0],
    )


def suffix_of(parts: tuple[int, tuple[str, ...]]) -> bytes:
    window_start_ms, labels = parts
    return series_suffix(labels, window_start_ms)


BATCHES = [
    Batch("p", 0, 0, 0, 0, 0, []),
    Batch(
        producer_id="0b5cfd53-5a2c-4e3e-8f5e-7d4b8f0d9a11",
        epoch=3,
        partition=259,
        sequence=70_000,
        floor=69_998,
        created_at_ms=1_700_000_000_000,
        groups=[
            Group(REVENUE, [series_suffix(v) for v in LABELS], [12.5, 3, -7]),
            Group(Definition("load", "mean"), [series_suffix(())], [(1.5, 2)]),
        ],
    ),
    Batch(
        "\u00e9", 2**63 - 1, 2**32 - 1, 2**63 - 2, 2**63 - 2, 2**63 - 1, [group(kind, STATES[kind]) for kind in FIRST_KINDS]
    ),
]

ORDERS = [
    Batch("p", 0, 0, 5, 5, 1_700_000_000_000, [], closing=True),
    Batch(
        "pipeline-views",
        1,
        2,
        3,
        3,
        1_700_000_000_000,
        [],
        controls=[
            Control("drop", "revenue"),
            Control("reset", "load", "mean"),
            Control("drop", "revenue", "sum", ("product", "region")),
            Control("reset", "total", "", ()),
        ],
    ),
    Batch(
        "letter:2-42-1",
        0,
        2,
        0,
        0,
        1_700_000_000_000,
        [Group(REVENUE, [series_suffix(LABELS[0])], [0.1])],
        origin=Origin("0b5cfd53-5a2c-4e3e-8f5e-7d4b8f0d9a11", 70_000),
    ),
]
"""Batches that do more than add: closing, control records, a replay."""

IDS = [
    REVENUE,
    Definition("revenue", "sum", ("product", "region"), monotone=True),
    Definition("_", "last"),
    Definition("visits", "sum", ("path",), 60),
    Definition("visits", "sum", ("path",), 60, True, 86_400),
    Definition("users", "min", ("page",), parameters=(("lg_k", 12), ("precision", 0.5), ("type", "hll"))),
]
"""Definitions, windows and parameters among them, whose ids stand in keys for ever."""

CASES: dict[str, Case] = {
    "batch": Case(BATCHES, codec.encode_batch, codec.decode_batch),
    **{f"state_{name}": of_kind(kind) for name, kind in KINDS.items()},
    "batch_histogram": Case(
        [Batch("p", 1, 2, 3, 3, 1_700_000_000_000, [group("histogram", STATES["histogram"][:2])])],
        codec.encode_batch,
        codec.decode_batch,
    ),
    "batch_orders": Case(ORDERS, codec.encode_batch, codec.decode_batch),
    "definition": Case(
        [
            DefinitionEntry(REVENUE, 1_000_000, 1_700_000_000_000),
            DefinitionEntry(Definition("_", "last"), 0, 0),
            DefinitionEntry(MONOTONE, 3, 2**63 - 1),
        ],
        codec.encode_definition,
        codec.decode_definition,
    ),
    "definition_expiring": Case(
        [
            DefinitionEntry(IDS[4], 7, 1_700_000_000_000, 1_699_913_580_000),
            DefinitionEntry(Definition("seen", "max", retention_s=600), 7, 1_700_000_000_000, 1_700_000_004_000),
        ],
        codec.encode_definition,
        codec.decode_definition,
    ),
    "state_expiring": Case(
        [(12.5, 1_700_000_000_000), (2**70, 1), (-1, 2**64 - 1), (0, 0)],
        lambda row: codec.encode_states(KINDS["sum"], [row[0]], row[1])[0],
        lambda value: (codec.decode_states(KINDS["sum"], [value])[0], codec.expires_at_ms(value)),
    ),
    "definition_id": Case(IDS, definition_id, {definition_id(it): it for it in IDS}.__getitem__),
    "batch_monotone": Case(
        [
            Batch(
                "p",
                1,
                2,
                3,
                2,
                1_700_000_000_000,
                [
                    Group(MONOTONE, [series_suffix(v) for v in LABELS], [0, 2**70, 0.5]),
                    Group(Definition("logins", "sum", (), 0, True), [series_suffix(())], [(1e16, -1.0)]),
                    Group(Definition("load", "mean"), [series_suffix(())], [(-1.5, 2)]),
                ],
            )
        ],
        codec.encode_batch,
        codec.decode_batch,
    ),
    "producer": Case(
        [
            Folded(),
            Folded(epoch=3, next_sequence=70_000, beyond=[], seen_at_ms=1_700_000_000_000),
            Folded(epoch=1, next_sequence=5, beyond=[(6, 7), (9, 300)], seen_at_ms=1),
            Folded(2**63 - 1, 2**63 - 3, [(2**63 - 2, 2**63 - 1)], 2**63 - 1, 2**63 - 1, True),
        ],
        codec.encode_folded,
        codec.decode_folded,
    ),
    "position": Case(
        [
            Position(0, 0, 0),
            Position(42, 1_700_000_000_123, 1_700_000_000_000),
        ],
        codec.encode_position,
        codec.decode_position,
    ),
    "position_source": Case(
        [
            Position(0, 1_700_000_000_123, 0, "x"),
            Position(42, 1_700_000_000_123, 1_700_000_000_000, "JZVYnDIHTV-gV6TLY6kfFQ"),
            Position(2**63 - 1, 2**63 - 1, 2**63 - 1, "\u00e9" * 40),
        ],
        codec.encode_position,
        codec.decode_position,
    ),
    "frames": Case(
        [[], [b"\x01"], [b"\x01one", b"\x01" * 300]],
        frames.encode_frames,
        frames.decode_frames,
    ),
    "suffix": Case(
        [(0, ()), *((0, labels) for labels in LABELS), (1_700_000_040_000, ("eu",)), (2**64 - 1, ("",) * 17)],
        suffix_of,
        parse_suffix,
    ),
    "dead_letter": Case(
        [
            DeadLetter(3, 42, 1_700_000_000_000, "why", "", b"\x01bytes"),
            DeadLetter(0, 0, 0, "no value", "", None),
            DeadLetter(3, 43, 1_700_000_000_000, "of one group", "revenue", codec.encode_batch(ORDERS[2])),
        ],
        codec.encode_letter,
        codec.decode_letter,
    ),
    "token": Case(
        [Token(), Token({0: 42}, "o4nZqS2fQ6e-_w"), Token({12: 1, 3: 2**63 - 1}, "x" * 64)],
        lambda token: str(token).encode(),
        lambda value: Token.parse(value.decode()),
    ),
}


def path_of(name: str, version: int = 2) -> Path:
    return FOLDER / f"v{version}" / f"{name}.hex"


def to_text(values: list[bytes]) -> str:
    """Return each value as hex, cut into lines, with a dot behind each value."""
    cut = [[value.hex()[at : at + LINE] for at in range(0, 2 * len(value), LINE)] for value in values]
    return "".join(f"{line}\n" for lines in cut for line in [*lines, "."])


def from_text(text: str) -> list[bytes]:
    return [bytes.fromhex(value) for value in text.split(".")[:-1]]


def read(name: str) -> list[bytes]:
    return from_text(path_of(name).read_text(encoding="ascii"))


@pytest.mark.parametrize("name", CASES)
def test_old_bytes_are_read(name: str) -> None:
    """Bytes of version 2 decode to the intended values, value by value and type by type."""
    case = CASES[name]
    found = [case.decode(value) for value in read(name)]
    assert found == case.values
    assert repr(found) == repr(case.values), "1 is not True, and 0.0 is not -0.0"


@pytest.mark.parametrize("name", CASES)
def test_the_same_bytes_are_written(name: str) -> None:
    """Today's bytes are those of version 2, to the bit: two versions of the program make one store."""
    case = CASES[name]
    assert [case.encode(value).hex() for value in case.values] == [value.hex() for value in read(name)]
    assert [case.encode(case.decode(value)) for value in read(name)] == read(name)


def test_every_file_has_its_case() -> None:
    """Each golden file has a case, and each case its file."""
    assert sorted(FOLDER.glob("v*/*")) == sorted([*map(path_of, CASES), *(path_of(name, 1) for name in REFUSED)])


REFUSED = {
    "batch": codec.decode_batch,
    "batch_monotone": codec.decode_batch,
    "definition": codec.decode_definition,
    "definition_monotone": codec.decode_definition,
    "position": codec.decode_position,
    "position_source": codec.decode_position,
    "producer": codec.decode_folded,
    **{f"state_{kind}": (lambda value, kind=kind: codec.decode_states(KINDS[kind], [value])) for kind in FIRST_KINDS},
}
"""Formats of version 1, which are no longer read. Frames, suffixes, dead letters and tokens had no version."""


@pytest.mark.parametrize("name", REFUSED)
def test_version_1_is_refused(name: str) -> None:
    """Bytes of version 1 are bad records, with both versions in the reason, and no newer program is asked for."""
    for value in from_text(path_of(name, 1).read_text(encoding="ascii")):
        with pytest.raises(BadRecord, match="version byte 01; this version reads 02") as caught:
            REFUSED[name](value)
        assert not isinstance(caught.value, NewerFormat)


def test_every_kind_has_golden_states() -> None:
    """Every kind has golden bytes."""
    assert [*STATES] == [*KINDS]


def test_keys() -> None:
    """A key is spelled out: tag, view, NUL, id of the definition, window start, labels."""
    assert POSITION_KEY == b"\x00"
    identity = sha256(b"\x93\xa7revenue\xa3sum\x92\xa7product\xa6region").digest()[:8]
    assert definition_key(REVENUE) == b"\x01revenue\x00" + identity
    assert producer_key("p-1") == b"\x03p-1"
    prefix = series_prefix(REVENUE)
    key = prefix + series_suffix(("eu", "tea"), 60_000)
    assert key == b"\x02revenue\x00" + identity + b"\x00\x00\x00\x00\x00\x00\xea\x60" + b"\x92\xa2eu\xa3tea"
    assert parse_suffix(key.removeprefix(prefix)) == (60_000, ("eu", "tea"))


def write_missing() -> None:
    """Write the files of cases that have none."""
    for name, case in CASES.items():
        path = path_of(name)
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(to_text([case.encode(value) for value in case.values]), encoding="ascii")
        print(f"wrote {path}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.golden.test_golden --write")
    write_missing()
