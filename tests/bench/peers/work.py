"""The deltas of a benchmark: equal for every tool, from a fixed seed, with totals that are counted apart."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

VIEW = "totals"


class Work(NamedTuple):
    """Deltas on series chosen at random; with `once`, one on each series, in random order."""

    series_count: int
    delta_count: int
    once: bool = False

    @property
    def name(self) -> str:
        """Heading of this work in a table."""
        return f"{self.series_count:,} series, each once" if self.once else f"{self.series_count:,} series"

    def chosen(self) -> list[int]:
        """Return the series of each delta, in order."""
        rng = random.Random(1)
        if self.once:
            order = [*range(self.series_count)]
            rng.shuffle(order)
            return order
        return rng.choices(range(self.series_count), k=self.delta_count)

    def warm_up(self) -> Work:
        """Return a tenth of this work, for the time before the measurement; its series are others."""
        count = max(1, self.delta_count // 10)
        return Work(min(self.series_count, count), count, self.once)


def labels(i: int, *, warm: bool = False) -> tuple[str, str]:
    """Return region and product of a series."""
    return f"{'warm' if warm else 'region'}-{i % 16}", f"product-{i:07d}"


def value(i: int) -> int:
    """Return what each delta adds to a series: whole numbers, so that every tool's total must be exactly equal."""
    return i % 1000 + 1


def key(pair: tuple[str, str]) -> str:
    """Return a series' labels as one text, the key of a message for tools that know no labels."""
    return "|".join(pair)


def expected(work: Work) -> dict[str, int]:
    """Return the total of every series after the warm-up and the work, counted without any tool."""
    totals = {}
    for part, warm in ((work.warm_up(), True), (work, False)):
        for i, count in Counter(part.chosen()).items():
            totals[key(labels(i, warm=warm))] = count * value(i)
    return totals
