"""How long to wait between flushes: long enough to merge, no longer than the log makes us wait anyway."""

from __future__ import annotations

_TIMES = 4
"""A flush every so many acknowledgement times: then a delta waits for its flush about as long as for two of them."""
_WEIGHT = 0.2
"""Of the newest latency in the average, as TCP's round-trip time (RFC 6298) has an eighth."""


class Linger:
    """Tunes the flush interval to the latency of acknowledgements, within bounds in ms. One thread at a time."""

    def __init__(self, least_ms: int, most_ms: int) -> None:
        self._most_s = most_ms / 1000
        self._least_s = min(least_ms, most_ms) / 1000
        self._latency_s = 0.0

    def observe(self, latency_s: float) -> None:
        """A batch was acknowledged so long after it was sent."""
        if self._latency_s:
            self._latency_s += _WEIGHT * (latency_s - self._latency_s)
        else:
            self._latency_s = latency_s

    @property
    def interval_s(self) -> float:
        """How long after a flush the next one is due."""
        return min(max(_TIMES * self._latency_s, self._least_s), self._most_s)
