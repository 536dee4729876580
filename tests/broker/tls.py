"""Certificates for tests, made by openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.broker.jars import Missing, need
from tests.broker.kafka import absent

PASSWORD = "secret"


class Certificates(NamedTuple):
    """Files of certificates and keys. The client's key is encrypted; the server's is with its certificate, for 127.0.0.1."""

    authority: Path
    server: Path
    client: Path
    client_key: Path


def make(folder: Path) -> Certificates:
    """Make an authority, a server and a client."""
    try:
        openssl = need("openssl")
    except Missing:
        absent(Missing("no openssl: apt-get install openssl"))

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], check=True, cwd=folder, capture_output=True, timeout=60)

    new = ("-newkey", "rsa:2048", "-nodes", "-subj")
    run("req", "-x509", *new, "/CN=tests", "-days", "2", "-keyout", "ca.key", "-out", "ca.pem")
    for name, also in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "subjectAltName=DNS:client")):
        run("req", *new, f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / f"{name}.ext").write_text(also)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", f"{name}.ext")
        run("x509", "-req", "-in", f"{name}.csr", *signed, "-out", f"{name}.pem")
    run("pkcs8", "-topk8", "-in", "client.key", "-out", "locked.key", "-passout", f"pass:{PASSWORD}")
    both = folder / "both.pem"
    both.write_text((folder / "server.key").read_text() + (folder / "server.pem").read_text())
    return Certificates(folder / "ca.pem", both, folder / "client.pem", folder / "locked.key")
