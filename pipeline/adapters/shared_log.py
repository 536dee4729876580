"""One embedded log for all publishers of this process."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.errors import PipelineError
from pipeline.ports import LogWriter, Message
from pipeline.settings import LogSettings

_shared: dict[Path, _Shared] = {}
_shared_lock = threading.Lock()


class _Shared:
    """A log that publishers of this process share; the last one to close it closes the data directory."""

    def __init__(self, data: DataDir, log: EmbeddedLog) -> None:
        self.data = data
        self.log = log
        self.users = 0


class SharedLog(LogWriter):
    """One publisher's share of an embedded log in this process."""

    def __init__(self, shared: _Shared) -> None:
        self._shared = shared
        self._closed = False

    def partition_count(self, topic: str) -> int:
        return self._shared.log.partition_count(topic)

    def message_bytes_max(self, topic: str) -> int:
        return self._shared.log.message_bytes_max(topic)

    def append(self, messages: Sequence[Message], *, timeout_s: float) -> list[int | PipelineError]:
        return self._shared.log.append(messages, timeout_s=timeout_s)

    def topic_id(self, topic: str) -> str:
        return self._shared.log.topic_id(topic)

    def high_watermarks(self, topic: str) -> Mapping[int, int]:
        return self._shared.log.high_watermarks(topic)

    def close(self) -> None:
        with _shared_lock:
            if self._closed:
                return
            self._closed = True
            self._shared.users -= 1
            if not self._shared.users:
                del _shared[self._shared.data.path]
                self._shared.log.close()
                self._shared.data.close()


def open_shared_log(path: str) -> LogWriter:
    """Open the embedded log in a data directory for a publisher of this process; `pipeline up --data` folds it later.

    Raises `Unavailable` if another process has the directory: publish to its `http://host:port` then.
    """
    key = Path(path).expanduser().absolute()
    with _shared_lock:
        shared = _shared.get(key)
        if shared is None:
            data = DataDir(key)
            settings = LogSettings(data=str(key))
            try:
                log = EmbeddedLog(data.log, topics.load(), settings, SystemClock())
            except BaseException:
                data.close()
                raise
            shared = _shared[key] = _Shared(data, log)
        shared.users += 1
        return SharedLog(shared)
