"""Views as Prometheus families, written by prometheus_client's encoders.

These write every value as the float64 that Prometheus makes of it anyway: an int beyond 2**53 is rounded, as it would be
there, and one beyond all floats is infinite, where its digits would make Prometheus refuse the whole scrape.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

from prometheus_client import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from pipeline.adapters.prometheus import encoder_for
from pipeline.core.exposition import OMITTED, STALENESS, Exposed, Exposition, family_name, sample_value


class _Families(Collector):
    """The families of one scrape, made one by one as they are written."""

    def __init__(self, exposition: Exposition) -> None:
        self._exposition = exposition

    def collect(self) -> Iterator[Metric]:
        it = self._exposition
        stale = Metric(STALENESS, "Upper bound on the age of anything accepted but not in this scrape.", "gauge")
        stale.add_sample(STALENESS, {}, inf if it.staleness_ms is None else it.staleness_ms / 1000)
        yield stale
        omitted = Metric(OMITTED, "Views that are left out of this scrape, and why.", "gauge")
        for view, reason in it.omitted.items():
            omitted.add_sample(OMITTED, {"view": view, "reason": reason}, 1)
        yield omitted
        yield from map(_family, it.views)


def _family(exposed: Exposed) -> Metric:
    definition = exposed.definition
    name = family_name(definition)
    kind, sample = ("counter", f"{name}_total") if definition.monotone else ("gauge", name)
    family = Metric(name, f"View of kind {definition.kind}{', monotone' * definition.monotone}.", kind)
    for labels, answer in zip(exposed.labels, exposed.values, strict=True):
        value = sample_value(answer)
        if value is not None:
            family.samples.append(Sample(sample, dict(zip(definition.labels, labels, strict=True)), value))
    return family


def render_views(exposition: Exposition, accept: str = "") -> tuple[bytes, str]:
    """The scrape as text, and the media type of that text: what Prometheus' Accept header prefers."""
    encode, media_type = encoder_for(accept)
    return encode(_Families(exposition)), media_type
