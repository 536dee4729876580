"""A broker that stands still keeps its connections: members give it up in time to find the next one."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.errors import NodeNotReadyError, RequestTimedOutError
from aiokafka.protocol.group import HeartbeatRequest

from pipeline.adapters.faust.app import _shorten_timeouts
from tests.broker.kafka import Broker

TIMEOUT_S = 1.0
PATIENT_S = 30.0
SOON_S = 8.0
"""Well below `PATIENT_S`, on a slow machine too."""


async def beat(client: Any, node: Any) -> bool:
    """Send the heartbeat of an unknown member, and return whether the broker answers with an error."""
    answer = await client.send(node, HeartbeatRequest("nobody", 0, "nobody"), group=ConnectionGroup.COORDINATION)
    return bool(answer.error_code)


@pytest.mark.long
def test_heartbeats_are_not_waited_for(broker: Broker) -> None:
    """A heartbeat or a connection attempt without an answer fails in time; both work again when the broker wakes."""

    async def run() -> None:
        client: Any = AIOKafkaClient(bootstrap_servers=broker.bootstrap, request_timeout_ms=int(PATIENT_S * 1000))
        await client.bootstrap()
        try:
            _shorten_timeouts(client, TIMEOUT_S)
            node = client.get_random_node()
            assert await beat(client, node)
            joins = client._conns[node, ConnectionGroup.COORDINATION]
            assert joins._request_timeout == PATIENT_S  # a join waits for the others
            await client.force_metadata_update()
            assert client._conns[node, ConnectionGroup.DEFAULT]._request_timeout == TIMEOUT_S
            broker.pause()
            for _ in range(2):  # on the connection that there is, and on a new one
                began_s = time.monotonic()
                with pytest.raises((RequestTimedOutError, NodeNotReadyError)):
                    await beat(client, node)
                assert time.monotonic() - began_s < SOON_S
            broker.resume()
            deadline_s = time.monotonic() + 60
            while True:
                try:
                    assert await beat(client, node)
                    break
                except (RequestTimedOutError, NodeNotReadyError):
                    assert time.monotonic() < deadline_s
        finally:
            await client.close()

    asyncio.run(run())


class Answering:
    """The part of a client that is needed, with answers that come when the test wants."""

    _request_timeout_ms = 30_000

    def __init__(self) -> None:
        self.answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def _get_conn(self, node: Any) -> None:
        pass

    async def send(self, node: Any, request: Any, *, group: Any) -> str:
        return await self.answer


def test_cancelled_heartbeats_end() -> None:
    """A cancelled heartbeat ends as cancelled even if its answer comes at the same moment."""

    async def run() -> None:
        client: Any = Answering()
        _shorten_timeouts(client, 30.0)
        sending = asyncio.create_task(client.send(0, HeartbeatRequest("nobody", 0, "nobody")))
        for _ in range(10):
            await asyncio.sleep(0)  # until it waits for the answer
        client.answer.set_result("fine")
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending

    asyncio.run(run())
