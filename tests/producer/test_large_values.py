"""What no batch can hold is refused when it is recorded, not when it is sent."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import Invalid
from tests.producer.support import FaultyLog, fold, publisher


@pytest.mark.parametrize("mode", [{}, {"durability": "process"}])
def test_a_value_that_no_batch_can_hold_is_refused_when_it_is_recorded(mode: dict[str, str], tmp_path: Path) -> None:
    """Once the log has said how large a batch may be: `Invalid` at the call, and everything else goes on."""
    log = FaultyLog()
    log.message_bytes_max = lambda topic: 10_000  # type: ignore[method-assign]
    with publisher(log, **mode, **({"spool_dir": str(tmp_path)} if mode else {})) as pub:
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
