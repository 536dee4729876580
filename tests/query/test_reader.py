"""Answers from stores: the right series, merged over partitions, at one commit boundary of each."""

import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline.adapters.memory import MemoryStores
from pipeline.adapters.rocks import RocksStores
from pipeline.core import codec
from pipeline.core.answer import Answer
from pipeline.core.kinds import KINDS
from pipeline.core.query import Labels, Query, parse_matcher
from pipeline.core.record import POSITION_KEY, Definition, canonical, definition_key, series_prefix, series_suffix
from pipeline.errors import Invalid, NotFound, NotReady, StoreCorrupt, Unavailable
from pipeline.ports import Store, StoreView
from pipeline.settings import LogSettings, QuerySettings
from tests.core import strategies as some
from tests.query.support import World, scanned, wait_until

REVENUE = Definition("revenue", "sum", ("region", "product"))
FAR_S = 1e18

V = Definition("v", "sum", ("a",))


def query(
    view: str = "revenue", *where: str, by: Labels | None = None, top: int | None = None, limit: int = 10_000
) -> Query:
    return Query(view, tuple(map(parse_matcher, where)), by, top, limit)


def read(world: World, it: Query) -> Answer:
    return world.reader.read(it, deadline_s=FAR_S)


def rows(answer: Answer) -> list[tuple[tuple[str, ...], Any]]:
    return [(tuple(series.labels.values()), series.value) for series in answer.series]


small = st.sampled_from(["", "a", "b", "ab", "\0", "é"])


@given(data=st.data(), kind=st.sampled_from([*KINDS.values()]))
def test_an_answer_is_the_merge_of_all_partitions(data: st.DataObject, kind: Any) -> None:
    """A series in several partitions is one series; the answer is a naive count's, for any `where` and `by`."""
    definition = Definition("v", kind.name, ("x", "y"))
    parts = data.draw(st.lists(st.lists(st.tuples(small, small), unique=True, max_size=6), min_size=3, max_size=3))
    assume(any(parts))  # an empty group defines nothing
    states = iter(data.draw(some.states(kind.name, count=1 + sum(map(len, parts)))))
    world = World(partition_count=3)
    naive: dict[Labels, Any] = {}
    for number, labels in enumerate(parts):
        part = {key: next(states) for key in labels}
        if part:
            world.append(number, definition, part)
        for key, state in part.items():
            naive[key] = kind.merge(naive[key], state) if key in naive else state
    world.fold()
    wanted = [(label, op, data.draw(small)) for label, op in data.draw(st.lists(operators, max_size=3))]
    by = data.draw(st.sampled_from([None, (), ("x",), ("y",), ("y", "x"), ("x", "y")]))
    groups: dict[Labels, Any] = {}
    for key, state in naive.items():
        values = dict(zip(("x", "y"), key, strict=True))
        if all(fits(values[label], op, value) for label, op, value in wanted):
            group = key if by is None else tuple(values[label] for label in by)
            groups[group] = kind.merge(groups[group], state) if group in groups else state
    answer = read(world, query("v", *[f"{label}{op}{value}" for label, op, value in wanted], by=by))
    assert [key for key, _ in rows(answer)] == sorted(groups)
    for key, value in rows(answer):
        assert value == kind.answer(groups[key])
    assert answer.as_of.next_offsets == {str(number): int(bool(part)) for number, part in enumerate(parts)}
    assert not answer.truncated


operators = st.tuples(st.sampled_from(["x", "y"]), st.sampled_from(["=", "!=", "=~", "!~"]))


def fits(value: str, op: str, pattern: str) -> bool:
    if op in ("=", "!="):
        return (value == pattern) is (op == "=")
    return (re.fullmatch(pattern, value) is not None) is (op == "=~")


@given(
    key=st.tuples(small, small),
    extra=st.lists(operators, max_size=2),
    value=small,
    by=st.sampled_from([None, (), ("x",), ("y", "x")]),
    present=st.lists(st.tuples(small, small), unique=True, min_size=1, max_size=8),
)
def test_a_point_read_answers_as_a_scan(
    key: Labels, extra: list[tuple[str, str]], value: str, by: Labels | None, present: list[Labels]
) -> None:
    """Equality on every label takes a shortcut to the same answer."""
    world = World(partition_count=2)
    definition = Definition("v", "sum", ("x", "y"))
    for number in range(2):
        world.append(number, definition, {labels: 1 + i * 10**number for i, labels in enumerate(present)})
    world.fold()
    pinned = [f"x={key[0]}", f"y={key[1]}", *(f"{label}{op}{value}" for label, op in extra)]
    it = query("v", *pinned, by=by)
    point, scan = world.reader.point(it), scanned(world.reader, it)
    assert point is not None
    assert msgspec.structs.replace(point, as_of=scan.as_of) == scan
    assert point.as_of.next_offsets == scan.as_of.next_offsets


def test_reads_without_all_labels_pinned_are_no_point_reads() -> None:
    """`point` refuses a read that does not pin all labels, and `read` scans."""
    world = World()
    world.publish(REVENUE, {("eu", "tea"): 1})
    assert world.reader.point(query("revenue", "region=eu")) is None
    assert rows(read(world, query("revenue", "region=eu"))) == [(("tea", "eu"), 1)]


def test_top_limit_and_what_was_cut() -> None:
    """An answer that lacks series says so and how many there are; a complete one does not."""
    world = World()
    world.publish(REVENUE, {("eu", f"p{i}"): i for i in range(10)})
    best = read(world, query(top=3))
    assert rows(best) == [(("p9", "eu"), 9), (("p8", "eu"), 8), (("p7", "eu"), 7)]
    assert (best.truncated, best.series_total) == (True, 10)
    first = read(world, query(limit=2))
    assert rows(first) == [(("p0", "eu"), 0), (("p1", "eu"), 1)]
    assert (first.truncated, first.series_total) == (True, 10)
    assert rows(read(world, query(top=3, limit=1))) == [(("p9", "eu"), 9)]
    assert read(world, query(limit=10)).series_total is None
    assert b"truncated" not in msgspec.json.encode(read(world, query(top=10)))


def test_blocks_do_not_show() -> None:
    """More series than one block holds, in uneven partitions, give the same totals."""
    world = World(partition_count=3)
    for number, count in enumerate((5_000, 1, 0)):
        world.append(number, REVENUE, {(f"r{i % 7}", f"p{i}"): i for i in range(count)})
    world.append(1, REVENUE, {(f"r{i % 7}", f"p{i}"): 1 for i in range(2_500)})
    world.fold()
    total = sum(range(5_000)) + 2_500
    assert read(world, query(by=())).series[0].value == total
    assert sum(series.value for series in read(world, query(by=("region",))).series) == total
    each = read(world, query())
    assert len(each.series) == 5_000
    assert sum(series.value for series in each.series) == total


def test_definitions_of_one_kind_are_merged() -> None:
    """A label that a definition lacks is empty; equal series of two definitions are one; where and by see all labels."""
    world = World(partition_count=2)
    world.append(0, Definition("orders", "sum", ("region",)), {("eu",): 1, ("us",): 10})
    world.append(1, Definition("orders", "sum", ("product", "region")), {("tea", "eu"): 100, ("", "us"): 1_000})
    world.append(1, Definition("orders", "sum", ("channel",)), {("web",): 10_000})
    world.fold()
    assert world.reader.definition("orders").labels == ("channel", "product", "region")
    assert rows(read(world, query("orders"))) == [
        (("", "", "eu"), 1),
        (("", "", "us"), 1_010),
        (("", "tea", "eu"), 100),
        (("web", "", ""), 10_000),
    ]
    assert rows(read(world, query("orders", by=("region",)))) == [(("",), 10_000), (("eu",), 101), (("us",), 1_010)]
    assert rows(read(world, query("orders", "product=", by=()))) == [((), 11_011)]
    pinned = query("orders", "channel=", "product=", "region=us")
    assert world.reader.point(pinned).series == read(world, pinned).series
    assert rows(read(world, pinned)) == [(("", "", "us"), 1_010)]
    assert rows(read(world, query("orders", "channel=web", "product=tea", "region="))) == []


@given(data=st.data())
def test_merged_definitions_answer_as_one_wide_definition_does(data: st.DataObject) -> None:
    """A read is that of one wide definition, however the series of a view are spread over definitions and partitions."""
    names = ("x", "y", "z")
    narrow, wide = World(partition_count=2), World(partition_count=2)
    for number in range(2):
        for labels in data.draw(st.lists(st.sampled_from([("x",), ("y", "z"), ("x", "y", "z"), ()]), unique=True)):
            values = data.draw(st.lists(st.tuples(*[small] * len(labels)), unique=True, min_size=1, max_size=4))
            series = {value: data.draw(st.integers(-9, 9)) for value in values}
            narrow.append(number, Definition("v", "sum", labels), series)
            padded = {tuple(dict(zip(labels, it, strict=True)).get(name, "") for name in names): series[it] for it in series}
            wide.append(number, Definition("v", "sum", names), padded)
    for world in (narrow, wide):
        world.append(0, Definition("v", "sum", names), {("a", "a", "a"): 0})
        world.fold()
    wanted = [f"{label}{op}{data.draw(small)}" for label, op in data.draw(st.lists(operators, max_size=3))]
    pins = [f"{name}={data.draw(small)}" for name in names] if data.draw(st.booleans()) else []
    by = data.draw(st.sampled_from([None, (), ("z",), ("y", "x")]))
    it = query("v", *pins, *wanted, by=by)
    assert rows(read(narrow, it)) == rows(read(wide, it))


def test_the_kind_that_was_first_answers() -> None:
    """A later definition of another kind changes no answer: the answer names it, and `kind` chooses it."""
    world = World(partition_count=2)
    world.append(0, Definition("revenue", "sum", ("region",)), {("eu",): 1})
    first_ms = world.clock.now_ms()
    world.fold()
    wait_until(lambda: world.clock.now_ms() > first_ms)
    world.append(1, Definition("revenue", "max", ("region",)), {("eu",): 7})
    world.append(0, Definition("revenue", "last"), {(): (1, 0, "text")})
    world.fold()
    answer = read(world, query("revenue"))
    assert (answer.kind, rows(answer)) == ("sum", [(("eu",), 1)])
    assert [(it.kind, it.window_s) for it in answer.also] == [("last", 0), ("max", 0)]
    chosen = read(world, msgspec.structs.replace(query("revenue", "region=eu"), kind="max"))
    assert (chosen.kind, rows(chosen)) == ("max", [(("eu",), 7)])
    assert [(it.kind, it.window_s) for it in chosen.also] == [("last", 0), ("sum", 0)]
    assert rows(read(world, msgspec.structs.replace(query("revenue"), window_s=0))) == [(("eu",), 1)]
    with pytest.raises(NotFound, match="it is last, max, sum"):
        read(world, msgspec.structs.replace(query("revenue"), kind="mean"))
    with pytest.raises(NotFound):
        read(world, msgspec.structs.replace(query("revenue"), window_s=60))
    assert [(view.name, view.kind) for view in world.reader.views().views] == [
        ("revenue", "sum"),
        ("revenue", "last"),
        ("revenue", "max"),
    ], "the one that answers is the first"


def test_a_point_read_sees_a_definition_that_came_later() -> None:
    """The remembered definitions of a view are compared with those of each partition at every read."""
    world = World(partition_count=2)
    world.append(0, Definition("v", "sum", ("a",)), {("x",): 1})
    world.fold()
    pinned = query("v", "a=x")
    assert rows(read(world, pinned)) == [(("x",), 1)]
    world.append(1, Definition("v", "sum", ("a", "b")), {("x", ""): 10, ("x", "y"): 100})
    world.fold()
    assert rows(read(world, query("v", "a=x", by=()))) == [((), 111)]
    assert rows(read(world, query("v", "a=x", "b="))) == [(("x", ""), 11)]


class ChangingStore:
    """A store that changes once, after the first access to it."""

    def __init__(self, store: Store, change: Callable[[], None]) -> None:
        self._store = store
        self._changes = [change]

    def _accessed(self) -> None:
        if self._changes:
            self._changes.pop()()

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        found = self._store.get(keys)
        self._accessed()
        return found

    def scan(self, start: bytes, end: bytes) -> Iterator[tuple[bytes, bytes]]:
        found = [*self._store.scan(start, end)]
        self._accessed()
        return iter(found)

    def snapshot(self) -> StoreView:
        return self._store.snapshot()


def test_a_definition_that_comes_while_others_are_read_is_not_missed() -> None:
    """The position is read before the definitions, so no remembered plan lacks a definition of its version."""
    world = World(partition_count=1)
    world.append(0, Definition("v", "sum", ("a",)), {("x",): 1})
    world.fold()
    world.append(0, Definition("v", "sum", ("a", "b")), {("x", ""): 10})
    store: Any = ChangingStore(world.partitions[0].store, world.fold)
    world.stores = lambda: {0: store}  # type: ignore[method-assign]
    reader = world.new_reader()
    pinned = query("v", "a=x", by=("a",))
    reader.definition("v")
    for _ in range(2):
        assert rows(reader.read(query("v", "a=x", "b="), deadline_s=FAR_S)) == [(("x", ""), 11)]
        assert rows(reader.read(pinned, deadline_s=FAR_S)) == [(("x",), 11)]


def test_a_definition_is_read_again_when_stores_are_made_anew() -> None:
    """Remembered definitions of a view are dropped when its stores are made anew."""
    world = World(partition_count=1)
    world.publish(REVENUE, {("eu", "tea"): 1})
    assert world.reader.definition("revenue") == canonical(REVENUE)
    other = World(partition_count=1)
    other.publish(Definition("revenue", "max", ("region",)), {("eu",): 7})
    world.partitions = other.partitions
    assert rows(read(world, query("revenue", "region=eu", by=()))) == [((), 7)]
    assert world.reader.point(query("revenue", "region=eu")) is not None
    world.partitions = World(partition_count=1).partitions
    with pytest.raises(NotFound):
        read(world, query())


def test_a_point_read_in_a_store_made_anew_looks_at_its_definitions() -> None:
    """A point read notices that a store was made anew, although both stores have counted as many changes of definitions."""
    world, other = World(partition_count=1), World(partition_count=1)
    world.append(0, Definition("v", "sum", ("a",)), {("x",): 1})
    other.append(0, Definition("v", "sum", ("a", "b")), {("x", "y"): 10, ("x", "z"): 100})
    world.fold()
    other.fold()
    assert rows(read(world, query("v", "a=x", by=()))) == [((), 1)]
    world.partitions = other.partitions
    assert rows(read(world, query("v", "a=x", by=()))) == [((), 110)]


def test_wrong_names_are_told() -> None:
    """An unknown view is `NotFound`, an unknown label `Invalid` in `where` and in `by`."""
    world = World()
    world.publish(REVENUE, {("eu", "tea"): 1})
    for name in ("revenu", "", "revenue\0", "é", "x" * 10_000):
        with pytest.raises(NotFound):
            read(world, query(name))
    for it in (query("revenue", "country=eu"), query(by=("country",)), query("revenue", "region=a", "product=b", "x=c")):
        with pytest.raises(Invalid, match="its labels: product, region"):
            read(world, it)


def test_views_count_series_over_partitions() -> None:
    """The list has each view with its definition and the sum of its partitions' series."""
    world = World()
    assert world.reader.views().views == []
    world.publish(REVENUE, {("eu", f"p{i}"): 1 for i in range(50)})
    (view,) = world.reader.views().views
    assert (view.name, view.kind, view.labels, view.window_s, view.series_count) == (
        "revenue",
        "sum",
        ("product", "region"),
        None,
        50,
    )


def test_restoring_is_not_ready() -> None:
    """A reader whose stores are being restored says in every call how far that is."""
    world = World()
    world.ready = False
    for call in (lambda: read(world, query()), world.reader.views, world.reader.partitions):
        with pytest.raises(NotReady, match="7 changelog records to go"):
            call()


def test_a_scan_ends_at_its_deadline() -> None:
    """A read past its deadline, or of a closed reader, is `Unavailable`; a point read takes no time."""
    world = World()
    world.publish(REVENUE, {("eu", "tea"): 1})
    with pytest.raises(Unavailable, match="timeout_ms"):
        world.reader.read(query(), deadline_s=-1)
    assert world.reader.read(query("revenue", "region=eu", "product=tea"), deadline_s=-1).series
    world.reader.close()
    with pytest.raises(Unavailable, match="stopping"):
        read(world, query())


def test_too_many_groups_are_refused() -> None:
    """Groups that have to be held until the end are bounded by `limit_max`."""
    world = World(settings=QuerySettings(limit_max=10))
    world.publish(Definition("v", "sum", ("x", "y")), {(f"x{i}", "y"): 1 for i in range(11)})
    with pytest.raises(Invalid, match="over 10 groups"):
        read(world, query("v", by=("x",), limit=1))
    assert read(world, query("v", "x!=x3", by=("x",), limit=1)).series_total == 10
    assert read(world, query("v", by=("y", "x"), limit=1)).series_total == 11


@pytest.mark.parametrize("where", [[], ["a=a"]])
@pytest.mark.parametrize("damage", ["position", "definition", "state", "kind"])
def test_a_damaged_store_is_found(damage: str, where: list[str]) -> None:
    """An entry that can't be decoded raises `StoreCorrupt`, and never makes a wrong answer."""
    world = World(partition_count=1)
    world.publish(V, {("a",): 1, ("b",): 2})
    key, value = {
        "position": (POSITION_KEY, b"\x02\x91"),
        "definition": (definition_key(V), b"\x02\xc0"),
        "state": (series_prefix(V) + series_suffix(("a",)), b"\x02\x93\xa3sum\x00"),
        "kind": (
            series_prefix(V) + series_suffix(("a",)),
            codec.encode_states(KINDS["max"], [1])[0],
        ),
    }[damage]
    world.partitions[0].store.write([key], [value])
    with pytest.raises(StoreCorrupt):
        read(world, query("v", *where))


@pytest.mark.parametrize("kind", [MemoryStores, RocksStores])
def test_an_answer_is_at_one_commit_of_each_partition(kind: type, tmp_path: Path) -> None:
    """Two series that always change together are never seen apart, nor apart from the position, while commits run."""
    stores = MemoryStores() if kind is MemoryStores else RocksStores(tmp_path, LogSettings())
    world = World(partition_count=2, stores=stores)
    definition = Definition("pairs", "sum", ("partition", "side"))

    def add() -> None:
        for number in range(2):
            world.append(number, definition, {(str(number), side): 1 for side in ("left", "right")})

    add()
    world.fold()
    commits_seen: set[tuple[str, int]] = set()
    wrong: list[Answer] = []
    stop = threading.Event()

    def reading() -> None:
        pinned = [query("pairs", f"partition={number}", "side=left") for number in "01"]
        while not stop.is_set():
            for it in (query("pairs"), *pinned):
                answer = read(world, it)
                commits_seen.update(answer.as_of.next_offsets.items())
                values = [(series.labels["partition"], series.value) for series in answer.series]
                if len(values) != (1 if it.where else 4) or not {*values} <= answer.as_of.next_offsets.items():
                    wrong.append(answer)

    threads = [threading.Thread(target=reading) for _ in range(2)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 20
    while len(commits_seen) < 60 and time.monotonic() < deadline:
        add()
        world.fold()
    stop.set()
    for thread in threads:
        thread.join()
    stores.close()
    assert not wrong
    assert len(commits_seen) >= 60


def test_what_is_committed_after_the_snapshot_is_in_no_part_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Position, definition and entries are of one moment, even if a commit comes between any two looks at the store."""
    world = World(partition_count=1)
    definition = Definition("v", "sum", ("x",))
    world.publish(definition, {("a",): 1})
    store: Any = world.partitions[0].store
    snapshot, get = store.snapshot, store.get

    def commit() -> None:
        monkeypatch.undo()
        world.append(0, definition, {("a",): 1})
        world.fold()

    def snapshot_then_commit() -> Any:
        taken = snapshot()
        commit()
        return taken

    def get_then_commit(keys: Any) -> Any:
        found = get(keys)
        commit()
        return found

    world.reader.definition("v")
    for name, wrapped, it in (
        ("snapshot", snapshot_then_commit, query("v")),
        ("get", get_then_commit, query("v", "x=a")),
        ("snapshot", snapshot_then_commit, query("v", by=())),
    ):
        before = read(world, it).series[0].value
        monkeypatch.setattr(store, name, wrapped)
        answer = read(world, it)
        assert answer.series[0].value == answer.as_of.next_offsets["0"] == before
        assert read(world, it).series[0].value == before + 1


def test_many_conditions_are_not_tested_on_the_event_loop() -> None:
    """Labels that are pinned leave few conditions to a point read: many regular expressions take long to compile."""
    world = World()
    world.publish(Definition("revenue", "sum", ("product", "region")), {("tea", "eu"): 1})
    regexes = [f"region=~eu|x{i}" for i in range(6)]
    few, many = (
        query("revenue", "region=eu", "product=tea", *regexes[:3]),
        query("revenue", "region=eu", "product=tea", *regexes),
    )
    assert world.reader.point(few) is not None
    assert world.reader.point(many) is None
    assert read(world, many).series == read(world, few).series
