"""The protocol of one partition, step by step."""

import itertools
import math
import re
from collections.abc import Callable

import pytest

import pipeline.core.record
from pipeline import native
from pipeline.core.codec import DefinitionEntry, encode_definition, encode_folded, encode_states
from pipeline.core.commit import Counts
from pipeline.core.kinds import BATCH_INT_BYTES_MAX, KINDS
from pipeline.core.limits import TaskLimits
from pipeline.core.query import merged
from pipeline.core.record import (
    NO_POSITION,
    POSITION_KEY,
    Definition,
    Group,
    Origin,
    Position,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.core.sequence import GAP_COUNT_MAX, Folded
from pipeline.core.task import TRANSITIONS, Phase, Task, TaskEvent
from pipeline.errors import IllegalTransition, StoreCorrupt
from tests.core.driver import NOW_MS, Shell, batch, group, totals
from tests.core.strategies import records

V = Definition("v", "sum", ("a",))
W = Definition("w", "max")


def said(position: Position) -> tuple[int, int, int]:
    return position.next_offset, position.committed_at_ms, position.source_at_ms


def add(value: float, label: str = "x") -> Group:
    return group(V, {(label,): value})


# Steps

STEPS: dict[TaskEvent, Callable[[Task], object]] = {
    TaskEvent.RESTORED: lambda task: task.restored(NO_POSITION, []),
    TaskEvent.FOLD: lambda task: task.fold(task.read(records({}, 0)), [], now_ms=0),
    TaskEvent.FREEZE: lambda task: task.freeze(),
    TaskEvent.PREPARE: lambda task: task.prepare_commit([], now_ms=0),
    TaskEvent.COMMITTED: lambda task: task.committed(),
}
ROUTE = [TaskEvent.RESTORED, TaskEvent.FREEZE, TaskEvent.PREPARE]
PHASES = dict(zip(Phase, range(4), strict=True))


def task_in(phase: Phase) -> Task:
    task = Task(0, TaskLimits())
    for step in ROUTE[: PHASES[phase]]:
        STEPS[step](task)
    assert task.phase is phase
    return task


@pytest.mark.parametrize(("phase", "step"), [*itertools.product(Phase, TaskEvent)], ids=lambda value: value.value)
def test_transitions(phase: Phase, step: TaskEvent) -> None:
    """A step in the table leads to its phase; any other is a bug that crashes, and changes nothing."""
    task = task_in(phase)
    if (phase, step) in TRANSITIONS:
        STEPS[step](task)
        assert task.phase is TRANSITIONS[phase, step]
    else:
        with pytest.raises(IllegalTransition, match=f"{step.value} while {phase.value}"):
            STEPS[step](task)
        assert task.phase is phase


def test_the_table_says_the_protocol() -> None:
    """Only this is legal: restore, then fold at any time, with one commit at a time."""
    legal = {(phase.value, step.value): after.value for (phase, step), after in TRANSITIONS.items()}
    assert legal == {
        ("assigned", "restored"): "folding",
        ("folding", "fold"): "folding",
        ("folding", "freeze"): "frozen",
        ("frozen", "fold"): "frozen",
        ("frozen", "prepare_commit"): "committing",
        ("committing", "fold"): "committing",
        ("committing", "committed"): "folding",
    }


# Folding and committing


def test_states_are_merged_across_commits() -> None:
    """A commit holds absolute states: the committed ones merged with the folded ones."""
    shell = Shell()
    shell.fold(batch(0, add(1), group(W, {(): 5})), batch(1, add(2), add(10, "y")))
    commit = shell.commit()
    assert commit.keys[-1] == POSITION_KEY
    assert commit.series_count == 3
    assert said(commit.position) == (2, NOW_MS, 1_001)
    assert shell.series("v") == {("x",): 3, ("y",): 10}
    shell.fold(batch(2, add(4), group(W, {(): 3})))
    assert shell.commit().series_count == 2
    assert shell.series("v") == {("x",): 7, ("y",): 10}
    assert totals(shell, "w") == [5]
    assert shell.task.counts == Counts(batches_folded=3, entries_folded=6)


def test_folding_goes_on_during_a_commit() -> None:
    """Records folded between freeze and committed are in the next commit, on top of this one."""
    shell = Shell()
    shell.fold(batch(0, add(1)))
    shell.freeze()
    shell.fold(batch(1, add(2)))
    shell.prepare()
    shell.fold(batch(2, add(4), add(100, "y")))
    assert shell.prepared.position.next_offset == 1
    assert shell.task.position == NO_POSITION, "not before it is durable"
    shell.committed()
    assert shell.task.position.next_offset == 1
    assert totals(shell) == [1]
    shell.commit()
    assert totals(shell) == [7, 100]
    assert shell.series_count("v") == 2
    assert shell.task.position.next_offset == 3


@pytest.mark.parametrize("steps", range(4))
def test_a_crash_before_the_commit_is_durable_changes_nothing(steps: int) -> None:
    """A task that is thrown away, at any step, leaves the next one to fold the same records to the same states."""
    shell = Shell()
    shell.fold(batch(0, add(1)))
    shell.commit()
    shell.fold(batch(1, add(2), group(W, {(): 9})))
    for step in (shell.freeze, shell.prepare, shell.write)[:steps]:
        step()
    shell.restart()
    assert shell.task.next_offset == (2 if steps == 3 else 1)
    shell.fold()
    shell.commit()
    assert totals(shell) == [3]
    assert totals(shell, "w") == [9]
    assert shell.series_count("v") == shell.series_count("w") == 1


def test_an_empty_commit_is_a_position() -> None:
    """With nothing folded a commit holds its position with its time, and nothing else."""
    shell = Shell()
    commit = shell.commit()
    assert (commit.keys, commit.dead_letters, commit.series_count) == ([POSITION_KEY], [], 0)
    assert said(commit.position) == (0, NOW_MS, 0)
    shell.fold(batch(0, add(1)))
    shell.commit()
    for _ in range(2):
        assert said(shell.commit().position) == (1, NOW_MS, 1_000)


def test_a_group_without_series_is_refused() -> None:
    """A group without series defines no view, so that it can't use up `views_max`."""
    shell = Shell()
    shell.fold(batch(0, Group(V, [], []), group(W, {(): 1})))
    assert shell.commit().series_count == 1
    assert shell.entries("v") == []
    assert shell.reasons() == ["a group without series"]
    assert totals(shell, "w") == [1]


def test_one_series_twice_in_a_group_is_merged() -> None:
    """A foreign publisher's repeated series counts in full, once as a series."""
    shell = Shell()
    suffix = series_suffix(("x",))
    shell.fold(batch(0, Group(V, [suffix, suffix], [1, 2]), add(4)))
    shell.commit()
    assert totals(shell) == [7]
    assert shell.series_count("v") == 1


def test_holes_in_the_offsets() -> None:
    """Folding goes on behind the run's `next_offset`, which transaction markers put beyond the last record."""
    shell = Shell()
    shell.hand_over(records({0: batch(0, add(1)), 4: batch(1, add(2))}, 7))
    assert shell.task.next_offset == 7
    assert shell.commit().position.next_offset == 7
    shell.hand_over(records({}, 9))
    assert shell.task.dirty
    assert said(shell.commit().position) == (9, NOW_MS, 1_004)


def test_records_below_the_position_are_skipped() -> None:
    """A record that was folded before is skipped, in whatever run it comes."""
    shell = Shell()
    first, second = batch(0, add(1)), batch(1, add(2))
    shell.fold(first)
    for _ in range(2):
        shell.hand_over(records({0: first, 1: second}, 2))
        shell.hand_over(records({0: b"bad"}, 1))
    assert shell.task.next_offset == 2
    shell.commit()
    shell.restart()
    shell.hand_over(records({0: first, 1: second}, 2))
    assert shell.task.counts == Counts()
    shell.commit()
    assert totals(shell) == [3]


def test_dirty() -> None:
    """A task is dirty if the log was read beyond what the last freeze holds."""
    shell = Shell()
    assert not shell.task.dirty
    shell.fold(batch(0, add(1)))
    assert shell.task.dirty
    shell.freeze()
    assert not shell.task.dirty
    shell.fold(batch(1, add(1)))
    assert shell.task.dirty
    shell.prepare()
    assert shell.task.dirty
    shell.committed()
    assert shell.task.dirty
    shell.commit()
    assert not shell.task.dirty
    shell.fold(batch(1, add(1)))
    assert shell.task.dirty, "a duplicate moves the position too"
    shell.freeze()
    shell.prepare()
    assert not shell.task.dirty
    shell.committed()
    assert not shell.task.dirty
    shell.fold(None)
    assert shell.task.dirty, "so does a bad record"


def test_skip_to() -> None:
    """After a loss folding goes on elsewhere, ahead or back, and the next commit records where."""
    shell = Shell()
    shell.fold(batch(0, add(1)))
    shell.commit()
    shell.task.skip_to(50)
    assert shell.task.dirty
    assert shell.commit().position.next_offset == 50
    shell.hand_over(records({10: batch(1, add(2)), 50: batch(2, add(4))}, 51))
    shell.commit()
    assert totals(shell) == [5]
    shell.task.skip_to(3)
    assert shell.task.dirty
    shell.hand_over(records({3: batch(3, add(8)), 4: batch(2, add(4))}, 5))
    assert shell.commit().position.next_offset == 5
    assert totals(shell) == [13]
    assert shell.task.counts.batches_duplicate == 1
    shell.restart()
    assert shell.task.next_offset == 5


def test_series_are_counted_once() -> None:
    """A view's series count is that of its entries, whether they are new, cached, or looked up beside new ones."""
    shell = Shell()
    shell.fold(batch(0, add(1, "a"), add(1, "b")))
    shell.commit()
    shell.fold(batch(1, add(1, "a"), add(1, "c")))
    shell.commit()
    assert shell.series_count("v") == 3
    shell.restart()
    shell.fold(batch(2, add(1, "a"), add(1, "b"), add(1, "d"), add(1, "0")))
    shell.freeze()
    shell.fold(batch(3, add(1, "d"), add(1, "e")))
    shell.prepare()
    shell.committed()
    assert shell.series_count("v") == 5
    shell.commit()
    assert shell.series_count("v") == shell.entry_count() == 6
    assert totals(shell) == [1, 3, 2, 1, 2, 1]


# Exactly once


def test_duplicates_are_dropped_and_counted() -> None:
    """A batch that comes again counts once: in the overlay, during a commit, after it, and after a restart."""
    shell = Shell()
    again = batch(0, add(1))
    shell.fold(again, again)
    shell.freeze()
    shell.fold(again)
    shell.prepare()
    shell.fold(again)
    shell.committed()
    shell.fold(again)
    shell.commit()
    assert shell.task.counts.batches_duplicate == 4
    shell.restart()
    shell.fold(again)
    shell.commit()
    assert shell.task.counts == Counts(batches_duplicate=1)
    assert totals(shell) == [1]
    assert shell.dead_letters == {}


def test_a_late_batch_is_folded() -> None:
    """Batches of one producer count in any order, across commits and restarts; numbers are the producer's own."""
    shell = Shell()
    shell.fold(batch(2, add(1)), batch(0, add(2)), batch(0, add(100), producer_id="q"))
    shell.commit()
    shell.restart()
    shell.fold(batch(1, add(4)), batch(2, add(1)))
    shell.commit()
    assert totals(shell) == [107]
    assert shell.task.counts == Counts(batches_folded=1, entries_folded=1, batches_duplicate=1)


def test_below_the_floor_everything_is_settled() -> None:
    """A batch below a floor that its own producer has announced is a duplicate, whatever it holds."""
    shell = Shell()
    shell.fold(batch(7, add(1), floor=5), batch(4, add(100)), batch(5, add(2)))
    shell.commit()
    assert totals(shell) == [3]
    assert shell.task.counts.batches_duplicate == 1


def test_an_old_epoch_is_refused() -> None:
    """After a spool was opened anew, batches of an older process become dead letters, before and after a restart."""
    shell = Shell()
    shell.fold(batch(0, add(1), epoch=3), batch(1, add(10), epoch=2), batch(1, add(2), epoch=4))
    shell.commit()
    shell.restart()
    shell.fold(batch(2, add(100), epoch=3), batch(2, add(4), epoch=4))
    shell.commit()
    assert totals(shell) == [7]
    assert shell.task.counts == Counts(batches_folded=1, entries_folded=1, batches_stale=1, records_bad=1)
    assert shell.reasons() == [
        "stale epoch 2: epoch 3 of producer 148de9c5 was seen",
        "stale epoch 3: epoch 4 of producer 148de9c5 was seen",
    ]


def test_a_duplicate_raises_the_epoch() -> None:
    """A re-sent batch of a newer process is dropped, and fences the older one all the same, for good."""
    shell = Shell()
    shell.fold(batch(0, add(1), epoch=1))
    shell.commit()
    shell.fold(batch(0, add(1), epoch=2))
    shell.commit()
    shell.restart()
    shell.fold(batch(1, add(2), epoch=1))
    shell.commit()
    assert totals(shell) == [1]
    assert shell.task.counts.batches_stale == 1


# Bad records


SEALED = batch(5, add(1))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "version byte missing"), (b"", "version byte missing"), (b"\x01" + SEALED[1:], "version byte 01"),
        (b"\x03abc", "version byte 03"), (b"\x02", "version byte"), (SEALED[:-1], "checksum"),
        (SEALED[:20] + b"?" + SEALED[21:], "checksum"), (batch(5, add(1), partition=1), "for partition 1 in partition 0"),
        (batch(1, add(1), producer_id="q", origin=Origin("q", 0)), "its own producer"),
    ],
    ids=lambda value: f"{value!r:.30}",
)  # fmt: skip
def test_bad_records_are_dead_lettered_whole(value: bytes | None, reason: str) -> None:
    """A bad record is kept with its reason, changes nothing else, and never stops those behind it."""
    shell = Shell()
    shell.fold(batch(0, add(1)), value, batch(1, add(2)))
    assert shell.task.counts == Counts(batches_folded=2, entries_folded=2, records_bad=1)
    commit = shell.commit()
    (letter,) = shell.letters()
    assert (letter.partition, letter.offset, letter.at_ms, letter.view, letter.value) == (0, 1, 1_001, "", value)
    assert re.search(reason, letter.reason)
    assert commit.dead_letters[0][0] == b"0-1"
    assert totals(shell) == [3]
    assert shell.series_count("v") == shell.entry_count() == 1
    shell.fold(batch(5, add(4)))
    shell.commit()
    assert totals(shell) == [7], "the number of a bad batch was not used up"
    assert len(shell.dead_letters) == 1


U = Definition("u", "sum", ("a",))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Group(U, [b"short"], [1]), "series key"), (Group(U, [series_suffix(())], [1]), "0 label values"),
        (Group(U, [series_suffix(("x",), 60_000)], [1]), "window"),
        (Group(U, [bytes(8) + b"\x91\xd9\x01x"], [1]), "canonical"),
        (Group(U, [series_suffix(("z",)), series_suffix(("x" * 5_000,))], [1, 1]), "4096"),
        (Group(U, [series_suffix(("x",))], [2 ** (8 * BATCH_INT_BYTES_MAX)]), "int of over"),
        (Group(U, [], []), "without series"),
        (Group(U, [series_suffix(("x",))], [math.nan]), "not finite"),
        (Group(U, [series_suffix(("x",))], [-math.inf]), "not finite"),
        (Group(U, [series_suffix(("x",))], [(1.0, 1.0)]), "error term"),
        (Group(Definition("u", "mean"), [series_suffix(())], [(math.inf, 1)]), "not finite"),
        (Group(Definition("u", "max"), [series_suffix(())], [math.inf]), "not finite"),
        (Group(Definition("u", "last"), [series_suffix(())], [(0, 0, math.nan)]), "not finite"),
        (Group(Definition("u", "last"), [series_suffix(())], [(3_601_001, 0, 1)]), "of 3601001; at most 3601000"),
        (Group(Definition("u", "sum", ("b", "a")), [series_suffix(("x", "y"))], [1]), "not in the order of their names"),
        (Group(Definition("u", "sum", (), 60), [series_suffix((), 1)], [1]), "no start of a window"),
        (Group(Definition("u-u", "sum"), [series_suffix(())], [1]), "does not match"),
        (Group(Definition("u", "min", monotone=True), [series_suffix(())], [1]), "monotone"),
    ],
    ids=lambda value: f"{value!r:.70}",
)  # fmt: skip
def test_a_group_is_the_unit_of_refusal(wrong: Group, reason: str) -> None:
    """A wrong group becomes a dead letter, as a batch of its own, and touches no other."""
    shell = Shell()
    shell.fold(batch(0, add(1), wrong, group(W, {(): 5})))
    assert shell.task.counts == Counts(batches_folded=1, entries_folded=2, groups_refused=1)
    commit = shell.commit()
    assert [key for key, _ in commit.dead_letters] == [b"0-0-1"]
    (letter,) = shell.letters()
    assert (letter.partition, letter.offset, letter.at_ms) == (0, 0, 1_000)
    assert letter.view == wrong.definition.view
    assert re.search(reason, letter.reason)
    assert letter.value == batch(0, wrong)
    assert totals(shell) == [1]
    assert totals(shell, "w") == [5]
    assert shell.entries("u") == []
    shell.restart()
    shell.fold(batch(0, add(1), wrong, group(W, {(): 5})))
    assert shell.task.counts == Counts(batches_duplicate=1), "the batch was folded"


def test_a_time_ahead_is_measured_from_the_record() -> None:
    """A `last` value may be as far ahead of its record's own time as the limit says, and no further; the past is free."""
    last = Definition("l", "last", ("a",))
    shell = Shell(TaskLimits(ts_ahead_max_ms=50))

    def at(*stamps: int) -> Group:
        return Group(last, [series_suffix((str(ts),)) for ts in stamps], [(ts, 0, ts) for ts in stamps])

    shell.now_ms = 10**9
    shell.fold(batch(0, at(0, 1_050)), batch(1, at(1_051)), batch(2, at(0, 1_053)), batch(3, at(1_053)))
    shell.commit()
    assert [letter.offset for letter in shell.letters()] == [2], "whatever the worker's clock says"
    assert [*shell.series("l")] == [("0",), ("1050",), ("1051",), ("1053",)]


def test_definitions_of_a_view_lie_side_by_side() -> None:
    """Definitions that differ in kind, labels or monotone have their own series, also after a restart; none is refused."""
    definitions = [
        V,
        Definition("v", "sum", ("a", "b")),
        Definition("v", "max", ("a",)),
        Definition("v", "sum", ("a",), 0, True),
    ]
    shell = Shell()
    for i, definition in enumerate(definitions * 2):
        if i == 5:
            shell.commit()
            shell.restart()
        shell.fold(batch(i, group(definition, {("x", "y")[: len(definition.labels)]: i + 1})))
    shell.commit()
    assert shell.letters() == []
    assert [[*shell.series_of(it).values()] for it in definitions] == [[6], [8], [7], [12]]
    assert {entry.definition for entry in shell.entries("v")} == {*definitions}


def test_an_id_that_two_definitions_share_is_refused_by_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """If two hashes begin alike, the later definition is dead-lettered, and never merged with the earlier one."""
    pipeline.core.record.series_prefix.cache_clear()
    monkeypatch.setattr(pipeline.core.record, "definition_id", lambda definition: bytes(8))
    try:
        shell = Shell()
        shell.fold(batch(0, add(1)), batch(1, group(Definition("v", "max", ("a",)), {("x",): 9}), group(W, {(): 1})))
        shell.commit()
        assert shell.reasons() == ["view v: another definition has the same id"]
        assert totals(shell) == [1]
        assert totals(shell, "w") == [1]
    finally:
        pipeline.core.record.series_prefix.cache_clear()


def test_a_later_definition_never_wins() -> None:
    """A new definition of a view is dated after those in the partition, whatever both clocks say, also after a restart."""
    kinds = [Definition("v", kind) for kind in ("sum", "min", "max", "last")]
    shell = Shell()
    for i, (definition, at_ms, now_ms) in enumerate(zip(kinds, (9_000, 10, 9_000, 0), (9_500, 9_500, 20, 0), strict=True)):
        shell.now_ms = now_ms
        shell.hand_over(records({i: batch(i, group(definition, {(): 1}))}, i + 1, at_ms=at_ms - i))
        shell.commit()
        shell.restart()
        assert merged("v", shell.entries("v")).definition.kind == "sum"
    by_time = sorted(shell.entries("v"), key=lambda entry: entry.defined_at_ms)
    assert [entry.definition for entry in by_time] == kinds
    assert [entry.defined_at_ms for entry in by_time] == [9_000, 9_001, 9_002, 9_003]


def test_definitions_are_limited() -> None:
    """A group that would add one definition too many is refused; groups of known definitions go on, also beside it."""
    shell = Shell(TaskLimits(views_max=2))
    u = Definition("u", "sum")
    shell.fold(batch(0, add(1)), batch(1, add(2), group(W, {(): 1}), group(u, {(): 1})), batch(2, add(4), group(W, {(): 1})))
    shell.fold(batch(3, group(u, {(): 1})), batch(4, group(Definition("v", "min"), {(): 1})))
    shell.commit()
    assert totals(shell) == [7]
    assert shell.reasons() == ["over 2 definitions of views in partition 0 (views_max)"] * 3
    shell.limits = TaskLimits(views_max=1)
    shell.restart()
    shell.fold(batch(5, add(8)))
    shell.commit()
    assert totals(shell) == [15], "a limit that was lowered keeps new definitions out, not known ones"


def test_gaps_are_limited() -> None:
    """A producer with over 1,000 gaps is refused, batch by batch, until it fills them or raises its floor."""
    shell = Shell()
    shell.fold(*(batch(2 * i + 1, add(1)) for i in range(GAP_COUNT_MAX + 3)))
    shell.fold(batch(0, add(1)), batch(9_999, add(1), floor=9_000))
    shell.commit()
    assert totals(shell) == [GAP_COUNT_MAX + 2]
    assert shell.task.counts.records_bad == 3
    assert set(shell.reasons()) == {"over 1000 gaps in the sequences of one producer"}


@pytest.mark.parametrize("sequence", [2**63 - 3, 2**63 - 2])
def test_the_last_sequences_can_be_stored(sequence: int) -> None:
    """A batch with the largest number that a batch can have leaves a producer entry that can be read."""
    for floor in (0, sequence):
        shell = Shell()
        shell.fold(batch(sequence, add(1), floor=floor))
        shell.commit()
        shell.restart()
        shell.fold(batch(sequence, add(1), floor=floor))
        assert shell.task.counts == Counts(batches_duplicate=1)


@pytest.mark.parametrize("kind", ["sum", "mean"])
def test_the_largest_ints_can_be_stored(kind: str) -> None:
    """However often the longest int that a batch may hold is added, the state can be read back."""
    definition = Definition("v", kind)
    largest = 2 ** (8 * BATCH_INT_BYTES_MAX - 1) - 1
    state = largest if kind == "sum" else (largest, largest)
    shell = Shell(TaskLimits(cache_entries_max=0))
    for sequence in range(3):
        shell.fold(batch(sequence, Group(definition, [series_suffix(())] * 500, [state] * 500)))
        shell.commit()
    assert shell.task.counts.records_bad == 0
    assert totals(shell) == [1_500 * largest if kind == "sum" else (1_500 * largest, 1_500 * largest)]


# Limits of memory


def test_the_overlay_is_full_by_entries() -> None:
    """An overlay full of series, dead letters or producers calls for a commit; freezing empties it."""
    shell = Shell(TaskLimits(overlay_entries_max=5))
    assert not shell.task.full
    shell.fold(batch(0, add(1, "a"), add(1, "b")))
    shell.fold(batch(1, add(1, "a"), group(W, {(): 1})))
    assert not shell.task.full
    shell.fold(b"bad")
    assert shell.task.full
    shell.freeze()
    assert not shell.task.full
    shell.fold(*(batch(0, producer_id=p) for p in "abcde"))
    assert shell.task.full
    shell.prepare()
    shell.committed()
    shell.commit()
    assert shell.entry_count() == 3


def test_the_overlay_is_full_by_bytes() -> None:
    """Few series with much text fill the overlay, too, and so do bad records."""
    text = Definition("t", "last")
    for fill in (batch(0, group(text, {(): "x" * 999})), b"?" * 1_000):
        shell = Shell(TaskLimits(overlay_bytes_max=1_000))
        shell.fold(batch(1, add(1)))
        assert not shell.task.full
        shell.fold(fill)
        assert shell.task.full
        shell.freeze()
        assert not shell.task.full


def cached(shell: Shell, values: list[bytes]) -> int:
    """Return for how many of the series in `values` a freeze needs no lookup."""
    before = shell.task.counts.entries_folded
    shell.fold(*values)
    return shell.task.counts.entries_folded - before - len(shell.task.freeze().keys)


@pytest.mark.parametrize("entries_max", [0, 1, 10, 100, 1_000])
def test_the_cache_is_bounded_by_entries(entries_max: int) -> None:
    """The cache keeps all of few series, and the newest of many, up to its limit and one commit."""
    shell = Shell(TaskLimits(cache_entries_max=entries_max))
    for i in range(400):
        shell.fold(batch(i, add(1, f"s{i:03}")))
        shell.commit()
    found = cached(shell, [batch(1_000 + i, add(1, f"s{i:03}")) for i in range(400)])
    assert min(400, entries_max // 2) <= found <= entries_max + 1


def test_the_cache_is_bounded_by_bytes() -> None:
    """Long states and labels count: a few of them push the others out of the cache."""
    text = Definition("t", "last", ("a",))
    for deltas in ({"s": "x" * 1_000}, {"s" * 1_000: 1}):
        ((label, value),) = deltas.items()
        shell = Shell(TaskLimits(cache_bytes_max=50_000))
        for i in range(200):
            shell.fold(batch(i, group(text, {(f"{label}{i:03}",): value})))
            shell.commit()
        found = cached(shell, [batch(1_000 + i, group(text, {(f"{label}{i:03}",): value})) for i in range(200)])
        assert 20 <= found <= 50


def test_a_cached_state_is_the_committed_one() -> None:
    """Series that move between the cache's generations keep their newest state, without a lookup."""
    shell = Shell(TaskLimits(cache_entries_max=8))
    for i in range(100):
        shell.fold(batch(i, add(1, "hot"), add(1, f"cold-{i}")))
        shell.freeze()
        assert (series_prefix(V) + series_suffix(("hot",)) in shell.lookup.keys) == (i == 0 and not native.in_use())
        shell.prepare()
        shell.committed()
    assert shell.series("v")[("hot",)] == 100
    assert shell.series_count("v") == 101


# Corrupt stores

GOOD_VIEW = encode_definition(DefinitionEntry(V, 1, 0))
GOOD_STATE = encode_states(KINDS["sum"], [1])[0]


@pytest.mark.parametrize(
    "definitions",
    [
        [b""], [b"\x02"], [b"\x03" + GOOD_VIEW[1:]], [b"\x01" + GOOD_VIEW[1:]], [GOOD_VIEW[:-1]],
        [GOOD_VIEW, encode_definition(DefinitionEntry(Definition("u", "median"), 1, 0))],
    ],
)  # fmt: skip
def test_a_corrupt_store_is_refused(definitions: list[bytes]) -> None:
    """Definitions that cannot be read are `StoreCorrupt`, for which the store is rebuilt from the changelog."""
    with pytest.raises(StoreCorrupt, match="partition 3"):
        Task(3, TaskLimits()).restored(NO_POSITION, definitions)


@pytest.mark.parametrize("value", [b"", b"\x02", b"\x01\x90\x90", b"\x02\x91\xc0", encode_folded(Folded()) + b"\x00"])
def test_a_corrupt_producer_is_refused(value: bytes) -> None:
    """A producer's entry that cannot be read is `StoreCorrupt`, when it is needed and when it is swept."""
    shell = Shell()
    shell.fold(batch(0, add(1)))
    shell.commit()
    shell.restart()
    shell.store[producer_key("p")] = value
    with pytest.raises(StoreCorrupt, match="partition 0"):
        shell.sweep()
    with pytest.raises(StoreCorrupt, match="partition 0"):
        shell.fold(batch(1, add(1)))


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"\x02",
        b"\x01\x93\xa3sum\x00\x01",
        encode_states(KINDS["max"], [1])[0],
        encode_states(KINDS["sum"], [1])[0] + b"\0",
    ],
)
def test_a_corrupt_state_is_refused(value: bytes) -> None:
    """A committed state that cannot be read is `StoreCorrupt`, naming partition and view; it is never overwritten."""
    shell = Shell()
    shell.fold(batch(0, add(1, "x"), add(1, "y")))
    shell.commit()
    shell.restart()
    shell.fold(batch(1, add(1, "x"), add(1, "y")))
    shell.freeze()
    values = [shell.store[key] for key in shell.lookup.keys]
    with pytest.raises(StoreCorrupt, match="partition 0, view v"):
        shell.task.prepare_commit([values[0], value], now_ms=0)


def test_values_must_answer_the_keys() -> None:
    """Fewer or more values than keys is a bug of the shell, and does not pass for absent entries."""
    for count in (0, 1, 3):
        shell = Shell()
        shell.fold(batch(0, add(1, "z")))
        shell.commit()
        shell.restart()
        shell.fold(batch(1, add(1, "x"), add(1, "y")))
        shell.freeze()
        with pytest.raises(ValueError, match=f"{count} values for 2 keys"):
            shell.task.prepare_commit([None] * count, now_ms=0)
