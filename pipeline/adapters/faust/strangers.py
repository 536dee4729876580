"""Members of a group that are no workers of this program: what they say of themselves is checked before it is used.

Whoever may join a group chooses the bytes that its leader and its observers read. A leader must not fail because of them,
for then nobody folds; and a member must not follow a leader that is no worker.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Annotated, Any

import msgspec
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata
from msgspec import Meta

from pipeline.errors import BadRecord, Invalid, PipelineError

METADATA_BYTES_MAX = 16 * 2**20
"""Size of the largest metadata of a member, unpacked: 1,000 members with 1,000 partitions each need a fourth of it."""
_Partitions = dict[str, list[Annotated[int, Meta(ge=0, lt=2**31)]]]


class _Placed(msgspec.Struct):
    actives: _Partitions
    standbys: _Partitions


class MemberMetadata(msgspec.Struct):
    """Fields of Faust's metadata, which all workers send."""

    assignment: _Placed
    url: str
    changelog_distribution: dict[str, _Partitions]
    external_topic_distribution: dict[str, _Partitions]
    topic_groups: dict[str, Annotated[int, Meta(ge=0, lt=2**31)]] | None = None


_NOTHING = msgspec.json.encode(MemberMetadata(_Placed({}, {}), "http://0.0.0.0/#stranger", {}, {}, {}))
"""MemberMetadata in place of that of a stranger: the leader gives it no partitions."""


def said(metadata: bytes) -> MemberMetadata:
    """Return what a member says when it joins. Raises `BadRecord` if it is no worker."""
    try:
        return _decoded(ConsumerProtocolMemberMetadata.decode(metadata).user_data)
    except (ValueError, TypeError):
        raise BadRecord("no worker's metadata") from None


def told(assignment: bytes) -> MemberMetadata:
    """Return what the leader tells a member. Raises `BadRecord` if the leader is no worker."""
    try:
        return _decoded(unpacked(ConsumerProtocolMemberAssignment.decode(assignment).user_data))
    except (ValueError, TypeError):
        raise BadRecord("no worker's assignment") from None


def unpacked(data: bytes) -> bytes:
    """Return decompressed bytes, at most `METADATA_BYTES_MAX`. Raises `BadRecord` for more, and for what is not whole."""
    unpacker = zlib.decompressobj()
    try:
        found = unpacker.decompress(data, METADATA_BYTES_MAX)
    except (zlib.error, TypeError):
        raise BadRecord("metadata of a group that is not compressed") from None
    if not unpacker.eof or unpacker.unused_data:
        raise BadRecord("metadata of a group that is cut off or too large")
    return found


def _decoded(user_data: bytes | None) -> MemberMetadata:
    if user_data is None or len(user_data) > METADATA_BYTES_MAX:
        raise BadRecord("no metadata, or too large")
    try:
        return msgspec.json.decode(user_data, type=MemberMetadata)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadRecord(f"not a worker's metadata: {error}") from None


def guard(coordinator: Any, group: str, strangers: Callable[[int], None], fail: Callable[[PipelineError], None]) -> None:
    """Check what a group's members and its leader say before aiokafka and Faust read it.

    As leader, leave out what strangers say and subscribe to, and call `strangers` with their number. As member of a group
    whose leader is a stranger, call `fail` and follow no assignment.
    """
    assign, complete = coordinator._perform_assignment, coordinator._on_join_complete

    async def perform_assignment(response: Any) -> Any:
        members, count = [], 0
        for *head, metadata in response.members:
            try:
                said(metadata)
            except BadRecord:
                count += 1
                metadata = ConsumerProtocolMemberMetadata(0, [], _NOTHING).encode()
            members.append((*head, metadata))
        strangers(count)
        version, protocol = response.API_VERSION, response.group_protocol
        return await assign(SimpleNamespace(API_VERSION=version, group_protocol=protocol, members=members))

    async def on_join_complete(generation: int, member_id: str, protocol: str, assignment: bytes) -> None:
        try:
            told(assignment)
        except BadRecord as error:
            fail(Invalid(f"group {group!r} is led by a program that is no worker ({error}): give this app another name"))
            await asyncio.Event().wait()
        await complete(generation, member_id, protocol, assignment)

    coordinator._perform_assignment, coordinator._on_join_complete = perform_assignment, on_join_complete
