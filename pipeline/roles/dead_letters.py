"""Dead letters of a server, of a broker, or of a data directory which no process has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader
from pipeline.config import Config
from pipeline.core.description import describe_letter
from pipeline.errors import Unavailable
from pipeline.query.dead_letters import DeadLetters, LetterCursor, LetterFilter, Listing, Outcome, Replayed
from pipeline.roles.offline import open_log
from pipeline.topics import DEAD_LETTERS, DELTAS

_PAGE = 1_000
_TIMEOUT_S = 60.0
_READ_TIMEOUT_S = 600.0
"""Longest wait for a server that reads a topic of millions of letters."""


class LetterSource(Protocol):
    """Lists, shows and replays dead letters."""

    def listing(self, only: LetterFilter, limit: int) -> Listing:
        """Return up to `limit` letters, and how many there are."""
        ...

    def show(self, key: str, series_max: int) -> dict[str, Any]:
        """Return a letter with its content, as the HTTP API shows it."""
        ...

    def replay_page(self, only: LetterFilter, *, timeout_s: float | None, dry_run: bool, forgotten: bool) -> Replayed:
        """Replay up to a thousand letters."""
        ...


class LogLetters(DeadLetters):
    """A `LetterSource` of a log that this process reads itself."""

    def show(self, key: str, series_max: int) -> dict[str, Any]:
        """See `LetterSource`."""
        text = describe_letter(key.encode(), self.get(key), series_max=series_max)
        found: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(text))
        return found

    def replay_page(self, only: LetterFilter, *, timeout_s: float | None, dry_run: bool, forgotten: bool) -> Replayed:
        """See `LetterSource`."""
        return self.replay(only, limit=_PAGE, timeout_s=timeout_s or _TIMEOUT_S, dry_run=dry_run, forgotten=forgotten)


class _Answered(msgspec.Struct):
    outcomes: list[Outcome]
    after: str | None


class HttpLetters:
    """A `LetterSource` behind a server that takes deltas."""

    def __init__(self, reader: HttpReader, url: str) -> None:
        self._reader, self._url = reader, url

    def listing(self, only: LetterFilter, limit: int) -> Listing:
        """See `LetterSource`."""
        query: dict[str, Any] = {"limit": limit}
        for name, value in (("view", only.view), ("reason", only.reason), ("since_ms", only.since_ms)):
            if value:
                query[name] = value
        if only.partition is not None:
            query["partition"] = only.partition
        found: Listing = self._answer(f"/v1/dead-letters?{urlencode(query, quote_via=quote)}", Listing)
        return found

    def show(self, key: str, series_max: int) -> dict[str, Any]:
        """See `LetterSource`."""
        found: dict[str, Any] = self._answer(f"/v1/dead-letters/{quote(key, safe='')}?series={series_max}", dict[str, Any])
        return found

    def replay_page(self, only: LetterFilter, *, timeout_s: float | None, dry_run: bool, forgotten: bool) -> Replayed:
        """See `LetterSource`."""
        order = {
            "keys": sorted(only.keys),
            "view": only.view,
            "reason": only.reason,
            "partition": only.partition,
            "since_ms": only.since_ms,
            "after": "" if only.after is None else str(only.after),
            "limit": _PAGE,
            "timeout_ms": None if timeout_s is None else int(timeout_s * 1000),
            "dry_run": dry_run,
            "forgotten": forgotten,
        }
        done = self._answer("/v1/dead-letters/replay", _Answered, msgspec.json.encode(order))
        return Replayed(done.outcomes, None if done.after is None else LetterCursor.parse(done.after))

    def _answer(self, path: str, kind: Any, body: bytes | None = None) -> Any:
        answer = self._reader.fetch(path, timeout_s=_READ_TIMEOUT_S, body=body)
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self._url}: not an answer of this API: {error}") from None


@contextmanager
def open_letters(config: Config, *, url: str, data: str | None) -> Iterator[LetterSource]:
    """Open the letters of a server or broker at `url`, or of the data directory `data`, which no process may have."""
    if data is None and not url.startswith("kafka:"):
        with HttpReader(url, settings=config.client) as reader:
            yield HttpLetters(reader, url)
        return
    settings = config.log if data is None else replace(config.log, data=data)
    with open_log(url if data is None else None, settings, config.kafka, DELTAS, DEAD_LETTERS) as log:
        yield LogLetters(log, SystemClock())
