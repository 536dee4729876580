"""Work that is too much for one step is done in runs, with the same result."""

import random
from collections import Counter

import pytest

import pipeline.core.changes
import pipeline.core.overlay
import pipeline.core.record
from pipeline.core.commit import Commit
from pipeline.core.limits import TaskLimits
from pipeline.core.record import RUN_ENTRIES_MAX, TAG_SERIES, Definition, runs, view_prefix
from pipeline.errors import StoreCorrupt
from tests.core.driver import Shell, batch, group

V = Definition("v", "sum", ("a",))
W = Definition("w", "mean", ("a",))
RUN = 10


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limit runs to a few entries."""
    for module in (pipeline.core.record, pipeline.core.overlay, pipeline.core.changes):
        monkeypatch.setattr(module, "RUN_ENTRIES_MAX", RUN)
    monkeypatch.setattr(pipeline.core.changes, "_SAMPLED", 2)


@pytest.mark.parametrize("cache_entries_max", [0, 30, 1_000])
@pytest.mark.parametrize("count", [1, RUN, RUN + 1, 20 * RUN])
@pytest.mark.usefixtures("short")
def test_runs_change_nothing(count: int, cache_entries_max: int) -> None:
    """States, counts and the order of entries are those of one step, whatever is cached, new or known."""
    shell = Shell(TaskLimits(cache_entries_max=cache_entries_max))
    rng = random.Random(count)
    expected: Counter[tuple[str, ...]] = Counter()
    for sequence in range(4):
        deltas = {(f"{rng.randrange(2 * count)}",): rng.randrange(1_000) for _ in range(count)}
        expected.update(deltas)
        shell.fold(batch(sequence, group(V, deltas), group(W, deltas)))
        if sequence != 1:  # so that a run of the overlay meets runs of a batch, too
            _assert_in_order(shell.commit())
            assert shell.series("v") == expected
            assert shell.series_count("v") == shell.series_count("w") == len(expected)
    assert {labels: state[0] for labels, state in shell.series("w").items()} == expected
    shell.restart()
    shell.refold()
    assert not shell.task.dirty


def _assert_in_order(commit: Commit) -> None:
    for view in ("v", "w"):
        keys = [key for key in commit.keys if key.startswith(view_prefix(view))]
        assert keys == sorted(keys)


@pytest.mark.usefixtures("short")
def test_a_bad_suffix_in_a_later_run_spoils_the_whole_group() -> None:
    """A group is folded whole or not at all, across runs, and no other group is affected."""
    shell = Shell()
    made = group(V, {(f"{n:03d}",): 1 for n in range(3 * RUN)})
    made.suffixes[-1] = b"bad"
    shell.fold(batch(0, made, group(W, {("x",): 1})))
    shell.commit()
    assert shell.entry_count() == 1
    assert [letter.view for letter in shell.letters()] == ["v"]


@pytest.mark.usefixtures("short")
def test_a_corrupt_entry_in_a_later_run_is_found() -> None:
    """An entry that can't be read is never taken for a new series."""
    shell = Shell(TaskLimits(cache_entries_max=0))
    deltas = {(f"{n:03d}",): 1 for n in range(3 * RUN)}
    shell.fold(batch(0, group(V, deltas)))
    commit = shell.commit()
    shell.store[[key for key in commit.keys if key[:1] == TAG_SERIES][2 * RUN]] = b"?"
    shell.fold(batch(1, group(V, deltas)))
    shell.freeze()
    with pytest.raises(StoreCorrupt):
        shell.prepare()


def test_runs_hold_everything_in_its_order() -> None:
    """No list that runs return is empty or too long, and all is in its order."""
    for count in (0, 1, RUN_ENTRIES_MAX, RUN_ENTRIES_MAX + 1, 2 * RUN_ENTRIES_MAX):
        found = [*runs(range(count))]
        assert [item for run in found for item in run] == [*range(count)]
        assert all(0 < len(run) <= RUN_ENTRIES_MAX for run in found)
