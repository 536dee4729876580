"""Tokens of what a log has acknowledged: each names its topic by id, so that a topic that was made anew is told apart."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

from pipeline.core.token import Token, name_acknowledged
from pipeline.errors import PipelineError, Unavailable
from pipeline.ports import LogWriter
from pipeline.topics import DELTAS

_log = logging.getLogger(__name__)


class TokenMaker:
    """Makes tokens with the id of the topic of deltas. Safe from any thread; threads that ask at once share an answer."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._changed = threading.Condition()
        self._known = ""
        """The newest id that the log told."""
        self._begun = self._done = 0
        """Numbers of the last request to the log that has begun, and of the last that was answered; one runs at a time."""
        self._asking = 0
        """The thread of the last request. A signal handler that runs in it must not wait for it."""
        self._error: PipelineError | None = None

    def topic_id_before(self) -> str:
        """Return the id that the topic had at some time before now: to be called before anything is appended.

        Raises `Unavailable` if no id is known and the log does not tell one.
        """
        return self._known or self._ask()

    def make(self, next_offsets: Mapping[int, int], before: str) -> Token:
        """Return the token of what was acknowledged since the topic's id was `before`.

        If the log is away by now, the topic is taken for the one that was there before: a topic made anew in so short a
        time is then named wrongly, and a read with that token is refused, not answered too early.
        """
        if not next_offsets:
            return Token()
        try:
            after = self._ask()
        except Unavailable as error:
            _log.info("whether topic %s is still the one of id %s is not known: %s", DELTAS, before, error)
            after = before
        if after == before:
            return name_acknowledged(next_offsets, before, after)
        _log.warning("topic %s was made anew: what was acknowledged before may be gone with the old one", DELTAS)
        return name_acknowledged(next_offsets, before, after, self._writer.high_watermarks(DELTAS))

    def _ask(self) -> str:
        """Return the log's answer to a request that begins from now on."""
        with self._changed:
            wanted = self._begun + 1
            while self._begun > self._done and self._asking != threading.get_ident():
                self._changed.wait()
            if self._done >= wanted:
                if self._error is not None:
                    raise Unavailable(str(self._error))
                return self._known
            self._begun += 1
            self._asking = threading.get_ident()
        topic_id, failed = "", None
        try:
            topic_id = self._writer.topic_id(DELTAS)
        except PipelineError as error:
            failed = error
        finally:
            with self._changed:
                self._done, self._error = self._begun, failed
                self._known = topic_id or self._known
                self._changed.notify_all()
        if failed is not None:
            raise Unavailable(str(failed))
        return topic_id
