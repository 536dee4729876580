"""docker-compose.yml and our image: everything that can be checked without a Docker engine, own commands run by hand."""

from __future__ import annotations

import base64
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import Reader
from pipeline.settings import QuerySettings, WorkerSettings
from pipeline.topics import DELTAS, load
from tests.broker.jars import Missing, need
from tests.broker.kafka import Broker, Port, absent, admin_client
from tests.support import ROOT, Program, pipeline, wait_until

FILE = ROOT / "docker-compose.yml"
COMPOSE = yaml.safe_load(FILE.read_text())
SERVICES: Mapping[str, dict[str, Any]] = COMPOSE["services"]
DOCKERFILE = ROOT / "pipeline" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN = [name for name, service in SERVICES.items() if "build" in service]
ROLES = [name for name in OWN if name != "topics"]


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions in order: name and the rest."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1].strip()) for line in text.splitlines() if line.strip()]


def last(name: str) -> str:
    """Return the last instruction of this name, which is the one that holds for the image."""
    return [rest for found, rest in instructions() if found == name][-1]


def test_compose_accepts_the_file() -> None:
    """docker-compose, and the newer plugin if installed, accept the file, and find the same services as these tests."""
    try:
        programs = [[need("docker-compose")]]
    except Missing:
        absent(Missing("no docker-compose: apt-get install docker-compose"))
    if (
        shutil.which("docker")
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False, timeout=30).returncode
    ):
        programs.append(["docker", "compose"])
    for program in programs:
        command = [*program, "-f", str(FILE), "config"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        assert yaml.safe_load(done.stdout)["services"].keys() == SERVICES.keys()


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_careful(name: str) -> None:
    """A service has ports of 127.0.0.1 only, a pinned image, health check, restart policy, init, and named volumes."""
    service = SERVICES[name]
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", ()))
    assert not service.keys() & {"network_mode", "privileged", "pid", "env_file"}
    assert pinned(service["image"])
    assert service["init"] is True
    once = name == "topics"
    assert service["restart"] == ("no" if once else "unless-stopped")
    assert service["healthcheck"].get("disable", False) is once
    for source, target, *_ in (volume.split(":") for volume in service.get("volumes", ())):
        assert target.startswith("/")
        assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
    used = [v.split(":")[0] for s in SERVICES.values() for v in s.get("volumes", ()) if not v.startswith(".")]
    assert len(used) == len(set(used)), "a directory belongs to one process"


def pinned(image: str) -> bool:
    """Return whether an image has a tag of a whole version."""
    return re.fullmatch(r"[a-z0-9/._-]+:v?\d+\.\d+\.\d+(-[a-z0-9.-]+)?", image) is not None


@pytest.mark.parametrize("name", OWN)
def test_own_service_is_our_image(name: str) -> None:
    """Our services run our version's image without privileges, and are stopped no sooner than a commit is decided."""
    service = SERVICES[name]
    assert service["image"] == f"{PROJECT['name']}:{PROJECT['version']}"
    assert ROOT / service["build"]["context"] / service["build"]["dockerfile"] == DOCKERFILE
    assert service["cap_drop"] == ["ALL"]
    assert service["read_only"] is True
    # Docker starts whatever ends; so what a start again can't help must not end.
    assert service["environment"] == ({} if name == "topics" else {"PIPELINE_HOLD": "1", "PIPELINE_INSECURE": "true"})
    assert service["stop_grace_period"].endswith("s")
    assert int(service["stop_grace_period"][:-1]) * 1000 > WorkerSettings().commit_timeout_ms


def test_files_agree() -> None:
    """Scraped addresses, dashboards and mounts agree between the files."""
    scraped = yaml.safe_load((ROOT / "dashboards" / "prometheus.yml").read_text())["scrape_configs"]
    addresses = {target for job in scraped for group in job["static_configs"] for target in group["targets"]}
    up = f"{QuerySettings().host}:{QuerySettings().port}"
    assert addresses == {up, *(f"{name}:{option(name, '--port')}" for name in ROLES)}
    for name in ROLES:
        assert option(name, "--host") == "0.0.0.0", "others call it by the container's address"
        assert SERVICES[name]["hostname"] == name, "a server answers for its own name, and not for every name"
        assert all(port.startswith("127.0.0.1:") for port in SERVICES[name].get("ports", ())), "it asks nobody for a token"
        assert [volume.split(":")[1] for volume in SERVICES[name]["volumes"]] == [option(name, "--data")]
        assert {port.split(":")[2] for port in SERVICES[name].get("ports", ())} <= {option(name, "--port")}
    mounted = [volume.split(":") for volume in SERVICES["prometheus"]["volumes"] if volume.startswith("./")]
    (rules,) = yaml.safe_load((ROOT / "dashboards" / "prometheus.yml").read_text())["rule_files"]
    assert {source: target for source, target, _ in mounted} == {
        f"./dashboards/{name}": f"/etc/prometheus/{name}" for name in ("prometheus.yml", rules)
    }
    folder = ROOT / "dashboards" / "grafana"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load((folder / "dashboards" / "pipeline.yml").read_text())["providers"]
    grafana = SERVICES["grafana"]
    mounts = {volume.split(":")[1]: volume.split(":")[0] for volume in grafana["volumes"]}
    assert mounts[provider["options"]["path"]] == "./dashboards"
    assert mounts["/etc/grafana/provisioning"] == "./dashboards/grafana"
    home = Path(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (ROOT / mounts[str(home.parent)] / home.name).exists()


def test_workers_share_the_partitions() -> None:
    """Each worker has a name of its own in the group, and a host name by which the others' status finds it."""
    workers = [name for name in ROLES if SERVICES[name]["command"][0] == "worker"]
    assert len({option(name, "--name") for name in workers}) == len(workers) > 1
    assert [SERVICES[name]["hostname"] for name in workers] == workers


def option(name: str, flag: str) -> str:
    """Return the value of a flag on a service's command line."""
    command: list[str] = SERVICES[name]["command"]
    return command[command.index(flag) + 1]


def test_dockerfile_is_careful() -> None:
    """The Dockerfile has pinned bases, an unprivileged user, a health check and our program, and copies what exists."""
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert bases
    assert all(pinned(base) for base in bases)
    assert last("USER").split(":")[0] not in ("", "root", "0")
    assert last("HEALTHCHECK")
    assert json.loads(last("ENTRYPOINT")) == ["pipeline"]
    assert "pipeline" in PROJECT["scripts"]
    rules = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in rules
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {
        source
        for name, rest in instructions()
        if name == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    }
    assert copied == kept
    assert all((ROOT / source).exists() for source in copied)
    assert PROJECT["readme"] in copied
    assert not re.search(r"(?i)password|secret|token", DOCKERFILE.read_text())


@pytest.fixture(scope="module")
def broker(kafka_jars: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Run an empty Kafka with the settings of the service, on other addresses; its HOST listener answers too."""
    (published,) = (port.split(":") for port in SERVICES["kafka"]["ports"])
    environment: dict[str, str] = SERVICES["kafka"]["environment"]
    assert f"HOST://:{published[2]}" in environment["KAFKA_LISTENERS"]
    assert f"HOST://{published[0]}:{published[1]}" in environment["KAFKA_ADVERTISED_LISTENERS"]
    assert len(base64.urlsafe_b64decode(environment["CLUSTER_ID"] + "==")) == 16
    host = Port()
    addresses = {
        "HOST://127.0.0.1:9092": f"HOST://127.0.0.1:{host.number}",
        "HOST://:19092": f"HOST://127.0.0.1:{host.number}",
        "://:9092": "://127.0.0.1:{port}",
        "://:9093": "://127.0.0.1:{controller_port}",
        "kafka:9092": "127.0.0.1:{port}",
        "kafka:9093": "127.0.0.1:{controller_port}",
    }
    properties = {
        name.removeprefix("KAFKA_").lower().replace("_", "."): replace(value, addresses)
        for name, value in environment.items()
        if name.startswith("KAFKA_") and name != "KAFKA_LOG_DIRS"
    }
    with Broker(tmp_path_factory.mktemp("compose") / "kafka", properties) as started:
        assert admin_client(f"127.0.0.1:{host.number}").list_topics(timeout=10).topics == {}
        yield started
    host.close()


def replace(text: str, changes: Mapping[str, str]) -> str:
    """Return the text with every one of these replaced, in this order."""
    for old, new in changes.items():
        text = text.replace(old, new)
    return text


class Service:
    """An own service's command line and health check, with addresses and paths that fit here."""

    def __init__(self, name: str, bootstrap: str, folder: Path) -> None:
        self.name = name
        self._port = Port()
        self.url = f"http://127.0.0.1:{self._port.number}"
        self._folder = folder
        self._changes = {
            "kafka:9092": bootstrap,
            "/data": str(folder / name),
            "0.0.0.0": "127.0.0.1",
            "8080": str(self._port.number),
        }
        self.command = [replace(word, self._changes) for word in SERVICES[name]["command"]]

    def start(self) -> Program:
        return Program(*self.command, stderr=self._folder / f"{self.name}.stderr", cwd=self._folder)

    def healthy(self, test: list[str] | None = None) -> bool:
        """Run a health check: by default the service's own."""
        kind, program, *arguments = test or SERVICES[self.name]["healthcheck"]["test"]
        assert (kind, program) == ("CMD", "python")
        command = [sys.executable, *(replace(word, self._changes) for word in arguments)]
        return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0

    def close(self) -> None:
        self._port.close()


@pytest.mark.long
def test_services_run_by_hand(broker: Broker, tmp_path: Path) -> None:
    """In the order of depends_on each own command line does its part: a delta is read back, and signals end all with 0."""
    assert all(SERVICES[name]["depends_on"] == {"topics": {"condition": "service_completed_successfully"}} for name in ROLES)
    assert SERVICES["topics"]["depends_on"] == {"kafka": {"condition": "service_healthy"}}
    with ExitStack() as stack:
        services = {name: Service(name, broker.bootstrap, tmp_path) for name in OWN}
        for service in services.values():
            stack.callback(service.close)
        for _ in range(2):  # it runs at every `up`
            applied = pipeline(*services["topics"].command, cwd=tmp_path)
            assert applied.returncode == 0, applied.stderr
        in_image = ["CMD", *json.loads(last("HEALTHCHECK").partition("CMD")[2])]
        assert not services["server"].healthy()
        assert not services["server"].healthy(in_image)
        programs = {name: stack.enter_context(services[name].start()) for name in ROLES}
        for name, program in programs.items():
            wait_until(
                lambda n=name, p=program: p.process.poll() is not None or services[n].healthy(), f"a healthy {name}", 60
            )
            assert program.process.poll() is None, program.stderr()
            assert services[name].healthy(in_image)
        read_back(services["server"].url)
        for number, program in zip([signal.SIGTERM, signal.SIGINT, signal.SIGTERM], programs.values(), strict=True):
            program.signal(number)
        assert {name: program.wait() for name, program in programs.items()} == dict.fromkeys(ROLES, 0)
        assert not (tmp_path / "pipeline-data").exists()


def read_back(url: str) -> None:
    """Check that deltas sent to the server are in its answers."""
    deltas = [{"view": "sold", "kind": "sum", "labels": {"n": str(n)}, "value": n} for n in range(40)]
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(f"{url}/v1/deltas", json.dumps(deltas).encode(), headers)) as answer:
        token = json.load(answer)["token"]
    with Reader(url) as reader:
        read = {series.labels["n"]: series.value for series in reader.get("sold", after=token).series}
        assert read == {str(n): n for n in range(40)}
        assert len(reader.status()["partitions"]) == load()[DELTAS].partitions
