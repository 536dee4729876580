"""Labels are known by name: in which order a process names them is its own affair."""

from __future__ import annotations

from pipeline.adapters.clock import SystemClock
from pipeline.ingest.gateway import Gateway
from pipeline.ports import RawDelta
from pipeline.settings import PublisherSettings
from tests.producer.support import fold, memory_log, publisher


def test_publishers_and_gateway_agree_whatever_the_order() -> None:
    """Two publishers that name a view's labels differently, and a client that has none of both, meet in one series."""
    log = memory_log()
    with publisher(log) as one, publisher(log) as two:
        one.sum("revenue", labels=("region", "product")).labels("eu", "tea").add(1)
        two.sum("revenue", labels=("product", "region")).labels("tea", "eu").add(10)
        two.sum("revenue", labels=("product", "region")).add(100, region="eu", product="tea")
    gateway = Gateway(log, SystemClock(), PublisherSettings(), lambda _: None)
    gateway.deltas([RawDelta("revenue", "sum", {"region": "eu", "product": "tea"}, 1_000)])
    views = fold(log)
    assert dict(views.of("revenue")) == {("tea", "eu"): 1_111}
    assert not views.dead
