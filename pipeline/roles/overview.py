"""All workers of an app at one moment: the members of its group, their statuses, and how far the partitions are.

The broker is asked for the group, then all members at once. A member that does not answer is shown as unreachable; its
partitions are known from the group, and their positions from the last mirrored ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.faust.group import STABLE, ConsumerGroup, describe_group
from pipeline.adapters.faust.security import security_of
from pipeline.adapters.http import HttpReader
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import Address, parse_url
from pipeline.core.answer import PartitionStatus, RestoreStatus, Status, known
from pipeline.errors import PipelineError, Unauthenticated, Unavailable
from pipeline.ports import Member
from pipeline.query.cross_origin import is_loopback
from pipeline.secret import Secret
from pipeline.settings import ClientSettings, KafkaSettings
from pipeline.topics import DELTAS

TIMEOUT_S = 2.0
"""Longest wait for the group, and for each member."""
_TOKENS = "it is sent to members on this machine, and with ca_file to those at https://; else ask this one by its URL"
_BROKER_MS_MAX = 5_000
"""Longest wait for the broker, so that the command soon says that it is away."""


class StandbyOverview(msgspec.Struct):
    """A standby of a partition. `phase` is `following`, `restoring`, or `unknown` if its member does not answer."""

    member: str
    phase: str
    remaining: int | None = None
    restore: RestoreStatus | None = None


class PartitionOverview(msgspec.Struct):
    """A partition. Unknown figures are None, an unknown phase is `unknown`."""

    partition: int
    member: str | None
    """Name of the member that folds it."""
    phase: str
    next_offset: int | None
    end_offset: int
    lag: int | None
    commit_age_ms: int | None
    restore: RestoreStatus | None
    standbys: list[StandbyOverview]


class MemberOverview(msgspec.Struct):
    """A member of the group.

    `error` says why it is unreachable. What only the member knows is None then, while partitions move also its partitions.
    """

    name: str
    url: str
    partitions: list[int] | None
    standbys: list[int] | None
    lag: int | None = None
    ready: bool | None = None
    fenced_count: int | None = None
    error: str | None = None


class Overview(msgspec.Struct):
    """Result of `pipeline status --from kafka://...`."""

    app: str
    group_state: str
    """Kafka's name of the state. While it is not Stable, partitions move, and members say which ones they have."""
    members: list[MemberOverview]
    partitions: list[PartitionOverview]
    notes: list[str]
    """Facts that could not be found out."""


def overview(url: str, settings: KafkaSettings, client: ClientSettings | None = None) -> Overview:
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
    answers = _ask_all(address, group.members, client)
    return _joined(address, group, answers, ends, mirrored, notes)


def _ask_all(address: Address, members: Sequence[Member], client: ClientSettings | None) -> list[Status | str]:
    """Return each member's status, or the reason for having none, within `TIMEOUT_S` even if a name does not resolve."""
    answers: list[Status | str] = [f"no answer within {TIMEOUT_S:g} s" for _ in members]

    def ask(index: int) -> None:
        try:
            answers[index] = _asked(address, members[index], client)
        except Exception as error:  # the answers of other members are shown all the same
            answers[index] = f"its answer can't be understood: {error!r}"

    threads = [threading.Thread(target=ask, args=(index,), daemon=True) for index in range(len(members))]
    clock = SystemClock()
    deadline_s = clock.monotonic_s() + TIMEOUT_S
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline_s - clock.monotonic_s()))
    return [*answers]


def _asked(address: Address, member: Member, client: ClientSettings | None) -> Status | str:
    if member.problem:
        return member.problem
    if not member.url:
        return "it has told no address yet"
    own = client_for(member.url, client or ClientSettings())
    try:
        with HttpReader(member.url, settings=own) as reader:
            answer = msgspec.json.decode(reader.fetch("/v1/status", timeout_s=TIMEOUT_S), type=Status)
    except Unauthenticated as error:
        return str(error) if own is client else f"it needs an access token; {_TOKENS}"
    except PipelineError as error:
        return str(error).removeprefix(f"{member.url}: ")
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        return f"not a worker's answer: {error}"
    if answer.role != "worker":
        return f"not a worker's answer: role {known(answer.role)}"
    if (answer.app, answer.name) != (address.app, member.name):
        return f"worker {known(answer.name) or '(without a name)'} of {known(answer.app)} answers there"
    return answer


def client_for(url: str, client: ClientSettings) -> ClientSettings:
    """Return the settings for a member at a URL: without the access token, unless nobody else can answer there.

    Whoever can join the group on Kafka names a URL there, and would be sent the token. On this machine a stranger does not
    listen, and an authority of ours, in `ca_file`, signs no certificate for one.
    """
    parts = urlsplit(url)
    is_ours = is_loopback(parts.hostname or "") or (parts.scheme == "https" and client.ca_file)
    return client if is_ours else replace(client, token=Secret(), token_file="")  # nosec B106  # no file


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
    """Join a member with its answer. A stable group says which partitions it has, else the member does."""
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
