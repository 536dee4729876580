"""Producing thousands of messages in one call of librdkafka, where the native core is in use.

The native core calls `rd_kafka_produce_batch` of the librdkafka that confluent_kafka has loaded. It is told of a client's
handle as a plugin of the client. Where that can't be, messages are produced one by one, which costs several times as much.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from confluent_kafka import KafkaException, Producer, cimpl, libversion

from pipeline import native
from pipeline.adapters.kafka.errors import error_of
from pipeline.errors import Invalid

_log = logging.getLogger(__name__)
_PLUGINS = "plugin.library.paths"
_MAJOR = 2
"""Major version of librdkafka whose functions and structures the native core knows."""
_FUNCTIONS = (
    "rd_kafka_conf_interceptor_add_on_new",
    "rd_kafka_topic_new",
    "rd_kafka_topic_destroy",
    "rd_kafka_produce_batch",
)


class BatchProducer(Protocol):
    """The native core's class of that name. It keeps its producer alive."""

    def produce(
        self,
        topic: str,
        partition: int,
        keys: Sequence[bytes | None],
        values: Sequence[bytes | None],
        start: int,
        end: int,
    ) -> tuple[int, int]:
        """Enqueue messages with `keys[start:end]` and `values[start:end]`; return the number of the first that is not
        enqueued, and the code of its error.

        Returns `end` and 0 if all are enqueued. If the code is that of a full queue, none of the others is enqueued.
        """
        ...


def new_producer(options: Mapping[str, Any]) -> tuple[Producer, BatchProducer | None]:
    """Return a new producer, and what enqueues many messages at it in one call; None where that can't be.

    Raises `Invalid` if it can't be and PIPELINE_NATIVE=require. The producer must be dropped, never closed.
    """
    addresses, _ = _found(_PLUGINS in options)
    if addresses is None:
        return Producer(options), None
    return _plugged(options, addresses)


def describe(options: Mapping[str, Any]) -> str:
    """Return a sentence that says whether many messages are produced in one call, and why not."""
    return _found(_PLUGINS in options)[1]


def are_in_use(options: Mapping[str, Any]) -> bool:
    """Return whether producers with these options produce many messages in one call."""
    return _found(_PLUGINS in options)[0] is not None


def _plugged(options: Mapping[str, Any], addresses: tuple[int, ...]) -> tuple[Producer, BatchProducer | None]:
    extension = native.extension()
    extension.BatchProducer.expect(*addresses)
    producer = Producer({**options, _PLUGINS: extension.__file__})
    return producer, extension.BatchProducer.of(producer)


@cache
def _found(has_plugins: bool) -> tuple[tuple[int, ...] | None, str]:
    """Return the addresses of librdkafka's functions, or None, and a sentence that says why."""
    if native.extension() is None:
        return None, f"messages are produced one by one: {native.describe()}"
    if has_plugins:
        return _without(f"the setting kafka has {_PLUGINS}, which the native core needs for itself", "leave it out")
    version, number = libversion()
    if number >> 24 != _MAJOR:
        return _without(f"librdkafka has version {version}", f"install a confluent-kafka with librdkafka {_MAJOR}.x")
    wheel = "install confluent-kafka as a wheel from PyPI"
    try:
        library = ctypes.CDLL(cimpl.__file__)  # finds the functions of what this module is linked with, too
        addresses = tuple(ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0 for name in _FUNCTIONS)
        _, batches = _plugged({"bootstrap.servers": "", "log_level": 0}, addresses)
    except (OSError, AttributeError, RuntimeError) as error:
        return _without(f"librdkafka's functions are not found: {error}", wheel)
    except KafkaException as exception:
        return _without(f"librdkafka can't load the native core: {error_of(exception).str().strip()}", wheel)
    if batches is None:
        return _without("librdkafka did not tell the native core of a client", wheel)
    return addresses, "many messages are produced in one call"


def _without(why: str, what: str) -> tuple[None, str]:
    if native.is_required():
        raise Invalid(f"messages can't be produced in one call: {why}, and {native.VARIABLE}=require: {what}")
    _log.info("commits cost more, because messages are produced one by one: %s; to change that, %s", why, what)
    return None, f"messages are produced one by one: {why}; {what}"
