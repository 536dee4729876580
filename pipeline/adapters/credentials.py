"""The access token of a client: given, or read from a file, and read again when a server refuses it."""

from __future__ import annotations

import re

from pipeline.core.grants import TOKEN_LENGTH_MAX
from pipeline.errors import Invalid
from pipeline.secret import Secret, read_secret
from pipeline.settings import ClientSettings

_TOKEN = re.compile(rf"[A-Za-z0-9._~+/=-]{{1,{TOKEN_LENGTH_MAX}}}")


class HiddenText(str):
    """A text for a driver that takes no `Secret`; tracebacks that show local variables do not show it."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "***"


class Credentials:
    """The access token that a client sends. Safe from any thread."""

    def __init__(self, settings: ClientSettings) -> None:
        """Raise `Invalid` for a file that can't be read, or a text that is no access token."""
        self._file = settings.token_file
        self.token: Secret = _checked(settings.token) if settings.token else self._read() if self._file else Secret()
        """The token to send; empty: none."""

    def _read(self) -> Secret:
        return _checked(read_secret(self._file, "token_file"))

    def renew(self, refused: Secret) -> bool:
        """Read the file again, after a server has refused a token; return whether there is another token by now."""
        if self._file and self.token == refused:
            try:
                self.token = self._read()
            except Invalid:
                return False  # the file is being replaced, or gone: the server's refusal says more
        return self.token != refused


def headers_of(token: Secret) -> dict[str, str]:
    """Return the headers that carry a token; none for an empty one."""
    return {"Authorization": HiddenText(f"Bearer {token.reveal()}")} if token else {}


def _checked(token: Secret) -> Secret:
    if not _TOKEN.fullmatch(token.reveal()):
        raise Invalid(f"token: not an access token: 1 to {TOKEN_LENGTH_MAX} letters, digits and - . _ ~ + / = are needed")
    return token
