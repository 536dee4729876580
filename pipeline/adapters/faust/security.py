"""Translates librdkafka's options for TLS and logins into those of aiokafka and Faust. Imports neither."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.adapters.kafka.tokens import OPTIONS, CachedTokens, extensions_of, token_source
from pipeline.errors import Invalid
from pipeline.secret import Secret, with_files

_PASSWORDS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_OAUTH = "OAUTHBEARER"
_SASL = {"sasl.mechanism", "sasl.mechanisms", "sasl.username", "sasl.password"}
_SSL = {
    "enable.ssl.certificate.verification",
    "ssl.ca.location",
    "ssl.ca.pem",
    "ssl.certificate.location",
    "ssl.cipher.suites",
    "ssl.endpoint.identification.algorithm",
    "ssl.key.location",
    "ssl.key.password",
}
_LESS = "a worker with --name connects with librdkafka and with aiokafka, which can do less"


class Security(NamedTuple):
    """Protocol, TLS and login of a connection to a broker."""

    protocol: str
    context: ssl.SSLContext | None = None
    """None: no TLS."""
    mechanism: str = ""
    """Empty: no login."""
    username: str = ""
    password: Secret = Secret()
    tokens: CachedTokens | None = None
    """Access tokens, for OAUTHBEARER."""
    extensions: Mapping[str, str] = {}
    """SASL extensions that go with each token."""

    def aiokafka(self) -> dict[str, Any]:
        """Return the keywords of aiokafka's clients."""
        login: dict[str, Any] = {"sasl_mechanism": self.mechanism}
        if self.tokens is not None:
            login["sasl_oauth_token_provider"] = self.provider()
        else:
            login |= {"sasl_plain_username": self.username, "sasl_plain_password": self.password.reveal()}
        return {"security_protocol": self.protocol, "ssl_context": self.context, **(login if self.mechanism else {})}

    def provider(self) -> Any:
        """Return the tokens as a provider of aiokafka's."""
        from pipeline.adapters.faust.token_provider import TokenProvider

        assert self.tokens is not None
        return TokenProvider(self.tokens, self.extensions)


PLAIN = Security("PLAINTEXT")


def security_of(user: Mapping[str, Any]) -> Security:
    """Translate options of librdkafka; `Invalid` for those that aiokafka lacks, and for files that can't be read."""
    user = with_files(user)
    protocol = str(user.get("security.protocol", "plaintext")).upper()
    if protocol not in ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"):
        raise Invalid(f"setting kafka: security.protocol={protocol.lower()}; plaintext, ssl, sasl_plaintext or sasl_ssl")
    context = _context(user) if protocol.endswith("SSL") else None
    if not protocol.startswith("SASL"):
        return Security(protocol, context)
    mechanism = str(user.get("sasl.mechanism", user.get("sasl.mechanisms", "GSSAPI"))).upper()
    if mechanism == _OAUTH:
        _refuse(user, "sasl.", _SASL | OPTIONS)
        tokens = CachedTokens(token_source(user))
        return Security(protocol, context, mechanism, tokens=tokens, extensions=extensions_of(user))
    if mechanism not in _PASSWORDS:
        known = ", ".join((*_PASSWORDS, _OAUTH))
        raise Invalid(f"setting kafka: sasl.mechanism {mechanism} is not for workers with --name, but {known}: {_LESS}")
    _refuse(user, "sasl.", _SASL)
    missing = [name for name in ("sasl.username", "sasl.password") if not user.get(name)]
    if missing:
        raise Invalid(f"setting kafka: {missing[0]} is needed for sasl.mechanism {mechanism}")
    return Security(protocol, context, mechanism, str(user["sasl.username"]), user["sasl.password"])


def _refuse(user: Mapping[str, Any], prefix: str, known: set[str]) -> None:
    unknown = sorted(name for name in user if prefix in name and name not in known)
    if unknown:
        raise Invalid(f"setting kafka: {unknown[0]} is not for workers with --name: {_LESS}")


def _context(user: Mapping[str, Any]) -> ssl.SSLContext:
    _refuse(user, "ssl.", _SSL)
    # As librdkafka has it: with a CA of one's own the system's don't count.
    own = str(user.get("ssl.ca.location", "probe")) != "probe" or "ssl.ca.pem" in user
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if own else ssl.create_default_context()
    try:
        _load(context, user)
    except (OSError, ValueError) as error:  # SSLError is an OSError
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise Invalid(f"setting kafka: {_files(user)}: {reason}") from None
    context.check_hostname = str(user.get("ssl.endpoint.identification.algorithm", "https")).lower() != "none"
    if str(user.get("enable.ssl.certificate.verification", "true")).lower() in ("false", "f", "0"):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _load(context: ssl.SSLContext, user: Mapping[str, Any]) -> None:
    place = str(user.get("ssl.ca.location", "probe"))
    if place != "probe":
        context.load_verify_locations(**{"capath" if Path(place).is_dir() else "cafile": place})
    if "ssl.ca.pem" in user:
        context.load_verify_locations(cadata=str(user["ssl.ca.pem"]))
    certificate, key = user.get("ssl.certificate.location"), user.get("ssl.key.location")
    if key and not certificate:
        raise ValueError("ssl.certificate.location is needed too")
    if certificate:
        # A password in any case: without one OpenSSL would ask for it on the terminal.
        context.load_cert_chain(str(certificate), key and str(key), user.get("ssl.key.password", Secret()).reveal())
    if ciphers := user.get("ssl.cipher.suites"):
        context.set_ciphers(str(ciphers))


def _files(user: Mapping[str, Any]) -> str:
    files = [f"{name}={user[name]}" for name in sorted(_SSL & user.keys()) if name.endswith("location")]
    return ", ".join(files) or "ssl.*"
