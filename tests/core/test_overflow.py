"""Beyond `series_max` totals stay exact, in the series whose labels are all `__overflow__`."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.codec import decode_batch
from pipeline.core.kinds import KINDS, TS_MS_MAX
from pipeline.core.limits import TaskLimits
from pipeline.core.record import OVERFLOW, Definition, Group, series_suffix
from pipeline.core.task import Phase
from tests.core import strategies as some
from tests.core.driver import Shell, batch, group
from tests.support import examples

V = Definition("v", "sum", ("a",))
REST = (OVERFLOW,)


def total_of(kind: str, states: Sequence[Any]) -> Any:
    total = states[0]
    for state in states[1:]:
        total = KINDS[kind].merge(total, state)
    return total


@st.composite
def commits(draw: st.DrawFn, kind: str) -> list[list[tuple[str, Any]]]:
    """Draw deltas by commit: labels, the overflow's own among them, and states that merge exactly in any order."""
    labels = st.sampled_from([*"abcdefgh", OVERFLOW])
    deltas = draw(some.families(kind)) if kind in ("last", "distinct", "topk") else some.grid
    states = deltas.map(lambda delta: KINDS[kind].collect([delta]))
    return draw(st.lists(st.lists(st.tuples(labels, states), min_size=1, max_size=6), min_size=1, max_size=6))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=examples(60))
@given(data=st.data())
def test_totals_are_exact_at_every_commit(kind: str, data: st.DataObject) -> None:
    """No delta is lost or counted twice, no known series is moved, and counts are those of the store, for each kind, with
    and without cached states, across restarts and limits that change, also with folds during a commit.
    """
    definition = Definition("v", kind, ("a",))
    limits = st.builds(
        TaskLimits,
        series_max=st.integers(1, 6),
        cache_entries_max=st.sampled_from([0, 4, 1_000]),
        ts_ahead_max_ms=st.just(TS_MS_MAX),
    )
    shell = Shell(data.draw(limits))
    there: set[tuple[str, ...]] = set()
    for rows in data.draw(commits(kind)):
        half = data.draw(st.integers(0, len(rows)))
        for part in (rows[:half], rows[half:]):
            if part:
                made = Group(definition, [series_suffix((label,)) for label, _ in part], [state for _, state in part])
                shell.fold(batch(len(shell.log), made))
            if shell.task.phase is Phase.FOLDING and data.draw(st.booleans()):
                shell.freeze()
                shell.prepare()
        if shell.task.phase is Phase.COMMITTING:
            shell.committed()
        shell.commit()
        found = shell.series("v")
        everything = [state for value in shell.log for state in states_of(value)]
        assert some.same(KINDS[kind], total_of(kind, [*found.values()]), total_of(kind, everything))
        assert there <= found.keys()
        assert shell.series_count("v") == len(found)
        assert len(found.keys() - there - {REST}) <= max(0, shell.limits.series_max - len(there))
        there = {*found}
        if data.draw(st.booleans()):
            shell.limits = data.draw(limits)
            shell.restart()


def states_of(value: bytes | None) -> list[Any]:
    return [state for it in decode_batch(value or b"").groups for state in it.states]


@pytest.mark.parametrize("cache_entries_max", [0, 100])
def test_known_series_go_on_and_new_ones_overflow(cache_entries_max: int) -> None:
    """The first series keep their place for ever; deltas of later ones are counted, in one series."""
    shell = Shell(TaskLimits(series_max=2, cache_entries_max=cache_entries_max))
    shell.fold(batch(0, group(V, {("x",): 1, ("y",): 2, ("z",): 4})))
    shell.commit()
    assert shell.series("v") == {("x",): 1, ("y",): 2, REST: 4}
    assert shell.task.counts.series_overflowed == 1
    shell.fold(batch(1, group(V, {("y",): 8, ("z",): 16, ("a",): 32})))
    shell.commit()
    assert shell.series("v") == {("x",): 1, ("y",): 10, REST: 52}
    assert shell.task.counts.series_overflowed == 3
    assert shell.series_count("v") == 3
    shell.restart()
    shell.fold(batch(2, group(V, {("x",): 64, REST: 128})))
    shell.commit()
    assert shell.series("v") == {("x",): 65, ("y",): 10, REST: 180}
    assert shell.task.counts.series_overflowed == 0, "its own deltas are no excess"


def test_the_limit_is_of_a_definition() -> None:
    """One definition's excess is not another's, of the same view or not."""
    wide = Definition("v", "sum", ("a", "b"))
    shell = Shell(TaskLimits(series_max=1))
    shell.fold(batch(0, group(V, {("x",): 1, ("y",): 2}), group(wide, {("x", "y"): 4, ("x", "z"): 8})))
    shell.commit()
    assert shell.series_of(V) == {("x",): 1, REST: 2}
    assert shell.series_of(wide) == {("x", "y"): 4, (OVERFLOW, OVERFLOW): 8}


def test_a_definition_without_labels_has_no_excess() -> None:
    """A definition without labels has one series, which is never in excess."""
    shell = Shell(TaskLimits(series_max=0))
    for i in range(3):
        shell.fold(batch(i, group(Definition("v", "sum"), {(): 1})))
        shell.commit()
    assert shell.series("v") == {(): 3}
    assert shell.series_count("v") == 1
    assert shell.task.counts.series_overflowed == 0
