"""TLS of servers and clients: contexts from certificate files, which are made again when the files change."""

from __future__ import annotations

import os
import ssl
import stat
from collections.abc import Callable, Sequence

from pipeline.errors import Invalid
from pipeline.ports import Clock
from pipeline.settings import ClientSettings, QuerySettings

_LOOK_S = 1.0
"""Time between two looks at whether a file has changed."""
_PEM_BYTES_MAX = 8 * 2**20
_CERTIFICATE, _KEY = "CERTIFICATE", "PRIVATE KEY"
_NO_CERTIFICATE = ("CERTIFICATE_REQUIRED", "HANDSHAKE_FAILURE", "BAD_CERTIFICATE", "UNKNOWN_CA", "CERTIFICATE_UNKNOWN")
"""Ends of OpenSSL's names for what a server says to a client whose certificate is missing or not accepted."""
_NO_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG")
_BROKEN_OFF = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, ssl.SSLEOFError)
_OTHER_NAME = (62, 64)
"""OpenSSL's codes for a certificate of another host name or IP address."""


class FollowedContext:
    """A TLS context that follows its files: connections that are made after a change have the new certificates.

    `make` returns a context, or raises `Invalid`; so does the constructor. While changed files make no context, as between
    the replacement of a certificate and of its key, the last one goes on; `on_failure` is told if that stays so.
    """

    def __init__(
        self, make: Callable[[], ssl.SSLContext], paths: Sequence[str], clock: Clock, on_failure: Callable[[Invalid], None]
    ) -> None:
        self._make = make
        self._paths = [path for path in paths if path]
        self._clock = clock
        self._on_failure = on_failure
        self._looked_s = clock.monotonic_s()
        self._made_of = self._state()
        self._failed_with: tuple[object, ...] | None = None
        self._told = False
        self._context = make()

    def __call__(self) -> ssl.SSLContext:
        """Return the context for a connection that is made now."""
        now_s = self._clock.monotonic_s()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            state = self._state()
            if state != self._made_of:
                self._renew(state)
        return self._context

    def _renew(self, state: tuple[object, ...]) -> None:
        try:
            self._context = self._make()
        except Invalid as error:
            if state != self._failed_with:
                self._failed_with, self._told = state, False
            elif not self._told:
                self._told = True
                self._on_failure(error)
        else:
            self._made_of, self._failed_with = state, None

    def _state(self) -> tuple[object, ...]:
        return tuple(map(_mark, self._paths))


def _mark(path: str) -> object:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_ino, found.st_size, found.st_mtime_ns


def server_context(settings: QuerySettings) -> ssl.SSLContext:
    """Return the context of a server with a `tls_cert_file`. Raises `Invalid`, naming the setting and the file."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    _load_pair(context, "tls_cert_file", settings.tls_cert_file, "tls_key_file", settings.tls_key_file)
    if settings.tls_client_ca_file:
        _load_authority(context, "tls_client_ca_file", settings.tls_client_ca_file)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(settings: ClientSettings) -> ssl.SSLContext:
    """Return the context of a client, which trusts `ca_file`, or else what the system does. Raises `Invalid` alike."""
    if settings.ca_file:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks names and certificates
        _load_authority(context, "ca_file", settings.ca_file)
    else:
        context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.client_cert_file:
        _load_pair(context, "client_cert_file", settings.client_cert_file, "client_key_file", settings.client_key_file)
    return context


def _load_pair(context: ssl.SSLContext, cert_name: str, cert: str, key_name: str, key: str) -> None:
    _read_pem(cert_name, cert, _CERTIFICATE)
    key_name = key_name if key else cert_name
    if "ENCRYPTED" in _read_pem(key_name, key or cert, _KEY):
        raise Invalid(f"{key_name}={key or cert!r:.200}: the key is encrypted, and nobody can be asked for its password")
    try:
        context.load_cert_chain(cert, key or None)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise Invalid(f"{key_name}={key or cert!r:.200}: not the key of the certificate in {cert!r:.200}") from None
        raise Invalid(f"{cert_name}={cert!r:.200}, {key_name}: {error.reason or error}") from None
    except OSError as error:
        raise Invalid(f"{cert_name}={cert!r:.200}: {error.strerror or error}") from None


def _load_authority(context: ssl.SSLContext, name: str, path: str) -> None:
    try:
        context.load_verify_locations(cadata=_read_pem(name, path, _CERTIFICATE))
    except ssl.SSLError as error:
        raise Invalid(f"{name}={path!r:.200}: {error.reason or error}") from None


def _read_pem(name: str, path: str, kind: str) -> str:
    """Return the content of a file of certificates or keys; `Invalid`, with the name of the setting, if it is none."""
    where = f"{name}={path!r:.200}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not hold up a start
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Invalid(f"{where}: not a regular file")
            text = file.read(_PEM_BYTES_MAX).decode("latin-1")
    except (OSError, ValueError) as error:
        raise Invalid(f"{where}: {error.strerror if isinstance(error, OSError) else 'no path'}") from None
    if not any(line.startswith("-----BEGIN ") and kind in line for line in text.splitlines()):
        raise Invalid(f"{where}: there is no {kind} in it (PEM is needed)")
    return text.encode("latin-1").decode("ascii", "replace")


def explained(error: Exception, settings: ClientSettings, *, over_tls: bool) -> str:
    """Return what a client says of an error of its connection: of TLS, with the setting that could be wrong."""
    said = f"{type(error).__name__}: {error}"
    if not over_tls:
        return said
    given = f"client_cert_file={settings.client_cert_file!r:.200}" if settings.client_cert_file else "none is given"
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code in _OTHER_NAME:
            return f"the server's certificate is of another name: {error.verify_message}"
        trusted = f"ca_file={settings.ca_file!r:.200}" if settings.ca_file else "the system; ca_file names others"
        return f"the server's certificate is not trusted: {error.verify_message}; trusted are authorities of {trusted}"
    reason = (error.reason or "") if isinstance(error, ssl.SSLError) else ""
    if "ALERT" in reason and reason.endswith(_NO_CERTIFICATE):
        return f"the server wants a client certificate that it trusts: {given} ({reason})"
    if reason in _NO_TLS:
        return f"the server does not speak TLS at this port: http:// is for such ({reason})"
    if isinstance(error, _BROKEN_OFF):
        return f"{said}; a server that wants a client certificate breaks off like this without one that it trusts: {given}"
    return said
