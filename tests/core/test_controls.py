"""Control records of the log, drop and reset: exactly once, between two batches, whatever is committed or under way."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.limits import TaskLimits
from pipeline.core.record import Control, Definition, definition_key
from pipeline.core.task import Phase
from tests.core.driver import Shell, batch, group, totals
from tests.support import examples

V = Definition("v", "sum", ("a",))
W = Definition("w", "sum", ("a",))
DROP, RESET = Control("drop", "v"), Control("reset", "v")


def add(value: int, label: str = "x", definition: Definition = V) -> Any:
    return group(definition, {(label,): value})


@pytest.mark.parametrize("control", [DROP, RESET], ids=lambda it: it.action)
@pytest.mark.parametrize("commits", [*itertools.product([False, True], repeat=3)])
@pytest.mark.parametrize("restart", [False, True])
def test_what_was_before_is_gone_and_what_comes_after_counts(
    control: Control, commits: tuple[bool, ...], restart: bool
) -> None:
    """After an order only later deltas count, with a commit at any of three places, or none; other views stay."""
    shell = Shell()
    steps = [
        batch(0, add(1), add(10, "y"), add(7, "x", W)),
        batch(1, controls=[control]),
        batch(2, add(2), add(3, "z")),
    ]
    for value, commit in zip(steps, commits, strict=True):
        shell.fold(value)
        if commit:
            shell.commit()
            if restart:
                shell.restart()
    shell.commit()
    assert shell.series("v") == {("x",): 2, ("z",): 3}
    assert shell.series_count("v") == 2
    assert totals(shell, "w") == [7]
    assert shell.entry_count() == 3
    shell.restart()
    shell.fold(*steps)
    shell.commit()
    assert shell.series("v") == {("x",): 2, ("z",): 3}, "an order that comes again is a duplicate"


def test_a_drop_takes_the_definition_and_a_reset_leaves_it() -> None:
    """A drop removes the definition, too, from the store and from the task; a reset keeps it."""
    for control, left in ((DROP, 0), (RESET, 1)):
        shell = Shell(TaskLimits(views_max=1))
        shell.fold(batch(0, add(1)))
        before = shell.commit().position.definitions_version
        shell.fold(batch(1, controls=[control]))
        commit = shell.commit()
        assert commit.position.definitions_version == before + (control is DROP)
        assert len(shell.entries("v")) == left
        assert shell.entry_count() == 0
        assert (definition_key(V) in shell.store) == bool(left)
        shell.fold(batch(2, add(1, "x", W)))
        shell.commit()
        assert len(shell.entries("w")) == 1 - left, "a drop makes room under views_max"


def test_a_control_comes_before_the_groups_of_its_batch() -> None:
    """An order comes before its own batch's groups, which count from nothing."""
    for control in (DROP, RESET):
        shell = Shell()
        shell.fold(batch(0, add(1), add(1, "y")))
        shell.commit()
        shell.fold(batch(1, add(5), controls=[control]))
        shell.commit()
        assert shell.series("v") == {("x",): 5}
        assert shell.series_count("v") == 1


@pytest.mark.parametrize("control", [DROP, RESET], ids=lambda it: it.action)
@pytest.mark.parametrize("at", range(3))
@pytest.mark.parametrize("more", range(3))
def test_an_order_while_a_commit_is_under_way(control: Control, at: int, more: int) -> None:
    """An order takes effect after freeze, after prepare, or after the write; deltas may follow before the commit ends."""
    shell = Shell()
    shell.fold(batch(0, add(1), add(1, "y")))
    shell.commit()
    shell.fold(batch(1, add(2), add(2, "z")))
    for step in (shell.freeze, shell.prepare, shell.write)[: at + 1]:
        step()
    shell.fold(batch(2, controls=[control]), *(batch(3 + i, add(8)) for i in range(more)))
    for step in (shell.prepare, shell.write)[at:]:
        step()
    shell.task.committed()
    assert shell.series("v") == {("x",): 3, ("y",): 1, ("z",): 2}, "the commit is as of before the order"
    shell.commit()
    assert shell.entry_count() == bool(more)
    for i in range(2):
        shell.fold(batch(10 + i, add(1, "n")))
        shell.commit()
    assert shell.series("v") == {("n",): 2} | ({("x",): 8 * more} if more else {})
    assert shell.series_count("v") == 1 + bool(more)


@pytest.mark.parametrize(
    ("control", "left"),
    [
        (Control("drop", "v"), []), (Control("drop", "v", "sum"), ["max"]), (Control("drop", "v", "max"), ["sum", "sum2"]),
        (Control("drop", "v", "", ("a",)), ["max", "sum2"]), (Control("drop", "v", "sum", ("a", "b")), ["max", "sum"]),
        (Control("drop", "v", "max", ("a",)), ["max", "sum", "sum2"]), (Control("drop", "v", "", ()), ["sum", "sum2"]),
        (Control("drop", "v_"), ["max", "sum", "sum2"]), (Control("drop", "v", "last"), ["max", "sum", "sum2"]),
    ],
)  # fmt: skip
def test_an_order_is_about_what_it_names(control: Control, left: list[str]) -> None:
    """An order names view, kind and labels; empty kind and no labels mean any."""
    definitions = {"sum": V, "max": Definition("v", "max"), "sum2": Definition("v", "sum", ("a", "b"))}
    shell = Shell()
    shell.fold(batch(0, *(group(it, {("x", "y")[: len(it.labels)]: 1}) for it in definitions.values())))
    shell.fold(batch(1, controls=[control]))
    shell.commit()
    assert sorted(name for name, it in definitions.items() if shell.series_of(it)) == left
    assert len(shell.entries("v")) == len(left)


class Model:
    """Totals of a view, from the order of the log alone."""

    def __init__(self) -> None:
        self.states: dict[str, dict[str, int]] = {}

    def apply(self, action: str, view: str, label: str, value: int) -> None:
        if action == "add":
            series = self.states.setdefault(view, {})
            series[label] = series.get(label, 0) + value
        elif action == "drop":
            self.states.pop(view, None)
        elif view in self.states:
            self.states[view] = {}


steps = st.lists(
    st.tuples(
        st.sampled_from(["add"] * 4 + ["drop", "reset"]), st.sampled_from("vw"), st.sampled_from("xyz"), st.integers(1, 9)
    )
    | st.sampled_from(["freeze", "prepare", "write", "committed", "crash"]),
    max_size=40,
)  # fmt: skip
LEGAL = {"freeze": Phase.FOLDING, "prepare": Phase.FROZEN, "write": Phase.COMMITTING, "committed": Phase.COMMITTING}


@settings(max_examples=examples(200))
@given(steps=steps, cache_entries_max=st.sampled_from([0, 2, 100]), series_max=st.sampled_from([1, 2, 100]))
def test_orders_take_effect_between_two_batches(steps: list[Any], cache_entries_max: int, series_max: int) -> None:
    """Totals are those of the log in its order, whatever commits, crashes, cache and overflow there are."""
    shell, model = Shell(TaskLimits(cache_entries_max=cache_entries_max, series_max=series_max)), Model()
    definitions = {"v": V, "w": W}
    for step in steps:
        if isinstance(step, tuple):
            action, view, label, value = step
            model.apply(*step)
            groups = [add(value, label, definitions[view])] if action == "add" else []
            controls = [Control(action, view)] if action != "add" else []
            shell.fold(batch(len(shell.log), *groups, controls=controls))
        elif step == "crash":
            shell.restart()
            shell.fold()
        elif shell.task.phase is LEGAL[step]:
            call: Callable[[], Any] = getattr(shell, step)
            call()
    shell.restart()
    shell.fold()
    shell.commit()
    for view in "vw":
        assert len(shell.entries(view)) == (view in model.states)
        if view in model.states:
            found = shell.series(view)
            assert sum(found.values()) == sum(model.states[view].values())
            assert shell.series_count(view) == len(found) <= series_max + 1
            if series_max == 100:
                assert {labels[0]: state for labels, state in found.items()} == model.states[view]


def test_folding_ends_behind_an_order_that_fills_a_commit() -> None:
    """Two large drops are of two commits. Records read behind the first are folded after it, and none is lost."""
    shell = Shell(TaskLimits(overlay_entries_max=10))
    definitions = [V, W]
    for number, definition in enumerate(definitions):
        shell.fold(batch(number, *(add(1, str(i), definition) for i in range(9))))
        shell.commit()
    assert not shell.task.full
    shell.append(
        batch(2, add(5, "k"), add(5, "l"), controls=[DROP]),
        batch(3, add(1, "n")),
        batch(4, controls=[Control("drop", "w")]),
        batch(5, add(1, "m")),
    )
    ends = []
    while shell.task.next_offset < len(shell.log):
        shell.fold()
        ends.append(shell.task.next_offset)
        tombstones = shell.commit().values.count(None)
        assert tombstones <= 10, "the series of one view and its definition"
    assert ends == [3, 5, 6]
    assert shell.series("v") == {("k",): 5, ("l",): 5, ("n",): 1, ("m",): 1}
    assert not shell.entries("w")
    assert shell.task.counts.series_cleared == 18
