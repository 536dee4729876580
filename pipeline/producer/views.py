"""The views of each kind, as an app records to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.producer.batch import record_many
from pipeline.producer.buffer import View
from pipeline.producer.cell import LastCell, ObserveCell, SumCell
from pipeline.producer.timing import ExceptionCounter, Exceptions, Timer


class SumView(View):
    """Totals, by series."""

    def labels(self, /, *values: str, **names: str) -> SumCell:
        """The series with these label values, by position or by name. Keep it: recording to it is the fast path."""
        return self._cell(values, names)  # type: ignore[no-any-return]

    def add(self, value: float = 1, /, **labels: str) -> None:
        """Add `value` to the series with these labels; not below 0 if the view is monotone.

        Raises `Invalid`, or `BufferFull` as `on_full` says.
        """
        self._cell((), labels).add(value)

    def add_many(self, values: Any, /, **labels: str) -> int:
        """As `SumCell.add_many`, to the series with these labels."""
        return record_many(self._cell((), labels), values)

    def time(self, **labels: str) -> Timer:
        """Add the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return self.labels(**labels).time()

    def count_exceptions(self, exception: Exceptions = Exception, **labels: str) -> ExceptionCounter:
        """Add 1 when `exception` leaves a `with` block or a call of a decorated function; see `ExceptionCounter`.

        A label named `exception` can only be given to `labels`.
        """
        return self.labels(**labels).count_exceptions(exception)


class ObserveView(View):
    """Smallest, largest or mean observation, by series."""

    def labels(self, /, *values: str, **names: str) -> ObserveCell:
        """The series with these label values, by position or by name. Keep it: recording to it is the fast path."""
        return self._cell(values, names)  # type: ignore[no-any-return]

    def observe(self, value: float, /, **labels: str) -> None:
        """Observe `value` in the series with these labels. Raises `Invalid`, or `BufferFull` as `on_full` says."""
        self._cell((), labels).observe(value)

    def observe_many(self, values: Any, /, **labels: str) -> int:
        """As `ObserveCell.observe_many`, in the series with these labels."""
        return record_many(self._cell((), labels), values)

    def time(self, **labels: str) -> Timer:
        """Observe the seconds that a `with` block, or each call of a decorated function, takes; see `Timer`."""
        return self.labels(**labels).time()


class LastView(View):
    """The newest value, by series."""

    def labels(self, /, *values: str, **names: str) -> LastCell:
        """The series with these label values, by position or by name. Keep it: recording to it is the fast path."""
        return self._cell(values, names)  # type: ignore[no-any-return]

    def set(self, value: str | float | bool | None, /, ts_ms: int | None = None, **labels: str) -> None:
        """Set the series with these labels, as of `ts_ms` (None: now). Raises `Invalid` or `BufferFull`.

        A label named `ts_ms` can only be given to `labels`.
        """
        self._cell((), labels).set(value, ts_ms)


VIEW_TYPES: Mapping[str, type[View]] = {
    "sum": SumView,
    "min": ObserveView,
    "max": ObserveView,
    "mean": ObserveView,
    "last": LastView,
}
"""The view class of each kind."""
