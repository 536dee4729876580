"""Reads of a server without stores, which merges the states that other servers have.

A read needs the definitions of all partitions before it can ask for states. They are known from the read before, and come
with every answer: if they are others by then, the read asks again. The states of several queries come in one answer of each
server, and so are of one moment of each partition.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec.structs import replace

from pipeline.budget import check_budget
from pipeline.core.answer import Answer, MemberStatus, PartitionStatus, Status, View, Views
from pipeline.core.codec import DefinitionEntry
from pipeline.core.exposition import (
    SERIES_MAX,
    Exposed,
    Exposition,
    choose,
    newest_final_ms,
    samples_of,
    state_exposed,
)
from pipeline.core.gathered import PARTS_VERSION, GroupStates, StatesAsked, StatesRead, group_count, states_of
from pipeline.core.grants import Bounds
from pipeline.core.kinds import KINDS, Kind, State
from pipeline.core.query import (
    Labels,
    MergedDefinition,
    Query,
    Selected,
    TopN,
    fold,
    group_key,
    label_index,
    listed,
    merged,
    seen_within,
)
from pipeline.core.record import Definition
from pipeline.core.token import Token
from pipeline.errors import BadRecord, Invalid, NotFound, NotReady, PipelineError, Unavailable
from pipeline.metrics import NAMES, Metrics
from pipeline.ports import Clock
from pipeline.query.codings import preferred_coding
from pipeline.query.found import answer_of, answers_together, points_answer
from pipeline.query.media import Encoded, encode_answers, encode_body, encoded, plain_json
from pipeline.query.params import ReadHeaders, ReadRequest, SeveralRequest, Waiting
from pipeline.query.part_servers import Gathered, PartServers
from pipeline.query.plans import Shape, shape
from pipeline.query.ranges import Points, check_unwindowed, expired_before
from pipeline.query.read_pool import ReadPool, Receive, while_connected
from pipeline.query.service import NOT_FOLDED, POLL_S, RenderViews, too_old
from pipeline.settings import QuerySettings

_TRIES = 5
"""Attempts of a read at finding the definitions of all partitions as they were before."""
_PLANS_MAX = 10_000
_HERE_MAX = 500
"""Groups that are merged on the event loop; a millisecond's work."""
T = TypeVar("T")
_Numbered = Sequence[tuple[int | None, Query]]
"""Queries, with the index of each in a request of several."""
_encode = msgspec.json.Encoder().encode


class GatherPlan(NamedTuple):
    """The definitions that a read merges, and from where on each keeps its windows, as all partitions have them."""

    merged: MergedDefinition
    hidden: Mapping[Definition, int]


def _plan_of(query: Query, entries: Sequence[DefinitionEntry]) -> GatherPlan:
    found = merged(query.view, entries, kind=query.kind, window_s=query.window_s, bounds=query.bounds)
    expired = expired_before(entries) if found.definition.window_s else {}
    return GatherPlan(found, {part: expired[part] for part in found.parts if expired.get(part)})


class _PlannedRead(NamedTuple):
    """A query, with the definitions that it merges and what it needs of each server."""

    query: Query
    plan: GatherPlan
    points: Points | None
    """Points that the states of a view with windows are merged to."""
    reads: list[StatesRead]
    """One read, or two if the query compares its range with an earlier one."""


def _reads_of(plan: GatherPlan, query: Query, points: Points | None) -> list[StatesRead]:
    """Return the states that a query needs of each part."""
    definition, parts = plan.merged.definition, [*plan.merged.parts]
    for matcher in query.where:
        label_index(definition, matcher.label)  # raises for a label that the view does not have
    group_key(definition, query.by)  # the same
    if points is None:
        TopN(KINDS[definition.kind], query)  # for quantiles
    if points is not None:
        hidden = [plan.hidden.get(part, 0) for part in parts]
        ranges = [it.span for it in (points, points.earlier) if it is not None]
        return [StatesRead(parts, query.where, query.by, span=span, hidden_before_ms=hidden) for span in ranges]
    keep = None if query.top is not None or query.bottom is not None else query.limit
    return [StatesRead(parts, query.where, query.by, keep)]


@contextmanager
def _naming(index: int | None) -> Iterator[None]:
    """Name the index of a query in its errors, if it has one."""
    try:
        yield
    except (Invalid, Unavailable) as error:
        if index is None:
            raise
        raise type(error)(f"query {index}: {error}") from None


class GatherService:
    """Serves reads on one event loop, as `ReadService` does, from what other servers have."""

    def __init__(self, servers: PartServers, clock: Clock, settings: QuerySettings, metrics: Metrics) -> None:
        self.clock = clock
        self._servers = servers
        self._settings = settings
        self._pool = ReadPool(settings, metrics, clock)
        self._plans: dict[Shape, GatherPlan] = {}

    # Reads

    async def answer(self, request: ReadRequest, receive: Receive | None = None) -> Encoded:
        """Return the encoded answer. Raises as `ReadService.answer`, and as `PartServers.gather`."""
        if request.cursor is not None:
            raise Invalid("cursor: a server that merges others has no pages, because it holds no moment of their stores")
        async with self._room(request, receive):
            (answer,) = await self._fresh_answers([(None, request.query)], request, allow_partial=request.allow_partial)
            body = await self._here_or_not(len(answer.series), lambda: encode_body(answer, request.media_type))
            parts, coding = await self._pool.coded(body, request.coding)
            return encoded(answer, request.media_type, b"", parts, coding)

    async def answers(self, request: SeveralRequest, headers: ReadHeaders, receive: Receive | None = None) -> Encoded:
        """Return the encoded answers to several queries, all of one moment of each partition. Raises as `answer`."""
        async with self._room(request, receive):
            found = await self._fresh_answers([*enumerate(request.queries)], request, allow_partial=None)
            body = await self._here_or_not(
                sum(len(it.series) for it in found), lambda: encode_answers(answers_together(found))
            )
            parts, coding = await self._pool.coded(body, preferred_coding(headers.encoding))
            return plain_json(parts, coding)

    @asynccontextmanager
    async def _room(self, request: Waiting, receive: Receive | None) -> AsyncIterator[None]:
        """Count a read until the context ends, as one that waits for newer data if it asks for that."""
        if request.waits:
            async with self._pool.waiting(receive):
                yield
        else:
            with self._pool.slot():
                async with while_connected(receive):
                    yield

    async def read(self, query: Query) -> tuple[Answer, float]:
        """Return the answer of now, not encoded, and the seconds that it took. Raises as `answer`."""
        with self._pool.slot():
            begun_s, deadline_s = self.clock.monotonic_s(), self._pool.deadline_s()
            waiting = Waiting(timeout_ms=max(1, int((deadline_s - begun_s) * 1_000)))
            (answer,) = await self._read([(None, query)], waiting, deadline_s, allow_partial=None)
            return answer, self.clock.monotonic_s() - begun_s

    async def moved(self, since: Mapping[int, int] | None, timeout_s: float) -> Mapping[int, int]:
        """Return the positions of the servers, as soon as one is another than in `since` or the time is over."""
        return await self._servers.moved(since, timeout_s)

    async def wait(self, request: Waiting, receive: Receive | None = None) -> None:
        """Wait for what the read asks to wait for. Raises as `answer`."""
        if request.waits:
            deadline_s = self.clock.monotonic_s() + request.timeout_ms / 1000
            asked = StatesAsked(PARTS_VERSION, [], max_staleness_ms=request.max_staleness_ms, timeout_ms=request.timeout_ms)
            async with self._room(request, receive):
                await self._gather(asked, deadline_s, request.after, allow_partial=None)

    async def _fresh_answers(self, queries: _Numbered, request: Waiting, *, allow_partial: bool | None) -> list[Answer]:
        deadline_s = self.clock.monotonic_s() + request.timeout_ms / 1000
        most = part_most = request.max_staleness_ms
        while True:
            waiting = replace(request, max_staleness_ms=part_most)
            answers = await self._read(queries, waiting, deadline_s, allow_partial=allow_partial)
            staleness_ms = answers[-1].as_of.staleness_ms
            if most is None or (staleness_ms is not None and staleness_ms <= most):
                return answers
            # It was fresh enough where it was read: there it has to be fresher by the time on the way.
            part_most = max(0, (part_most or 0) - max(1, (staleness_ms or 0) - most))
            if self.clock.monotonic_s() >= deadline_s:
                raise NotReady(too_old(request))
            await asyncio.sleep(POLL_S)

    async def _read(
        self, queries: _Numbered, request: Waiting, deadline_s: float, *, allow_partial: bool | None
    ) -> list[Answer]:
        now_ms, views = self.clock.now_ms(), sorted({query.view for _, query in queries})
        plans, are_new = [self._plans.get(shape(query)) for _, query in queries], False
        for _ in range(_TRIES):
            try:
                planned = self._planned(queries, plans, now_ms)
            except Invalid:
                if are_new:
                    raise
                planned = []  # a query that does not fit the remembered definitions may fit those that there are by now
            asked = StatesAsked(
                PARTS_VERSION,
                [],
                [read for it in planned for read in it.reads],
                views,
                "",
                request.max_staleness_ms,
                request.timeout_ms,
            )
            gathered = await self._gather(asked, deadline_s, request.after, allow_partial=allow_partial)
            found = await self._plans_of(queries, request, gathered, deadline_s)
            if [it.plan for it in planned] == found:
                count = sum(len(read.states) for part in gathered.parts for read in part.found.reads)
                return await self._here_or_not(count, partial(self._build_all, queries, planned, gathered, deadline_s))
            plans, are_new = [*found], True
        raise Unavailable(f"view {views[0]}: its definitions change faster than they are read; try again")

    def _planned(self, queries: _Numbered, plans: Sequence[GatherPlan | None], now_ms: int) -> list[_PlannedRead]:
        """Return what each query needs by these definitions; nothing while those of one are unknown."""
        planned: list[_PlannedRead] = []
        for (index, query), plan in zip(queries, plans, strict=True):
            if plan is None:
                return []
            with _naming(index):
                points = None
                if plan.merged.definition.window_s:
                    points = Points(query, plan.merged, self._settings, now_ms)
                else:
                    check_unwindowed(query)
                planned.append(_PlannedRead(query, plan, points, _reads_of(plan, query, points)))
        return planned

    async def _plans_of(
        self, queries: _Numbered, request: Waiting, gathered: Gathered, deadline_s: float
    ) -> list[GatherPlan]:
        """Return the definitions that each query merges, as the servers have them now, and remember them."""
        entries: dict[str, list[DefinitionEntry]] = {}
        for entry in gathered.entries():
            entries.setdefault(entry.definition.view, []).append(entry)
        plans: list[GatherPlan] = []
        for index, query in queries:
            own, key = entries.get(query.view, []), shape(query)
            with _naming(index):
                try:
                    plans.append(_plan_of(query, own))
                except NotFound as error:
                    self._plans.pop(key, None)
                    hint = await self._hint(query.view, request, deadline_s, near=not own and query.bounds is None)
                    raise NotFound(f"{error}{hint}") from None
            if len(self._plans) >= _PLANS_MAX:
                self._plans.clear()
            self._plans[key] = plans[-1]
        return plans

    async def _hint(self, view: str, request: Waiting, deadline_s: float, *, near: bool) -> str:
        """Return the end of a message that there is no such view, or none of this kind; with `near`, naming others."""
        hint = "" if request.after is not None else f"; {NOT_FOLDED}"
        if not near:
            return hint
        asked = StatesAsked(PARTS_VERSION, [], views=None)
        everything = await self._gather(asked, deadline_s, None, allow_partial=True)
        names = {entry.definition.view for entry in everything.entries()}
        named = " or ".join(get_close_matches(view[:200], [*names][:2_000]))
        return f"; is it {named}?{hint}" if named else hint

    async def _gather(
        self, asked: StatesAsked, deadline_s: float, after: Token | None, *, allow_partial: bool | None
    ) -> Gathered:
        """Ask the servers, each for its partitions, and to wait for what the token says of these."""
        wanted: Mapping[int, int] = {} if after is None else after.next_offsets
        topic_id = "" if after is None else after.topic_id

        def make(numbers: list[int], timeout_ms: int) -> StatesAsked:
            own = {number: wanted[number] for number in numbers if number in wanted}
            return replace(asked, partitions=numbers, after=str(Token(own, topic_id)), timeout_ms=timeout_ms)

        gathered = await self._servers.gather(make, deadline_s, allow_partial=allow_partial)
        count = len(gathered.missing) + sum(len(part.found.partitions) for part in gathered.parts)
        if wanted and max(wanted) >= count:
            raise NotReady(f"after: there is no partition {max(wanted)} yet; these servers have {count}")
        return gathered

    def _build_all(
        self, queries: _Numbered, planned: Sequence[_PlannedRead], gathered: Gathered, deadline_s: float
    ) -> list[Answer]:
        """Merge the parts to the answer of each query."""
        answers: list[Answer] = []
        first = 0
        for (index, _), it in zip(queries, planned, strict=True):
            with _naming(index):
                answers.append(self._build(it, gathered, first, deadline_s))
            first += len(it.reads)
        return answers

    def _build(self, planned: _PlannedRead, gathered: Gathered, first: int, deadline_s: float) -> Answer:
        """Merge the parts to an answer; `first` is the index of its first read in each of them."""
        query, plan, points = planned.query, planned.plan, planned.points
        kind = KINDS[plan.merged.definition.kind]
        width = len(plan.merged.definition.labels if query.by is None else query.by)

        def check() -> None:
            check_budget()
            if self._pool.closed:
                raise Unavailable("the server is stopping")
            if self.clock.monotonic_s() > deadline_s:
                raise Unavailable(f"view {query.view}: not read within timeout_ms; narrow `where`, or give it more time")

        def found(index: int) -> Iterator[tuple[GroupStates, list[Any]]]:
            parts = [part.found.reads[index] for part in gathered.parts]
            for it in zip(parts, _states(kind, parts, width), strict=True):
                yield it
                check()

        if points is not None:
            points.hide_expired(plan.hidden)
            ranges = [it for it in (points, points.earlier) if it is not None]
            for index, one in enumerate(ranges, first):
                for part, own in found(index):
                    one.add(part.buckets, part.labels, own)
            final_before_ms = self._servers.final_before_ms(gathered)
            as_of = lambda: gathered.as_of(self.clock.monotonic_s())  # noqa: E731  # it is asked for when all is built
            return points_answer(query, plan.merged, points, as_of, final_before_ms, check)
        groups: dict[Labels, State] = {}
        for part, own in found(first):
            fold(kind, groups, part.labels, own)
        choice = TopN(kind, query)
        choice.offer(groups)
        selected = choice.selected()
        count = group_count([part.found.reads[first] for part in gathered.parts], groups)
        selected = Selected(selected.labels, selected.values, count)
        return answer_of(query, plan.merged, selected, gathered.as_of(self.clock.monotonic_s()))

    async def views(self, headers: ReadHeaders, bounds: Bounds | None = None) -> Encoded:
        """Return all views within bounds, encoded."""
        with self._pool.slot():
            asked = StatesAsked(PARTS_VERSION, [], views=None)
            gathered = await self._gather(asked, self._pool.deadline_s(), None, allow_partial=None)
            found = [View.of(it, bounds) for it in listed(gathered.entries(), bounds)]
            body = _encode(Views(found, gathered.as_of(self.clock.monotonic_s())))
            parts, coding = await self._pool.coded(body, preferred_coding(headers.encoding))
            return plain_json(parts, coding)

    # For Prometheus

    async def scrape(
        self,
        views: Sequence[str],
        render: RenderViews,
        accept: str,
        *,
        windowed: bool = True,
        bounds: Bounds | None = None,
        receive: Receive | None = None,
    ) -> tuple[bytes, str]:
        """Return all views within bounds, or these, as `render` writes them. Raises as `ViewReader.scrape`."""
        with self._pool.slot():
            async with while_connected(receive):
                exposition = await self._scrape(views, bounds, self._pool.deadline_s(), windowed=windowed)
                return await self._pool.run(lambda: render(exposition, accept))

    async def _scrape(self, views: Sequence[str], bounds: Bounds | None, deadline_s: float, *, windowed: bool) -> Exposition:
        asked = StatesAsked(PARTS_VERSION, [], views=None)
        gathered = await self._gather(asked, deadline_s, None, allow_partial=None)
        where = Query("").within(bounds).where
        for _ in range(_TRIES):
            plans = self._exposed_plans(gathered, views, bounds)
            chosen, omitted = choose({view: plan.merged for view, plan in plans.items()}, NAMES)
            final_before_ms = self._servers.final_before_ms(gathered)
            reads: list[tuple[Definition, StatesRead]] = []
            for it in chosen:
                plan, start_ms = plans[it.view], newest_final_ms(it, final_before_ms)
                if it.window_s and not (windowed and start_ms >= max(plan.hidden.values(), default=0)):
                    continue
                keep = self._settings.openmetrics_series_max
                reads.append((it, StatesRead([*plan.merged.parts], where, keep=keep, window_start_ms=start_ms)))
            asked = StatesAsked(PARTS_VERSION, [], [read for _, read in reads], None)
            gathered = await self._gather(asked, deadline_s, None, allow_partial=None)
            # The second answers can be of other servers than the first: the windows have to be final there, too.
            final_before_ms = self._servers.final_before_ms(gathered)
            final = all(read.window_start_ms <= newest_final_ms(it, final_before_ms) for it, read in reads if it.window_s)
            if final and self._exposed_plans(gathered, views, bounds) == plans:
                return await self._pool.run(partial(self._expose, gathered, [it for it, _ in reads], omitted))
        raise Unavailable("definitions change faster than they are read; try again")

    def _exposed_plans(self, gathered: Gathered, views: Sequence[str], bounds: Bounds | None) -> dict[str, GatherPlan]:
        found: dict[str, list[DefinitionEntry]] = {}
        for entry in seen_within(bounds, gathered.entries()):
            if not views or entry.definition.view in views:
                found.setdefault(entry.definition.view, []).append(entry)
        if unknown := set(views) - found.keys():
            raise NotFound(f"no view {min(unknown)[:100]!r}")
        return {view: _plan_of(Query(view, bounds=bounds), entries) for view, entries in found.items()}

    def _expose(self, gathered: Gathered, chosen: Sequence[Definition], omitted: dict[str, str]) -> Exposition:
        left = self._settings.openmetrics_series_max
        exposed: list[Exposed] = []
        for index, definition in enumerate(chosen):
            kind = KINDS[definition.kind]
            answer = state_exposed(definition) or kind.answerer(())
            parts = [part.found.reads[index] for part in gathered.parts]
            groups: dict[Labels, State] = {}
            for part, own in zip(parts, _states(kind, parts, len(definition.labels)), strict=True):
                fold(kind, groups, part.labels, own)
            count = group_count(parts, groups)
            if count > left // samples_of(definition):
                omitted[definition.view] = SERIES_MAX
                continue
            left -= count * samples_of(definition)
            labels = sorted(groups)
            exposed.append(Exposed(definition, labels, [answer(groups[it]) for it in labels]))
        as_of = gathered.as_of(self.clock.monotonic_s())
        return Exposition(exposed, dict(sorted(omitted.items())), as_of.staleness_ms)

    # Operations

    @property
    def ready(self) -> bool:
        """Return whether every partition has a server that answers."""
        try:
            return len(self._servers.partitions()) == self._servers.partition_count()
        except PipelineError:
            return False

    def status(self) -> Status:
        """Return what `/v1/status` shows."""
        try:
            partitions, count = self._servers.partitions(), self._servers.partition_count()
        except PipelineError:
            partitions, count = {}, 0
        states = []
        for number in range(count):
            it = partitions.get(number)
            if it is None:
                states.append(PartitionStatus(partition=number, phase="missing"))
                continue
            states.append(
                PartitionStatus(
                    partition=number,
                    phase="gathered",
                    next_offset=it.next_offset,
                    staleness_ms=it.staleness_ms,
                    committed_at_ms=it.committed_at_ms,
                    topic_id=it.topic_id,
                )
            )
        members = [MemberStatus(error or "answers", url, numbers) for url, numbers, error in self._servers.followed()]
        return Status(role="gatherer", ready=self.ready, partition_count=count, partitions=states, members=members)

    async def observe(self) -> None:
        """Ask the servers again and again which partitions they have."""
        await self._servers.watch()

    def close(self) -> None:
        """End all running reads, and take no more."""
        self._pool.close()
        self._servers.close()

    async def _here_or_not(self, count: int, work: Callable[[], T]) -> T:
        return work() if count <= _HERE_MAX else await self._pool.run(work)


def _states(kind: Kind, parts: Sequence[GroupStates], width: int) -> list[list[Any]]:
    """Return the states of each part. Raises `Unavailable` if they can't be read."""
    try:
        return [states_of(kind, part, width) for part in parts]
    except BadRecord as error:
        raise Unavailable(f"a server's answer can't be read: {error}") from None
