"""librdkafka's own mock cluster, for errors that real brokers do not give on demand.

The cluster is reached in the library that confluent_kafka has loaded. It appends all records and knows nothing of
isolation: only a real broker shows which records a transaction makes visible.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from confluent_kafka import Producer

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.options import Address, parse_url, transaction_options
from pipeline.adapters.kafka.reader import KafkaReader
from pipeline.adapters.kafka.transaction import KafkaTransaction
from pipeline.ports import Message

PRODUCE, FETCH, LIST_OFFSETS, METADATA = 0, 1, 2, 3
FIND_COORDINATOR, INIT_PRODUCER_ID, ADD_PARTITIONS, END_TXN = 10, 22, 24, 26
"""Numbers of requests (KIP-1 and later)."""

_PRODUCER = 0


def _library() -> Any:
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "librdkafka" in line}
    lib = ctypes.CDLL(sorted(path for path in paths if ".so" in path)[0])
    pointer = ctypes.c_void_p
    for name, result, arguments in (
        ("rd_kafka_conf_new", pointer, []),
        ("rd_kafka_conf_set", ctypes.c_int, [pointer, *[ctypes.c_char_p] * 3, ctypes.c_size_t]),
        ("rd_kafka_new", pointer, [ctypes.c_int, pointer, ctypes.c_char_p, ctypes.c_size_t]),
        ("rd_kafka_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_new", pointer, [pointer, ctypes.c_int]),
        ("rd_kafka_mock_cluster_destroy", None, [pointer]),
        ("rd_kafka_mock_cluster_bootstraps", ctypes.c_char_p, [pointer]),
        ("rd_kafka_mock_clear_request_errors", None, [pointer, ctypes.c_int16]),
        ("rd_kafka_mock_push_request_errors_array", None, [pointer, ctypes.c_int16, ctypes.c_size_t, pointer]),
        ("rd_kafka_mock_topic_create", ctypes.c_int, [pointer, ctypes.c_char_p, ctypes.c_int, ctypes.c_int]),
        ("rd_kafka_mock_set_apiversion", ctypes.c_int, [pointer, ctypes.c_int16, ctypes.c_int16, ctypes.c_int16]),
        ("rd_kafka_mock_start_request_tracking", None, [pointer]),
        ("rd_kafka_mock_get_requests", ctypes.POINTER(pointer), [pointer, ctypes.POINTER(ctypes.c_size_t)]),
        ("rd_kafka_mock_request_destroy_array", None, [ctypes.POINTER(pointer), ctypes.c_size_t]),
        ("rd_kafka_mock_request_api_key", ctypes.c_int16, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class MockCluster:
    """Brokers, one by default, that answer as they are told to. Close it after the clients that use it."""

    def __init__(self, count: int = 1) -> None:
        self._lib = _library()
        text = ctypes.create_string_buffer(512)
        conf = self._lib.rd_kafka_conf_new()
        assert self._lib.rd_kafka_conf_set(conf, b"log_level", b"0", text, len(text)) == 0, text.value
        self._client = self._lib.rd_kafka_new(_PRODUCER, conf, text, len(text))
        assert self._client, text.value
        self._cluster = self._lib.rd_kafka_mock_cluster_new(self._client, count)
        assert self._cluster
        self._lib.rd_kafka_mock_start_request_tracking(self._cluster)

    @property
    def bootstrap(self) -> str:
        """host:port."""
        address: bytes = self._lib.rd_kafka_mock_cluster_bootstraps(self._cluster)
        return address.decode()

    def create(self, topic: str, partitions: int) -> None:
        """Create a topic."""
        assert self._lib.rd_kafka_mock_topic_create(self._cluster, topic.encode(), partitions, 1) == 0

    def fail(self, request: int, *codes: int) -> None:
        """Answer the next requests of this kind with these errors, one each, and later ones well again."""
        errors = (ctypes.c_int * len(codes))(*codes)
        self._lib.rd_kafka_mock_push_request_errors_array(self._cluster, request, len(codes), errors)

    def heal(self, request: int) -> None:
        """Answer requests of this kind without errors again."""
        self._lib.rd_kafka_mock_clear_request_errors(self._cluster, request)

    def limit(self, request: int, newest: int) -> None:
        """Know only versions 0 to `newest` of a request; -1: don't know it at all."""
        assert self._lib.rd_kafka_mock_set_apiversion(self._cluster, request, min(0, newest), newest) == 0

    def requests(self) -> list[int]:
        """Return the kinds of all requests so far, in order."""
        count = ctypes.c_size_t()
        found = self._lib.rd_kafka_mock_get_requests(self._cluster, ctypes.byref(count))
        kinds = [int(self._lib.rd_kafka_mock_request_api_key(found[n])) for n in range(count.value)]
        self._lib.rd_kafka_mock_request_destroy_array(found, count)
        return kinds

    def close(self) -> None:
        self._lib.rd_kafka_mock_cluster_destroy(self._cluster)
        self._lib.rd_kafka_destroy(self._client)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def address(mock: MockCluster) -> Address:
    """Return the cluster's address."""
    return parse_url(f"kafka://{mock.bootstrap}")


def begun(mock: MockCluster, transactional_id: str = "t-0", *, timeout_s: float = 10.0, **options: Any) -> KafkaTransaction:
    """Return a new transaction on the cluster, which tries again in haste."""
    ours = transaction_options(address(mock), {}, transactional_id=transactional_id, timeout_ms=5_000)
    return KafkaTransaction(
        {**ours, "retry.backoff.ms": 1, "retry.backoff.max.ms": 5, **options},
        transactional_id,
        timeout_s=timeout_s,
        clock=SystemClock(),
        check=lambda _topic, _partition: None,
        broker_topic=address(mock).topic,
    )


def reader_of(options: Mapping[str, Any], end_offset: int) -> KafkaReader:
    """Return a reader of a topic with one partition, which ends at an offset."""
    return KafkaReader(
        options,
        "deltas",
        clock=SystemClock(),
        partition_count=lambda: 1,
        start_offsets=lambda _: {0: 0},
        end_offsets=lambda _: {0: end_offset},
        ask_ends=lambda _: {},
    )


def one_by_one(options: Mapping[str, Any]) -> tuple[Producer, None]:
    """Return a producer as `batches.new_producer` does where messages can't be produced in one call."""
    return Producer(options), None


def three(start: int = 0) -> list[Message]:
    """Return three messages: the first and the last report, and one between them does not."""
    return [Message("deltas", 0, b"k", b"%d" % number) for number in range(start, start + 3)]
