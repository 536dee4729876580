"""A broker over TLS that takes every login, and a token endpoint for OAUTHBEARER on 127.0.0.1."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion

from tests.broker.tls import Certificates
from tests.broker.users import PASSWORD as ADMIN_PASSWORD
from tests.broker.users import PLAIN

USER, PASSWORD = "app", "password-of-tests"
SCRAM = {"SCRAM-SHA-256": ScramMechanism.SCRAM_SHA_256, "SCRAM-SHA-512": ScramMechanism.SCRAM_SHA_512}
CLIENT_SECRET = "client-secret-of-tests"
_LOGIN = "org.apache.kafka.common.security"


def properties(it: Certificates, ssl_port: int, reauthenticate_ms: int = 0) -> dict[str, str]:
    """Return the properties of a broker with a listener for logins, and one on `ssl_port` for certificates of clients.

    OAUTHBEARER takes unsigned tokens that have not expired. A session ends with its token, if `reauthenticate_ms` is not 0.
    """
    prefix = "listener.name.sasl_ssl"
    return {
        "listeners": f"SASL_SSL://127.0.0.1:{{port}},SSL://127.0.0.1:{ssl_port},CONTROLLER://127.0.0.1:{{controller_port}}",
        "advertised.listeners": f"SASL_SSL://127.0.0.1:{{port}},SSL://127.0.0.1:{ssl_port}",
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,SASL_SSL:SASL_SSL,SSL:SSL",
        "inter.broker.listener.name": "SASL_SSL",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512,OAUTHBEARER",
        f"{prefix}.plain.sasl.jaas.config": (
            f'{PLAIN} username="admin" password="{ADMIN_PASSWORD}" user_admin="{ADMIN_PASSWORD}" user_{USER}="{PASSWORD}";'
        ),
        **{f"{prefix}.{name.lower()}.sasl.jaas.config": f"{_LOGIN}.scram.ScramLoginModule required;" for name in SCRAM},
        f"{prefix}.oauthbearer.sasl.jaas.config": (
            f'{_LOGIN}.oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="admin";'
        ),
        f"{prefix}.oauthbearer.connections.max.reauth.ms": str(reauthenticate_ms),
        f"{prefix}.ssl.client.auth": "requested",
        "listener.name.ssl.ssl.client.auth": "required",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(it.server),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(it.authority),
    }


def set_scram_password(admin: AdminClient, password: str = PASSWORD) -> None:
    """Give the user of SCRAM a password."""
    for kind in SCRAM.values():  # one request may change a user only once
        wanted = UserScramCredentialUpsertion(USER, ScramCredentialInfo(kind, 4096), password.encode())
        admin.alter_user_scram_credentials([wanted])[USER].result(30)


def token(subject: str = USER, lifetime_s: float = 3600.0) -> str:
    """Return an unsigned JSON web token."""
    now = time.time()
    parts = {"alg": "none"}, {"sub": subject, "iat": int(now), "exp": now + lifetime_s, "scope": "kafka"}
    return ".".join(base64.urlsafe_b64encode(json.dumps(it).encode()).decode().rstrip("=") for it in parts) + "."


class TokenEndpoint:
    """A token endpoint of OAuth 2.0 with one client and the grant `client_credentials`."""

    def __init__(self, lifetime_s: float) -> None:
        self.lifetime_s = lifetime_s
        self.secret = CLIENT_SECRET
        self.pause_s = 0.0
        """Pause before each byte of an answer; 0: it comes at once."""
        self.given = 0
        """Number of tokens that were given."""
        self.asked: list[Mapping[str, str]] = []
        """Bodies of all requests."""
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"])).decode()
                outer.asked.append({name: values[0] for name, values in parse_qs(body).items()})
                code, answer = outer._answer(self.headers.get("Authorization", ""))
                data = json.dumps(answer).encode()
                self.send_response(code)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if not outer.pause_s:
                    self.wfile.write(data)
                    return
                with suppress(OSError):  # the client has given up
                    for byte in data:
                        self.wfile.write(bytes([byte]))
                        time.sleep(outer.pause_s)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        """URL of the endpoint."""
        return f"http://127.0.0.1:{self._server.server_port}/token"

    def _answer(self, authorization: str) -> tuple[int, Mapping[str, object]]:
        login = base64.b64encode(f"{USER}:{self.secret}".encode()).decode()
        if authorization != f"Basic {login}":
            return 401, {"error": "invalid_client", "error_description": "wrong id or secret"}
        self.given += 1
        lifetime_s = self.lifetime_s
        return 200, {"access_token": token(lifetime_s=lifetime_s), "token_type": "Bearer", "expires_in": int(lifetime_s)}


@contextmanager
def token_endpoint(lifetime_s: float = 3600.0) -> Iterator[TokenEndpoint]:
    """Serve tokens that are valid for `lifetime_s`."""
    endpoint = TokenEndpoint(lifetime_s)
    thread = threading.Thread(target=endpoint._server.serve_forever, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint._server.shutdown()
        endpoint._server.server_close()
        thread.join()
