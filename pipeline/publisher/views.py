"""The views and series that an app records to, on top of those of the table in use, native or plain.

The publisher gives a view what the table does not know: a clock, and a way to read the last snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from pipeline import native
from pipeline.core.kinds import KINDS
from pipeline.core.query import describe
from pipeline.core.record import Definition, canonical, parse_suffix
from pipeline.errors import Invalid
from pipeline.publisher.columns import (
    Column,
    Scalar,
    Vector,
    has_times,
    read_table,
    read_times,
    read_value,
    rows_in,
    rows_of,
)
from pipeline.publisher.local import LocalView
from pipeline.publisher.timing import ExceptionCounter, Exceptions, Timer

__all__ = ["BaseView", "Table"]
SeriesT = TypeVar("SeriesT")
_extension = native.extension()
if TYPE_CHECKING or _extension is None:
    from pipeline.publisher.table import Table
    from pipeline.publisher.view import AddSeries, AddView, BaseView, ObserveSeries, ObserveView, SetSeries, SetView
else:
    Table, BaseView = _extension.Table, _extension.View
    AddSeries, AddView = _extension.AddSeries, _extension.AddView
    ObserveSeries, ObserveView = _extension.ObserveSeries, _extension.ObserveView
    SetSeries, SetView = _extension.SetSeries, _extension.SetView


class _PublisherView(Generic[SeriesT]):
    """The methods of views of all kinds beyond recording."""

    definition: Definition
    read_local: Callable[[Any], LocalView]
    """Reads the last snapshot of a view. The publisher sets it, and `monotonic_s`."""
    monotonic_s: Callable[[], float]

    if TYPE_CHECKING:

        def labels(self, /, *values: str, **names: str) -> SeriesT:
            """Return the series with these label values, by position or by name: recording to it is the fast path."""

    def local(self) -> LocalView:
        """Return what this process alone has recorded since it started, as of the last snapshot. Takes no lock."""
        return self.read_local(self)

    def __repr__(self) -> str:
        return f"<view {self.definition.view}: {describe(self.definition)}>"


def _clock_of(series: Any) -> Callable[[], float]:
    clock: Callable[[], float] = series.view.monotonic_s
    return clock


class SumSeries(AddSeries):
    """A series of a sum view. Get it from `labels(...)`, keep it, share it between threads."""

    __slots__ = ()

    def add_many(self, values: Any, /, *, ts_ms: Any = None) -> int:
        """Add each of `values`: a sequence, or a NumPy or Arrow array. Return how many were recorded.

        `ts_ms` are as many times, in a view with windows (None: now). Raises `Invalid`, which names the row, before anything
        is recorded; `BufferFull` as `on_full` says.
        """
        return record_many(self, values, ts_ms)

    def time(self) -> Timer:
        """Add the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return Timer(self.add, _clock_of(self))

    def count_exceptions(self, exception: Exceptions = Exception) -> ExceptionCounter:
        """Add 1 when `exception` leaves a `with` block or a call of a decorated function; see `ExceptionCounter`."""
        return ExceptionCounter(self.add, exception)


class ObservedSeries(ObserveSeries):
    """A series of a min, max, mean or histogram view."""

    __slots__ = ()

    def observe_many(self, values: Any, /, *, ts_ms: Any = None) -> int:
        """Observe each of `values`; see `SumSeries.add_many`."""
        return record_many(self, values, ts_ms)

    def time(self) -> Timer:
        """Observe the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return Timer(self.observe, _clock_of(self))


class LastSeries(SetSeries):
    """A series of a last view."""

    __slots__ = ()


class SumView(_PublisherView[SumSeries], AddView):
    """Totals, by series."""

    series_type = SumSeries

    def add_many(self, values: Any, /, **labels: str) -> int:  # type: ignore[override]  # the table's takes label values
        """Add each of `values` to the series with these labels; see `SumSeries.add_many`."""
        return record_many(self.labels(**labels), values)

    def time(self, **labels: str) -> Timer:
        """Add the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return self.labels(**labels).time()

    def count_exceptions(self, exception: Exceptions = Exception, **labels: str) -> ExceptionCounter:
        """Add 1 when `exception` leaves a `with` block or a call of a decorated function; see `ExceptionCounter`.

        A label named `exception` can only be given to `labels`.
        """
        return self.labels(**labels).count_exceptions(exception)


class ObservedView(_PublisherView[ObservedSeries], ObserveView):
    """Smallest, largest or mean observation, by series."""

    series_type = ObservedSeries

    def observe_many(self, values: Any, /, **labels: str) -> int:
        """Observe each of `values` in the series with these labels; see `SumSeries.add_many`."""
        return record_many(self.labels(**labels), values)

    def time(self, **labels: str) -> Timer:
        """Observe the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return self.labels(**labels).time()


class HistogramView(ObservedView):
    """Distribution of observations, by series."""


class LastView(_PublisherView[LastSeries], SetView):
    """The newest value, by series."""

    series_type = LastSeries


VIEW_TYPES: Mapping[str, type[BaseView]] = {
    "sum": SumView,
    "min": ObservedView,
    "max": ObservedView,
    "mean": ObservedView,
    "last": LastView,
    "histogram": HistogramView,
}
"""The view class of each kind."""
assert VIEW_TYPES.keys() == KINDS.keys()


def record_many(series: Any, values: Any, ts_ms: Any = None) -> int:
    """Record values to one series; see `SumSeries.add_many`."""
    view = series.view
    column = read_value("value", values)
    if isinstance(column, Scalar):
        raise Invalid(f"view {view.definition.view}: a sequence of numbers is needed, got {type(values).__name__}")
    by_name = dict(zip(canonical(view.definition).labels, parse_suffix(series.suffix)[1], strict=True))
    labels = [by_name[name] for name in view.definition.labels]
    times = None if ts_ms is None else rows_of(read_times("ts_ms", ts_ms), len(column))
    recorded: int = BaseView.add_many(view, labels, numbers_of(column, len(column)), times)
    return recorded


def record_table(view: Any, table: Any, ignore: Iterable[str] = ()) -> int:
    """Record the rows of a table; see `BasePublisher.record_batch`."""
    definition = view.definition
    columns = read_table(definition, table, ignore)
    row_count = rows_in(definition, columns)
    labels = [rows_of(columns[name], row_count) for name in definition.labels]
    times = rows_of(columns["ts_ms"], row_count) if has_times(definition) and "ts_ms" in columns else None
    recorded: int = view.record_columns(labels, numbers_of(columns["value"], row_count), times)
    return recorded


def numbers_of(column: Column, row_count: int) -> Any:
    """Return a column of values for the table: an array of 64-bit numbers as it is, everything else as a list."""
    if isinstance(column, Vector) and column.array.dtype.str in ("<f8", "<i8"):
        return column.array
    return rows_of(column, row_count)
