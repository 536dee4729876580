"""Definitions of views: which are valid, and which errors the others raise. For values, see tests/contracts."""

from __future__ import annotations

import enum
import gc
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.core.kinds import KIND_NAMES, KINDS
from pipeline.core.record import Definition, parse_suffix
from pipeline.errors import Invalid
from pipeline.ingest.gateway import Gateway
from pipeline.ports import RawDelta
from pipeline.publisher.client import publisher_settings
from pipeline.settings import PublisherSettings
from tests.publisher.modes import MODES, settings_of
from tests.publisher.support import FaultyLog, batches, fold, memory_log, publisher


class Region(enum.StrEnum):
    EU = "eu"


class OldRegion(str, enum.Enum):  # noqa: UP042  # what StrEnum replaced prints another way
    EU = "eu"


def test_a_view_is_defined_once() -> None:
    """A definition gives one view, however often it is asked for; another one is `Invalid`, and says what the view is."""
    log = memory_log()
    with publisher(log) as pub:
        view, counter = pub.sum("v", labels=("a", "b")), pub.sum("m", labels=("a",), monotone=True)
        assert pub.sum("v", labels=["a", "b"]) is view
        assert pub.view("sum", "v", labels=iter(("a", "b"))) is view  # type: ignore[arg-type]
        assert pub.view("sum", "m", labels="a", monotone=True) is counter
        assert pub.sum("v", labels=("a", "b"), window_s=None, retention_s=None) is view
        assert pub.sum("v", labels=("a", "b"), window_s=0, retention_s=0) is view
        for again in (
            lambda: pub.mean("v", labels=("a", "b")),
            lambda: pub.sum("v", labels=("b", "a")),
            lambda: pub.sum("v"),
            lambda: pub.sum("v", labels=("a", "b"), monotone=True),
            lambda: pub.sum("v", labels=("a", "b"), window_s=60),
            lambda: pub.sum("v", labels=("a", "b"), retention_s=60),
        ):
            with pytest.raises(Invalid, match=r"view v is sum\(a, b\) here"):
                again()
        with pytest.raises(Invalid, match=r"view m is monotone sum\(a\) here; not sum\(a\)"):
            pub.sum("m", labels=("a",))
        counter.add(1, a="x")
    (batch,) = batches(log)
    assert [group.definition for group in batch.groups] == [Definition("m", "sum", ("a",), monotone=True)]


@pytest.mark.parametrize(
    ("view", "more", "says"),
    [
        *((name, {}, "view name") for name in ("", "a-b", "1a", "ü", "a\n", "a" * 1000)),
        *((name, {}, "text") for name in (None, b"v")),
        *(("v", {"labels": labels}, "text") for labels in ((1,), None, 5)),
        ("v", {"labels": ("a b",)}, "label name"),
        ("v", {"labels": ("a", "a")}, "twice"),
        ("v", {"labels": tuple(f"l{i}" for i in range(40))}, "labels; at most"),
        *(("v", {"window_s": window_s}, "window_s") for window_s in (-1, 1.5, "60", True, 10**10)),
        *(("v", {"retention_s": length}, "retention_s") for length in (-1, 1.5, "60", True, 10**11)),
        *(("v", {"kind": kind}, "unknown kind") for kind in ("median", "", None, ["sum"], 1)),
        *(("v", {"monotone": monotone}, "True or False") for monotone in (1, None, "yes")),
        ("v", {"kind": "max", "monotone": True}, "a max cannot be monotone"),
    ],
)
def test_what_is_no_view_is_refused(view: Any, more: dict[str, Any], says: str) -> None:
    """An invalid view is `Invalid` where it is made."""
    with publisher(memory_log()) as pub:
        with pytest.raises(Invalid, match=says) as caught:
            pub.view(**{"kind": "sum", "view": view, **more})
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", KIND_NAMES)
def test_every_kind_has_windows_and_a_retention(kind: str) -> None:
    """Window and retention are part of each kind's definition; deltas of two windows are two series."""
    log = memory_log()
    with publisher(log) as pub:
        make: Any = getattr(pub, kind)
        view = make("v", window_s=60, retention_s=3_600)
        assert pub.view(kind, "v", window_s=60, retention_s=3_600) is view
        with pytest.raises(Invalid, match=r"v is .* in windows of 60 s, kept for 3600 s here; not .* in windows of 60 s$"):
            make("v", window_s=60)
        record = getattr(view, KINDS[kind].method)
        record(1, ts_ms=59_999)
        record(1, ts_ms=60_000)
        record(1)
    groups = [group for batch in batches(log) for group in batch.groups]
    assert {group.definition for group in groups} == {Definition("v", kind, (), 60, retention_s=3_600)}
    starts = sorted(parse_suffix(suffix)[0] for group in groups for suffix in group.suffixes)
    assert starts[:2] == [0, 60_000]
    assert len(starts) == 3
    assert starts[2] % 60_000 == 0


def test_there_are_at_most_so_many_views() -> None:
    """A publisher has as many views as a partition accepts; existing ones go on."""
    with publisher(memory_log()) as pub:
        for i in range(10_000):
            pub.sum(f"v{i}")
        with pytest.raises(Invalid, match="over 10000 views"):
            pub.sum("one_more")
        assert pub.sum("v5").definition.view == "v5"


def test_names_of_an_enum_are_plain_text() -> None:
    """A view that is named by a `StrEnum` member can be encoded, and its label values are texts."""
    log = memory_log()
    with publisher(log) as pub:
        view = pub.sum(Region.EU, labels=(OldRegion.EU,))
        view.add(1, eu=Region.EU)
        view.labels(OldRegion.EU).add(2)
        assert pub.sum("eu", labels=("eu",)) is pub.sum(Region.EU, labels=(Region.EU,))
    assert fold(log).of("eu") == {("eu",): 3}


def test_settings_are_checked() -> None:
    """A name that is no setting, or a value out of bounds, is `Invalid`."""
    assert publisher_settings({"flush_interval_ms": 7}).flush_interval_ms == 7
    for bad in (
        {"flush_intervall_ms": 7},
        {"flush_interval_ms": 0},
        {"on_full": "wait"},
        {"batch_bytes_max": "1"},
        {"buffer_bytes_max": True},
    ):
        with pytest.raises(Invalid, match=next(iter(bad))):
            publisher_settings(bad)


def test_handles_that_are_not_recorded_to_cost_nothing() -> None:
    """`labels` of thousands of different values, without a delta, keeps nothing."""
    with publisher(memory_log()) as pub:
        view = pub.sum("v", labels=("a",))
        view.labels("warm")
        gc.collect()
        tracemalloc.start()
        for i in range(20_000):
            view.labels(str(i))
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 100_000
        assert pub.stats()["buffer_bytes"] == 0


def test_publishers_and_gateway_agree_on_labels_whatever_the_order() -> None:
    """Two publishers that order a view's labels differently, and a client with neither order, meet in one series."""
    log = memory_log()
    with publisher(log) as one, publisher(log) as two:
        one.sum("revenue", labels=("region", "product")).labels("eu", "tea").add(1)
        two.sum("revenue", labels=("product", "region")).labels("tea", "eu").add(10)
        two.sum("revenue", labels=("product", "region")).add(100, region="eu", product="tea")
    gateway = Gateway(log, SystemClock(), PublisherSettings(), lambda view, bounds: None)
    gateway.deltas([RawDelta("revenue", "sum", {"region": "eu", "product": "tea"}, 1_000)])
    views = fold(log)
    assert dict(views.of("revenue")) == {("tea", "eu"): 1_111}
    assert not views.dead


@pytest.mark.parametrize("mode", MODES)
def test_a_value_that_no_batch_can_hold_is_refused_when_it_is_recorded(mode: str, tmp_path: Path) -> None:
    """Once the log has told its largest batch, a larger value is `Invalid` at the call, and everything else goes on."""
    log = FaultyLog()
    log.message_bytes_max = lambda topic: 10_000  # type: ignore[method-assign]
    with publisher(log, **settings_of(mode, tmp_path)) as pub:
        view, total = pub.last("v", labels=("a",)), pub.sum("w", labels=("a",))
        view.set("x" * 9_000, a="b")
        pub.flush()
        for refused in (
            lambda: view.set("x" * 10_000, a="b"),
            lambda: view.labels("b").set("ü" * 5_000),
            lambda: total.add(1, a="y" * 4_096 + "z" * 6_000),
            lambda: pub.record_batch(view, {"a": ["b", "c"], "value": ["x", "x" * 10_000]}),
        ):
            with pytest.raises(Invalid):
                refused()
        total.add(1, a="y" * 4_000)
    assert fold(log.log).of("v") == {("b",): "x" * 9_000}
    assert fold(log.log).of("w") == {("y" * 4_000,): 1}
