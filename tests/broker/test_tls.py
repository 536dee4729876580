"""The membership of a worker with a name translates librdkafka's options for TLS and logins, or refuses them by name."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.adapters.faust.security import PLAIN, Security, security_of
from pipeline.errors import Invalid
from pipeline.secret import Secret
from tests.broker.tls import PASSWORD, Certificates, make
from tests.broker.users import login


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("tls"))


def options(it: Certificates) -> dict[str, str]:
    """Return all options of a client with a login and a certificate."""
    return {
        **login("admin"),
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": str(it.authority),
        "ssl.certificate.location": str(it.client),
        "ssl.key.location": str(it.client_key),
        "ssl.key.password": PASSWORD,
    }


def test_what_is_asked_for(certificates: Certificates) -> None:
    """Every option of librdkafka is translated; defaults are librdkafka's."""
    assert security_of({}) == PLAIN == Security("PLAINTEXT")
    assert security_of({"socket.timeout.ms": 5}) == PLAIN
    asked = security_of(options(certificates))
    assert (asked.protocol, asked.mechanism, asked.username, asked.password) == (
        "SASL_SSL",
        "PLAIN",
        "admin",
        Secret("p"),
    )
    assert asked.context is not None
    assert (asked.context.check_hostname, asked.context.verify_mode) == (True, ssl.CERT_REQUIRED)
    assert [it["subject"][0][0][1] for it in asked.context.get_ca_certs()] == ["tests"]
    loose = security_of({"security.protocol": "ssl", "ssl.endpoint.identification.algorithm": "none"}).context
    assert loose is not None
    assert (loose.check_hostname, loose.verify_mode) == (False, ssl.CERT_REQUIRED)
    looser = security_of({"security.protocol": "ssl", "enable.ssl.certificate.verification": "false"}).context
    assert looser is not None
    assert looser.verify_mode == ssl.CERT_NONE
    scram = {**login("u"), "sasl.mechanism": "scram-sha-512"}
    assert security_of(scram).mechanism == "SCRAM-SHA-512"
    both = {"sasl_mechanism": "PLAIN", "sasl_plain_username": "u", "sasl_plain_password": "p"}
    assert security_of(login("u")).aiokafka() == {**both, "security_protocol": "SASL_PLAINTEXT", "ssl_context": None}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"security.protocol": "tls"}, "security.protocol=tls; plaintext, ssl, sasl_plaintext or sasl_ssl"),
        ({"security.protocol": "sasl_plaintext"}, "sasl.mechanism GSSAPI is not for workers with --name"),
        ({**login("u"), "sasl.username": ""}, "sasl.username is needed"),
        ({"security.protocol": "ssl", "ssl.ca.location": "/nowhere/ca"}, "ssl.ca.location=/nowhere/ca: No such file"),
        ({"security.protocol": "ssl", "ssl.key.location": "k"}, "ssl.key.location=k: ssl.certificate.location is needed"),
        ({"security.protocol": "ssl", "ssl.keystore.location": "k"}, "ssl.keystore.location is not for workers with --name"),
        ({"security.protocol": "ssl", "ssl.key.pem": "k"}, "ssl.key.pem is not for workers with --name"),
    ],
)
def test_what_cannot_be(asked: Mapping[str, Any], said: str) -> None:
    """An option without a counterpart is refused by name."""
    with pytest.raises(Invalid) as error:
        security_of(asked)
    assert said in str(error.value)


def test_a_wrong_key_password(certificates: Certificates) -> None:
    """A wrong or missing password is an error, never a prompt."""
    for wrong in ({"ssl.key.password": "wrong"}, {"ssl.key.password": ""}):
        with pytest.raises(Invalid, match=r"ssl\.key\.location="):
            security_of({**options(certificates), **wrong})
