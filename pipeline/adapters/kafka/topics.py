"""Creates and changes topics on a broker. `plan` decides what to do; this module carries it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec
from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ClusterMetadata,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from pipeline.adapters.kafka.errors import LastError, Verdict, code_of, describe, error_of, translate
from pipeline.adapters.kafka.options import Address, admin_options, try_user_options
from pipeline.adapters.kafka.plan import (
    DEFAULT_REPLICATION,
    ORDER,
    PARTITIONS,
    REPLICATION,
    Found,
    Plan,
    Step,
    Wish,
    make_plan,
)
from pipeline.errors import Invalid, Unavailable
from pipeline.ports import Clock
from pipeline.secret import revealed
from pipeline.topics import Topic

_PAUSE_S = 0.05
_LATE_S = 1.0
"""Delay with which librdkafka may report its own time-out."""
_RACES = frozenset(
    {
        KafkaError.TOPIC_ALREADY_EXISTS,
        KafkaError.INVALID_PARTITIONS,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError._UNKNOWN_TOPIC,
    }
)
"""Errors of a race: another client was faster, or the broker has not heard of the topic yet. Look again."""
_DENIED = frozenset({KafkaError.TOPIC_AUTHORIZATION_FAILED, KafkaError.CLUSTER_AUTHORIZATION_FAILED})


class Applied(msgspec.Struct, frozen=True):
    """Result of `TopicAdmin.apply`."""

    plan: Plan
    """The last plan: without changes, or with refusals."""
    done: Sequence[Step]
    """Steps that were carried out; empty if anything was refused at once."""


class _Again(Exception):
    """The plan no longer fits, or a request may be repeated. Holds the error."""

    def __init__(self, error: KafkaError, what: str) -> None:
        super().__init__()
        self.error = error
        self.what = what


class TopicAdmin:
    """The three topics of one app on a broker. All calls of one object together may take `timeout_ms`."""

    def __init__(
        self, address: Address, user: Mapping[str, Any], topics: Mapping[str, Topic], clock: Clock, *, timeout_ms: int
    ) -> None:
        self._address = address
        self._topics = topics
        self._clock = clock
        self._timeout_ms = timeout_ms
        self._deadline_s = clock.monotonic_s() + timeout_ms / 1000
        self._last_error = LastError()
        try_user_options(address, user, timeout_ms=timeout_ms)
        options: dict[str, Any] = {**admin_options(address, user), "error_cb": self._last_error}
        if "debug" not in user:
            options["log_level"] = 2  # the error contains the reason
        # Kept until the end: a client that is garbage-collected cancels its requests.
        self._client = AdminClient(revealed(options))

    def plan(self, wish: Wish) -> Plan:
        """Return what `apply` would do. Changes nothing.

        Raises `Unavailable` if no broker answers in time, `Invalid` if one refuses to answer.
        """
        while True:
            try:
                return self._plan(wish)
            except _Again as again:
                self._pause(again)

    def apply(self, wish: Wish) -> Applied:
        """Carry out the plan, or nothing if a part of it is refused, here or by the broker.

        Returns when the broker shows every change. Concurrent calls do no harm. Raises as `plan` does; the changes until
        then stay, and the next call goes on from there.
        """
        done: list[Step] = []
        while True:
            try:
                plan = self._plan(wish)
                if plan.refused or not plan.changes:
                    return Applied(plan, done)
                if done and self._clock.monotonic_s() >= self._deadline_s:
                    unlike = ", ".join(f"{self._address.topic(it.topic)} {it.setting}={it.found}" for it in plan.changes)
                    raise Unavailable(f"{self._address}: changed, but the broker still shows {unlike}: look again with plan")
                self._check(plan, done)
                for name in ORDER:
                    steps = self._carry_out(name, plan, check_only=False)
                    done += [step for step in steps if step not in done]
                    self._wait_until_shown(name, plan)
                self._client.poll(_PAUSE_S)  # settings reach the broker that answers a moment after the controller
            except _Again as again:
                self._pause(again)

    def _check(self, plan: Plan, done: Sequence[Step]) -> None:
        try:
            for name in ORDER:
                self._carry_out(name, plan, check_only=True)
        except Invalid as error:
            raise error if done else Invalid(f"{error}; nothing was changed") from None

    # Reading

    def _plan(self, wish: Wish) -> Plan:
        found: dict[str, Found] = {}
        broker_count = 0
        for name in ORDER:
            metadata = self._metadata(name)
            broker_count = len(metadata.brokers)
            topic = metadata.topics.get(self._address.topic(name))
            if topic is None or (topic.error is not None and topic.error.code() == KafkaError.UNKNOWN_TOPIC_OR_PART):
                continue
            if topic.error is not None:
                raise self._sorted(topic.error, "look at", name, "DESCRIBE")
            replication = sorted({len(partition.replicas) for partition in topic.partitions.values()})
            found[name] = Found(len(topic.partitions), tuple(replication), self._configs(name))
        return make_plan(self._topics, found, wish, broker_count=broker_count)

    def _metadata(self, name: str) -> ClusterMetadata:
        """Return the metadata of one topic. Waits in growing slices, because librdkafka tells the reason of a failure
        between them.
        """
        slice_s = 0.5
        while True:
            try:
                return self._client.list_topics(self._address.topic(name), min(self._left_s(), slice_s))
            except KafkaException as exception:
                error = error_of(exception)
            self._client.poll(0)
            for it in (error, self._last_error.last):
                if it is not None and code_of(it).verdict is not Verdict.RETRY:
                    raise translate(it, str(self._address))
            if self._clock.monotonic_s() >= self._deadline_s:
                raise self._nobody(error)
            slice_s *= 2

    def _configs(self, name: str) -> dict[str, str]:
        resource = ConfigResource(ResourceType.TOPIC, self._address.topic(name))
        futures = self._client.describe_configs([resource], request_timeout=self._left_s())
        entries = self._result(futures[resource], "read the settings of", name, "DESCRIBE_CONFIGS")
        return {entry.name: entry.value or "" for entry in entries.values()}

    # Changes

    def _carry_out(self, name: str, plan: Plan, *, check_only: bool) -> list[Step]:
        """Carry out the steps of one topic, or with `check_only` ask the broker whether it would; return the steps."""
        steps = [step for step in plan.changes if step.topic == name]
        wanted = {step.setting: step.wanted for step in steps}
        count = int(wanted.pop(PARTITIONS, 0))
        if any(step.action == "create" for step in steps):
            factor = wanted.pop(REPLICATION)
            replicas = int(factor) if factor.isdecimal() else DEFAULT_REPLICATION
            self._create(name, count, replicas, wanted, check_only)
            return steps
        if wanted:
            self._alter(name, wanted, check_only)
        if count:
            self._grow(name, count, check_only)
        return steps

    def _create(self, name: str, count: int, replicas: int, configs: dict[str, str], check_only: bool) -> None:
        topic = NewTopic(self._address.topic(name), num_partitions=count, replication_factor=replicas, config=configs)
        left_s = self._left_s()
        futures = self._client.create_topics(
            [topic], request_timeout=left_s, operation_timeout=left_s, validate_only=check_only
        )
        self._result(futures[topic.topic], "create", name, "CREATE")

    def _alter(self, name: str, configs: Mapping[str, str], check_only: bool) -> None:
        entries = [
            ConfigEntry(setting, value, incremental_operation=AlterConfigOpType.SET) for setting, value in configs.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, self._address.topic(name), incremental_configs=entries)
        futures = self._client.incremental_alter_configs(
            [resource], request_timeout=self._left_s(), validate_only=check_only
        )
        self._result(futures[resource], "change settings of", name, "ALTER_CONFIGS")

    def _grow(self, name: str, count: int, check_only: bool) -> None:
        left_s = self._left_s()
        more = NewPartitions(self._address.topic(name), count)
        futures = self._client.create_partitions(
            [more], request_timeout=left_s, operation_timeout=left_s, validate_only=check_only
        )
        self._result(futures[self._address.topic(name)], "add partitions to", name, "ALTER")

    def _wait_until_shown(self, name: str, plan: Plan) -> None:
        """Wait until every partition of a topic has a leader, as the next client needs."""
        counts = [int(step.wanted) for step in plan.changes if (step.topic, step.setting) == (name, PARTITIONS)]
        while counts:
            topic = self._metadata(name).topics[self._address.topic(name)]
            leaders = [partition.leader for partition in topic.partitions.values()]
            if topic.error is None and len(leaders) >= counts[0] and min(leaders) >= 0:
                return
            if self._clock.monotonic_s() >= self._deadline_s:
                there = sum(leader >= 0 for leader in leaders)
                raise Unavailable(
                    f"{self._address.topic(name)}: {there} of {counts[0]} partitions have a leader: run it again"
                )
            self._client.poll(_PAUSE_S)

    # Time and errors

    def _left_s(self) -> float:
        return max(self._deadline_s - self._clock.monotonic_s(), 0.01)

    def _result(self, future: Future[Any], what: str, name: str, permission: str) -> Any:
        try:
            return future.result(self._left_s() + _LATE_S)
        except KafkaException as exception:
            raise self._sorted(error_of(exception), what, name, permission) from None
        except TimeoutError:
            raise self._nobody(None) from None

    def _sorted(self, error: KafkaError, what: str, name: str, permission: str) -> Exception:
        full = self._address.topic(name)
        if error.code() in _DENIED:
            return Invalid(
                f"{self._address}: no permission to {what} topic {full} ({error.name()}): "
                f"grant {permission} on it with kafka-acls, or set sasl.* and ssl.* in the setting `kafka`"
            )
        if error.code() in _RACES or code_of(error).verdict is Verdict.RETRY:
            return _Again(error, f"{what} topic {full}")
        return translate(error, f"{self._address}: {what} topic {full}")

    def _pause(self, again: _Again) -> None:
        """Wait for a moment before the next attempt; raise if time is over."""
        if self._clock.monotonic_s() >= self._deadline_s:
            raise Unavailable(
                describe(again.error, f"{self._address}: {again.what}, tried for {self._timeout_ms} ms")
            ) from None
        self._client.poll(_PAUSE_S)

    def _nobody(self, error: KafkaError | None) -> Unavailable:
        why = "" if error is None else f" ({self._last_error.text(error)})"
        return Unavailable(
            f"{self._address}: no broker answers in {self._timeout_ms} ms{why}: check the address, that the broker runs and "
            "its advertised.listeners can be reached from here, and security.protocol and ssl.* in the setting `kafka`"
        )
