"""The views and series of the plain table: what an app records to.

The native ones (`pipeline_native.pyi`) have the same recording methods, and `definition`, `overflow_count`, `labels`,
`add_many`, `record_columns` and `series_type`; their series have `view` and `suffix`. The rest is for the plain table only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat
from math import inf, isfinite
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.core.kinds import KINDS, State, kind_of
from pipeline.core.kinds.base import SHORT
from pipeline.core.record import Definition, canonical, check_label_values, series_prefix, series_suffix
from pipeline.errors import Invalid, PipelineError

if TYPE_CHECKING:
    from pipeline.publisher.table import Table

QUEUE_MAX = 512
"""Length of the queue at which a recording thread merges it."""
NS_PER_MS = 1_000_000


class Slot:
    """The place of a series in the table."""

    __slots__ = ("adds", "end_ns", "least", "number", "open_ns", "out", "seen", "suffix", "view")

    def __init__(self, view: BaseView, suffix: bytes, seen: int, *, open: bool = True) -> None:
        self.view = view
        self.suffix = suffix
        self.seen = seen
        """Number of the drain that last found something here, or of the last one before the series came in."""
        self.adds = view.kind == "sum"
        self.least = view.least if open and not view.window_ms else inf
        """The least number that can be recorded without a check; up to `SHORT`."""
        start_ns = int.from_bytes(suffix[:8], "big") * NS_PER_MS
        self.end_ns = start_ns + view.window_ms * NS_PER_MS if view.window_ms else inf
        """The end of the series' window; infinity: it has none."""
        self.open_ns = start_ns if open and view.window_ms else inf
        """The time from which, up to `end_ns`, numbers from the view's `least` to `SHORT` need no check; infinity: never."""
        self.number = 0
        """The number of the series in the journal; 0: it has none yet."""
        self.out = False
        """True once the series was evicted: it gets another slot when it is recorded again."""

    def shut(self) -> None:
        """Have every delta checked from now on."""
        self.least = self.open_ns = inf

    def leave(self) -> None:
        """Mark the slot as evicted."""
        self.out, self.least, self.open_ns = True, inf, inf


def check_value(kind: str, monotone: bool, value: object) -> Any:
    """Return the plain value of a delta of a kind, or raise `Invalid`. Most publishers use it as the table's `check`."""
    checked = kind_of(Definition("", kind, monotone=monotone)).check(value)
    return checked[2] if kind == "last" else checked


def label_values(definition: Definition, values: Sequence[Any], names: Mapping[str, Any]) -> tuple[str, ...]:
    """Return plain label values in the order of the definition, given by position or by name, or raise `Invalid`."""
    labels = definition.labels
    if names:
        if values:
            raise Invalid(f"view {definition.view}: label values by position or by name, not both")
        if names.keys() != set(labels):
            raise Invalid(f"view {definition.view} has labels {list(labels)}; got {list(names)}")
        values = [names[label] for label in labels]
    return check_label_values(definition, values)


class BaseView:
    """A view that this process records to. Subclasses have the recording method of their kinds; subclass those."""

    method: ClassVar[str]
    series_type: ClassVar[type[BaseSeries]]
    """Class of the handles that `labels` returns. A subclass may name a subclass of it."""

    def __init__(self, table: Table, definition: Definition, series_max: int, spread: int = 1) -> None:
        if KINDS[definition.kind].method != self.method:
            raise Invalid(f"view {definition.view}: kind {definition.kind} is not recorded by {self.method}")
        self.definition = definition
        """The definition with labels in the order in which this process names them."""
        self.spread = spread
        """Number of partitions over which each series is spread."""
        self.overflow_count = 0
        """Deltas that went to the overflow series."""
        self.table = table
        self.kind = definition.kind
        self.kind_rules = KINDS[definition.kind]
        self.merge, self.heap_bytes = self.kind_rules.merge, self.kind_rules.heap_bytes
        self.monotone = definition.monotone
        self.window_ms = definition.window_s * 1_000
        self.series_max = series_max
        self.canonical = canonical(definition)
        self.number = 0
        self.prefix = series_prefix(self.canonical)
        self.slots: dict[bytes, Slot] = {}
        """The series that are in the table, by suffix."""
        self.own_counts: dict[bytes, int] = defaultdict(int)
        """The number of series that are not overflow series, by the start of their window."""
        self.by_labels: dict[Any, Slot] = {}
        """A cache of slots by label values in the order of the definition; by the value itself if there is one label."""
        self.least = (0.0 if self.monotone else -SHORT) if KINDS[self.kind].single else inf
        """The least number that is its own delta; infinity if states are of another kind."""
        self.now_ns = table.now_ns
        self._order = [definition.labels.index(name) for name in self.canonical.labels]
        self._label_count = len(self._order)
        self._names = itemgetter(*definition.labels) if definition.labels else tuple
        self._queue = table.queue
        table.join(self)

    def leave(self) -> None:
        """Forget all series, in a forked child."""
        for slot in self.slots.values():
            slot.leave()
        self.slots, self.by_labels, self.own_counts = {}, {}, defaultdict(int)

    def labels(self, /, *values: str, **names: str) -> Any:
        """Return the series with these label values, by position or by name. It takes no memory before it is recorded."""
        return self.series_type(self, *values, **names)

    def add_many(self, labels: Sequence[str], values: Iterable[Any], ts_ms: Iterable[Any] | None = None) -> int:
        """Record values to one series, checked before the first is recorded; return how many were not dropped."""
        suffix = self.suffix(label_values(self.definition, tuple(labels), {}))
        return self._record_rows(repeat(suffix), self._rows(values, ts_ms))

    def record_columns(
        self, label_columns: Sequence[Iterable[str]], values: Iterable[Any], ts_ms: Iterable[Any] | None = None
    ) -> int:
        """Record rows, all of them checked before the first is recorded; return how many were not dropped.

        There is a column for each label, in the order of the definition.
        """
        columns = [tuple(column) for column in label_columns]
        rows = self._rows(values, ts_ms)
        if len(columns) != len(self._order) or any(len(column) != len(rows) for column in columns):
            raise Invalid(f"view {self.definition.view}: a column of {len(rows)} rows is needed for each label")
        suffixes = []
        for row, labels in enumerate(zip(*columns, strict=True) if columns else repeat((), len(rows))):
            try:
                suffixes.append(self.suffix(label_values(self.definition, labels, {})))
            except Invalid as error:
                raise self._wrong_row("", row, error) from None
        return self._record_rows(suffixes, rows)

    def _wrong_row(self, column: str, row: int, error: Invalid) -> Invalid:
        return Invalid(f"view {self.definition.view}: {column}row {row}: {error}; nothing was recorded")

    def _rows(self, values: Iterable[Any], ts_ms: Iterable[Any] | None) -> list[tuple[State, bytes]]:
        view, values = self.definition.view, tuple(values)
        times = None if ts_ms is None else tuple(ts_ms)
        if times is not None and len(times) != len(values):
            raise Invalid(f"view {view}: columns of different lengths; nothing was recorded")
        if times is not None and self.kind != "last":
            self.check_windows(0)
        rows, now = [], self.table.now_ms()
        for row, value in enumerate(values):
            column = "column ts_ms, "
            try:
                ts = now if times is None else self.table.time_of(times[row])[0]
                column = "column value, "
                rows.append((self.delta(value, ts, now), self.window(ts)))
            except Invalid as error:
                raise self._wrong_row(column, row, error) from None
        return rows

    def _record_rows(self, suffixes: Iterable[bytes], rows: list[tuple[State, bytes]]) -> int:
        record, done = self.table.record, 0
        try:
            for suffix, (delta, window) in zip(suffixes, rows, strict=False):
                done += record(self, window + suffix[8:], delta)
        except PipelineError as error:
            raise type(error)(f"{error}; {done} of the batch of {len(rows)} deltas were recorded before") from None
        return done

    def check_windows(self, ts_ms: object) -> None:
        """Raise `Invalid` if a time is given to a view that has none."""
        if ts_ms is not None and not self.window_ms:
            raise Invalid(f"view {self.definition.view}: it has no windows, so its deltas have no ts_ms")

    def suffix(self, values: tuple[str, ...]) -> bytes:
        """Return the suffix, in no window, of checked label values in the order of the definition."""
        return series_suffix([values[i] for i in self._order])

    def window(self, ts_ms: int) -> bytes:
        """Return the start of the window of a time, as a suffix begins with it."""
        return (ts_ms - ts_ms % self.window_ms if self.window_ms else 0).to_bytes(8, "big")

    def delta(self, value: Any, ts_ms: int = 0, now_ms: int = 0) -> State:
        """Return the state of one delta, or raise `Invalid`."""
        kind = type(value)
        if self.kind == "last":
            if value is not None and kind is not bool and not (kind is float and isfinite(value)):
                value = self.table.check("last", False, value)
            return ts_ms, self.table.rise(now_ms), value
        plain = self.kind_rules.takes_numbers and kind in (int, float) and -SHORT <= value <= SHORT  # false for NaN
        if not plain or (self.monotone and value < 0):
            value = self.table.check(self.kind, self.monotone, value)
        return value if self.kind_rules.single else self.kind_rules.collect([value])

    def record(self, suffix: bytes, value: Any, ts_ms: object = None) -> Slot | None:
        """Record a delta to the series with a suffix, in the window of a time; return the series' slot, if it has one."""
        if not self.window_ms and self.kind != "last":
            self.table.record(self, suffix, self.delta(value))
            return self.slots.get(suffix)
        ts, now = self.table.time_of(ts_ms)
        delta = self.delta(value, ts, now)
        if self.window_ms:
            suffix = self.window(ts) + suffix[8:]
        self.table.record(self, suffix, delta)
        return self.slots.get(suffix)

    def record_named(self, value: Any, names: dict[str, Any]) -> None:
        """Record a delta to the series with these labels; of a view with windows, `ts_ms` is the time."""
        kind = type(value)
        if (kind is float or kind is int) and len(names) == self._label_count:
            try:
                slot = self.by_labels[self._names(names)]
            except (KeyError, TypeError):
                pass
            else:
                now_ns = self.now_ns() if slot.open_ns < inf else 0  # first: a call lets other threads in
                if slot.least <= value <= SHORT or (slot.open_ns <= now_ns < slot.end_ns and self.least <= value <= SHORT):
                    self._queue.append((slot, value))
                    if len(self._queue) >= QUEUE_MAX:
                        self.table.settle()
                    return
        ts_ms = names.pop("ts_ms", None) if self.window_ms else None
        values = label_values(self.definition, (), names)
        found = self.record(self.suffix(values), value, ts_ms)
        if found is not None and ts_ms is None:
            self.by_labels[values if len(values) != 1 else values[0]] = found


class BaseSeries:
    """A series that deltas can be recorded to, from any thread: `BaseSeries(view, "eu")` is `view.labels("eu")`."""

    def __init__(self, view: BaseView, /, *values: str, **names: str) -> None:
        self.view = view
        self.suffix = view.suffix(label_values(view.definition, values, names))
        """The suffix of the series, in no window."""
        self._slot = Slot(view, self.suffix, 0, open=False)
        self._queue = view.table.queue
        self._now_ns = view.now_ns
        self._least = view.least

    def _record(self, value: Any, ts_ms: object) -> None:
        view = self.view
        view.check_windows(ts_ms)
        self._slot = view.record(self.suffix, value, ts_ms) or self._slot


class AddSeries(BaseSeries):
    """A series of a sum."""

    def add(self, value: float = 1, /, *, ts_ms: int | None = None) -> None:
        """Add `value`, of a view with windows to the window of `ts_ms` (None: now)."""
        kind, slot = type(value), self._slot
        if (kind is float or kind is int) and ts_ms is None:
            if not slot.least <= value <= SHORT:
                now_ns = self._now_ns() if slot.open_ns < inf else 0  # first: a call lets other threads in
                if not (slot.open_ns <= now_ns < slot.end_ns and self._least <= value <= SHORT):
                    self._record(value, None)
                    return
            self._queue.append((slot, value))
            if len(self._queue) >= QUEUE_MAX:
                self.view.table.settle()
        else:
            self._record(value, ts_ms)


class ObserveSeries(BaseSeries):
    """A series of a min, max or mean."""

    def observe(self, value: float, /, *, ts_ms: int | None = None) -> None:
        """Observe `value`, of a view with windows in the window of `ts_ms` (None: now)."""
        kind, slot = type(value), self._slot
        if (kind is float or kind is int) and ts_ms is None:
            if not slot.least <= value <= SHORT:
                now_ns = self._now_ns() if slot.open_ns < inf else 0  # first: a call lets other threads in
                if not (slot.open_ns <= now_ns < slot.end_ns and self._least <= value <= SHORT):
                    self._record(value, None)
                    return
            self._queue.append((slot, value))
            if len(self._queue) >= QUEUE_MAX:
                self.view.table.settle()
        else:
            self._record(value, ts_ms)


class SetSeries(BaseSeries):
    """A series of a last."""

    def set(self, value: str | float | bool | None, /, ts_ms: int | None = None) -> None:
        """Set the value, as of `ts_ms` (None: now)."""
        self.view.record(self.suffix, value, ts_ms)


class AddView(BaseView):
    """Totals, by series."""

    method = "add"
    series_type = AddSeries

    def add(self, value: float = 1, /, **labels: Any) -> None:
        """Add `value` to the series with these labels; of a view with windows, `ts_ms` is the time (absent: now)."""
        self.record_named(value, labels)


class ObserveView(BaseView):
    """Smallest, largest or mean observations, by series."""

    method = "observe"
    series_type = ObserveSeries

    def observe(self, value: float, /, **labels: Any) -> None:
        """Observe `value` in the series with these labels; of a view with windows, `ts_ms` is the time (absent: now)."""
        self.record_named(value, labels)


class SetView(BaseView):
    """The newest values, by series."""

    method = "set"
    series_type = SetSeries

    def set(self, value: str | float | bool | None, /, ts_ms: int | None = None, **labels: Any) -> None:
        """Set the series with these labels, as of `ts_ms` (None: now); a label of that name is for `labels` only."""
        self.record(self.suffix(label_values(self.definition, (), labels)), value, ts_ms)
