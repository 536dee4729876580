"""What Faust and aiokafka log by themselves, made bearable: each line once a minute, and not what is normal.

That each of Faust's services starts and stops is for debugging; what it does for us we say ourselves.
"""

from __future__ import annotations

import logging

from pipeline.adapters.kafka.said import RateLimitFilter

_LOGGERS = ("aiokafka", "aiokafka.conn", "aiokafka.consumer.group_coordinator", "faust", "faust.app.base")
_NORMAL = (
    "Group Coordinator Request failed: [Error 15]",  # the first member of a new cluster, for some seconds
    "Missing sensor state",  # nobody measures rebalances there
    "because it is rebalancing",
)


class _Quiet(RateLimitFilter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether to log it."""
        return not any(text in record.getMessage() for text in _NORMAL) and super().filter(record)


def quieten() -> None:
    """Of all members of this process. Twice is fine."""
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        logging.getLogger("faust").setLevel(logging.WARNING)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(it, _Quiet) for it in logger.filters):
            logger.addFilter(_Quiet())
