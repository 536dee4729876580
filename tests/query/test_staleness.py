"""The bound on staleness is true, and as tight as the observed ends allow."""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.adapters.memory import MemoryLog
from pipeline.core.answer import AsOf
from pipeline.core.query import Query
from pipeline.core.record import NO_POSITION, Definition, Position
from pipeline.errors import NotReady, Unavailable
from pipeline.ports import Message
from pipeline.query.ends import EndsNow, LogEnds
from pipeline.query.reader import ViewReader
from pipeline.query.staleness import OBSERVATIONS_MAX, SPACING_S, EndOffsetHistory, bound_ms
from pipeline.topics import DELTAS
from tests.query.support import World, scanned
from tests.support import HandClock

DEFINITION = Definition("v", "sum")


def as_of(world: World) -> AsOf:
    return world.reader.read(Query("v", by=()), deadline_s=1e18).as_of


def partial_fold(world: World, number: int, count: int) -> None:
    """Fold and commit up to `count` more records of one partition."""
    partition = world.partitions[number]
    reader = world.log.reader(DELTAS)
    reader.assign({number: partition.task.next_offset})
    for records in reader.poll(record_count_max=count, bytes_max=2**30, timeout_s=0):
        partition.fold(records)
    if partition.task.dirty:
        partition.commit()


actions = st.one_of(
    st.tuples(st.just("append"), st.integers(0, 1)),
    st.tuples(st.just("fold"), st.integers(0, 1), st.integers(1, 3)),
    st.tuples(st.just("wait"), st.sampled_from([0.0002, 0.0015, 0.007, 0.05, 3.0])),
    st.tuples(st.just("read")),
    st.tuples(st.just("observe")),
    st.tuples(st.just("away"), st.booleans()),
)


@given(st.lists(actions, min_size=5, max_size=40))
def test_the_bound_is_never_below_the_truth(script: list[tuple[object, ...]]) -> None:
    """Records that an answer lacks are no older than its staleness says; with all records it is next to nothing, unless the
    reader cannot see the log.
    """
    clock = HandClock()
    world = World(partition_count=2, clock=clock)
    for number in range(2):
        world.append(number, DEFINITION, {(): 1})
    world.fold()
    accepted: dict[int, list[float]] = {0: [clock.s], 1: [clock.s]}
    away = False

    def end_offsets() -> Mapping[int, int]:
        if away:
            raise Unavailable("the log is away")
        seen = world.log.end_offsets(DELTAS)
        looks.append((clock.s, seen))
        return seen

    looks: list[tuple[float, Mapping[int, int]]] = []
    ends = EndsNow(end_offsets, partial(world.log.start_offsets, DELTAS), clock)
    world.reader = ViewReader(stores=world.stores, ends=ends, clock=clock, settings=world.settings)
    for action, *arguments in [*script, ("read",)]:
        match action:
            case "append":
                number = arguments[0]
                accepted[number].append(clock.s)
                world.append(number, DEFINITION, {(): 1})
            case "fold":
                partial_fold(world, *arguments)
            case "wait":
                clock.s += arguments[0]
            case "observe":
                world.reader.partitions()
            case "away":
                away = arguments[0]
            case "read":
                answer = as_of(world)
                missing = [at for number, times in accepted.items() for at in times[answer.next_offsets[str(number)] :]]
                assert answer.staleness_ms is not None
                assert answer.staleness_ms >= (clock.s - min(missing, default=clock.s)) * 1000
                if not missing and not away:
                    assert answer.staleness_ms <= 1
                known = [
                    max(
                        [at for at, ends in looks if ends[number] <= answer.next_offsets[str(number)]],
                        default=accepted[number][answer.next_offsets[str(number)] - 1],
                    )
                    for number in range(2)
                ]
                thinned_ms = SPACING_S * 1000  # of two looks so close to each other only one is remembered
                assert answer.staleness_ms <= (clock.s - min(known)) * 1000 + thinned_ms + 2


def test_nothing_is_known_of_a_log_that_was_never_seen() -> None:
    """With nothing folded and the log away the bound is unknown, and one unknown partition makes the whole unknown."""
    clock = HandClock()
    world = World(partition_count=2, clock=clock)
    world.append(0, DEFINITION, {(): 1})
    world.fold()

    def away() -> Mapping[int, int]:
        raise Unavailable("the log is away")

    world.reader = ViewReader(stores=world.stores, ends=EndsNow(away, away, clock), clock=clock, settings=world.settings)
    assert as_of(world).staleness_ms is None
    assert [state.staleness_ms for state in world.reader.partitions()] == [1, None]
    assert [state.end_offset for state in world.reader.partitions()] == [None, None]


def test_a_reader_behind_the_log_grows_stale() -> None:
    """An end offset seen before the missing record was accepted gives a tighter bound than the last folded record."""
    clock = HandClock()
    world = World(partition_count=1, clock=clock)
    world.append(0, DEFINITION, {(): 1})
    world.fold()
    clock.s += 60
    assert as_of(world).staleness_ms == 0
    clock.s += 5
    world.append(0, DEFINITION, {(): 1})
    clock.s += 2
    assert as_of(world).staleness_ms == 7_000
    world.fold()
    assert as_of(world).staleness_ms == 0


def test_gauges_say_lag_and_staleness() -> None:
    """`partitions` sets the gauges of lag and staleness of each partition."""
    clock = HandClock()
    world = World(partition_count=2, clock=clock)
    as_of_nothing = world.reader.partitions()
    assert [(state.lag, state.staleness_ms) for state in as_of_nothing] == [(0, 0), (0, 0)]
    clock.s += 1.5
    world.append(1, DEFINITION, {(): 1})
    world.append(1, DEFINITION, {(): 1})
    clock.s += 1
    world.reader.partitions()
    text = world.metrics.render()[0].decode()
    assert 'pipeline_lag_records{partition="0"} 0.0' in text
    assert 'pipeline_lag_records{partition="1"} 2.0' in text
    assert 'pipeline_staleness_seconds{partition="1"} 2.5' in text


@given(st.lists(st.tuples(st.floats(0.0001, 1.0), st.integers(0, 3)), min_size=1, max_size=60), st.data())
def test_forgetting_makes_the_bound_looser_never_wrong(steps: list[tuple[float, int]], data: st.DataObject) -> None:
    """The bounded memory of end offsets answers as one that forgets nothing, or with an earlier time."""
    kept = EndOffsetHistory()
    times: list[float] = []
    offsets: list[int] = []
    at_s, end = 0.0, data.draw(st.integers(0, 2))
    for wait_s, more in steps:
        at_s, end = at_s + wait_s / 20, end + more
        kept.observe(at_s, end)
        times.append(at_s)
        offsets.append(end)
        wanted = data.draw(st.integers(0, end + 1))
        i = bisect_right(offsets, wanted)
        found = kept.reached_s(wanted)
        assert (found is None) if i == 0 else (found is None or found <= times[i - 1])
    assert kept.reached_s(end) == at_s


def test_a_minute_is_remembered_in_bounded_memory() -> None:
    """Few of the observed ends are kept: the last minute nearly in full, and the first one."""
    kept = EndOffsetHistory()
    for i in range(20_000):
        kept.observe(i * 0.02, i)
    assert len(kept._offsets) <= OBSERVATIONS_MAX
    assert kept.reached_s(0) == 0
    for age_s, error_s in ((0, 0.0), (10, 0.1), (30, 0.2), (60, 1.0)):
        next_offset = 19_999 - 50 * age_s
        found = kept.reached_s(next_offset)
        assert found is not None
        assert 0 <= next_offset * 0.02 - found <= error_s + 1e-6
    for i in range(5_000):
        kept.observe(400 + i * 0.0001, 20_000 + i)
    assert len(kept._offsets) <= OBSERVATIONS_MAX


def test_gauges_hide_nothing() -> None:
    """Unknown staleness is infinite, not the last known: for stores being restored, and for partitions without a store."""
    clock = HandClock()
    world = World(partition_count=2, clock=clock)
    seen = LogEnds(clock.s, {0: 0, 1: 0, 2: 0}, {})
    world.reader = ViewReader(
        stores=world.stores, ends=lambda: seen, clock=clock, settings=world.settings, metrics=world.metrics
    )
    world.reader.partitions()

    def gauge(number: int) -> str:
        (line,) = [
            it for it in world.metrics.render()[0].decode().splitlines() if f'staleness_seconds{{partition="{number}"' in it
        ]
        return line.split()[-1]

    assert [gauge(number) for number in range(3)] == ["0.0", "0.0", "+Inf"]
    world.ready = False
    with pytest.raises(NotReady):
        world.reader.partitions()
    assert [gauge(number) for number in range(3)] == ["+Inf"] * 3


def test_late_and_fallen_observations() -> None:
    """An observation that comes after a newer one is dropped; a log that ends earlier than before was made anew."""
    kept = EndOffsetHistory()
    kept.observe(2.0, 10)
    kept.observe(1.0, 5)
    assert kept.reached_s(7) is None
    kept.observe(3.0, 4)
    assert (kept.reached_s(4), kept.reached_s(3), kept.reached_s(10)) == (3.0, None, 3.0)


@pytest.mark.parametrize(
    ("position", "reached_s", "bound"),
    [
        (NO_POSITION, None, None),
        (NO_POSITION, 9.9995, 1),
        (NO_POSITION, 10.0, 0),
        (NO_POSITION, 8.0, 2_000),
        (Position(1, 0, 49_400), 8.0, 2_000),
        (Position(1, 0, 49_400), None, 601),
        (Position(1, 0, 50_000), None, 1),
        (Position(1, 0, 50_001), None, None),
        (Position(1, 0, 50_001), 8.0, 2_000),
    ],
)
def test_what_was_seen_counts_before_the_wall_clock(position: Position, reached_s: float | None, bound: int | None) -> None:
    """An observed end counts before the wall clock; the bound is rounded up; a last record from the future says nothing."""
    assert bound_ms(position, reached_s, now_s=10.0, now_ms=50_000) == bound


def test_ends_are_noted_before_the_store_is_looked_at() -> None:
    """The ends are observed before the store is read, so that a record folded in between only makes the answer fresher."""
    clock = HandClock()
    world = World(partition_count=1, clock=clock)
    world.append(0, DEFINITION, {(): 1})
    world.fold()
    order: list[str] = []

    def noting(name: str, call: Callable[..., object]) -> Callable[..., object]:
        def noted(*arguments: object) -> object:
            order.append(name)
            return call(*arguments)

        return noted

    store = world.partitions[0].store
    store.get = noting("store", store.get)  # type: ignore[method-assign]
    store.snapshot = noting("store", store.snapshot)  # type: ignore[method-assign]
    end_offsets = noting("ends", lambda: world.log.end_offsets(DELTAS))
    ends = EndsNow(end_offsets, partial(world.log.start_offsets, DELTAS), clock)  # type: ignore[arg-type]
    reader = ViewReader(stores=world.stores, ends=ends, clock=clock, settings=world.settings)
    reader.definition("v")
    for call in (
        lambda: reader.point(Query("v")),
        lambda: scanned(reader, Query("v")),
        reader.views,
        reader.partitions,
    ):
        clock.s += 1
        order.clear()
        call()
        assert order[0] == "ends"
        assert "ends" not in order[1:]


@pytest.mark.parametrize("end", [1, 2, 5])
def test_a_position_in_a_topic_that_is_gone_covers_nothing(monkeypatch: pytest.MonkeyPatch, end: int) -> None:
    """A position in a topic that was made anew, even beyond its end, covers none of the new topic's records."""
    clock = HandClock()
    monkeypatch.setattr(MemoryLog, "topic_id", lambda self, topic: "old")
    world = World(partition_count=1, clock=clock)
    for _ in range(2):
        world.append(0, DEFINITION, {(): 1})
    world.fold()
    seen = LogEnds(clock.s, {0: 2}, {0: 0}, "old")
    world.reader = ViewReader(stores=world.stores, ends=lambda: seen, clock=clock, settings=world.settings)
    assert as_of(world) == AsOf(0, {"0": 2})
    clock.s += 3
    seen = LogEnds(clock.s, {0: end}, {0: 0}, "new")
    answer = as_of(world)
    assert answer.next_offsets == {"0": 0}, "so that no token of the new topic is taken for covered"
    assert answer.staleness_ms is not None
    assert answer.staleness_ms >= 3_000
    (state,) = world.reader.partitions()
    assert (state.lag, state.staleness_ms) == (end, answer.staleness_ms)


def test_what_waits_behind_an_open_transaction_is_missing() -> None:
    """Records behind an open transaction count as missing, in staleness and lag, until the transaction is over."""
    clock = HandClock()
    world = World(partition_count=1, clock=clock)
    world.append(0, DEFINITION, {(): 1})
    world.fold()

    def staleness_ms() -> int | None:
        return world.reader.read(Query("v"), deadline_s=1e18).as_of.staleness_ms

    assert staleness_ms() == 0
    clock.s += 1
    hanging = world.log.leave_open([Message(DELTAS, 0, None, b"theirs")])
    world.append(0, DEFINITION, {(): 1})
    for seconds in range(1, 20):
        clock.s += 1
        world.fold()
        assert (staleness_ms() or 0) >= seconds * 1000
        (state,) = world.reader.partitions()
        assert state.lag == 2
        assert (state.staleness_ms or 0) >= seconds * 1000
    hanging.abort()
    world.fold()
    assert staleness_ms() == 0
    assert world.reader.partitions()[0].lag == 0
