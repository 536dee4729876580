"""Records StatsD lines as deltas of the views that `statsd_mapping` says, within limits.

A line that is wrong is counted by reason, and keeps no other line from being recorded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from math import floor
from typing import Any

import pipeline.metrics as m
from pipeline.core.kinds import add, number
from pipeline.core.record import Definition
from pipeline.core.statsd import COUNTER, GAUGE, HISTOGRAM, REASONS, SET, TIMER, Line, Malformed, joined_lines, parse_line
from pipeline.errors import BufferFull, Invalid, PipelineError, Unavailable
from pipeline.ingest.statsd_mapping import MEMBER, wanted_views
from pipeline.left_out import LeftOut
from pipeline.metrics import NO_METRICS, Metrics
from pipeline.ports import Clock
from pipeline.publisher.client import BasePublisher
from pipeline.settings import IngestSettings

PROTOCOLS = ("statsd_udp", "statsd_tcp")
_OWN_REASONS = (
    "collision", "kind", "labels", "late", "observations_max", "views_max", "series_max", "sender_share", "buffer_full",
    "refused", "packet_long", "connections_max", "idle", "cut", "http",
)  # fmt: skip
_OF_JOINED = frozenset(("type", "rate"))
"""Reasons for which a line is refused that is several in one."""
_EPSILON = 1e-9
"""The most that the float of a whole number of observations lacks."""
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
        self.kind = parts[0].view.definition.kind
        """Kind of the first of the views."""
        self.series: dict[tuple[str, ...], Any] = {}
        """By label values: of gauges a `_Gauge`; of timers and histograms the part of an observation that sample rates have
        left; of other types None.
        """


class _Gauge:
    """The newest value of a gauge."""

    __slots__ = ("at_ms", "is_timed", "value")

    def __init__(self) -> None:
        self.value: Any = 0
        """A sum, as `kinds.add` returns it: steps leave error terms."""
        self.at_ms = 0
        self.is_timed = False
        """True if the line said its time, which can be ahead of the clock here."""

    def is_newer(self, ts_ms: int | None, now_ms: int) -> bool:
        """Return whether this value is of a later time than a line that says this time, or none."""
        return self.at_ms > (now_ms if ts_ms is None else ts_ms) and (self.is_timed or ts_ms is not None)


class _Quota:
    """Counts what lines have made, in total and by sender: a limit, of which one sender gets only a share."""

    def __init__(self, most: int, share_percent: int, reason: str) -> None:
        self._most, self._each, self._reason = most, max(1, most * share_percent // 100), reason
        self._count = 0
        self._counts: Counter[str] = Counter()

    def check(self, sender: str | None, more: int = 1) -> None:
        """Raise `_Refused` if there is no room for so many more."""
        if sender is not None and self._counts[sender] + more > self._each:
            raise _Refused("sender_share")
        if self._count + more > self._most:
            raise _Refused(self._reason)

    def take(self, sender: str | None, more: int = 1) -> None:
        self._count += more
        if sender is not None:
            self._counts[sender] += more


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
        share = settings.ingest_sender_share
        self._view_quota = _Quota(settings.ingest_views_max, share, "views_max")
        self._series_quota = _Quota(settings.ingest_series_max, share, "series_max")
        self._dialect: Any = settings.ingest_dialect
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

    def take(self, lines: Sequence[bytes], protocol: str, sender: str | None = None) -> None:
        """Record lines; see `ports.LineSink`."""
        count = 0
        for line in lines:
            read = parse_line(line, self._settings.ingest_line_bytes_max, self._dialect)
            if read is None:
                continue
            if isinstance(read, Malformed) and read.reason in _OF_JOINED and self._dialect != "dogstatsd":
                parts = joined_lines(line)
                if len(parts) > 1:
                    self.take(parts, protocol, sender)
                    continue
            count += 1
            try:
                if isinstance(read, Malformed):
                    raise _Refused(read.reason)
                self._record(read, sender)
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

    def _record(self, line: Line, sender: str | None) -> None:
        slot = self._slots.get((line.type, line.name)) or self._new_slot(line, sender)
        if slot.source != line.source:
            raise _Refused("collision")
        tags = dict(line.tags)
        if line.type == SET and slot.kind == "sum":
            if MEMBER in tags:
                raise _Refused("collision")
            tags[MEMBER] = line.member
        if len(line.values) * line.weight > self._settings.ingest_observations_max:
            raise _Refused("observations_max")
        values = [part.values(tags) for part in slot.parts]
        key = values[0]
        if key not in slot.series:
            self._series_quota.check(sender)
            slot.series[key] = _Gauge() if line.type == GAUGE else 0 if line.type in (TIMER, HISTOGRAM) else None
            self._series_quota.take(sender)
        cells = [part.view.labels(*of) for part, of in zip(slot.parts, values, strict=True)]
        if line.type == GAUGE:
            self._record_gauge(line, slot, key, cells[0])
            return
        times = [line.ts_ms if part.has_windows else None for part in slot.parts]
        if line.type == COUNTER:
            for value in line.values:
                cells[0].add(value, ts_ms=times[0])
        elif line.type == SET:
            record = cells[0].add if slot.kind == "sum" else cells[0].observe
            record(1 if slot.kind == "sum" else line.member, ts_ms=times[0])
        else:
            self._record_observations(line, slot, key, cells, times)

    def _record_observations(
        self, line: Line, slot: _MetricViews, key: tuple[str, ...], cells: Sequence[Any], times: Sequence[int | None]
    ) -> None:
        """Observe each value as often as its sample rate says. What is left of an observation waits for the next one."""
        for value in line.values:
            weight = slot.series[key] + line.weight
            whole = floor(weight + _EPSILON)
            for _ in range(whole):
                cells[0].observe(value, ts_ms=times[0])
            slot.series[key] = max(weight - whole, 0)
            if len(cells) > 1:
                cells[1].observe(value, ts_ms=times[1])
                cells[2].add(line.weight, ts_ms=times[2])

    def _record_gauge(self, line: Line, slot: _MetricViews, key: tuple[str, ...], cell: Any) -> None:
        """Set a gauge. A step is relative to the newest value, so a step that is older than that is refused."""
        gauge: _Gauge = slot.series[key]
        is_late = gauge.is_newer(line.ts_ms, now_ms := self._clock.now_ms())
        if is_late and line.relative[0]:
            raise _Refused("late")
        value = gauge.value
        for step, relative in zip(line.values, line.relative, strict=True):
            try:
                value = add(value, step) if relative else step
                number(_plain(value))
            except Invalid:
                raise _Refused("value") from None
        if line.ts_ms is None:
            self._unset[slot, key] = _plain(value)
        else:
            if (slot, key) in self._unset and not is_late:
                cell.set(self._unset.pop((slot, key)), gauge.at_ms)  # else it would be recorded later, as newer
            cell.set(_plain(value), line.ts_ms)
        if not is_late:
            gauge.value, gauge.at_ms, gauge.is_timed = (
                value,
                now_ms if line.ts_ms is None else line.ts_ms,
                line.ts_ms is not None,
            )

    def _new_slot(self, line: Line, sender: str | None) -> _MetricViews:
        wanted = wanted_views(line, self._settings, self._known)
        self._view_quota.check(sender, len(wanted))
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
        self._view_quota.take(sender, len(wanted))
        slot = self._slots[line.type, line.name] = _MetricViews(line.source, parts)
        return slot

    def _definition(self, line: Line, view: str, kind: str) -> Definition:
        known = self._known.get(view)
        if known is None:
            labels = [*self._labels.get(line.name, [name for name, _ in line.tags])]
            if line.type == SET and kind == "sum":
                if MEMBER in labels:
                    raise _Refused("collision")
                labels.append(MEMBER)
            return Definition(view, kind, tuple(labels))
        if known.kind != kind or (line.type == SET and kind == "sum" and MEMBER not in known.labels):
            raise _Refused("kind")
        return known


def _plain(total: Any) -> int | float:
    """Return a gauge's value without the error term that relative steps have left."""
    value: int | float = total[0] if type(total) is tuple else total
    return value
