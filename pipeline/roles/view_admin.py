"""Drops and resets views, through a server or directly on a broker."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

import msgspec

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpViews
from pipeline.adapters.kafka.checks import check_topics
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.core.answer import Changed, View
from pipeline.core.query import Listed, concerned, listed
from pipeline.core.record import Control, Definition
from pipeline.core.token import Token
from pipeline.errors import Invalid, NotFound, NotReady, Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ports import Clock, RequestKey
from pipeline.secret import redacted_url
from pipeline.settings import ClientSettings, KafkaSettings, PublisherSettings
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.catalogue import Catalogue

_PAUSE_S = 0.05


class ViewAdmin(Protocol):
    """Lists the definitions of views, and appends control records about them. For one thread at a time."""

    def views(self) -> list[View]:
        """Return all definitions, by view; those that answer for a view come first."""
        ...

    def change(self, control: Control, key: str) -> Changed:
        """Append a control record. A repeat with the same `key` counts once; `NotFound` if it concerns no definition."""
        ...

    def folded(self, token: Token) -> bool:
        """Return whether the state that reads answer from contains what the token stands for."""
        ...

    def close(self) -> None:
        """Close connections."""
        ...


class ControlOutcome(msgspec.Struct, frozen=True):
    """Result of a drop or reset."""

    action: str
    view: str
    definitions: list[View]
    """Definitions that it concerned when it was appended."""
    token: str
    """Token of the control record; empty: it was folded before the log's answer came."""
    folded: bool
    """True if all partitions have folded it within the time."""


def about(control: Control, views: ViewAdmin) -> list[View]:
    """Return the known definitions that a control record concerns."""
    return [it for it in views.views() if control.concerns(Definition(it.name, it.kind, it.labels))]


def change(views: ViewAdmin, control: Control, *, timeout_s: float, clock: Clock, key: str = "") -> ControlOutcome:
    """Append a control record, with repeats until the log acknowledges it, and wait until it is folded, within `timeout_s`.

    It counts once, however often it is repeated. Raises `NotFound` if it concerns no definition, and `Unavailable` if it is
    not acknowledged in time: then it may be folded all the same.
    """
    key, deadline_s = key or clock.new_id(), clock.monotonic_s() + timeout_s
    known = about(control, views)
    changed = _acknowledged(views, control, key, known, deadline_s, clock)
    folded = _wait_folded(views, Token.parse(changed.token), deadline_s, clock)
    return ControlOutcome(control.action, control.view, changed.definitions, changed.token, folded)


def _acknowledged(
    views: ViewAdmin, control: Control, key: str, known: list[View], deadline_s: float, clock: Clock
) -> Changed:
    pause, tried = threading.Event(), False
    while True:
        try:
            return views.change(control, key)
        except NotFound:
            if not tried or not known:
                raise
            return Changed(control.action, control.view, known, "")  # an earlier attempt, whose answer was lost, has done it
        except (NotReady, Unavailable):
            if clock.monotonic_s() >= deadline_s:
                raise
        tried = True
        pause.wait(_PAUSE_S)


def _wait_folded(views: ViewAdmin, token: Token, deadline_s: float, clock: Clock) -> bool:
    pause = threading.Event()
    while True:
        with suppress(NotReady, Unavailable):
            if views.folded(token):
                return True
        if clock.monotonic_s() >= deadline_s:
            return False
        pause.wait(_PAUSE_S)


class KafkaViews:
    """A `ViewAdmin` on a broker, without a server: definitions are read from the changelog.

    The first read takes as long as a restore; `timeout_s` is its limit.
    """

    def __init__(self, url: str, kafka: KafkaSettings, publisher: PublisherSettings, *, timeout_s: float) -> None:
        self._clock = SystemClock()
        self._timeout_s = timeout_s
        self._log = KafkaLog(parse_url(url), kafka, self._clock, request_timeout_ms=publisher.request_timeout_ms)
        try:
            check_topics(self._log, (DELTAS, CHANGELOG))
            self._catalogue = Catalogue(self._log, self._clock)
            self._orders = Gateway(self._log, self._clock, publisher, lambda view, bounds: None)
        except BaseException:
            self._log.close()
            raise

    def views(self) -> list[View]:
        """Return all definitions, by view; those that answer for a view come first."""
        return [View.of(it) for it in self._listed()]

    def _listed(self) -> list[Listed]:
        self._catalogue.read(self._clock.monotonic_s() + self._timeout_s)
        return listed(self._catalogue.entries())

    def change(self, control: Control, key: str) -> Changed:
        """See `ViewAdmin.change`."""
        definitions = [View.of(it) for it in concerned(control, self._listed())]
        token = self._orders.controls(
            [control], RequestKey(f"{control.action} {control.view}", key, msgspec.json.encode(control))
        )
        return Changed(control.action, control.view, definitions, str(token))

    def folded(self, token: Token) -> bool:
        """Return whether the changelog contains what the token stands for."""
        self._catalogue.read(self._clock.monotonic_s() + self._timeout_s)
        return self._catalogue.covers(token)

    def close(self) -> None:
        """Close connections."""
        self._catalogue.close()
        self._log.close()


def open_views(
    url: str,
    kafka: KafkaSettings,
    publisher: PublisherSettings,
    client: ClientSettings | None = None,
    *,
    timeout_s: float,
) -> ViewAdmin:
    """Return the `ViewAdmin` of `url`, http://host:port or kafka://host:port[/app]. Raises as its adapters do."""
    if url.startswith("kafka://"):
        return KafkaViews(url, kafka, publisher, timeout_s=timeout_s)
    if url.startswith(("http://", "https://")):
        return HttpViews(url, settings=client)
    raise Invalid(f"not where views are: {redacted_url(url)!r:.200}; known: http://host:port, kafka://host:port[/app]")
