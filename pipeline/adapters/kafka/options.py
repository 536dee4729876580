"""Addresses of clusters, and every librdkafka option that this package sets, each with its reason.

Users can set any other option (`security.protocol`, `sasl.*`, `ssl.*`, sizes, timeouts) with the setting `kafka`; options
that carry a guarantee are refused. Reference: librdkafka's CONFIGURATION.md.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from confluent_kafka import Consumer, KafkaException, Producer

from pipeline.adapters.kafka.errors import RateLimitFilter
from pipeline.adapters.kafka.tokens import CALLBACK, TOKEN_FILE, TokenFile, check_tokens
from pipeline.errors import Invalid
from pipeline.secret import redacted_url, revealed, with_files

_log = logging.getLogger("pipeline.kafka")
_log.addFilter(RateLimitFilter())
_APP = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,99}\Z")
_SERVER = re.compile(r"(\[[0-9a-fA-F:.]+\]|[a-zA-Z0-9._-]+):[0-9]{1,5}\Z")
PORT_MAX = 65_535
DEFAULT_APP = "pipeline"
MESSAGE_BYTES_MAX = 64 * 2**20
"""Limit of our clients; each topic has its own."""

_COMMON: dict[str, Any] = {
    "socket.keepalive.enable": True,  # a broker whose host is gone sends nothing; without it that takes minutes to notice
    "socket.timeout.ms": 10_000,  # a stopped broker keeps its connections: give up early, and try another or again
    "reconnect.backoff.max.ms": 1_000,  # folding must go on within seconds of a broker's return
    "allow.auto.create.topics": False,  # a topic made by accident has the wrong number of partitions
    "enable.metrics.push": False,  # our metrics are scraped; the broker need not collect them (KIP-714)
    "log.connection.close": False,  # idle connections are closed all day long
}

_READER: dict[str, Any] = {
    "isolation.level": "read_committed",  # invariant 4: followers see whole commits only
    "enable.auto.commit": False,  # invariant 3: positions are in the changelog
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",  # invariant 8: a person decides about a lost position
    "enable.partition.eof": True,  # how a reader knows that only transaction markers are left
    "check.crcs": True,  # as the Java client does: a flipped bit is an error, not a number
    "fetch.wait.max.ms": 100,  # of an empty fetch, for which new assignments and ends with markers only have to wait
    "fetch.error.backoff.ms": 50,  # a leader that moves must not cost half a second
    "max.partition.fetch.bytes": 4 * 2**20,  # measured: restores read one partition a third faster than with 1 MiB
    "queued.max.messages.kbytes": 32 * 2**10,  # memory of fetched, unread records of one reader
}

_WRITER: dict[str, Any] = {
    "enable.idempotence": True,  # no reordering and no doubling by the client's own retries
    "acks": "all",  # acknowledged means replicated
    "compression.type": "lz4",  # measured: cheaper than sending the bytes; zstd saves a fifth of them for twice the CPU
    "batch.num.messages": 100_000,  # the limit that counts is the one in bytes
    "queue.buffering.max.messages": 1_000_000,  # the account of the publisher, or the overlay, is the limit
    "queue.buffering.max.kbytes": 2**20,
    "message.max.bytes": MESSAGE_BYTES_MAX,  # the topic's max.message.bytes decides, and its answer says so
}

_PUBLISHER: dict[str, Any] = {
    **_WRITER,
    "linger.ms": 1,  # batches are merged already; waiting for more only costs time
}

_TRANSACTION: dict[str, Any] = {
    **_WRITER,
    "linger.ms": 20,  # whole batches while a commit is produced; its end flushes at once
    "retry.backoff.ms": 5,  # measured: a commit that meets the markers of the last one waits for so long
    "retry.backoff.max.ms": 1_000,
}

_FIXED = frozenset(
    {
        "acks",
        "allow.auto.create.topics",
        "auto.offset.reset",
        "auto.commit.enable",
        "bootstrap.servers",
        "default.topic.config",
        "delivery.report.only.error",
        "dr_cb",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.idempotence",
        "enable.partition.eof",
        "error_cb",
        "group.id",
        "isolation.level",
        "log_cb",
        "logger",
        "message.timeout.ms",
        "metadata.broker.list",
        "on_delivery",
        "delivery.timeout.ms",
        "request.required.acks",
        "transaction.timeout.ms",
        "transactional.id",
    }
)
"""Refused options, with their aliases: they carry a guarantee, are used by this package, or are set by the URL or a setting.
"""


class Address(NamedTuple):
    """A cluster, and the names of one app on it."""

    bootstrap: str
    app: str
    prefix: str
    """Prefix of topic names on the broker."""

    @property
    def group(self) -> str:
        """Memberless group to which positions are mirrored for lag tools."""
        return f"{self.app}-position"

    def topic(self, name: str) -> str:
        """Return the name of one of our topics on the broker."""
        return self.prefix + name

    def __str__(self) -> str:
        return f"kafka://{self.bootstrap}" + (f"/{self.app}" if self.prefix else "")


def parse_url(url: str) -> Address:
    """Parse `kafka://host:port[,host:port...][/app]`; with an app, topics are named `app.deltas` and so on."""
    scheme, _, rest = url.partition("://")
    servers, slash, app = rest.partition("/")
    wrong = [it for it in servers.split(",") if not _SERVER.match(it) or not 0 < int(it.rpartition(":")[2]) <= PORT_MAX]
    if scheme != "kafka" or wrong:
        login = "; a login is in the setting kafka: sasl.username, sasl.password" if "@" in url else ""
        raise Invalid(f"{redacted_url(url)!r:.200} is not kafka://host:port[,host:port...][/app]{login}")
    if slash and app and not _APP.match(app):
        raise Invalid(f"{redacted_url(url)!r:.200}: the app's name may hold letters, digits, '.', '_' and '-', at most 100")
    if app == DEFAULT_APP:
        # Other topics, but the same group and transactional ids as without a name: they would fence each other.
        raise Invalid(f"{url!r:.200}: {app} is what an app without a name is called; leave it out, or choose another")
    return Address(servers, app or DEFAULT_APP, f"{app}." if app else "")


def check_user_options(user: Mapping[str, Any]) -> None:
    """Raise `Invalid` if an option is one that users may not set."""
    for name in user:
        if name in _FIXED:
            raise Invalid(f"setting kafka: {name} is fixed, because this package depends on it; leave it out")


def try_user_options(address: Address, user: Mapping[str, Any], *, timeout_ms: int) -> None:
    """Raise `Invalid` if librdkafka does not know an option, or refuses its value. Opens no connection."""
    check_user_options(user)
    if not user:
        return
    check_tokens(user)
    user = {name: value for name, value in user.items() if name not in (TOKEN_FILE, CALLBACK)}
    alone = {"bootstrap.servers": "", "log_level": 0}
    try:
        Producer(revealed({**publisher_options(address, user, timeout_ms=timeout_ms), **alone}))
        Consumer(revealed({**reader_options(address, user), **alone})).close()
    except (KafkaException, TypeError, ValueError) as error:
        reason = error.args[0].str().strip() if isinstance(error, KafkaException) else error
        raise Invalid(f"setting kafka: {reason}; options are those of librdkafka's CONFIGURATION.md") from None


def reader_options(address: Address, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a consumer with assigned partitions. It joins no group, but librdkafka demands a group id."""
    return _merged(address, "reader", _READER, user, {"group.id": address.group})


def publisher_options(address: Address, user: Mapping[str, Any], *, timeout_ms: int) -> dict[str, Any]:
    """Return the options of a producer without transactions, which gives a message up after `timeout_ms`."""
    return _merged(address, "publisher", _PUBLISHER, user, {"delivery.timeout.ms": timeout_ms})


def transaction_options(
    address: Address, user: Mapping[str, Any], *, transactional_id: str, timeout_ms: int
) -> dict[str, Any]:
    """Return the options of a transactional producer. The broker aborts a transaction that is open for over `timeout_ms`."""
    own = {
        "transactional.id": transactional_id,
        "transaction.timeout.ms": timeout_ms,
        "delivery.timeout.ms": max(1_000, timeout_ms - 1_000),
        "socket.timeout.ms": min(_COMMON["socket.timeout.ms"], max(1_000, timeout_ms - 1_000)),
    }
    return _merged(address, transactional_id, _TRANSACTION, user, own)


def admin_options(address: Address, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of an AdminClient, without those that only producers and consumers know."""
    check_user_options(user)
    common = {name: value for name, value in user.items() if name.startswith(_ADMIN)}
    return _merged(address, "admin", {}, common, {})


_ADMIN = (
    "api.version",
    "broker.",
    "client.",
    "connections.",
    "debug",
    "enable.sasl.",
    "enable.ssl.",
    "https.",
    "metadata.",
    CALLBACK,
    "reconnect.",
    "sasl.",
    "security.",
    "socket.",
    "ssl.",
)


def _merged(
    address: Address, role: str, ours: Mapping[str, Any], user: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """Return all options of a client, in which secrets are of type `Secret`: `revealed` gives those for librdkafka."""
    check_user_options(user)
    given = dict(user)
    if path := given.pop(TOKEN_FILE, None):
        given[CALLBACK] = TokenFile(str(path)).for_librdkafka
    return {
        "client.id": f"{address.app}-{role}",
        **_COMMON,
        **ours,
        **with_files(given),
        **own,
        "bootstrap.servers": address.bootstrap,
        "logger": _log,
    }
