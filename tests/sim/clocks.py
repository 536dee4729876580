"""Time in the simulator: one true time that nothing under test can see, and a clock for every node, which may be wrong."""

from __future__ import annotations

from random import Random

DAY_MS = 86_400_000


class TrueTime:
    """Milliseconds that pass for everybody. Only the world moves it, and only the auditor judges by it."""

    def __init__(self) -> None:
        self.at_ms = 1_700_000_000_000
        self.id_count = 0


class NodeClock:
    """A `ports.Clock` of one node: the true time plus the error of this node's clock."""

    def __init__(self, name: str, true_time: TrueTime) -> None:
        self.name = name
        self.off_ms = 0
        self._true_time = true_time

    def now_ms(self) -> int:
        return self._true_time.at_ms + self.off_ms

    def rising_ns(self) -> int:
        return self._true_time.at_ms * 1_000_000

    def monotonic_s(self) -> float:
        return self._true_time.at_ms / 1000

    def thread_cpu_s(self) -> float:
        return 0.0

    def new_id(self) -> str:
        self._true_time.id_count += 1
        return f"id-{self._true_time.id_count}"

    def jump(self, rng: Random) -> None:
        """Be wrong by up to some days from now on, or right again."""
        if self.off_ms and rng.random() < 0.7:
            self.off_ms = 0
        else:
            self.off_ms = rng.choice((-1, 1)) * rng.choice((3_600_000, rng.randint(1, 12) * DAY_MS))
