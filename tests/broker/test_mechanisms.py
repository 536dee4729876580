"""Logins by SCRAM, PLAIN, OAUTHBEARER and certificates, over TLS: all roles work with each, and say what is wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.kafka.writer import KafkaLogWriter
from pipeline.errors import Invalid, PipelineError, Unavailable
from pipeline.ports import Message
from pipeline.settings import KafkaSettings
from pipeline.topics import DELTAS
from tests.broker.agents import SHOP, wait_counted
from tests.broker.drive import PUBLISHER, Role, server
from tests.broker.kafka import App, Broker, Port, admin_client, create_topics, new_app
from tests.broker.mechanisms import (
    CLIENT_SECRET,
    PASSWORD,
    USER,
    TokenEndpoint,
    properties,
    set_scram_password,
    token,
    token_endpoint,
)
from tests.broker.tls import PASSWORD as KEY_PASSWORD
from tests.broker.tls import Certificates, make
from tests.broker.users import login
from tests.support import again_and_again, pipeline, wait_until

WAIT_S = 60.0
SHORT_S = 10.0
"""Life of a token, and of a session at the broker, in tests of renewal."""
WRONG = "not-the-secret-of-anybody"
LONG_ONLY = pytest.mark.long


class Secured(NamedTuple):
    """A broker with all mechanisms."""

    broker: Broker
    ssl_port: int
    certificates: Certificates
    endpoint: TokenEndpoint
    admin: AdminClient
    admin_login: Mapping[str, str]
    scratch: Path

    def options(self, mechanism: str) -> dict[str, str]:
        """Return librdkafka's options of a client."""
        authority = {"ssl.ca.location": str(self.certificates.authority)}
        own = {
            "ssl.certificate.location": str(self.certificates.client),
            "ssl.key.location": str(self.certificates.client_key),
            "ssl.key.password": KEY_PASSWORD,
        }
        if mechanism == "mTLS":
            return {"security.protocol": "SSL", **authority, **own}
        common = {"security.protocol": "SASL_SSL", **authority, "sasl.mechanism": mechanism}
        match mechanism:
            case "OIDC":
                named = {
                    "method": "oidc",
                    "client.id": USER,
                    "client.secret": CLIENT_SECRET,
                    "token.endpoint.url": self.endpoint.url,
                }
                return {
                    **common,
                    "sasl.mechanism": "OAUTHBEARER",
                    **{f"sasl.oauthbearer.{it}": v for it, v in named.items()},
                }
            case "token file":
                file = {"sasl.oauthbearer.token_file": str(self.token_file)}
                return {**common, "sasl.mechanism": "OAUTHBEARER", **file}
        return {**common, **own, "sasl.username": USER, "sasl.password": PASSWORD}

    @property
    def token_file(self) -> Path:
        """File that another program keeps a token in."""
        return self.scratch / "token"

    def app(self, mechanism: str) -> App:
        """Return an app that nobody has used, at the listener of this mechanism."""
        return new_app(f"127.0.0.1:{self.ssl_port}" if mechanism == "mTLS" else self.broker.bootstrap)


@pytest.fixture(scope="module")
def secured(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    scratch = tmp_path_factory.mktemp("secured")
    certificates, port = make(scratch), Port()
    admin = {**login("admin"), "security.protocol": "SASL_SSL", "ssl.ca.location": str(certificates.authority)}
    given = properties(certificates, port.number, reauthenticate_ms=int(SHORT_S * 1000))
    with Broker(scratch / "kafka", given, client=admin) as broker, token_endpoint() as endpoint:
        client = admin_client(broker.bootstrap, **admin)
        set_scram_password(client)
        (scratch / "token").write_text(token() + "\n")
        yield Secured(broker, port.number, certificates, endpoint, client, admin, scratch)


def environment(options: Mapping[str, str]) -> dict[str, str]:
    """Return options of librdkafka as an environment: secrets may not be on a command line."""
    return {"PIPELINE_KAFKA": json.dumps(options)}


class Shop:
    """An app whose worker has a name and runs an agent."""

    def __init__(self, it: Secured, mechanism: str, scratch: Path, *more: str) -> None:
        self.app = it.app(mechanism)
        self.options = it.options(mechanism)
        self.env = {**environment(self.options), "ORDERS": f"{self.app.app}.orders"}
        (scratch / "shop.py").write_text(SHOP.format(pause_s=0))
        made = pipeline("topics", "apply", "--to", self.app.url, "--partitions", "2", env=self.env)
        assert made.returncode == 0, made.stderr
        it.admin.create_topics([NewTopic(self.env["ORDERS"], 1, 1)])[self.env["ORDERS"]].result(30)
        self._orders = Producer({**it.admin_login, "bootstrap.servers": it.broker.bootstrap})
        settings = {"session_timeout_ms": 6_000, "flush_interval_ms": 20}
        own = ("--name", "one", "-A", "shop:app", *more)
        self.worker = Role("worker", self.app, scratch / "one", *own, env=self.env, **settings)
        self.worker._cwd = scratch
        self.server = server(self.app, scratch / "server", "--ingest", env=self.env)

    def order(self, number: int) -> None:
        """Send an event for the agent."""
        self._orders.produce(self.env["ORDERS"], json.dumps({"id": number}).encode())
        assert self._orders.flush(WAIT_S) == 0

    def run(self, *command: str) -> str:
        """Run a command with the login, and return what it prints."""
        done = pipeline(*command, "--from", self.app.url, env=self.env)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    "mechanism",
    [
        "SCRAM-SHA-256",
        *(pytest.param(it, marks=LONG_ONLY) for it in ("SCRAM-SHA-512", "PLAIN", "OIDC", "token file", "mTLS")),
    ],
)
def test_all_roles(secured: Secured, tmp_path: Path, mechanism: str) -> None:
    """Topics, a publisher, a member with an agent, a gateway, reads, status, views and dead letters work with one login."""
    shop = Shop(secured, mechanism, tmp_path)
    with (
        shop.worker as role,
        shop.server as reads,
        Publisher(shop.app.url, kafka=shop.options, **PUBLISHER) as direct,
        Publisher(reads.url) as gateway,
        Reader(reads.url) as reader,
    ):
        direct.sum("v").add(2)
        gateway.sum("v").add(3)
        shop.order(1)
        assert reader.get("v", after=direct.flush(WAIT_S) | gateway.flush(WAIT_S)).value() == 5
        assert wait_counted(reads, ["1"], role) == {"1": 1}
        assert shop.run("status").count("  folding  ") == 2
        assert "v" in shop.run("views", "ls")
        assert '"letter_count":0' in shop.run("dead-letters", "ls", "--json")
        assert role.terminate() == 0, role.tail()
        for it in (role, reads):
            assert PASSWORD not in it.program.stderr()
            assert CLIENT_SECRET not in it.program.stderr()


@pytest.mark.long
def test_what_is_wrong_is_said(secured: Secured, tmp_path: Path) -> None:
    """A wrong secret, an expired token and an unknown authority are Invalid, with words that show no secret."""
    secured.endpoint.lifetime_s = 3600
    old = tmp_path / "old"
    old.write_text(token(lifetime_s=-60) + WRONG)
    wrong = {
        "SCRAM-SHA-256": ({"sasl.password": WRONG}, "invalid credentials with SASL mechanism SCRAM-SHA-256"),
        "OIDC": ({"sasl.oauthbearer.client.secret": WRONG}, "refuses with 401 'invalid_client: wrong id or secret'"),
        "token file": ({"sasl.oauthbearer.token_file": str(old)}, "invalid_token"),
        "PLAIN": ({"ssl.ca.location": str(secured.certificates.client)}, "certificate verify failed"),
        "mTLS": ({"ssl.key.password": WRONG}, "ssl.key"),
    }
    for mechanism, (options, said) in wrong.items():
        with pytest.raises(Invalid) as error:
            connect(secured.app(mechanism), {**secured.options(mechanism), **options})
        assert said in str(error.value)
        assert "setting `kafka`" in str(error.value) or "setting kafka" in str(error.value)
        assert WRONG not in str(error.value)
    bare = {"security.protocol": "SSL", "ssl.ca.location": str(secured.certificates.authority)}
    away = secured.options("OIDC") | {"sasl.oauthbearer.token.endpoint.url": f"http://127.0.0.1:{Port().number}/token"}
    for mechanism, options, said in (("mTLS", bare, "alert bad certificate"), ("OIDC", away, "Connection refused")):
        with pytest.raises(Unavailable, match=said):
            connect(secured.app(mechanism), options, kafka_timeout_ms=1_000)
    done = pipeline(
        *("worker", "--from", secured.app("PLAIN").url, f"--data={tmp_path}/w", "--port=0"),
        env=environment({**secured.options("SCRAM-SHA-512"), "sasl.password": WRONG}),
    )
    assert done.returncode == 2, done.stderr
    assert "check sasl.* in the setting `kafka`" in done.stderr.splitlines()[-1]
    assert WRONG not in done.stdout + done.stderr


def connect(app: App, options: Mapping[str, str], **settings: int) -> None:
    """Connect as roles do when they start."""
    log = KafkaLog(parse_url(app.url), KafkaSettings(kafka=options, **settings), SystemClock())
    with closing(log):
        log.connect([DELTAS])


@pytest.mark.long
def test_a_password_that_is_changed(secured: Secured) -> None:
    """A running writer says that its login fails, and delivers when the password counts again."""
    app = secured.app("SCRAM-SHA-256")
    create_topics(app.bootstrap, app.app, 1, client=secured.admin_login, only=[DELTAS])
    options = {**secured.options("SCRAM-SHA-256"), "connections.max.idle.ms": "1000"}
    writer = KafkaLogWriter(parse_url(app.url), options, SystemClock(), timeout_ms=2_000, metadata_refresh_ms=60_000)
    with closing(writer):

        def append() -> int | PipelineError:
            return writer.append([Message(DELTAS, 0, None, b"x")], timeout_s=2)[0]

        assert append() == 1
        set_scram_password(secured.admin, WRONG)
        try:
            time.sleep(2)  # the idle connection is closed
            refused = append()
        finally:
            set_scram_password(secured.admin)
        assert isinstance(refused, Unavailable)
        assert "invalid credentials" in str(refused)
        assert str(refused).endswith("check sasl.* in the setting `kafka`")
        wait_until(lambda: isinstance(append(), int), "a delivery", WAIT_S)


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("mechanism", ["OIDC", "token file"])
def test_tokens_are_renewed(secured: Secured, tmp_path: Path, mechanism: str) -> None:
    """With tokens and sessions of ten seconds all roles go on, and the member keeps its partitions; each delta counts once.

    A token endpoint that is away for longer than a token lives only delays.
    """
    secured.endpoint.lifetime_s = SHORT_S

    def renew() -> None:
        part = tmp_path / "part"
        part.write_text(token(lifetime_s=SHORT_S))
        part.replace(secured.token_file)

    total = 0
    with again_and_again(renew, SHORT_S / 3):
        shop = Shop(secured, mechanism, tmp_path, "--log-level=info")
        with (
            shop.worker as role,
            shop.server as reads,
            Publisher(shop.app.url, kafka=shop.options, **PUBLISHER) as direct,
            Reader(reads.url) as reader,
        ):

            def count_for(seconds: float, pause_s: float = 0.5) -> None:
                nonlocal total
                until_s = time.monotonic() + seconds
                while time.monotonic() < until_s:
                    direct.sum("v").add(1)
                    shop.order(total)
                    total += 1
                    time.sleep(pause_s)

            def all_is_counted() -> None:
                assert reader.get("v", after=direct.flush(WAIT_S), timeout_ms=60_000).value() == total
                assert wait_counted(reads, map(str, range(total)), role) == {str(it): 1 for it in range(total)}

            count_for(3 * SHORT_S)
            all_is_counted()
            assert "generation 1: partitions [0, 1]" in role.program.stderr(), role.tail()
            assert "generation 2" not in role.program.stderr(), role.tail()
            if mechanism == "OIDC":
                assert secured.endpoint.given > 10
                secured.endpoint.secret = WRONG  # it refuses everybody
                count_for(2 * SHORT_S)
                secured.endpoint.secret = CLIENT_SECRET
                all_is_counted()
            assert role.terminate() == 0, role.tail()
