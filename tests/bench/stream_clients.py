"""Many readers of one stream, in a process of their own: when did each of them have which value?

python -m tests.bench.stream_clients HOST PORT PATH COUNT PATTERN

Prints `ready` when each has its first event. At the next line of input it prints JSON: a list for each reader, of the values
that PATTERN found in its events, each with the time of its receipt in seconds since 1970.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from typing import Any

_AT_ONCE = 50
"""Connections that are opened at the same time."""


class _Reader(asyncio.Protocol):
    """Sends one request, and notes each event of the answer."""

    def __init__(self, request: bytes, pattern: re.Pattern[bytes]) -> None:
        self.first = asyncio.get_running_loop().create_future()
        self.seen: list[tuple[int, float]] = []
        self._request = request
        self._pattern = pattern
        self._rest = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now_s = time.time()
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            found = self._pattern.search(event)
            if found is not None:
                self.seen.append((int(found[1]), now_s))
        if events and not self.first.done():
            self.first.set_result(None)

    def connection_lost(self, _: object) -> None:
        if not self.first.done():
            self.first.set_exception(ConnectionError(self._rest[:300].decode(errors="replace")))


async def run(host: str, port: int, path: str, count: int, pattern: str) -> list[list[tuple[int, float]]]:
    """Read until there is a line of input; return what each reader has seen."""
    loop = asyncio.get_running_loop()
    request = f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
    readers = [_Reader(request, re.compile(pattern.encode())) for _ in range(count)]
    for start in range(0, count, _AT_ONCE):
        some = readers[start : start + _AT_ONCE]
        await asyncio.gather(*[loop.create_connection(lambda it=it: it, host, port) for it in some])  # type: ignore[misc]
        await asyncio.gather(*[it.first for it in some])
    print("ready", flush=True)
    await loop.run_in_executor(None, sys.stdin.readline)
    return [it.seen for it in readers]


def main() -> None:
    """Run with this process' arguments."""
    host, port, path, count, pattern = sys.argv[1:]
    print(json.dumps(asyncio.run(run(host, int(port), path, int(count), pattern))), flush=True)


if __name__ == "__main__":
    main()
