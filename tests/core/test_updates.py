"""Updates of watched answers: whoever applies them has the answer that a read would give, also after several at once."""

from functools import reduce
from itertools import pairwise
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.answer import Answer, AsOf, Series
from pipeline.core.updates import merged, update_of, updated
from tests.support import examples

STEP_MS = 10
values: st.SearchStrategy[Any] = st.sampled_from([0, 1, 1.0, True, None, "a", {"count": 1}, {"count": 2}])
names = st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"))


@st.composite
def answers(draw: st.DrawFn, *, windowed: bool, ordered: bool, lead: int) -> Answer:
    """An answer of series with two labels: windowed ones move on in time, ordered ones come in an order of their own.

    Each point covers `lead` steps more than its own.
    """
    rows = draw(st.dictionaries(names, st.dictionaries(st.integers(0, 8), values, min_size=1, max_size=5), max_size=4))
    keys = [*rows] if ordered else sorted(rows)
    first = draw(st.integers(0, 4))
    series = []
    for key in keys:
        labels = dict(zip(("p", "q"), key, strict=True))
        points = [(at * STEP_MS, value) for at, value in sorted(rows[key].items()) if at >= first - lead]
        series.append(Series(labels, points=points) if windowed else Series(labels, next(iter(rows[key].values()))))
    times = (
        {"start_ms": first * STEP_MS, "end_ms": 90, "step_ms": STEP_MS, "over_ms": (1 + lead) * STEP_MS} if windowed else {}
    )
    truncated = draw(st.booleans())
    return Answer("v", "last", None, series, AsOf(draw(st.integers(0, 9)), {}), truncated=truncated, **times)


@st.composite
def histories(draw: st.DrawFn) -> list[Answer]:
    """Answers to one read, as time goes by."""
    windowed, ordered = draw(st.booleans()), draw(st.booleans())
    lead = draw(st.integers(0, 2))
    found = draw(st.lists(answers(windowed=windowed, ordered=ordered, lead=lead), min_size=2, max_size=5))
    if windowed:
        starts = sorted(it.start_ms or 0 for it in found)
        found = [_moved(it, start_ms) for it, start_ms in zip(found, starts, strict=True)]
    return found


def _moved(answer: Answer, start_ms: int) -> Answer:
    first_ms = start_ms + (answer.step_ms or 0) - (answer.over_ms or 0)
    series = [
        msgspec.structs.replace(it, points=[point for point in it.points if point[0] >= first_ms]) for it in answer.series
    ]
    return msgspec.structs.replace(answer, start_ms=start_ms, series=series)


def shown(answer: Answer) -> bytes:
    """An answer as a client sees it, which tells True, 1 and 1.0 apart."""
    return msgspec.json.encode(msgspec.structs.replace(answer, as_of=AsOf(0, {})))


@settings(max_examples=examples(600))
@given(history=histories())
def test_updates_make_the_answer_of_a_read(history: list[Answer]) -> None:
    """Each update alone, all in a row, and all merged to one, make the newest answer, to the byte."""
    updates = []
    for before, after in pairwise(history):
        update = update_of(before, after)
        if update is None:
            assert [it.labels for it in before.series] == [it.labels for it in after.series]
        else:
            decoded = msgspec.json.decode(msgspec.json.encode(update), type=type(update))
            assert shown(updated(before, decoded)) == shown(after)
            updates.append(update)
    reached = reduce(updated, updates, history[0])
    if updates:
        assert shown(updated(history[0], merged(updates))) == shown(reached)
    newest = history[-1]
    if newest.step_ms is not None:
        reached = _moved(reached, newest.start_ms or 0)
    assert reached.series == newest.series


def test_labels_with_other_names() -> None:
    """A series with the values of one before, but other names of labels, takes its place."""
    before = Answer("v", "sum", None, [Series({"region": "x"}, 1)], AsOf(0, {}))
    after = Answer("v", "sum", None, [Series({"zone": "x"}, 1), Series({"zone": "y"}, 2)], AsOf(0, {}))
    update = update_of(before, after)
    assert update is not None
    assert updated(before, update).series == after.series


def test_an_update_has_only_what_changed() -> None:
    """Series and points that stay as they are do not travel; an answer that is only newer is no update."""
    a, b = Series({"p": "a"}, points=[(0, 1), (10, 2)]), Series({"p": "b"}, points=[(0, 5)])
    times = {"start_ms": 0, "end_ms": 20, "step_ms": 10, "over_ms": 10}
    before = Answer("v", "sum", ("p",), [a, b], AsOf(1, {"0": 1}), **times)
    later = msgspec.structs.replace(before, as_of=AsOf(9, {"0": 2}), end_ms=30, final_before_ms=20)
    assert update_of(before, later) is None
    changed = msgspec.structs.replace(later, series=[Series({"p": "a"}, points=[(0, 1), (10, 3), (20, 1)]), b])
    update = update_of(before, changed)
    assert update is not None
    assert (update.gone, update.changed, update.order) == ([], [Series({"p": "a"}, points=[(10, 3), (20, 1)])], None)
    assert update.answer.series == []
