"""Record StatsD lines as deltas: the views that they make, and the limits.

    counter    NAME            sum
    gauge      NAME            last
    timer      NAME_ms         mean    NAME_ms_max  max    NAME_ms_count  sum
    histogram  NAME            mean    NAME_max     max    NAME_count     sum
    set        NAME{member}    sum; its series are the members, so their number is the set's size

A line that is wrong is counted by reason, and keeps no other line from being recorded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pipeline.metrics as m
from pipeline.core.kinds import add, number
from pipeline.core.record import Definition
from pipeline.core.statsd import COUNTER, GAUGE, HISTOGRAM, REASONS, SET, TIMER, Line, Malformed, parse_line
from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.left_out import LeftOut
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.publisher.client import BasePublisher
from pipeline.settings import IngestSettings

MEMBER = "member"
PROTOCOLS = ("statsd_udp", "statsd_tcp")
_OWN_REASONS = (
    "collision", "kind", "labels", "views_max", "series_max", "buffer_full", "refused",
    "packet_long", "connections_max", "cut",
)  # fmt: skip
_log = logging.getLogger(__name__)


class _Refused(Exception):
    """A line is left out, for a reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class _Part:
    """One of the views that lines of a name and type are recorded to."""

    def __init__(self, view: Any, labels: tuple[str, ...]) -> None:
        self.view = view
        self.labels = labels
        self._names = frozenset(labels)
        self.has_windows = view.definition.window_s > 0
        """True if the time of a line decides about the window; else it is of no use, but to gauges."""

    def values(self, tags: Mapping[str, str]) -> tuple[str, ...]:
        """Return the label values of a line, empty for a tag that it lacks."""
        if not tags.keys() <= self._names:
            raise _Refused("labels")
        return tuple([tags.get(label, "") for label in self.labels])


class _MetricViews:
    """The views and series of the lines of one name and type."""

    def __init__(self, source: str, parts: Sequence[_Part]) -> None:
        self.source = source
        self.parts = parts
        self.series: dict[tuple[str, ...], Any] = {}
        """Values of gauges by label values; of other types None."""


class StatsdSink:
    """A `ports.LineSink` that records to a publisher. Its owner calls `close` before the last flush.

    The labels of a view are those of `known`, by the view's name; else of `labels`, by the metric's Prometheus name; else
    the tags of the first line. A label that a line lacks is empty; a line with another label is left out.
    """

    def __init__(
        self,
        publisher: BasePublisher,
        clock: Clock,
        settings: IngestSettings,
        metrics: Metrics = NO_METRICS,
        *,
        known: Mapping[str, Definition] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self._publisher = publisher
        self._clock = clock
        self._settings = settings
        self._metrics = metrics
        self._known = known or {}
        self._labels = labels or {}
        self._slots: dict[tuple[str, str], _MetricViews] = {}
        self._owners: dict[str, tuple[str, str]] = {}
        """By view, the source and type of the lines that it belongs to."""
        self._series_count = 0
        self._unset: dict[tuple[_MetricViews, tuple[str, ...]], int | float] = {}
        """Values of gauges that are not recorded yet."""
        self._set_ms = 0
        """The time at which gauges were last recorded."""
        self.line_count = 0
        self.left_out = LeftOut(_log, clock, metrics)
        for protocol in PROTOCOLS:
            metrics.inc(m.INGEST_LINES, 0, protocol)
            for reason in (*REASONS, *_OWN_REASONS):
                metrics.inc(m.INGEST_MALFORMED, 0, protocol, reason)

    def take(self, lines: Sequence[bytes], protocol: str) -> None:
        """Record lines; see `ports.LineSink`."""
        count = 0
        for line in lines:
            read = parse_line(line, self._settings.ingest_line_bytes_max)
            if read is None:
                continue
            count += 1
            try:
                if isinstance(read, Malformed):
                    raise _Refused(read.reason)
                self._record(read)
            except _Refused as refused:
                self.refuse(refused.reason, protocol, line)
            except BufferFull:
                self.refuse("buffer_full", protocol, line)
            except PipelineError as error:
                self.refuse("refused", protocol, line, error)
        self.line_count += count
        self._metrics.inc(m.INGEST_LINES, count, protocol)
        self.tick()

    def refuse(self, reason: str, protocol: str, line: bytes = b"", error: object = "") -> None:
        """Count what is left out; see `LeftOut`."""
        self.left_out.add(protocol, reason, f"{repr(line[:150])[1:]} {error}".strip() if line else "")

    @property
    def refused(self) -> Counter[str]:
        """Number of lines that were left out, by reason."""
        return Counter(self.left_out.counts())

    def tick(self) -> None:
        """Record gauges that have changed, at most once a millisecond, so that a storm of lines costs little."""
        self.left_out.tick()
        if self._unset and self._clock.now_ms() != self._set_ms:
            self._set_gauges()

    def close(self) -> bool:
        """Record the remaining gauges; return False if the publisher has no room: flush, and call this again."""
        self.left_out.close()
        if self._unset:
            self._set_gauges()
        return not self._unset

    def _set_gauges(self) -> None:
        self._set_ms = self._clock.now_ms()
        for (slot, values), value in [*self._unset.items()]:
            try:
                slot.parts[0].view.labels(*values).set(value)
            except (BufferFull, Unavailable):  # the newest value stays, and is tried again
                return
            del self._unset[slot, values]

    def _record(self, line: Line) -> None:
        slot = self._slots.get((line.type, line.name)) or self._new_slot(line)
        if slot.source != line.source:
            raise _Refused("collision")
        tags = dict(line.tags)
        if line.type == SET:
            if MEMBER in tags:
                raise _Refused("collision")
            tags[MEMBER] = line.member
        values = [part.values(tags) for part in slot.parts]
        key = values[0]
        if key not in slot.series:
            if self._series_count >= self._settings.ingest_series_max:
                raise _Refused("series_max")
            slot.series[key] = 0 if line.type == GAUGE else None
            self._series_count += 1
        cells = [part.view.labels(*of) for part, of in zip(slot.parts, values, strict=True)]
        if line.type == GAUGE:
            self._record_gauge(line, slot, key, cells[0])
            return
        times = [line.ts_ms if part.has_windows else None for part in slot.parts]
        if line.type == SET:
            cells[0].add(1, ts_ms=times[0])
        elif line.type == COUNTER:
            for value in line.values:
                cells[0].add(value, ts_ms=times[0])
        else:
            mean, largest, count = cells
            for value in line.values:
                mean.observe(value, ts_ms=times[0])
                largest.observe(value, ts_ms=times[1])
                count.add(line.weight, ts_ms=times[2])

    def _record_gauge(self, line: Line, slot: _MetricViews, key: tuple[str, ...], cell: Any) -> None:
        value = slot.series[key]
        for step, relative in zip(line.values, line.relative, strict=True):
            try:
                value = add(value, step) if relative else step
                number(_plain(value))
            except Invalid:
                raise _Refused("value") from None
        if line.ts_ms is not None:
            cell.set(_plain(value), line.ts_ms)
        else:
            self._unset[slot, key] = _plain(value)
        slot.series[key] = value

    def _new_slot(self, line: Line) -> _MetricViews:
        wanted = _wanted(line)
        if len(self._owners) + len(wanted) > self._settings.ingest_views_max:
            raise _Refused("views_max")
        definitions = []
        for view, kind in wanted:
            owner = self._owners.get(view)
            if owner is not None:
                raise _Refused("kind" if owner[0] == line.source else "collision")
            definition = self._definition(line, view, kind)
            if not {name for name, _ in line.tags} <= {*definition.labels}:
                raise _Refused("labels")
            definitions.append(definition)
        parts = [_Part(self._publisher.define(it), it.labels) for it in definitions]
        for view, _ in wanted:
            self._owners[view] = line.source, line.type
        slot = self._slots[line.type, line.name] = _MetricViews(line.source, parts)
        return slot

    def _definition(self, line: Line, view: str, kind: str) -> Definition:
        known = self._known.get(view)
        if known is None:
            labels = [*self._labels.get(line.name, [name for name, _ in line.tags])]
            if line.type == SET:
                if MEMBER in labels:
                    raise _Refused("collision")
                labels.append(MEMBER)
            return Definition(view, kind, tuple(labels))
        if known.kind != kind or (line.type == SET and MEMBER not in known.labels):
            raise _Refused("kind")
        return known


def _plain(total: Any) -> int | float:
    """Return a gauge's value without the error term that relative steps have left."""
    value: int | float = total[0] if type(total) is tuple else total
    return value


def _wanted(line: Line) -> list[tuple[str, str]]:
    """Return the views that a line is recorded to, with their kinds."""
    name = line.name
    if line.type in (COUNTER, SET):
        return [(name, "sum")]
    if line.type == GAUGE:
        return [(name, "last")]
    if line.type == TIMER and not name.endswith("_ms"):
        name = f"{name}_ms"
    assert line.type in (TIMER, HISTOGRAM)
    return [(name, "mean"), (f"{name}_max", "max"), (f"{name}_count", "sum")]
