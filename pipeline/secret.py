"""Secrets: the one type that holds a password or token, the names of settings that hold one, and texts without them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from hmac import compare_digest
from typing import Any, NoReturn, Self

from pipeline.errors import Invalid

SECRET_BYTES_MAX = 65_536
"""Size of the largest file that may hold a secret; keys in PEM take a few KB."""
FILE_SUFFIX = "_file"
"""End of the name under which the file of a secret is given: `token_file`, `sasl.password_file`."""
_HIDDEN = "***"
_SECRET_OPTION = re.compile(r"password|passphrase|secret|credential|private|\.pem\Z|oauthbearer\.config")
_PLACE = re.compile(r"(\.location|\.file|_file|\.path|\.url|\.id|certificate\.pem|ca\.pem)\Z")
_USER_OF_URL = re.compile(r"(?<=://)\S*@")
_QUERY_OF_URL = re.compile(r"\?.*", re.DOTALL)


class Secret:
    """A text that is never shown: not by print, format, repr, logging, JSON, pickle or a traceback with local variables.

    Only `reveal` returns the text. An empty secret is false, and means that there is none.
    """

    __slots__ = ("__text",)

    def __init__(self, text: str | Self = "") -> None:
        if not isinstance(text, str | Secret):
            raise Invalid("a secret is a text")
        self.__text: str = text.reveal() if isinstance(text, Secret) else text

    def reveal(self) -> str:
        """Return the text. Keep it in no attribute, and put it into no message."""
        return self.__text

    def __bool__(self) -> bool:
        return bool(self.__text)

    def __eq__(self, other: object) -> bool:
        """Compare in a time that does not depend on where the texts differ."""
        if not isinstance(other, Secret):
            return NotImplemented
        return compare_digest(self.__text.encode(errors="surrogatepass"), other.reveal().encode(errors="surrogatepass"))

    def __hash__(self) -> int:
        return hash(self.__text)

    def __repr__(self) -> str:
        return f"Secret({_HIDDEN if self.__text else ''})"

    def __str__(self) -> str:
        return _HIDDEN if self.__text else ""

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Secret is not pickled: give the other process the file or the variable that holds it")


def read_secret(path: str | os.PathLike[str], name: str) -> Secret:
    """Return the text of a file without the line break at its end; `Invalid` names the setting `name` and the path.

    A symbolic link is followed: Kubernetes mounts secrets as links. Only a regular file is read.
    """
    where = f"{name}={os.fspath(path)!r:.200}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Invalid(f"{where}: not a regular file")
            data = file.read(SECRET_BYTES_MAX + 1)
        text = data.decode().removesuffix("\n").removesuffix("\r")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text, or no path"
        raise Invalid(f"{where}: {reason}") from None
    if not text or len(data) > SECRET_BYTES_MAX:
        raise Invalid(f"{where}: {'empty' if not text else f'larger than {SECRET_BYTES_MAX} bytes'}")
    return Secret(text)


def is_secret_option(name: str, value: object = "") -> bool:
    """Return whether an option of librdkafka holds a secret: by its name, or because its value is a URL with a user."""
    if isinstance(value, Secret):
        return True
    if isinstance(value, str) and _USER_OF_URL.search(value):
        return True
    return bool(_SECRET_OPTION.search(name)) and not _PLACE.search(name)


def with_secrets(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of librdkafka in which each one that holds a secret is a `Secret`."""
    return {name: _held(name, value) if is_secret_option(name, value) else value for name, value in options.items()}


def _held(name: str, value: object) -> Secret:
    if not isinstance(value, Secret | str | int | float):
        raise Invalid(f"setting kafka: {name}: a text is needed, got {type(value).__name__}")
    return value if isinstance(value, Secret) else Secret(str(value))


def with_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same options, all secrets as `Secret`; a secret that NAME_file names is read from its file."""
    found = with_secrets(options)
    for name in options:
        if name.endswith(FILE_SUFFIX) and is_secret_option(plain := name.removesuffix(FILE_SUFFIX)):
            if plain in options:
                raise Invalid(f"setting kafka: {plain} and {name} are both given; leave one out")
            found[plain] = read_secret(str(found.pop(name)), f"setting kafka: {name}")
    return found


def revealed(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as librdkafka itself takes them: secrets, those from files too, as texts. Keep them in no variable."""
    found = with_files(options)
    return {name: value.reveal() if isinstance(value, Secret) else value for name, value in found.items()}


def redacted_url(url: str) -> str:
    """Return a URL, or what was given as one, without what stands before the last `@` and behind a `?`."""
    before, at, rest = url.rpartition("@")
    if at:
        scheme, separator, _ = before.partition("://")
        url = f"{scheme}{separator}{_HIDDEN}@{rest}" if separator else f"{_HIDDEN}@{rest}"
    return _QUERY_OF_URL.sub(f"?{_HIDDEN}", url)
