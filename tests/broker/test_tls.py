"""TLS and a login together: the membership of a worker with a name accepts librdkafka's options, or refuses them by name."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher
from pipeline.adapters.faust.security import PLAIN, Security, security_of
from pipeline.errors import Invalid
from pipeline.secret import Secret
from tests.broker.drive import PUBLISHER, worker
from tests.broker.kafka import Broker, create_topics, new_app
from tests.broker.tls import PASSWORD, Certificates, make
from tests.broker.users import PROPERTIES, given, login
from tests.support import pipeline, wait_until


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make(tmp_path_factory.mktemp("tls"))


def options(it: Certificates) -> dict[str, str]:
    """Return all options that a client of `broker_with_tls` needs."""
    return {
        **login("admin"),
        "security.protocol": "SASL_SSL",
        "ssl.ca.location": str(it.authority),
        "ssl.certificate.location": str(it.client),
        "ssl.key.location": str(it.client_key),
        "ssl.key.password": PASSWORD,
    }


def properties(it: Certificates) -> dict[str, str]:
    """Return the properties of a broker that wants a certificate and a login of its clients."""
    named = {name: value.replace("SASL_PLAINTEXT", "SASL_SSL") for name, value in PROPERTIES.items()}
    jaas = named.pop("listener.name.sasl_plaintext.plain.sasl.jaas.config")
    return {
        **named,
        "listener.name.sasl_ssl.plain.sasl.jaas.config": jaas,
        "listener.name.sasl_ssl.ssl.client.auth": "required",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(it.server),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(it.authority),
    }


@pytest.mark.timeout(180)
def test_a_member_over_tls(kafka_jars: Path, certificates: Certificates, tmp_path: Path) -> None:
    """With authority, certificate, locked key and login a member folds, as status shows; a missing authority is named."""
    client = options(certificates)
    flags = given(client)
    with Broker(tmp_path / "kafka", properties(certificates), client=client) as broker:
        app = new_app(broker.bootstrap)
        create_topics(app.bootstrap, app.app, 2, client=client)
        with worker(app, tmp_path / "one", "--name", "one", *flags, session_timeout_ms=6_000) as role:
            with Publisher(app.url, kafka=client, **PUBLISHER) as publisher:
                publisher.sum("v").add(1)

            def folds() -> bool:
                done = pipeline("status", "--from", app.url, *flags)
                assert done.returncode == 0, done.stderr
                return done.stdout.count("  folding  ") == 2 and "lag 0 records" in done.stdout

            wait_until(folds, "a member that folds", 60)
            assert role.terminate() == 0, role.tail()
        without = [it for it in flags if "ssl.ca" not in it]
        done = pipeline("status", "--from", app.url, *without, "--set", "kafka_timeout_ms=3000")
        assert done.returncode == 2, done.stderr
        assert "check ssl.* and security.protocol in the setting `kafka`" in done.stderr


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
