"""Access tokens as `pipeline tokens` makes them, and the file that they are listed in."""

from __future__ import annotations

import secrets
from collections.abc import Sequence

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.tokens_file import TokensFile
from pipeline.config import Config
from pipeline.core.grants import TOKEN_PREFIX, AccessToken, check_token, digest_of
from pipeline.core.times import length_ms
from pipeline.errors import Invalid, NotFound
from pipeline.secret import Secret

_TOKEN_BYTES = 32


def tokens_file(config: Config, path: str | None) -> TokensFile:
    """Return the file at a path, or without one at that of the setting `tokens_file`."""
    where = path or config.query.tokens_file
    if not where:
        raise Invalid("which file of tokens? Give --file PATH, or the setting tokens_file")
    return TokensFile(where, SystemClock())


def new_token(
    name: str,
    scopes: Sequence[str],
    expires: str | None = None,
    *,
    views: Sequence[str] = (),
    labels: Sequence[str] = (),
) -> tuple[AccessToken, Secret]:
    """Return an entry for a new token, and the token. `labels` are texts such as `team=a`.

    Raises `Invalid` for a wrong name, scope, view, label or time.
    """
    bound: dict[str, str] = {}
    for text in labels:
        label, equals, value = text.partition("=")
        if not equals or label in bound:
            raise Invalid(f"--label {text[:100]!r}: LABEL=VALUE is needed, once for a label")
        bound[label] = value
    now_ms = SystemClock().now_ms()
    token = Secret(TOKEN_PREFIX + secrets.token_urlsafe(_TOKEN_BYTES))
    entry = AccessToken(
        name,
        digest_of(token.reveal().encode()).hex(),
        tuple(dict.fromkeys(scopes)),
        now_ms,
        None if expires is None else now_ms + length_ms("--expires", expires),
        tuple(dict.fromkeys(views)),
        bound,
    )
    return check_token(entry), token


def without(known: Sequence[AccessToken], name: str) -> list[AccessToken]:
    """Return the entries but for one; `NotFound` if there is none of this name."""
    left = [it for it in known if it.name != name]
    if len(left) == len(known):
        raise NotFound(f"no token {name[:100]!r}; pipeline tokens ls shows which there are")
    return left
