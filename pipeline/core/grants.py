"""Grants: what an access token allows, and the content of the file that lists access tokens.

An access token (the word "token" alone is what a flush returns) has 32 random bytes. The file has the SHA-256 of each,
not the token, so a reader of the file can't act in anybody's name. Passwords need a slow hash with salt, because people
choose texts that can be guessed. Of 2^256 equally likely tokens none can be guessed, and a slow hash would cost more than
a read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from hashlib import sha256

import msgspec

from pipeline.core.record import NAME, OVERFLOW, Definition
from pipeline.errors import Invalid

READ, PUBLISH, ADMIN = "read", "publish", "admin"
SCOPES = (READ, PUBLISH, ADMIN)
TOKEN_PREFIX = "pipeline_"  # nosec B105  # no token
"""Start of every access token, by which scanners for secrets know one."""
TOKEN_LENGTH_MAX = 1_024
ACCESS_TOKENS_MAX = 1_000
"""Most entries of a file, which a server reads on its event loop within milliseconds."""
_FILE_VERSION = 1
_TOKEN_NAME = re.compile(r"[A-Za-z0-9._-]{1,100}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Bounds(msgspec.Struct, frozen=True):
    """The part of all views that a token is bound to: some views, and of each the series with certain labels."""

    views: tuple[str, ...] = ()
    """Names, or beginnings of names with `*` behind them; empty: all views."""
    labels: tuple[tuple[str, str], ...] = ()
    """Labels and values that every series has that is read or written, by label."""

    def has_view(self, view: str) -> bool:
        """Return whether a view of this name is within the bounds."""
        return not self.views or any(view.startswith(it[:-1]) if it.endswith("*") else view == it for it in self.views)

    def has(self, definition: Definition) -> bool:
        """Return whether a definition is within the bounds: its view, and it has every label."""
        return self.has_view(definition.view) and all(label in definition.labels for label, _ in self.labels)

    def refusal(self, view: str, labels: Mapping[str, str]) -> str:
        """Return why a series is outside the bounds; empty if it is within them."""
        if not self.has_view(view):
            return f"view {view[:100]!r} is outside the token's bounds: {', '.join(self.views)}"
        for label, value in self.labels:
            if labels.get(label) != value:
                return f"view {view[:100]}: the token is bound to {label}={value}"
        return ""


class Grant(msgspec.Struct, frozen=True):
    """Rights of the bearer of an access token."""

    name: str
    """Name of the token; empty: no token was needed."""
    scopes: frozenset[str]
    bounds: Bounds | None = None
    """None: everything is within them."""
    digest: bytes = b""
    """Digest of the token: another one may be given the same name."""


EVERYTHING = Grant("", frozenset(SCOPES))
"""Grant of every request to a server that has no file of tokens."""

NOTHING = Grant("", frozenset())
"""Grant of a request without a token, on the paths that need none."""


class AccessToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of the file."""

    name: str
    sha256: str
    """Digest of the token in hexadecimal digits."""
    scopes: tuple[str, ...]
    created_ms: int
    expires_ms: int | None = None
    views: tuple[str, ...] = ()
    labels: dict[str, str] = {}

    @property
    def grant(self) -> Grant:
        """Rights that the token gives."""
        bounds = Bounds(self.views, tuple(sorted(self.labels.items())))
        bound = bounds if self.views or self.labels else None
        return Grant(self.name, frozenset(self.scopes), bound, bytes.fromhex(self.sha256))


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    tokens: list[AccessToken]


def digest_of(token: bytes) -> bytes:
    """Return the digest under which a token is known."""
    return sha256(token).digest()


def check_token(it: AccessToken) -> AccessToken:
    """Return an entry of the file; `Invalid` says what is wrong with it."""
    where = f"token {it.name[:100]!r}"
    if not _TOKEN_NAME.fullmatch(it.name):
        raise Invalid(f"{where}: a name has 1 to 100 letters, digits, dots, dashes and underscores")
    if not _DIGEST.fullmatch(it.sha256):
        raise Invalid(f"{where}: sha256 is 64 hexadecimal digits")
    if not it.scopes or not set(it.scopes) <= set(SCOPES):
        raise Invalid(f"{where}: one scope at least is needed, of {', '.join(SCOPES)}")
    for view in it.views:
        if view != "*" and not NAME.fullmatch(view.removesuffix("*")):
            raise Invalid(f"{where}: {view[:100]!r} is not the name of a view, or its beginning and *")
    for label, value in it.labels.items():
        # `__name__` is the view to Prometheus, and `le` a bucket: a condition on them would be no condition on a label.
        if not NAME.fullmatch(label) or label.startswith("__") or label == "le":
            raise Invalid(f"{where}: {label[:100]!r} is not a label that a token can be bound to")
        if value in ("", OVERFLOW):
            raise Invalid(f"{where}: label {label}: an empty value or {OVERFLOW} belongs to everybody")
    return it


def decode_tokens(content: bytes) -> list[AccessToken]:
    """Return the entries of a file's content; `Invalid` for anything else."""
    try:
        found = msgspec.json.decode(content, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Invalid(f"not a file of tokens: {error}") from None
    if found.version != _FILE_VERSION:
        raise Invalid(f"a file of tokens of version {found.version}; this program knows {_FILE_VERSION}")
    if len(found.tokens) > ACCESS_TOKENS_MAX:
        raise Invalid(f"{len(found.tokens)} tokens; at most {ACCESS_TOKENS_MAX}")
    for it in found.tokens:
        check_token(it)
    _check_unique([it.name for it in found.tokens], "name")
    _check_unique([it.sha256 for it in found.tokens], "sha256")
    return found.tokens


def _check_unique(values: Collection[str], what: str) -> None:
    if len(set(values)) < len(values):
        raise Invalid(f"two tokens have one {what}")


def encode_tokens(tokens: Iterable[AccessToken]) -> bytes:
    """Return the content of a file with these entries."""
    return msgspec.json.format(msgspec.json.encode(_File(_FILE_VERSION, [*tokens])), indent=2) + b"\n"
