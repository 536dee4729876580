"""Says once that the log went away, or never was there, and once that it is back: not for each batch that has to wait."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TypeVar

from pipeline.errors import PipelineError
from pipeline.ports import Clock, LogWriter, Message
from pipeline.publisher.delivery import FOR_GOOD

T = TypeVar("T")
_log = logging.getLogger(__name__)
_AWAY_S = 1.0
"""How long nothing must have been accepted: what a second attempt mends is nobody's business."""


class WatchedLog:
    """A log writer, with an eye on whether the log is there. Safe from any thread.

    The log is away while all that is asked of it fails, for a second or more, and something waits for it. It is back when it
    answers to a batch. `what_waits` says what waits for it; empty: nothing.
    """

    def __init__(self, writer: LogWriter, clock: Clock, what_waits: Callable[[], str]) -> None:
        self._writer = writer
        self._clock = clock
        self._what_waits = what_waits
        self._lock = threading.RLock()  # a signal handler may flush, too
        self._since: tuple[float, int] | None = None
        """By both clocks, when the first attempt began of those that have failed since the log last answered."""
        self._told = False

    def partition_count(self, topic: str) -> int:
        return self._asked(lambda: self._writer.partition_count(topic))

    def message_bytes_max(self, topic: str) -> int:
        return self._asked(lambda: self._writer.message_bytes_max(topic))

    def topic_id(self, topic: str) -> str:
        return self._asked(lambda: self._writer.topic_id(topic))

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return self._writer.high_watermarks(topic)

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        began = self._clock.monotonic_s(), self._clock.now_ms()
        results = self._writer.append(messages, timeout_s=timeout_s)
        failed = [it for it in results if isinstance(it, PipelineError) and not isinstance(it, FOR_GOOD)]
        if len(failed) < len(results):
            self._note_answer()
        elif failed:
            self._note_failure(began, failed[-1])
        return results

    def close(self) -> None:
        self._writer.close()

    def _asked(self, ask: Callable[[], T]) -> T:
        began = self._clock.monotonic_s(), self._clock.now_ms()
        try:
            return ask()
        except PipelineError as error:
            if not isinstance(error, FOR_GOOD):
                self._note_failure(began, error)
            raise

    def _note_failure(self, began: tuple[float, int], error: PipelineError) -> None:
        with self._lock:
            self._since = since = self._since or began
            if self._told or self._clock.monotonic_s() - since[0] < _AWAY_S:
                return
            self._told = True
        if waits := self._what_waits():
            _log.warning("the log is away since %s: %s; the last error: %s", _time(since[1]), waits, error)
        else:
            self._told = False

    def _note_answer(self) -> None:
        if self._since is None:
            return
        with self._lock:
            since, told = self._since, self._told
            self._since, self._told = None, False
        if told and since is not None:
            away_s = self._clock.monotonic_s() - since[0]
            waits = self._what_waits() or "nothing waits"
            _log.warning("the log is back; it was away for %.1f s, since %s: %s", away_s, _time(since[1]), waits)


def _time(at_ms: int) -> str:
    return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(timespec="seconds")
