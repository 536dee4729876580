"""The header `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header).

A repeat counts once because its batches are derived from the key (`ingest.idempotency`), without any memory of the server's.
This module remembers, for a while, the body that a key was used with, and refuses another body.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

from pipeline.core.grants import Bounds
from pipeline.errors import Invalid
from pipeline.ports import RequestKey
from pipeline.query.problems import Refused

HEADER = "idempotency-key"
KEY_LENGTH_MAX = 200
KEY_PATTERN = r'^([!#-~][!-~]*|"([ !#-\[\]-~]|\\["\\])+")$'
"""Pattern of the whole header: a bare word, or a quoted string with backslash escapes."""
_KEY = re.compile(KEY_PATTERN)
_PERHAPS = (
    "; nothing of this try is taken, but this server has seen the Idempotency-Key before: all or a part of what it got then "
    "may be counted"
)


def parse_key(headers: Sequence[str]) -> str | None:
    """Return the key in these header values; None without a header, `Invalid` if there is no valid one.

    A key is a string of structured fields (RFC 9651), `"8e03978e-40d5"`, or without quotes, as many clients send it.
    """
    if not headers:
        return None
    if len(headers) > 1:
        raise Invalid("Idempotency-Key: once in a request")
    text = headers[0].strip()
    key = re.sub(r'\\(["\\])', r"\1", text[1:-1]) if text.startswith('"') else text
    if len(text) > KEY_LENGTH_MAX or not _KEY.fullmatch(text) or not key.strip():
        raise Invalid(f"Idempotency-Key: 1 to {KEY_LENGTH_MAX} visible ASCII characters, with or without quotes")
    return key


def path_within(path: str, bounds: Bounds | None) -> str:
    """Return what stands for a path in the keys of requests, which are other ones for access tokens of other bounds."""
    return path if bounds is None else f"{path} {bounds!r}"


class UsedKeys:
    """The bodies of the newest `keys_max` keys, both as digests: a path can be long. Safe from any thread."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._lock = threading.Lock()
        self._digests: dict[bytes, bytes] = {}

    @contextmanager
    def using(self, path: str, key: str | None, body: bytes, bounds: Bounds | None = None) -> Iterator[RequestKey | None]:
        """Yield the key of a request while it is carried out; 422 if the key was used with another body.

        Access tokens of different `bounds` have keys of their own.

        A request that is refused does not use up its key, because none of it was taken. If an earlier request had the key,
        some of that one may have been taken, and the refusal says so.
        """
        if key is None:
            yield None
            return
        digest, name = sha256(body).digest(), sha256(repr((path, key, bounds)).encode()).digest()
        with self._lock:
            repeated = name in self._digests
            first = self._digests.pop(name, digest)
            self._digests[name] = first
            while len(self._digests) > self._keys_max:
                del self._digests[next(iter(self._digests))]
        if first != digest:
            raise Refused(422, f"Idempotency-Key {key!r} was used for {path} with another body")
        try:
            yield RequestKey(path_within(path, bounds), key, digest)
        except (Invalid, Refused) as error:
            if repeated:
                raise _with(error, _PERHAPS) from None
            with self._lock:
                self._digests.pop(name, None)
            raise


def _with(error: Invalid | Refused, more: str) -> Invalid | Refused:
    """Return the refusal with `more` after its text."""
    if isinstance(error, Refused):
        return Refused(error.status, error.detail + more, error.headers)
    return type(error)(f"{error}{more}")
