"""The header `Idempotency-Key`: draft-ietf-httpapi-idempotency-key-header, as far as a server can keep it without sharing
memory with others. What makes a repeat count once needs no memory, and is in `producer.keyed`; what is remembered here, for
a while, is which body a key was used with, so that another one is refused.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256

from pipeline.errors import Invalid
from pipeline.ports import RequestKey
from pipeline.query.problems import Refused

HEADER = "idempotency-key"
KEY_LENGTH_MAX = 200
KEY_PATTERN = r'^([!#-~][!-~]*|"([ !#-\[\]-~]|\\["\\])+")$'
"""Of the header as a whole: without quotes, or with them, where a quote and a backslash stand behind a backslash."""
_KEY = re.compile(KEY_PATTERN)
_PERHAPS = (
    "; nothing of this try is taken, but this server has seen the Idempotency-Key before: all or a part of what it got then "
    "may be counted"
)


def parse_key(headers: Sequence[str]) -> str | None:
    """The key that these headers of a request give; None without one. `Invalid` if they give none that can be used.

    It is a string of structured fields (RFC 9651), `"8e03978e-40d5"`, or the same without quotes, as many clients send it.
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


class UsedKeys:
    """Which body each of the newest `keys_max` keys was used with. Safe from any thread."""

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._lock = threading.Lock()
        self._digests: dict[tuple[str, str], bytes] = {}

    @contextmanager
    def using(self, path: str, key: str | None, body: bytes) -> Iterator[RequestKey | None]:
        """The key of a request, while it is carried out; 422 if it was used with another body.

        A request that is refused, so that nothing of it was taken, has not used its key; unless an earlier one has, of which
        some may have been taken: then the refusal says so.
        """
        if key is None:
            yield None
            return
        digest, name = sha256(body).digest(), (path, key)
        with self._lock:
            repeated = name in self._digests
            first = self._digests.pop(name, digest)
            self._digests[name] = first
            while len(self._digests) > self._keys_max:
                del self._digests[next(iter(self._digests))]
        if first != digest:
            raise Refused(422, f"Idempotency-Key {key!r} was used for {path} with another body")
        try:
            yield RequestKey(path, key, digest)
        except (Invalid, Refused) as error:
            if repeated:
                raise _with(error, _PERHAPS) from None
            with self._lock:
                self._digests.pop(name, None)
            raise


def _with(error: Invalid | Refused, more: str) -> Invalid | Refused:
    """The same refusal, which says more."""
    if isinstance(error, Refused):
        return Refused(error.status, error.detail + more, error.headers)
    return type(error)(f"{error}{more}")
