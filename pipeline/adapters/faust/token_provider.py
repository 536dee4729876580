"""Gives access tokens to aiokafka, for logins by OAUTHBEARER."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from aiokafka.abc import AbstractTokenProvider
from aiokafka.errors import AuthenticationFailedError, KafkaConnectionError

from pipeline.adapters.kafka.tokens import CachedTokens
from pipeline.errors import Invalid, PipelineError


class TokenProvider(AbstractTokenProvider):
    """Tokens of a source, got in a thread of their own. aiokafka asks for one with each connection."""

    def __init__(self, tokens: CachedTokens, extensions: Mapping[str, str]) -> None:
        self._tokens = tokens
        self._extensions = dict(extensions)

    async def token(self) -> str:
        """Return a token. Raises errors that aiokafka handles as those of a connection, so that it tries again."""
        try:
            return (await asyncio.to_thread(self._tokens)).reveal()
        except PipelineError as error:
            kind = AuthenticationFailedError if isinstance(error, Invalid) else KafkaConnectionError
            raise kind(str(error)) from None

    def extensions(self) -> dict[str, str]:
        """Return the SASL extensions that go with each token."""
        return self._extensions
