"""All workers of an app at one moment: who is in its group, what each of them says, and how far the partitions are.

The group is asked, not a worker; then all of its members at once. One that does not answer is told of as unreachable, and
what is known of its partitions without it: that it has them, and the position that was mirrored last.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.faust.group import STABLE, ConsumerGroup, describe_group
from pipeline.adapters.faust.security import security_of
from pipeline.adapters.http import HttpReader
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import Address, parse_url
from pipeline.core.answer import PartitionStatus, RestoreStatus, Status, known
from pipeline.errors import PipelineError, Unavailable
from pipeline.ports import Member
from pipeline.settings import KafkaSettings
from pipeline.topics import DELTAS

TIMEOUT_S = 2.0
"""How long the group, and each member, may take to answer."""
_BROKER_MS_MAX = 5_000
"""How long the broker may: whoever asks for the status when it is away wants to hear that soon."""


class StandbyOverview(msgspec.Struct):
    """A copy of a partition. `phase` is `following`, `restoring`, or `unknown` if its member does not answer."""

    member: str
    phase: str
    remaining: int | None = None
    restore: RestoreStatus | None = None


class PartitionOverview(msgspec.Struct):
    """A partition. What nobody tells is None, and `phase` then `unknown`."""

    partition: int
    member: str | None
    """Who folds it."""
    phase: str
    next_offset: int | None
    end_offset: int
    lag: int | None
    commit_age_ms: int | None
    restore: RestoreStatus | None
    standbys: list[StandbyOverview]


class MemberOverview(msgspec.Struct):
    """A member. `error` says why it is unreachable; what only it knows is None then: while they move, its partitions too."""

    name: str
    url: str
    partitions: list[int] | None
    standbys: list[int] | None
    lag: int | None = None
    ready: bool | None = None
    fenced_count: int | None = None
    error: str | None = None


class Overview(msgspec.Struct):
    """What `pipeline status --from kafka://...` shows."""

    app: str
    group_state: str
    """Kafka's name for it. While it is not Stable, partitions are moving, and are where the members say."""
    members: list[MemberOverview]
    partitions: list[PartitionOverview]
    notes: list[str]
    """What could not be found out."""


def overview(url: str, settings: KafkaSettings) -> Overview:
    """Ask the broker, then all members. Raises `Unavailable` if there is no broker, or no member; `Invalid` as usual."""
    address = parse_url(url)
    security = security_of(settings.kafka)
    settings = replace(settings, kafka_timeout_ms=min(settings.kafka_timeout_ms, _BROKER_MS_MAX))
    with closing(KafkaLog(address, settings, SystemClock())) as log:
        log.connect([DELTAS])
        group = describe_group(address, security, timeout_s=TIMEOUT_S)
        if not group.members:
            raise Unavailable(
                f"{address}: group {address.app} has no members: no worker with a --name runs. "
                "One without is in no group: ask it by its URL, pipeline status --from http://host:port"
            )
        notes: list[str] = []
        ends = log.high_watermarks(DELTAS)
        mirrored: Mapping[int, int] = {}
        try:
            mirrored = log.mirrored_positions()
        except PipelineError as error:
            notes.append(f"positions of members that do not answer are unknown: {error}")
    answers = _ask_all(address, group.members)
    return _joined(address, group, answers, ends, mirrored, notes)


def _ask_all(address: Address, members: Sequence[Member]) -> list[Status | str]:
    """Each member's answer, or why there is none. In time, whatever they do, and however long a name takes to resolve."""
    answers: list[Status | str] = [f"no answer within {TIMEOUT_S:g} s" for _ in members]

    def ask(index: int) -> None:
        try:
            answers[index] = _asked(address, members[index])
        except Exception as error:  # of one member: the others' answers are shown all the same
            answers[index] = f"its answer can't be understood: {error!r}"

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(members))]
    clock = SystemClock()
    deadline_s = clock.monotonic_s() + TIMEOUT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline_s - clock.monotonic_s()))
    return [*answers]


def _asked(address: Address, member: Member) -> Status | str:
    if not member.url:
        return "it has told no address yet"
    try:
        with HttpReader(member.url) as reader:
            answer = msgspec.json.decode(reader.fetch("/v1/status", timeout_s=TIMEOUT_S), type=Status)
    except PipelineError as error:
        return str(error).removeprefix(f"{member.url}: ")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return f"not a worker's answer: {error}"
    if answer.role != "worker":
        return f"not a worker's answer: role {known(answer.role)}"
    if (answer.app, answer.name) != (address.app, member.name):
        return f"worker {known(answer.name) or '(without a name)'} of {known(answer.app)} answers there"
    return answer


class _MemberAnswer(NamedTuple):
    state: MemberOverview
    answer: Status | None


def _joined(
    address: Address,
    group: ConsumerGroup,
    answers: Sequence[Status | str],
    ends: Mapping[int, int],
    mirrored: Mapping[int, int],
    notes: list[str],
) -> Overview:
    rows = [_row(group, member, answer) for member, answer in zip(group.members, answers, strict=True)]
    partitions = [_partition(number, rows, end, mirrored.get(number)) for number, end in sorted(ends.items())]
    by_number = {it.partition: it for it in partitions}
    for row in rows:
        if row.state.partitions is not None:
            lags = [by_number[number].lag for number in row.state.partitions if number in by_number]
            row.state.lag = None if None in lags else sum(lag or 0 for lag in lags)
    return Overview(address.app, group.state, [row.state for row in rows], partitions, notes)


def _row(group: ConsumerGroup, member: Member, answer: Status | str) -> _MemberAnswer:
    """Where the partitions are is for the group to say, while it is stable."""
    actives, standbys = member.actives, member.standbys
    if isinstance(answer, str):
        unknown = group.state != STABLE
        has, keeps = (None, None) if unknown else (sorted(actives), sorted(standbys))
        return _MemberAnswer(MemberOverview(member.name, member.url, has, keeps, error=answer), None)
    if group.state != STABLE:
        actives = frozenset(it.partition for it in answer.partitions)
        standbys = frozenset(it.partition for it in known(answer.standbys) or ())
    state = MemberOverview(member.name, member.url, sorted(actives), sorted(standbys))
    state.ready, state.fenced_count = answer.ready, known(answer.fenced_count)
    return _MemberAnswer(state, answer)


def _partition(number: int, rows: Sequence[_MemberAnswer], end_offset: int, mirrored: int | None) -> PartitionOverview:
    owner = next((row for row in rows if number in (row.state.partitions or ())), None)
    answer = None if owner is None else owner.answer
    status = None if answer is None else _find(number, answer.partitions)
    next_offset, age_ms, phase = mirrored, None, "unknown"
    if answer is not None and status is not None:
        phase = "restoring" if status.restore else status.phase
        if status.phase != "assigned":  # before that it does not know its position
            next_offset = known(status.next_offset)
        at_ms, committed_at_ms = known(answer.at_ms), known(status.committed_at_ms)
        if at_ms and committed_at_ms:
            age_ms = max(0, at_ms - committed_at_ms)
    return PartitionOverview(
        partition=number,
        member=None if owner is None else owner.state.name,
        phase=phase,
        next_offset=next_offset,
        end_offset=end_offset,
        lag=None if next_offset is None else max(0, end_offset - next_offset),
        commit_age_ms=age_ms,
        restore=None if status is None else known(status.restore),
        standbys=[_standby(row, number) for row in rows if number in (row.state.standbys or ())],
    )


def _find(number: int, partitions: Iterable[PartitionStatus]) -> PartitionStatus | None:
    return next((it for it in partitions if it.partition == number), None)


def _standby(row: _MemberAnswer, number: int) -> StandbyOverview:
    status = None if row.answer is None else _find(number, known(row.answer.standbys) or ())
    if status is None:
        return StandbyOverview(row.state.name, "unknown")
    return StandbyOverview(row.state.name, status.phase, known(status.changelog_remaining) or 0, known(status.restore))
