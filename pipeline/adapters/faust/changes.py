"""A channel of a view's changes for an agent, fed one by one from a thread of its own.

A change is done when the agent asks for the next one, like an event. Rebalances do not clear this channel: the feed itself
follows the assignment.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import faust

_ROOM_INTERVAL_S = 0.05
_GRACE_S = 1.0
"""Longest wait for the agent's present change when the other changes are taken back."""


class Gate:
    """Hands changes from a feed's thread to an agent's loop, and counts those that are done."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Any] = deque()
        self._under_way = False
        self._done_count = 0
        self._ready: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def offer(self, changes: Sequence[Any], stopping: Callable[[], bool]) -> int:
        """Wait until the agent has done all changes, or `stopping` returns True; return how many are done."""
        with self._changed:
            self._waiting.extend(changes)
            self._done_count, self._under_way = 0, False
            self._wake()
            while self._done_count < len(changes) and not stopping():
                self._changed.wait(_ROOM_INTERVAL_S)
            self._waiting.clear()
            if self._under_way:
                self._changed.wait_for(lambda: not self._under_way, _GRACE_S)
                self._under_way = False  # its result, if it comes later, is not counted
            return self._done_count

    def _wake(self) -> None:
        if self._loop is not None and self._ready is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ready.set)

    async def take(self) -> Any:
        """Return the next change. The one before it is done."""
        with self._changed:
            if self._ready is None:
                self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
            if self._under_way:
                self._under_way = False
                self._done_count += 1
                self._changed.notify_all()
        while True:
            with self._changed:
                if self._waiting:
                    self._under_way = True
                    return self._waiting.popleft()
                self._ready.clear()
            await self._ready.wait()


class ChangesChannel(faust.Channel):
    """The changes of one view, for one agent."""

    def __init__(self, app: Any, *, view: str, gate: Gate | None = None, **options: Any) -> None:
        super().__init__(app, **options)
        self.view = view
        self.gate = gate or Gate()

    def _clone_args(self) -> Any:
        return {**super()._clone_args(), "view": self.view, "gate": self.gate}

    async def __anext__(self) -> Any:
        return await self.gate.take()

    def __str__(self) -> str:
        return f"changes of {self.view}"
