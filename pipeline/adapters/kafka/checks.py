"""Checks of an app's topics on a broker: what workers and query servers need of them to be exact.

A follower of the changelog that reads more slowly than compaction works can miss a value: the old record is removed before
the follower has read the newer one, and its store then holds a state that never existed. Records younger than the topic's
`min.compaction.lag.ms` remove nothing, so a follower that is behind by less than half of that time is safe. Kafka's default
is 0, with which no server may answer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.adapters.kafka.log import KafkaLog
from pipeline.errors import Invalid
from pipeline.topics import CHANGELOG, Topic

_log = logging.getLogger(__name__)

LAG = "min.compaction.lag.ms"
TIMESTAMPS = "message.timestamp.type"
LAG_MS_MIN = 2_000
"""Shortest usable lag: a server asks for the changelog's end ten times in half of it."""


class CompactionLag:
    """Tells, from the broker's settings, for how long a server of `log` may be behind.

    `assumed_ms` is the compaction lag to assume if the broker does not show its setting; 0: assume none.
    """

    def __init__(self, log: KafkaLog, assumed_ms: int = 0) -> None:
        self._log = log
        self._assumed_ms = assumed_ms
        self.why_not = ""
        """Reason why nothing may be served, as of the last call; empty if it may."""

    def check(self) -> None:
        """Raise `Invalid`, saying what to do, if servers may not answer."""
        if not self():
            raise Invalid(self.why_not)

    def __call__(self) -> float:
        """Return the seconds by which a server may be behind, or 0 if it must not serve. Raises `Unavailable`."""
        lag_ms, self.why_not = self._lag_ms()
        return lag_ms / 2_000

    def _lag_ms(self) -> tuple[int, str]:
        name, address = self._log.address.topic(CHANGELOG), self._log.address
        options = self._log.topic_options(CHANGELOG)
        if LAG not in options:
            why = (
                f"whether servers can answer from topic {name} depends on its {LAG}, which we may not see: grant "
                f"DESCRIBE_CONFIGS on topic {name} with kafka-acls, or say what it is in the setting compaction_lag_ms"
            )
            return self._assumed_ms, "" if self._assumed_ms else why
        apply = f"`pipeline topics apply --to {address}` sets 600000 (10 minutes) and LogAppendTime"
        if options.get(TIMESTAMPS, "LogAppendTime") != "LogAppendTime":
            # Compaction would go by the workers' clocks, and a wrong one would make young records old.
            return 0, f"topic {name} has {TIMESTAMPS}={options[TIMESTAMPS]}, so its {LAG} can't be relied on: {apply}"
        lag_ms = int(options[LAG])
        if lag_ms < LAG_MS_MIN:
            why = (
                f"topic {name} has {LAG}={lag_ms}: compaction could remove values before a server reads the newer ones, and "
                f"its answers would be of states that never were; at least {LAG_MS_MIN} is needed: {apply}"
            )
            return 0, why
        return lag_ms, ""


def check_topics(log: KafkaLog, names: Sequence[str]) -> int:
    """Return the partition count of the topics; `Invalid` if it differs, `Unavailable` if no broker answers."""
    log.connect(names)
    counts = {name: log.partition_count(name) for name in names}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{log.address.topic(name)} {count}" for name, count in counts.items())
        raise Invalid(
            f"the topics need as many partitions as each other, but have: {found}; pipeline topics plan --to {log.address}"
        )
    return counts[names[0]]


def check_changelog(log: KafkaLog, described: Topic) -> int:
    """Return the ms for which the changelog keeps tombstones at least; `Invalid` if the topic deletes state.

    Logs a warning for each setting that query servers need and that is different.
    """
    options = log.topic_options(CHANGELOG)
    name, do = log.address.topic(CHANGELOG), f"pipeline topics plan --to {log.address}"
    policy = options.get("cleanup.policy", "compact")
    if policy != "compact":
        raise Invalid(f"topic {name} has cleanup.policy={policy}, which deletes committed state; it must be compact: {do}")
    for option in ("min.compaction.lag.ms", "message.timestamp.type"):
        wanted = described.kafka.get(option)
        found = options.get(option)
        if found is not None and wanted is not None and (int(found) < wanted if type(wanted) is int else found != wanted):
            _log.warning("topic %s has %s=%s, not %s: query servers need it; %s", name, option, found, wanted, do)
    return min(described.delete_retention_ms, int(options.get("delete.retention.ms", described.delete_retention_ms)))
