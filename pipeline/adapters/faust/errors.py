"""Translates aiokafka's errors into those of `pipeline.errors`, and limits the log lines of Faust and aiokafka."""

from __future__ import annotations

import logging
import ssl

from aiokafka import errors

from pipeline.adapters.kafka.errors import RateLimitFilter
from pipeline.errors import Invalid, PipelineError, Unavailable

_GRANT = "grant it with kafka-acls"
_LOGGERS = ("aiokafka", "aiokafka.conn", "aiokafka.consumer.group_coordinator", "faust", "faust.app.base")
_NORMAL = (
    "Group Coordinator Request failed: [Error 15]",  # the first member of a new cluster, for some seconds
    "Missing sensor state",  # Faust's rebalance sensors are not used
    "because it is rebalancing",
)


def translate(error: BaseException, group: str, what: str, *, needs: str = "READ") -> PipelineError:
    """Return one of our errors. `what` says what was tried, `needs` which permission on the group that takes."""
    match error:
        case PipelineError():
            return error
        case errors.GroupAuthorizationFailedError():
            return Invalid(f"{what}: {needs} on the group {group} is missing: {_GRANT}")
        case errors.TopicAuthorizationFailedError():
            return Invalid(f"{what}: DESCRIBE on topic {', '.join(map(str, error.args))} is missing: {_GRANT}")
        case errors.InconsistentGroupProtocolError():
            return Invalid(f"{what}: group {group} is that of another program: choose another app's name")
        case errors.InvalidSessionTimeoutError():
            return Invalid(
                f"{what}: session_timeout_ms is not between group.min and group.max.session.timeout.ms of the broker"
            )
        case errors.AuthenticationFailedError() | errors.AuthenticationMethodNotSupported():
            return Invalid(f"{what}: {error}: check sasl.* in the setting `kafka`")
        case (
            errors.GroupCoordinatorNotAvailableError()
            | errors.NotCoordinatorForGroupError()
            | errors.GroupLoadInProgressError()
        ):
            return Unavailable(f"{what}: the broker that coordinates group {group} is not there yet: try again in a moment")
        case ssl.SSLError():
            return Invalid(f"{what}: {error}: check ssl.* and security.protocol in the setting `kafka`")
    return Unavailable(f"{what}: {error!r}")


class _NoiseFilter(RateLimitFilter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to log the record."""
        return not any(text in record.getMessage() for text in _NORMAL) and super().filter(record)


def limit_logging() -> None:
    """Log each line of Faust and aiokafka once a minute, and none about regular operation. Idempotent."""
    if logging.getLogger().getEffectiveLevel() > logging.DEBUG:
        logging.getLogger("faust").setLevel(logging.WARNING)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # each token that is renewed is a line
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(it, _NoiseFilter) for it in logger.filters):
            logger.addFilter(_NoiseFilter())
