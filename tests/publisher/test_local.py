"""Local snapshots: everything that this process has recorded, as of a moment that is no older than they say."""

from __future__ import annotations

from itertools import permutations

import pytest

from tests.publisher.support import fold, memory_log, publisher, stalled, wait_until


def test_after_a_flush_or_close_it_has_everything_and_never_changes() -> None:
    """A flush or a close takes a snapshot of everything recorded before, however rarely others are taken."""
    pub = publisher(memory_log(), snapshot_interval_ms=3_600_000)
    view = pub.sum("v", labels=("a",))
    seen = [view.local()]
    for label in "xxy":
        view.add(1, a=label)
        pub.flush()
        seen.append(view.local())
    view.add(5, a="y")
    pub.close()
    assert [dict(one) for one in seen] == [{}, {("x",): 1}, {("x",): 2}, {("x",): 2, ("y",): 1}]
    assert [one.taken_s for one in seen] == sorted({one.taken_s for one in seen})
    assert dict(view.local()) == {("x",): 2, ("y",): 6} == dict(pub.local()["v"])
    with pytest.raises(TypeError):
        seen[1]["x",] = 5  # type: ignore[index]
    before = view.local().age_ms
    assert 0 <= before <= view.local().age_ms  # nobody takes them any more, and it says so


def test_all_kinds_answer_as_reads_do() -> None:
    """Each value is that of a read of the view of this process alone."""
    log = memory_log()
    with publisher(log) as pub:
        pub.sum("sum").add(2**70)
        pub.sum("huge").add_many([1e308, 1e308])
        for value in (3, 1.5, 9):
            for view in (pub.min("min"), pub.max("max"), pub.mean("mean"), pub.histogram("histogram")):
                view.observe(value)
        for text, ts_ms in (("old", 5), ("new", 6), ("older", 4)):
            pub.last("last").set(text, ts_ms)
    found = {name: local[()] for name, local in pub.local().items()}
    local = {(name, ()): value for name, value in found.items()}
    assert found["histogram"]["quantiles"]["0.99"] == 9
    del found["histogram"]
    assert found == {"sum": 2**70, "huge": 2 * int(1e308), "min": 1.5, "max": 9, "mean": 4.5, "last": "new"}
    assert local == fold(log).answers


def test_labels_stand_as_declared() -> None:
    """Labels have the order in which this process declares them, to iterate over and to look up; no others are in it."""
    with publisher(memory_log()) as pub:
        orders = [*permutations(["c", "a", "d", "b"])]
        views = [pub.sum(f"v{number}", labels=order) for number, order in enumerate(orders)]
        bare = pub.sum("bare")
        bare.add(1)
        for view in views:
            view.add(7, a="1", b="2", c="3", d="4")
        pub.flush()
        for order, view in zip(orders, views, strict=True):
            labels = tuple("1234"["abcd".index(name)] for name in order)
            assert (view.local().labels, [*view.local()], view.local()[labels]) == (order, [labels], 7)
            for wrong in (
                "1234",
                (*labels, "x"),
                labels[1:],
                (1, 2, 3, 4),
                (None,) * 4,
                5,
                None,
                ("\ud800",) * 4,
                [*labels],
            ):
                assert wrong not in view.local()
                assert view.local().get(wrong) is None  # type: ignore[call-overload]
        assert () in bare.local()
        assert ("x",) not in bare.local()
        assert "1 series" in repr(bare.local())


def test_at_its_limit_it_says_that_it_is_not_complete() -> None:
    """Beyond `local_series_max`, over all views, a snapshot is incomplete and says so; sent deltas are not affected."""
    log = memory_log()
    with publisher(log, local_series_max=10) as pub:
        one, two = pub.sum("one", labels=("a",)), pub.sum("two", labels=("a",))
        pub.record_batch(one, {"a": list("abcdefg"), "value": 1})
        pub.flush()
        pub.record_batch(two, {"a": list("abcdefg"), "value": 1})
        pub.flush()
        assert (one.local().complete, two.local().complete, len(one.local()), len(two.local())) == (True, False, 7, 3)
    assert fold(log).total("two") == 7


def test_it_is_fresh_in_quiet_and_old_when_nobody_takes_it() -> None:
    """The age stays small while the flusher runs, also without new deltas, and grows when it is held up."""
    pub = publisher(memory_log(), snapshot_interval_ms=5)
    view = pub.sum("v")
    view.add(1)
    pub.flush()
    first = view.local()
    wait_until(lambda: view.local().taken_s > first.taken_s + 0.05)
    assert dict(view.local()) == {(): 1}
    with stalled(pub) as held:
        view.add(1)
        assert held.wait(10)
        stuck_s = view.local().taken_s
        wait_until(lambda: view.local().age_ms > 100)
        assert (view.local().taken_s, dict(view.local())) == (stuck_s, {(): 1})
    wait_until(lambda: dict(view.local()) == {(): 2})
    pub.close()
