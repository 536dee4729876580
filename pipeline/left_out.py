"""Counts what ingest leaves out, by protocol and reason, and keeps the first example of each reason.

StatsD, pushes, OTLP and bridges share it: the metric `pipeline_ingest_malformed_total`, `ingest_left_out` in
`GET /v1/status`, and one log line a minute are made here.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import pipeline.metrics as m
from pipeline.core.answer import LeftOutStatus
from pipeline.metrics import Metrics
from pipeline.ports import Clock

LINE_INTERVAL_S = 60.0
"""Least time between two log lines."""
_EXAMPLE_LENGTH_MAX = 200
_Key = tuple[str, str]


class LeftOut:
    """Counts of one process or one bridge. Safe from any thread.

    The first thing that is left out is logged at once. What follows within a minute waits for one line: somebody has to
    call `tick` from time to time, and `close` in the end.
    """

    def __init__(self, log: logging.Logger, clock: Clock, metrics: Metrics, examples_max: int = 1) -> None:
        """A log line has up to `examples_max` examples of each reason."""
        self._log = log
        self._examples_max = examples_max
        self._clock = clock
        self._metrics = metrics
        self._lock = threading.RLock()
        self._found: dict[_Key, LeftOutStatus] = {}
        self._waiting: dict[_Key, tuple[int, list[str]]] = {}
        """Counts that are not logged yet, each with its first examples."""
        self._next_line_s = clock.monotonic_s()

    def add(self, protocol: str, reason: str, example: object | Callable[[], object] = "", count: int = 1) -> None:
        """Count what is left out. `protocol` and `reason` are words out of a few; `example` may have any characters.

        An example that is a function is called only if it is shown.
        """
        if count <= 0:
            return
        self._metrics.inc(m.INGEST_MALFORMED, count, protocol, reason)
        key = protocol, reason
        with self._lock:
            found = self._found.get(key)
            waiting, examples = self._waiting.get(key, (0, []))
            wanted = found is None or len(examples) < self._examples_max
            text = _shown(example() if callable(example) else example) if wanted else ""
            if found is None:
                self._found[key] = LeftOutStatus(protocol, reason, count, text, self._clock.now_ms())
            else:
                found.count += count
            self._waiting[key] = waiting + count, [*examples, text] if wanted and text else examples
        self.tick()

    def tick(self) -> None:
        """Log what has been left out since the last line, unless that is less than a minute ago."""
        if self._waiting and self._clock.monotonic_s() >= self._next_line_s:
            self.close()

    def close(self) -> None:
        """Log what has been left out since the last line."""
        with self._lock:
            waiting, self._waiting = self._waiting, {}
            self._next_line_s = self._clock.monotonic_s() + LINE_INTERVAL_S
        if waiting:
            parts = [
                f"{protocol} {reason} {count:,}" + (f" (the first: {'; '.join(examples)})" if examples else "")
                for (protocol, reason), (count, examples) in waiting.items()
            ]
            self._log.warning("left out by ingest: %s", "; ".join(parts))

    def counts(self, *protocols: str) -> dict[str, int]:
        """Return how much was left out, by reason, of some protocols or of all."""
        found: dict[str, int] = {}
        with self._lock:
            for it in self._found.values():
                if not protocols or it.protocol in protocols:
                    found[it.reason] = found.get(it.reason, 0) + it.count
        return found

    def status(self) -> list[LeftOutStatus]:
        """Return a copy of the counts, in the order in which the reasons came up."""
        with self._lock:
            return [LeftOutStatus(it.protocol, it.reason, it.count, it.first, it.first_at_ms) for it in self._found.values()]


def _shown(example: object) -> str:
    """Return the beginning of an example as text that a terminal shows as it is."""
    if isinstance(example, bytes):
        return repr(example[:_EXAMPLE_LENGTH_MAX])[1:]
    text = str(example)
    text = text[:_EXAMPLE_LENGTH_MAX]
    return text if text.isprintable() else ascii(text)
