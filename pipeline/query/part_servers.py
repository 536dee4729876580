"""Servers that each follow some partitions: which there are, which to ask for what, and asking them all at once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import ceil, inf
from typing import NamedTuple, Protocol

import pipeline.metrics as m
from pipeline.core.answer import AsOf
from pipeline.core.codec import DefinitionEntry, decode_definition
from pipeline.core.gathered import PARTS_VERSION, PartitionFound, StatesAsked, StatesFound, decode_found, encode_part
from pipeline.errors import BadRecord, NotReady, PipelineError, Unavailable
from pipeline.metrics import Metrics
from pipeline.ports import Clock
from pipeline.query.staleness import LogTime, final_before_ms
from pipeline.threads import Failures

_log = logging.getLogger(__name__)
_THREADS = 64
"""Requests to one server that run at once. Each server has threads of its own, so that a slow one holds up no other."""
_ASK_S = 2.0
"""Time in which a server must say which partitions it has."""
_AGAIN_S = 0.2
"""Least time between two such questions, if reads lack partitions."""
_OF_TIMEOUT = 0.9
"""Share of the time of a request that the server may take; the rest is for the way."""
_GRACE_S = 0.25
"""Time beyond that of a read in which a server's own refusal is waited for: it says more than that nothing came."""


class PartServer(Protocol):
    """A server of some partitions. Safe from any thread."""

    url: str

    def ask(self, body: bytes, timeout_s: float) -> bytes:
        """Return the answer to an encoded `StatesAsked`. Raises what the server raises; `Unavailable` without an answer."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class Part(NamedTuple):
    """Answer of one server."""

    url: str
    found: StatesFound
    asked_s: float
    """Time on the monotonic clock at which the question was sent."""


class Gathered(NamedTuple):
    """Answers of several servers, each partition in one of them."""

    parts: list[Part]
    missing: list[int]
    """Partitions of which no server has answered."""

    def entries(self) -> list[DefinitionEntry]:
        """Return the definition entries of all partitions. Raises `Unavailable` if one can't be read."""
        try:
            return [decode_definition(value) for part in self.parts for value in part.found.entries]
        except BadRecord as error:
            raise Unavailable(f"a server's answer can't be read: {error}") from None

    def as_of(self, now_s: float) -> AsOf:
        """Return what the answers reflect: the worst staleness of all, and the time on the way."""
        staleness_ms: int | None = 0
        next_offsets: dict[int, int] = {}
        for part in self.parts:
            since_ms = max(0, ceil((now_s - part.asked_s) * 1_000) - part.found.after_ms)
            for it in part.found.partitions:
                next_offsets[it.number] = it.next_offset
                unknown = it.staleness_ms is None or staleness_ms is None
                staleness_ms = None if unknown else max(staleness_ms or 0, (it.staleness_ms or 0) + since_ms)
        return AsOf(staleness_ms, {str(number): next_offsets[number] for number in sorted(next_offsets)}, self.missing)


class _KnownServer:
    """Knowledge of one server."""

    def __init__(self, server: PartServer) -> None:
        self.server = server
        self.threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pipeline-gather")
        self.found: StatesFound | None = None
        """The last answer of the server; None: it does not answer."""
        self.error = "it has not answered yet"
        self.asked_s = -inf
        self.asking: asyncio.Task[None] | None = None

    @property
    def partitions(self) -> Mapping[int, PartitionFound]:
        return {} if self.found is None else {it.number: it for it in self.found.partitions}


class PartServers:
    """Asks servers from one event loop, on which it must be used."""

    def __init__(self, servers: Sequence[PartServer], clock: Clock, metrics: Metrics, interval_s: float) -> None:
        self._known = [_KnownServer(server) for server in servers]
        self._clock = clock
        self._metrics = metrics
        self._interval_s = interval_s
        self._time = LogTime()
        self._noted = asyncio.Event()
        """Set, and replaced, when a server has said which partitions it has, or has not answered."""

    # Which there are

    async def watch(self) -> None:
        """Ask each server again and again which partitions it has."""
        await asyncio.gather(*[self._watch(known) for known in self._known])

    async def _watch(self, known: _KnownServer) -> None:
        failures = Failures(_log, "asking a server", self._metrics)
        while True:
            try:
                await self._ask_partitions(known)
            except Exception as error:
                failures.note(error)
            await asyncio.sleep(self._interval_s)

    async def _ask_partitions(self, known: _KnownServer) -> None:
        """Ask a server which partitions it has, or wait for the answer if it is being asked."""
        if known.asking is None or known.asking.done():
            known.asking = asyncio.create_task(self._note_partitions(known))
        await asyncio.shield(known.asking)

    async def _note_partitions(self, known: _KnownServer) -> None:
        known.asked_s = self._clock.monotonic_s()
        was_there = known.found is not None
        try:
            asked = StatesAsked(PARTS_VERSION, None, timeout_ms=int(_ASK_S * 1_000))
            known.found = (await self._ask(known, asked, _ASK_S)).found
            known.error = ""
        except PipelineError as error:
            known.found, known.error = None, str(error)
            if was_there:
                _log.warning("%s does not answer: %s", known.server.url, error)
        self._metrics.set(m.GATHER_SERVER_UP, float(known.found is not None), known.server.url)
        noted, self._noted = self._noted, asyncio.Event()
        noted.set()

    async def _look_again(self, deadline_s: float) -> None:
        """Ask those that do not answer once more, unless they were asked a moment ago; wait for answers under way."""
        now_s = self._clock.monotonic_s()
        absent = [it for it in self._known if it.found is None]
        due = [it for it in absent if now_s - it.asked_s >= _AGAIN_S or (it.asking is not None and not it.asking.done())]
        if due:
            asking = [asyncio.create_task(self._ask_partitions(it)) for it in due]
            await asyncio.wait(asking, timeout=max(0.0, deadline_s - now_s))

    def partition_count(self) -> int:
        """Return the number of partitions. Raises `NotReady` if servers disagree, `Unavailable` if none answers."""
        there = [(it.server.url, it.found) for it in self._known if it.found is not None]
        if not there:
            raise Unavailable(f"no server answers: {'; '.join(f'{it.server.url}: {it.error}' for it in self._known)}")
        url, first = there[0]
        for other, found in there[1:]:
            if found.partition_count != first.partition_count:
                raise NotReady(
                    f"servers disagree: {url} has a topic of {first.partition_count} partitions, {other} one of "
                    f"{found.partition_count}; is one of another app?"
                )
        _check_topics(there)
        return first.partition_count

    def followed(self) -> list[tuple[str, list[int], str]]:
        """Return URL, partitions and error of each server."""
        return [(it.server.url, sorted(it.partitions), it.error) for it in self._known]

    def partitions(self) -> dict[int, PartitionFound]:
        """Return the state of each partition as the server that is asked for it said it last."""
        found: dict[int, PartitionFound] = {}
        for known, numbers in self._cover(range(self.partition_count()), ()).items():
            found |= {number: known.partitions[number] for number in numbers}
        return dict(sorted(found.items()))

    async def moved(self, since: Mapping[int, int] | None, timeout_s: float) -> Mapping[int, int]:
        """Return the position of each partition as `partitions` has it, as soon as one differs from `since`.

        Without `since` return no positions, and after `timeout_s` those that are known. Raises as `partition_count`.
        """
        if since is None:
            return {}
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._positions() == since:
                    await self._noted.wait()
        return self._positions()

    def _positions(self) -> dict[int, int]:
        return {number: it.next_offset for number, it in self.partitions().items()}

    def _cover(self, numbers: Iterable[int], without: Iterable[_KnownServer]) -> dict[_KnownServer, list[int]]:
        """Return which server to ask for which partitions: the fresher one by whole seconds, of equals the first."""
        candidates = [it for it in self._known if it not in {*without}]
        cover: dict[_KnownServer, list[int]] = {}
        for number in numbers:
            able = [it for it in candidates if number in it.partitions]
            if able:
                cover.setdefault(min(able, key=lambda it: _seconds(it.partitions[number].staleness_ms)), []).append(number)
        return cover

    # Asking

    async def gather(
        self, make: Callable[[list[int], int], StatesAsked], deadline_s: float, *, allow_partial: bool | None
    ) -> Gathered:
        """Return the answers of as many servers as needed to have each partition once.

        `make` returns the question for some partitions, given the time for it in ms. If a server does not answer, another
        one that has the same partitions is asked. Raises `Unavailable` or `NotReady`, naming partitions and servers, if
        partitions are missing all the same and `allow_partial` is not True, or if all are. None: there is no choice.
        """
        failed: dict[_KnownServer, PipelineError] = {}
        parts: list[Part] = []
        looked = False
        while True:
            have = {it.number for part in parts for it in part.found.partitions}
            try:
                count = self.partition_count()
                lacking = [number for number in range(count) if number not in have]
                cover = self._cover(lacking, failed)
            except (Unavailable, NotReady):
                if looked:
                    raise
                lacking, cover = [-1], {}
            if not looked and sum(map(len, cover.values())) < len(lacking):
                looked = True
                await self._look_again(deadline_s)
                continue
            if not cover:
                break
            tries = [self._try(known, numbers, make, deadline_s, failed) for known, numbers in cover.items()]
            for known, outcome in zip(cover, await asyncio.gather(*tries, return_exceptions=True), strict=True):
                if isinstance(outcome, Part):
                    parts.append(outcome)
                elif isinstance(outcome, NotReady | Unavailable):
                    failed[known] = outcome
                else:
                    raise outcome
            if len(parts) > 1:
                _check_topics([(part.url, part.found) for part in parts])
        if lacking and not (allow_partial and parts):
            advice = "; allow_partial=true answers without them" if allow_partial is False and parts else ""
            raise self._lack(lacking, failed, advice)
        return Gathered(parts, lacking)

    def _lack(self, lacking: Sequence[int], failed: Mapping[_KnownServer, PipelineError], advice: str) -> PipelineError:
        """Return the error that names what is missing."""
        reasons = {it.server.url: it.error for it in self._known if it.found is None}
        reasons |= {it.server.url: str(error) for it, error in failed.items()}
        named = ", ".join(map(str, lacking[:20])) + (f" and {len(lacking) - 20} more" if len(lacking) > 20 else "")
        why = "; ".join(f"{url}: {why.removeprefix(f'{url}: ')}" for url, why in reasons.items()) or "no server follows them"
        waited = failed and all(isinstance(error, NotReady) for error in failed.values())
        kind = NotReady if waited else Unavailable
        return kind(f"partitions {named} are missing: {why}{advice}")

    async def _try(
        self,
        known: _KnownServer,
        numbers: list[int],
        make: Callable[[list[int], int], StatesAsked],
        deadline_s: float,
        failed: Iterable[_KnownServer],
    ) -> Part:
        others = {number for it in self._known if it not in {known, *failed} for number in it.partitions}
        left_s = deadline_s - self._clock.monotonic_s()
        if others.issuperset(numbers):
            left_s /= 2  # another one is asked then
        if left_s <= 0:
            raise Unavailable(f"{known.server.url}: no time is left")
        asked = make(numbers, max(1, int(left_s * 1_000 * _OF_TIMEOUT)))
        part = await self._ask(known, asked, left_s + _GRACE_S)
        if sorted(it.number for it in part.found.partitions) != numbers:
            raise Unavailable(f"{known.server.url}: it has answered for other partitions than {numbers}")
        if len(part.found.reads) != len(asked.reads):
            raise Unavailable(f"{known.server.url}: it has answered {len(part.found.reads)} reads of {len(asked.reads)}")
        return part

    async def _ask(self, known: _KnownServer, asked: StatesAsked, timeout_s: float) -> Part:
        url, deadline_s = known.server.url, self._clock.monotonic_s() + timeout_s

        def ask() -> Part:
            asked_s = self._clock.monotonic_s()
            if asked_s >= deadline_s:
                raise Unavailable(f"{url}: too many requests wait for it")
            try:
                found = decode_found(known.server.ask(encode_part(asked), deadline_s - asked_s))
            except BadRecord as error:
                raise Unavailable(f"{url}: {error}") from None
            self._time.observe(found.newest_ms, self._clock.monotonic_s())
            return Part(url, found, asked_s)

        running = asyncio.get_running_loop().run_in_executor(known.threads, ask)
        try:
            async with asyncio.timeout(timeout_s):  # not wait_for, which swallows being cancelled at the same time
                return await running
        except TimeoutError:
            raise Unavailable(f"{url}: no answer in time") from None

    def final_before_ms(self, gathered: Gathered) -> int:
        """Return the time that all partitions have reached; 0 if one is missing."""
        if gathered.missing:
            return 0
        ends_s = [part.asked_s + (part.found.after_ms - part.found.ends_age_ms) / 1_000 for part in gathered.parts]
        folded_ms = [it.folded_ms for part in gathered.parts for it in part.found.partitions]
        return final_before_ms(folded_ms, self._time.reached_ms(min(ends_s, default=0.0)))

    def close(self) -> None:
        """Ask no more."""
        for known in self._known:
            known.threads.shutdown(wait=False, cancel_futures=True)
            known.server.close()


def _seconds(staleness_ms: int | None) -> float:
    return inf if staleness_ms is None else staleness_ms // 1_000


def _check_topics(found: Sequence[tuple[str, StatesFound]]) -> None:
    """Raise `NotReady` if servers follow different topics."""
    named = [(url, it.topic_id) for url, it in found if it.topic_id]
    for url, topic_id in named[1:]:
        if topic_id != named[0][1]:
            raise NotReady(
                f"servers disagree: {named[0][0]} follows topic {named[0][1]}, {url} follows {topic_id}: one is of another "
                "app or cluster, or has not noticed yet that the topic was made anew"
            )
