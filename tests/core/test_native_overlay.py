"""The native core folds as Python does: the same refusals, the same commits to the byte, and nothing kept is stale."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import native
from pipeline.core.codec import Received, decode_states, encode_batch, encode_states, receive_batch
from pipeline.core.groups import PackedGroup, check_rows
from pipeline.core.kinds import BATCH_INT_BYTES_MAX, KINDS
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Batch, Control, Definition, Group, series_prefix, series_suffix
from pipeline.errors import BadRecord, StoreCorrupt
from tests.core import strategies as some
from tests.core.driver import Shell, batch, group
from tests.core.test_codec import sealed
from tests.core.test_task_streams import run, steps
from tests.core.twins import TwinTask
from tests.support import examples

pytestmark = pytest.mark.skipif(not native.in_use(), reason=native.describe())

NATIVE_KINDS = ("sum", "min", "max", "mean", "last")
HOUR_S = 3_600
VIEWS = [
    *(Definition(f"v_{kind}", kind, ("a",)) for kind in KINDS),
    Definition("bare", "sum"),
    Definition("counter", "sum", ("a",), monotone=True),
    Definition("windows", "mean", ("a",), window_s=1, retention_s=2),
    Definition("silent", "sum", ("a",), retention_s=1),
    Definition("silent_mean", "mean", ("a",), retention_s=1),
]
WIDE = Definition("w", "sum", ("a", "b"))


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """Draw the rows of a view, some of them twice: of any states, and of windows that are late, kept or ahead."""
    definition = draw(st.sampled_from(VIEWS))
    labels = draw(st.lists(st.sampled_from(["x", "y", "z", "", "\0"]), min_size=1, max_size=5))
    states = draw(some.any_states(definition.kind, count=len(labels)))
    if definition.monotone:
        states = [some.magnitude(state) for state in states]
    starts = st.sampled_from([0, 1_000, 3_000, 4_000, 9_000]) if definition.window_s else st.just(0)
    suffixes = [series_suffix((label,) if definition.labels else (), draw(starts)) for label in labels]
    return Group(definition, suffixes, states)


controls = st.builds(
    Control, st.sampled_from(["drop", "reset"]), st.sampled_from([it.view for it in VIEWS]), st.just(""), st.none()
)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes | None]:
    """Draw a log of batches with orders, whose publishers' clock goes on."""
    log: list[bytes | None] = []
    for sequence in range(draw(st.integers(1, 12))):
        orders = draw(st.lists(controls, max_size=1)) if draw(st.booleans()) else []
        content = draw(st.lists(groups(), max_size=3))
        at_ms = draw(st.sampled_from([0, 900, 2_000, 5_000]))
        log.append(encode_batch(Batch("p", 0, 0, sequence, 0, at_ms, content, False, orders)))
    return log


limits = st.builds(
    TaskLimits,
    cache_entries_max=st.sampled_from([0, 2, 6, 100_000]),
    cache_bytes_max=st.sampled_from([0, 400, 4_000, 2**26]),
    series_max=st.sampled_from([1, 3, 1_000]),
    views_max=st.sampled_from([5, 100]),
    ts_ahead_max_ms=st.sampled_from([3_000, 2**53]),
)


@settings(max_examples=examples(120), deadline=None)
@given(log=streams(), steps=steps, limits=limits)
def test_both_ways_commit_the_same(log: list[bytes | None], steps: list[str], limits: TaskLimits) -> None:
    """Each step of any stream comes to the same on the native core, with its cache, as in Python without one."""
    run(log, steps, limits, TwinTask)


def seen(received: Received) -> list[tuple[Any, ...]]:
    """Return all that a task can see of a batch."""
    rows = [
        (
            it.definition,
            it.suffixes,
            encode_states(KINDS[it.definition.kind], it.states),
            [verdict(it, at_ms) for at_ms in (0, 2**60)],
        )
        for it in received.batch.groups
    ]
    return [*rows, (received.indexes, received.refused, msgspec.structs.replace(received.batch, groups=[]))]


def verdict(group: Group, latest_ms: int) -> str:
    """Return why rows are refused; empty: they are not."""
    try:
        check_rows(group, latest_ms)
    except BadRecord as error:
        return str(error)
    return ""


def outcome(value: bytes, extension: Any) -> object:
    """Return what becomes of bytes, on the native core or without it."""
    try:
        return seen(receive_batch(value, extension))
    except BadRecord as error:
        return str(error)


bodies = st.builds(
    lambda content: encode_batch(Batch("p", 0, 0, 0, 0, 0, content))[9:], st.lists(groups(), min_size=1, max_size=2)
)


@settings(max_examples=examples(300), deadline=None)
@given(some.damaged(bodies))
def test_damaged_batches_get_the_same_verdict(body: bytes) -> None:
    """Both ways refuse the same of any bytes with the same words, and read the same rows of the rest."""
    value = sealed(body)
    assert outcome(value, native.extension()) == outcome(value, None)


@pytest.mark.parametrize("kind", NATIVE_KINDS)
def test_usual_groups_are_taken_natively(kind: str) -> None:
    """The native core takes what is common, with and without windows: else nobody would notice that it takes nothing."""
    for window_s in (0, 1):
        definition = Definition("v", kind, ("a", "b"), window_s=window_s)
        states = [KINDS[kind].collect([KINDS[kind].check(value)]) for value in (0, -1, 10**6, -(2**62), 0.5, 1e300)]
        suffixes = [series_suffix((f"{i}" * 40, "é"), 5_000 * window_s) for i in range(len(states))]
        (found,) = receive_batch(batch(0, Group(definition, suffixes, states)), native.extension()).batch.groups
        assert isinstance(found, PackedGroup)
        assert (found.count, found.suffixes, found.states) == (len(states), suffixes, states)


@pytest.mark.parametrize(
    ("kind", "column"),
    [
        ("sum", [b"\xca" + struct.pack(">f", 1.5)]),
        ("sum", [b"\xcf" + b"\xff" * 8]),
        ("sum", [b"\xd3" + b"\0" * 8]),
        ("sum", [b"\x92\x01\xcb" + struct.pack(">d", 2**-60)]),
        ("sum", [b"\xc7" + bytes((200, 1)) + b"\x7f" * 200]),
        ("sum", [b"\xc8" + BATCH_INT_BYTES_MAX.to_bytes(2, "big") + b"\x01" + b"\x7f" * BATCH_INT_BYTES_MAX]),
        ("sum", [b"\xd4\x01\x05"]),
        ("mean", [b"\x01", b"\xcf" + b"\xff" * 8]),
        ("mean", [b"\x01", b"\xcf" + (2**32).to_bytes(8, "big")]),
        ("last", [b"\x01", b"\x01", b"\xcf" + b"\xff" * 8]),
    ],
)
def test_unusual_numbers_count_as_well(kind: str, column: list[bytes]) -> None:
    """Numbers that no publisher of ours encodes so, or hardly ever, end in the same states, beside usual ones."""
    definition = Definition("v", kind, ("a",))
    fields = [b"\x91" + it for it in column]
    usual = group(definition, {("x",): 1, ("y",): 2})
    shell = Shell(task_type=TwinTask)
    for sequence in range(6):
        wire = b"\x93" + msgspec.msgpack.encode((definition.view, kind, definition.labels))
        suffixes = b"\x91" + msgspec.msgpack.encode(series_suffix(("x",)))
        odd = b"\x91" + wire + suffixes + bytes((0x90 + len(fields),)) + b"".join(fields)
        head = msgspec.msgpack.encode(("q", 0, sequence, 0, 0, False, None, []))
        shell.fold(
            batch(sequence, usual), sealed(bytes((head[0] + 1,)) + head[1:] + odd), batch(sequence, usual, producer_id="r")
        )
        if sequence % 2:
            shell.commit()
    assert set(shell.series("v")) == {("x",), ("y",)}
    assert not shell.letters()


def test_a_series_that_is_new_needs_no_lookup() -> None:
    """The store is asked for no key that it lacks, of a definition that began with this task or was reset."""
    shell = Shell(TaskLimits(cache_entries_max=0))
    for i in range(3):
        shell.fold(batch(2 * i, group(WIDE, {(f"{i}", "b"): 1})))
        shell.freeze()
        assert shell.lookup.keys == []
        shell.prepare()
        shell.committed()
        shell.fold(batch(2 * i + 1, group(WIDE, {(f"{i}", "b"): 1, ("new", f"{i}"): 1})))
        shell.commit()
    assert shell.series("w") == {**{(f"{i}", "b"): 2 for i in range(3)}, **{("new", f"{i}"): 1 for i in range(3)}}
    shell.restart()
    shell.fold(batch(6, group(WIDE, {("1", "b"): 1, ("2", "new"): 1})))
    shell.freeze()
    assert len(shell.lookup.keys) == 2  # another task cannot know


def test_what_is_forgotten_is_looked_up() -> None:
    """The store is asked again once the hashes of all series would take more memory than they may."""
    shell = Shell(TaskLimits(cache_entries_max=0, cache_bytes_max=400), TwinTask)
    for sequence in range(4):
        shell.fold(batch(sequence, group(WIDE, {(f"{sequence}", f"{i}"): 1 for i in range(60)} | {("x", "x"): 1})))
        shell.commit()
    assert shell.series("w")[("x", "x")] == 4


def test_a_damaged_entry_is_an_error_on_both_ways() -> None:
    """A committed value that can't be read stops the task: it is never taken for a new series."""
    for kind in NATIVE_KINDS:
        definition = Definition("v", kind, ("a",))
        content = group(definition, {("x",): 1})
        shell = Shell(TaskLimits(cache_entries_max=0))
        shell.fold(batch(0, content))
        shell.commit()
        (key,) = [key for key in shell.store if key.startswith(series_prefix(definition))]
        whole = shell.store[key]
        for value in (
            whole[:-1],
            whole + b"\x00",
            b"\x02",
            whole[:2] + b"\xa3bad" + whole[6:],
            encode_states(KINDS["sum"], ["x"])[0],
        ):
            shell.store[key] = value
            shell.restart()
            shell.fold(batch(1, content))
            shell.freeze()
            with pytest.raises(StoreCorrupt):
                shell.prepare()
        shell.store[key] = whole
        assert decode_states(KINDS[kind], [whole])
