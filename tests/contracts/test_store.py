"""The contract of every store: the laws of a dict, whole writes, and views that do not change."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from pipeline.ports import Store, StoreView
from tests.contracts.support import StoreLab, threads

# Few keys, close together, of the bytes that order and range bounds could get wrong.
keys = st.lists(st.sampled_from([b"\x00", b"\x01", b"a", b"\xff"]), max_size=3).map(b"".join)
some_keys = st.lists(keys, max_size=6)
writes = st.lists(st.tuples(keys, st.none() | st.binary(max_size=20)), max_size=12)

START, END = b"", b"\xff" * 5
"""A range with every key in it."""


class StoreMachine(RuleBasedStateMachine):
    """A store beside the dict that it must be like."""

    lab: StoreLab

    @initialize()
    def begin(self) -> None:
        self.lab.stores.destroy(0)
        self.store = self.lab.stores.open(0)
        self.model: dict[bytes, bytes] = {}
        self.views: list[tuple[StoreView, dict[bytes, bytes]]] = []
        self.opened = 0

    def check(self, view: StoreView, model: dict[bytes, bytes], start: bytes, end: bytes, some: list[bytes]) -> None:
        assert list(view.scan(start, end)) == sorted(item for item in model.items() if start <= item[0] < end)
        assert list(view.scan(START, END)) == sorted(model.items())
        assert view.get(some) == [model.get(key) for key in some]

    @rule(entries=writes)
    def write(self, entries: list[tuple[bytes, bytes | None]]) -> None:
        self.store.write([key for key, _ in entries], [value for _, value in entries])
        for key, value in entries:
            if value is None:
                self.model.pop(key, None)
            else:
                self.model[key] = value

    @rule(start=keys, end=keys, some=some_keys)
    def read(self, start: bytes, end: bytes, some: list[bytes]) -> None:
        self.check(self.store, self.model, start, end, some)

    @precondition(lambda self: len(self.views) < 3)
    @rule()
    def snapshot(self) -> None:
        self.views.append((self.store.snapshot(), dict(self.model)))

    @precondition(lambda self: self.views)
    @rule(index=st.integers(0, 2), start=keys, end=keys, some=some_keys)
    def read_snapshot(self, index: int, start: bytes, end: bytes, some: list[bytes]) -> None:
        self.check(*self.views[index % len(self.views)], start, end, some)

    @precondition(lambda self: self.opened < 3)  # the one thing that takes its time
    @rule(how=st.sampled_from(["closed", "process ended", "destroyed"]))
    def open_again(self, how: str) -> None:
        self.opened += 1
        self.views.clear()  # an open view holds the files
        if how == "process ended":
            self.lab.reopen()
        else:
            self.store.close()
            self.store.close()
        if how == "destroyed":
            self.lab.stores.destroy(0)
            self.model = {}
        self.store = self.lab.stores.open(0)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.check(self.store, self.model, START, END, [])
            self.views.clear()
            self.store.close()


def test_a_store_is_a_dict(store_lab: StoreLab) -> None:
    """A store answers as a dict, and a view as an earlier one, through writes, deletions, closes, opens and destructions."""

    class Machine(StoreMachine):
        lab = store_lab

    run_state_machine_as_test(Machine, settings=settings(max_examples=15, stateful_step_count=30, deadline=None))  # type: ignore[no-untyped-call]


@pytest.fixture
def store(store_lab: StoreLab) -> Store:
    return store_lab.stores.open(3)


def test_a_new_store_is_empty(store: Store) -> None:
    """A new store is empty, and asking for no key gives no value."""
    assert store.get([]) == []
    assert store.get([b"a", b""]) == [None, None]
    assert list(store.scan(START, END)) == []
    assert list(store.snapshot().scan(START, END)) == []
    store.write([], [])
    store.write([b"never there"], [None])
    assert list(store.scan(START, END)) == []


def test_get_answers_in_the_order_it_was_asked(store: Store) -> None:
    """`get` returns one value for each key, in the order of the keys, twice for a key asked twice."""
    store.write([b"a", b"b", b"c"], [b"1", b"2", b"3"])
    assert store.get([b"c", b"x", b"a", b"c"]) == [b"3", None, b"1", b"3"]


def test_the_last_of_several_writes_to_a_key_counts(store: Store) -> None:
    """The last value of a key counts, even within one write."""
    store.write([b"a", b"b", b"a", b"b"], [b"1", b"2", None, b"3"])
    assert list(store.scan(START, END)) == [(b"b", b"3")]


def test_large_and_odd_entries(store_lab: StoreLab) -> None:
    """Keys and values are any bytes: empty, 8 KB of 0xff, 8 MB of random ones."""
    store = store_lab.stores.open(0)
    large = random.Random(1).randbytes(8 * 2**20)
    entries = {b"": b"", b"\x00": b"\x00", b"k" * 8192: b"v", b"\xfe" * 8192: large, b"large": large[::-1]}
    store.write([*entries], [*entries.values()])
    for _ in range(2):
        assert dict(store.scan(START, END)) == entries
        assert store.get([*entries]) == [*entries.values()]
        store.close()
        store = store_lab.stores.open(0)


def test_stores_are_apart(store_lab: StoreLab) -> None:
    """Nothing that is done to one partition's store affects another's."""
    one, other = store_lab.stores.open(0), store_lab.stores.open(1)
    one.write([b"k"], [b"one"])
    other.write([b"k"], [b"other"])
    one.close()
    store_lab.stores.destroy(0)
    store_lab.stores.destroy(7)  # never there
    assert other.get([b"k"]) == [b"other"]
    assert store_lab.stores.open(0).get([b"k"]) == [None]
    store_lab.reopen()
    assert store_lab.stores.open(1).get([b"k"]) == [b"other"]


def test_a_store_that_is_set_aside(store_lab: StoreLab) -> None:
    """The store is kept under a returned, unique name; the next one is empty, and other partitions stay."""
    other = store_lab.stores.open(1)
    other.write([b"k"], [b"other"])
    names = []
    for value in (b"first", b"second"):
        store = store_lab.stores.open(0)
        assert store.get([b"k"]) == [None]
        store.write([b"k"], [value])
        store.close()
        names.append(store_lab.stores.set_aside(0, "it is ahead of its changelog"))
    assert len(set(names)) == 2
    assert other.get([b"k"]) == [b"other"]
    assert [store_lab.aside(name).get([b"k"]) for name in names] == [[b"first"], [b"second"]]
    assert store_lab.stores.open(0).get([b"k"]) == [None]


def test_a_snapshot_stays_as_it_was(store: Store) -> None:
    """A view, and a scan that has begun, show no later write, though many writes make RocksDB move everything about."""
    some = [b"%05d" % number for number in range(2_000)]
    store.write(some, [b"old"] * 2_000)
    view = store.snapshot()
    half = view.scan(START, END)
    begun = [next(half) for _ in range(1_000)]
    store.write(some[::2], [None] * 1_000)
    for _ in range(30):
        store.write(some[1::2], [b"new" * 100] * 1_000)
    expected = [(key, b"old") for key in some]
    assert begun + list(half) == expected
    assert list(view.scan(START, END)) == expected
    assert list(view.scan(some[500], some[700])) == expected[500:700]
    assert view.get([some[0], some[1], b"none"]) == [b"old", b"old", None]
    assert len(list(store.scan(START, END))) == 1_000


def test_a_scan_can_be_left(store: Store) -> None:
    """A scan that is not read to its end does not keep the store from being closed and opened."""
    store.write([b"a", b"b"], [b"1", b"2"])
    assert next(store.scan(START, END)) == (b"a", b"1")
    assert next(store.snapshot().scan(b"b", END)) == (b"b", b"2")
    store.close()


CONCURRENT_KEYS = [b"%03d" % number for number in range(300)]


@pytest.mark.parametrize(
    "look",
    [
        lambda store: store.get([CONCURRENT_KEYS[0], CONCURRENT_KEYS[-1]]),
        lambda store: store.get(CONCURRENT_KEYS),
        lambda store: [value for _, value in store.scan(START, END)],
        lambda store: [value for _, value in store.snapshot().scan(START, END)],
        lambda store: store.snapshot().get(CONCURRENT_KEYS),
    ],
    ids=["get two", "get all", "scan", "snapshot scan", "snapshot get"],
)
def test_a_write_is_seen_whole(store: Store, look: Callable[[Store], list[bytes | None]]) -> None:
    """Readers in other threads see the store between two writes, and never an older one after a newer one."""
    stop = threading.Event()
    written = [0]

    def writer() -> None:
        while not stop.is_set():
            written[0] += 1
            store.write(CONCURRENT_KEYS, [b"%09d" % written[0]] * len(CONCURRENT_KEYS))

    def reader() -> None:
        seen = []
        try:
            give_up_s = time.monotonic() + 10
            while (len(seen) < 200 or len(set(seen)) < 20) and time.monotonic() < give_up_s:
                values = set(look(store))
                assert len(values) == 1, f"parts of writes: {values}"
                seen += values
        finally:
            stop.set()
        assert all((earlier or b"") <= (later or b"") for earlier, later in pairwise(seen))
        assert len(set(seen)) >= 10, "the writer did not get on"

    store.write(CONCURRENT_KEYS, [b"0"] * len(CONCURRENT_KEYS))
    with threads(writer, reader):
        pass
