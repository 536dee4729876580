"""How far behind a query server may fall before the changelog's compaction can make its answers wrong.

A follower that reads slower than compaction cleans can miss a value that is gone while it has not read the newer one yet:
its store then is a state that never was. What is younger than the topic's `min.compaction.lag.ms` removes nothing, so a
follower within half of that time is safe. Kafka's default is 0: then no server is.
"""

from __future__ import annotations

from pipeline.adapters.kafka.log import KafkaLog
from pipeline.errors import Invalid
from pipeline.topics import CHANGELOG

LAG = "min.compaction.lag.ms"
TIMESTAMPS = "message.timestamp.type"
LAG_MS_MIN = 2_000
"""The shortest lag that a server can live with: it asks for the changelog's end ten times in half of it."""


class CompactionLag:
    """The time by which a server of `log` may be behind, as the broker says now.

    `assumed_ms` is the lag where the broker does not let us see it; 0: none is assumed.
    """

    def __init__(self, log: KafkaLog, assumed_ms: int = 0) -> None:
        self._log = log
        self._assumed_ms = assumed_ms
        self.why_not = ""
        """Why nothing may be served, as of the last call; empty: it may."""

    def check(self) -> None:
        """Raise `Invalid`, saying what to do, unless servers can answer."""
        if not self():
            raise Invalid(self.why_not)

    def __call__(self) -> float:
        """Seconds by which a server may be behind; 0: it must not serve at all. Raises `Unavailable`."""
        lag_ms, self.why_not = self._asked()
        return lag_ms / 2_000

    def _asked(self) -> tuple[int, str]:
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
