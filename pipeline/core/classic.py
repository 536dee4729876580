"""Classic histograms in a scrape: the views NAME_bucket, NAME_count and NAME_sum, shown as one family again.

A bridge, pushed text and OTLP record a histogram as monotone sums under the names of its samples, so a scrape has to show
it under these names, and not as three counters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from pipeline.core.exposition import OF_PROMETHEUS, Exposed, Exposition, family_names, sample_value
from pipeline.core.kinds import KINDS
from pipeline.core.query import Labels

_LE = "le"
_BUCKET, _COUNT, _SUM = "_bucket", "_count", "_sum"
Number = int | float


class ClassicSeries(msgspec.Struct, frozen=True):
    """One histogram of a family."""

    labels: Labels
    buckets: Sequence[tuple[str, float, Number]]
    """Bounds, as `le` has them and as numbers, in order, each with the count up to it; the last one is infinite."""
    sum: Number | None


class ClassicHistogram(msgspec.Struct, frozen=True):
    """A family of histograms."""

    name: str
    labels: Labels
    series: Sequence[ClassicSeries]

    @property
    def about(self) -> str:
        """Help text."""
        return f"Views {self.name}{_BUCKET}, {self.name}{_COUNT} and {self.name}{_SUM}, monotone sums."


def joined(exposition: Exposition, own: Collection[str]) -> list[Exposed | ClassicHistogram]:
    """Return what a scrape shows, in the order of names: views, and histograms in place of the views that they are of.

    A histogram whose name another view has, or Prometheus, or one of the program's metrics `own`, stays three counters.
    """
    views = {it.definition.view: it for it in exposition.views if it.definition.monotone}
    found: dict[str, ClassicHistogram] = {}
    for view, buckets in views.items():
        name = view.removesuffix(_BUCKET)
        count, total = views.get(name + _COUNT), views.get(name + _SUM)
        if name != view and count is not None and _LE in buckets.definition.labels and _is_free(name, exposition, own):
            histogram = _histogram(name, buckets, count, total)
            if histogram is not None:
                found[name] = histogram
    parts = {name + suffix for name in found for suffix in (_BUCKET, _COUNT, _SUM)}
    shown: dict[str, Exposed | ClassicHistogram] = {**found}
    shown |= {it.definition.view: it for it in exposition.views if it.definition.view not in parts}
    return [shown[name] for name in sorted(shown)]


def _is_free(name: str, exposition: Exposition, own: Collection[str]) -> bool:
    """Return whether nothing else has the names of a family that are not those of its views."""
    mine = {name, f"{name}_created"}
    if mine & {*exposition.omitted} or mine & OF_PROMETHEUS or not mine.isdisjoint(own):
        return False
    parts = {name + suffix for suffix in (_BUCKET, _COUNT, _SUM)}
    return not any(mine & family_names(it.definition) for it in exposition.views if it.definition.view not in parts)


def _histogram(name: str, buckets: Exposed, count: Exposed, total: Exposed | None) -> ClassicHistogram | None:
    """Return the family; None if its views do not fit together."""
    labels = count.definition.labels
    le = buckets.definition.labels.index(_LE)
    others = [it for it in buckets.definition.labels if it != _LE]
    if others != [*labels] or (total is not None and total.definition.labels != labels):
        return None
    rows: dict[Labels, dict[float, tuple[str, Number]]] = {of: {} for of in count.labels}
    for of, value in zip(buckets.labels, _numbers(buckets), strict=True):
        row = rows.get((*of[:le], *of[le + 1 :]))
        try:
            bound = float(of[le])
        except ValueError:
            return None
        if row is None or bound in row or value is None:
            return None
        row[bound] = of[le], value
    sums: Mapping[Labels, Number | None] = {} if total is None else dict(zip(total.labels, _numbers(total), strict=True))
    if not all(row and max(row) == float("inf") for row in rows.values()):
        return None
    series = [
        ClassicSeries(of, [(row[bound][0], bound, row[bound][1]) for bound in sorted(row)], sums.get(of))
        for of, row in rows.items()
    ]
    return ClassicHistogram(name, labels, series)


def _numbers(exposed: Exposed) -> list[Number | None]:
    number = KINDS[exposed.definition.kind].number
    return [sample_value(number(answer)) for answer in exposed.values]
