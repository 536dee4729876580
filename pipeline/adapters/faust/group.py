"""The consumer group of an app as its coordinator describes it, for processes that are no members."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import NamedTuple

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, for_code

from pipeline.adapters.faust.errors import limit_logging, translate
from pipeline.adapters.faust.member_metadata import CLIENT, name_and_url
from pipeline.adapters.faust.security import Security
from pipeline.adapters.faust.strangers import said, told
from pipeline.adapters.kafka.options import Address
from pipeline.errors import BadRecord
from pipeline.ports import Member
from pipeline.topics import CHANGELOG, DELTAS

STABLE = "Stable"
_AGAIN_S = 0.2


class ConsumerGroup(NamedTuple):
    """A group at one moment."""

    state: str
    """Kafka's name of the state: Stable, PreparingRebalance, CompletingRebalance, Empty, Dead."""
    members: list[Member]
    """Unless the group is stable, members have no partitions, and perhaps no URLs."""


def describe_group(address: Address, security: Security, *, timeout_s: float) -> ConsumerGroup:
    """Return the group of an app's workers once it is stable, or after `timeout_s` as it is.

    Raises `Unavailable` if no broker answers in time, `Invalid` without the permission to see the group.
    """
    limit_logging()
    try:
        return asyncio.run(_described(address, security, timeout_s))
    except (KafkaError, TimeoutError, OSError) as error:
        raise translate(error, address.app, f"asking who is in group {address.app}", needs="DESCRIBE") from None


async def _described(address: Address, security: Security, timeout_s: float) -> ConsumerGroup:
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + timeout_s
    async with asyncio.timeout(timeout_s * 2):
        admin = AIOKafkaAdminClient(
            bootstrap_servers=address.bootstrap,
            client_id=f"{address.app}-status",
            request_timeout_ms=int(timeout_s * 1000),
            **security.aiokafka(),
        )
        try:
            await admin.start()
            while True:
                in_time = loop.time() < deadline_s
                try:
                    found = await _asked(admin, address)
                except KafkaError as error:
                    if not (error.retriable and in_time):  # a broker that was just started finds its groups in a moment
                        raise
                else:
                    if found.state in (STABLE, "Empty", "Dead") or not in_time:
                        return found
                await asyncio.sleep(_AGAIN_S)
        finally:
            await admin.close()


async def _asked(admin: AIOKafkaAdminClient, address: Address) -> ConsumerGroup:
    (answer,) = await admin.describe_consumer_groups([address.app])
    ((code, _, state, _, _, members, *_),) = answer.groups
    if code:
        raise for_code(code)
    return ConsumerGroup(state, sorted(_member(address, *it) for it in members))


def _member(address: Address, _: str, client_id: str, __: str, metadata: bytes, assignment: bytes) -> Member:
    name, url, problem = client_id.partition(f"{address.app}{CLIENT}")[2] or client_id, "", ""
    actives, standbys = frozenset[int](), frozenset[int]()
    if metadata:  # of a rebalance there is none
        try:
            name, url = name_and_url(said(metadata).url)
        except BadRecord:
            problem = "a stranger: what it says of itself is not what a worker says"
    with suppress(BadRecord):
        placed = told(assignment).assignment
        actives = frozenset(placed.actives.get(address.topic(DELTAS), ()))
        standbys = frozenset(placed.standbys.get(address.topic(CHANGELOG), ()))
    return Member(name, url, actives, standbys, problem)
