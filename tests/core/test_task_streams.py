"""Whole streams of records: whatever the commits, crashes and limits, the committed entries are those of a plain fold."""

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.codec import decode_definition, decode_folded, encode_batch, encode_position, receive_batch
from pipeline.core.kinds import BATCH_INT_BYTES_MAX, KINDS, STATE_INT_BYTES_MAX, TS_MS_MAX
from pipeline.core.limits import TaskLimits
from pipeline.core.record import (
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Batch,
    Definition,
    Group,
    series_prefix,
    series_suffix,
)
from pipeline.core.task import Phase, Task
from pipeline.errors import BadRecord
from tests.core import strategies as some
from tests.core.driver import Shell
from tests.core.test_codec import sealed
from tests.support import examples

VIEWS = [Definition(f"v_{kind}", kind, ("a",)) for kind in KINDS] + [Definition("v", "sum"), Definition("v_", "sum", ("a",))]
WRONG = Definition("v", "sum", ("b", "a"))
"""Definition that no publisher of ours sends: groups beside it are folded."""


@st.composite
def groups(draw: st.DrawFn) -> Group:
    definition = draw(st.sampled_from(VIEWS))
    labels = (
        draw(st.lists(st.sampled_from(["x", "y", "z", ""]), unique=True, min_size=1, max_size=4))
        if definition.labels
        else [None]
    )
    # one family of numbers for the whole stream, so that every order is exact
    own = definition.kind in ("last", "distinct", "topk")
    deltas = some.families(definition.kind) if own else st.just(some.grid)
    states = [KINDS[definition.kind].collect([draw(draw(deltas)) for _ in range(draw(st.integers(1, 2)))]) for _ in labels]
    return Group(definition, [series_suffix([v for v in [label] if v is not None]) for label in labels], states)


@st.composite
def streams(draw: st.DrawFn) -> list[bytes | None]:
    """Draw a log: two producers' batches, each once or more, in any order, and some bad records."""
    log: list[bytes | None] = []
    for producer_id in "pq":
        for sequence in range(draw(st.integers(1, 6))):
            content = draw(st.lists(groups(), max_size=3))
            for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
                epoch = draw(st.sampled_from([0, 0, 0, 1]))
                log.append(encode_batch(Batch(producer_id, epoch, 0, sequence, 0, 0, content)))
    half_wrong = [draw(groups()), Group(WRONG, [series_suffix(("x", "y"))], [1])]
    log += draw(st.lists(st.sampled_from([None, b"", b"\x01junk", encode_batch(Batch("r", 0, 0, 0, 0, 0, half_wrong))])))
    return draw(st.permutations(log))


def plain_fold(log: list[bytes | None]) -> tuple[dict[tuple[Definition, bytes], Any], int, int]:
    """Return the result of a stream, from the text of DESIGN alone: states by series, bad records, bad groups."""
    found: dict[tuple[Definition, bytes], Any] = {}
    seen: set[tuple[str, int]] = set()
    epochs: dict[str, int] = {}
    bad = bad_groups = 0
    for value in log:
        if value is None or len(value) < 9:
            bad += 1
            continue
        received = receive_batch(value)
        batch = received.batch
        newest = epochs.get(batch.producer_id, 0)
        if (batch.producer_id, batch.sequence) in seen:
            epochs[batch.producer_id] = max(newest, batch.epoch)
        elif batch.epoch < newest:
            bad += 1
        else:
            epochs[batch.producer_id] = batch.epoch
            seen.add((batch.producer_id, batch.sequence))
            bad_groups += len(received.refused)
            for group in batch.groups:
                for suffix, state in zip(group.suffixes, group.states, strict=True):
                    key = group.definition, suffix
                    found[key] = KINDS[group.definition.kind].merge(found[key], state) if key in found else state
    return found, bad, bad_groups


LEGAL = {
    "freeze": Phase.FOLDING,
    "prepare": Phase.FROZEN,
    "write": Phase.COMMITTING,
    "committed": Phase.COMMITTING,
}
steps = st.lists(st.sampled_from(["fold"] * 4 + ["commit"] * 3 + ["crash", "refold", *LEGAL]), min_size=12, max_size=40)


def run(log: list[bytes | None], steps: list[str], limits: TaskLimits, task_type: type[Task] = Task) -> Shell:
    """Fold a log with commits and crashes at any step, then to its end; skip a step that is not legal at its time."""
    shell = Shell(limits, task_type)
    shell.append(*log)
    for step in steps:
        if step == "fold":
            shell.fold(count=1)
        elif step == "refold":
            shell.refold()
        elif step == "crash":
            shell.restart()
        elif step == "commit":
            finish_commit(shell)
        elif shell.task.phase is LEGAL[step]:
            getattr(shell, step)()
    finish_commit(shell)
    shell.fold()
    shell.commit()
    return shell


def finish_commit(shell: Shell) -> None:
    """End the commit that is under way, or make one."""
    for step in ("freeze", "prepare", "committed"):
        if shell.task.phase is LEGAL[step]:
            getattr(shell, step)()


caches = st.builds(
    TaskLimits,
    cache_entries_max=st.sampled_from([0, 1, 2, 5, 10, 20, 100_000]),
    cache_bytes_max=st.sampled_from([0, 20, 60, 2**26]),
    producers_max=st.sampled_from([0, 1, 2, 100_000]),
    ts_ahead_max_ms=st.just(TS_MS_MAX),
)


def committed(shell: Shell) -> dict[bytes, bytes]:
    """Return the store without the version of the definitions, which counts the commits that brought some."""
    position = msgspec.structs.replace(shell.task.position, definitions_version=0)
    return {**shell.store, POSITION_KEY: encode_position(position)}


@settings(max_examples=examples(60))
@given(log=streams(), runs=st.lists(st.tuples(steps, caches), min_size=1, max_size=3))
def test_commits_crashes_and_caches_change_nothing(
    log: list[bytes | None], runs: list[tuple[list[str], TaskLimits]]
) -> None:
    """One stream, with any commits, crashes and cache sizes, makes the same store, equal to a plain fold."""
    straight = run(log, [], TaskLimits(ts_ahead_max_ms=TS_MS_MAX))
    states, bad, bad_groups = plain_fold(log)
    expected = {series_prefix(it) + suffix: some.image(KINDS[it.kind], state) for (it, suffix), state in states.items()}
    assert {key: value for key, value in straight.store.items() if key[:1] == TAG_SERIES} == expected
    counts = straight.task.counts
    assert (counts.records_bad, counts.groups_refused, len(straight.dead_letters)) == (bad, bad_groups, bad + bad_groups)
    for view in {it.view for it, _ in states}:
        for entry in straight.entries(view):
            assert entry.series_count == sum(it == entry.definition for it, _ in states)
    for steps_taken, limits in runs:
        shell = run(log, steps_taken, limits)
        assert committed(shell) == committed(straight)
        assert shell.dead_letters == straight.dead_letters


@st.composite
def extremes(draw: st.DrawFn) -> bytes:
    """Draw batches at and beyond the limits of numbers."""
    sequence = draw(st.sampled_from([0, 2**63 - 3, 2**63 - 2, 2**63 - 1]))
    size = draw(
        st.sampled_from([9, BATCH_INT_BYTES_MAX, BATCH_INT_BYTES_MAX + 1, STATE_INT_BYTES_MAX, STATE_INT_BYTES_MAX + 1])
    )
    largest = draw(st.sampled_from([1, -1])) * (2 ** (8 * size - 1) - 1)
    kind, state = draw(
        st.sampled_from([("sum", largest), ("mean", (largest, abs(largest))), ("max", largest), ("last", (1, 1, largest))])
    )
    group = Group(Definition(kind, kind), [series_suffix(())], [state])
    return encode_batch(Batch("p", 0, 0, sequence, draw(st.sampled_from([0, sequence])), 0, [group]))


hostile = (
    some.batches(groups_max=2).map(encode_batch)
    | some.damaged(some.batches(groups_max=2).map(encode_batch))
    | some.damaged(st.builds(lambda g: encode_batch(Batch("p", 0, 0, 0, 0, 0, g)), st.lists(some.groups(), max_size=2)))
    | extremes()
    | st.binary(max_size=40)
    | st.none()
)


@settings(max_examples=examples(200))
@given(values=st.lists(hostile, max_size=5), data=st.data())
def test_no_record_stops_a_partition(values: list[bytes | None], data: st.DataObject) -> None:
    """Any bytes in the log are folded or dead-lettered, and committed states can be read and added to."""
    at_home = [
        None if value is None else sealed(value[9:]) for value in values
    ]  # in partition 0, with a checksum that is right
    shell = Shell(TaskLimits(cache_entries_max=data.draw(st.sampled_from([0, 100]))))
    for offset in range(len(at_home)):
        shell.fold(at_home[offset])
        if data.draw(st.booleans()):
            shell.commit()
    shell.commit()
    counts = shell.task.counts
    assert counts.batches_folded + counts.records_bad + counts.batches_duplicate == len(values)
    assert len(shell.dead_letters) == len(shell.letters()) == counts.records_bad + counts.groups_refused
    producers = [decode_folded(value) for key, value in shell.store.items() if key[:1] == TAG_PRODUCER]
    assert len(producers) <= 2 * counts.batches_folded, "its own, and that of what it replays"
    # the same states once more, from other producers: now every lookup reads what was committed
    shell.restart()
    for i, value in enumerate(at_home):
        try:
            batch = receive_batch(value or b"").batch
        except BadRecord:
            continue
        again = Batch(f"again-{i}", 0, 0, 0, 0, 0, batch.groups)
        shell.fold(encode_batch(again))
    shell.commit()
    shell.restart()
    for value in [value for key, value in shell.store.items() if key[:1] == TAG_DEFINITION]:
        entry = decode_definition(value)
        found = shell.series_of(entry.definition)
        for state in found.values():
            KINDS[entry.definition.kind].answer(state)
        assert entry.series_count == len(found)
