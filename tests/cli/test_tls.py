"""TLS from the command line: flags of the server, settings of the clients in the environment."""

import json
from pathlib import Path

import pytest

from tests.broker.tls import make
from tests.cli.conftest import Here
from tests.support import Program, UpProcess, pipeline


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with certificates."""
    folder = tmp_path_factory.mktemp("tls")
    make(folder)
    return folder


def test_commands_speak_tls(files: Path, tmp_path: Path) -> None:
    """A server beyond loopback that asks for client certificates, a gatherer before it, and commands with certificates."""
    door = ("--tls-cert", f"{files}/server.pem", "--tls-key", f"{files}/server.key", "--tls-client-ca", f"{files}/ca.pem")
    env = {
        "PIPELINE_CA_FILE": f"{files}/ca.pem",
        "PIPELINE_CLIENT_CERT_FILE": f"{files}/client.pem",
        "PIPELINE_CLIENT_KEY_FILE": f"{files}/client.key",
    }
    with UpProcess(tmp_path / "data", "--host", "0.0.0.0", *door) as up:
        url = f"https://127.0.0.1:{up.port}"
        assert up.ready["url"] == url
        sent = pipeline("publish", "hits", "--to", url, "-", input="n\n1\n2\n", env=env)
        assert sent.returncode == 0, sent.stderr
        token = sent.stdout.split()[-1]
        for command in (
            ("get", "hits", "--after", token, "--from", url),
            ("status", "--from", url),
            ("views", "ls", "--from", url),
        ):
            done = pipeline(*command, "--json", env=env)
            assert done.returncode == 0, done.stderr
        errors = tmp_path / "gatherer.stderr"
        with Program("serve", "--gather", url, "--port", "0", "--json", stderr=errors, env=env) as gatherer:
            gathered = json.loads(gatherer.read_line())["url"]
            done = pipeline("get", "hits", "--from", gathered, "--json")
            assert json.loads(done.stdout)["series"][0]["value"] == 2
        stranger = pipeline("get", "hits", "--from", url, env={"PIPELINE_CA_FILE": f"{files}/ca.pem"})
        assert stranger.returncode == 1
        assert "client certificate" in stranger.stderr


def test_wrong_files_are_told(here: Here, files: Path, tmp_path: Path) -> None:
    """A server with a key of another certificate does not start: the error names the flag's setting, exit code 2."""
    wrong = ("--tls-cert", f"{files}/server.pem", "--tls-key", f"{files}/client.key")
    done = here("up", "--data", str(tmp_path / "data"), "--port", "0", *wrong)
    assert (done.returncode, done.stdout) == (2, "")
    assert "tls_key_file" in done.stderr
    assert not (tmp_path / "data").exists()
