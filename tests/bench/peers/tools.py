"""The tools that are compared: how each is installed, started, and its totals read from its changelog."""

from __future__ import annotations

import shutil
import struct
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline import native
from pipeline.core.codec import decode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import Definition, parse_suffix, series_prefix
from tests.bench.peers.work import VIEW, key
from tests.broker.jars import Missing, fetch, need

HERE = Path(__file__).parent
QUIX, FAUST, STREAMS = "3.28.1", "0.15.3", "4.3.1"
_PREFIX = series_prefix(Definition(VIEW, "sum", ("product", "region")))
_CACHE_BYTES = 67_108_864
"""Cache of Kafka Streams: as much as the buffer of one of our publishers has by default, over six times Streams' default."""


class Place(NamedTuple):
    """Names and folders of one measurement, which no other uses."""

    bootstrap: str
    name: str
    """App, group and prefix of topics."""
    data: Path
    partitions: int
    port: int
    commit_ms: int
    cache: Path

    @property
    def url(self) -> str:
        return f"kafka://{self.bootstrap}/{self.name}"

    @property
    def topic(self) -> str:
        """Topic of the deltas."""
        return f"{self.name}.deltas"


class Tool(NamedTuple):
    """One line of the tables."""

    name: str
    says: str
    """Settings that a reader has to know."""
    publisher: str
    """Way of `tests.bench.peers.publish`."""
    values: str
    """Encoding of a message's value."""
    install: Callable[[Path], None]
    """Make what is needed in a cache folder; raises `Missing`."""
    command: Callable[[Place], Sequence[str]]
    read: Callable[[Sequence[tuple[bytes, bytes]]], dict[str, int]]
    """Totals in changelog entries, of which the last of a key counts."""
    env: Mapping[str, str] = {}
    group: str = ""
    """Suffix of the consumer group whose offsets tell what is committed."""
    ready: Callable[[Place], bool] | None = None
    """Return whether the worker is restored; None: it prints a line, or does not tell."""
    prints_ready: bool = False
    slow: int = 0
    """Share of `--slow` that is the most deltas of this tool, which would take very long: 1 of so many; 0: no limit."""

    @property
    def is_ours(self) -> bool:
        return self.publisher == "ours"

    @property
    def tells_ready(self) -> bool:
        """Return whether the end of a restore can be seen from outside."""
        return self.prints_ready or self.ready is not None


def _native(cache: Path) -> None:
    if not native.in_use():
        raise Missing("the native core is not built here")


def _plain(cache: Path) -> None:
    pass


def _venv(folder: str, *packages: str) -> Callable[[Path], None]:
    """Return a function that makes an environment with these packages, once."""

    def install(cache: Path) -> None:
        made = cache / folder
        if (made / "installed").exists():
            return
        shutil.rmtree(made, ignore_errors=True)
        _run([sys.executable, "-m", "venv", str(made)])
        _run([str(made / "bin" / "python"), "-m", "pip", "install", "-q", *packages])
        (made / "installed").touch()

    return install


def _streams(cache: Path) -> None:
    """Let Maven fetch Kafka Streams and compile the program, once for each version of it."""
    need("java")
    made = cache / f"streams-{STREAMS}"
    source = (HERE / "streams/pom.xml").read_text() + (HERE / "streams/src/main/java/Totals.java").read_text()
    if (made / "source").is_file() and (made / "source").read_text() == source:
        return
    need("javac")
    shutil.rmtree(made, ignore_errors=True)
    goals = ["compile", "dependency:copy-dependencies", "-DincludeScope=runtime"]
    _run(
        [
            need("mvn"),
            "-q",
            "-B",
            "-f",
            str(HERE / "streams/pom.xml"),
            f"-Dout={made}",
            *goals,
            f"-DoutputDirectory={made}/lib",
        ]
    )
    (made / "source").write_text(source)


def _run(command: list[str]) -> None:
    fetch(command, f"{' '.join(command[:4])}...")


def _worker(place: Place) -> list[str]:
    settings = {"commit_interval_ms": place.commit_ms, "mirror_interval_ms": 500, "standby_count": 0}
    program = [sys.executable, "-c", "from pipeline.cli import main; main()", "worker"]
    where = ["--from", place.url, "--data", str(place.data), "--name", "one", "--port", str(place.port)]
    return [*program, *where, *[f"--set={name}={value}" for name, value in settings.items()]]


def _worker_ready(place: Place) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{place.port}/readyz", timeout=5) as answer:
        return bool(answer.status == 200)
    return False


def _streams_command(place: Place) -> list[str]:
    made = place.cache / f"streams-{STREAMS}"
    settings: dict[str, Any] = {
        "application.id": place.name,
        "bootstrap.servers": place.bootstrap,
        "processing.guarantee": "exactly_once_v2",
        "commit.interval.ms": place.commit_ms,
        "poll.ms": min(100, place.commit_ms),
        "statestore.cache.max.bytes": _CACHE_BYTES,
        "num.stream.threads": 1,
        "state.dir": place.data,
        "producer.compression.type": "lz4",
        "main.consumer.max.poll.records": 10_000,
        "restore.consumer.max.poll.records": 10_000,
        "main.consumer.group.instance.id": "one",
        "consumer.session.timeout.ms": 6_000,
    }
    jvm = ["-Xmx1g", "-XX:+UseSerialGC"]  # of all collectors this one costs least CPU
    given = [f"{name}={value}" for name, value in settings.items()]
    return ["java", *jvm, "-cp", f"{made}/classes:{made}/lib/*", "Totals", place.topic, *given]


def _python(folder: str, script: str) -> Callable[[Place], Sequence[str]]:
    def command(place: Place) -> list[str]:
        program = [str(place.cache / folder / "bin" / "python"), "-P", str(HERE / script)]
        last = place.partitions if script == "faust_app.py" else place.commit_ms / 1000
        return [*program, place.bootstrap, place.topic, place.name, str(place.data), str(last)]

    return command


def _read_ours(entries: Sequence[tuple[bytes, bytes]]) -> dict[str, int]:
    last = {name: value for name, value in entries if name.startswith(_PREFIX)}
    states = decode_states(KINDS["sum"], [*last.values()])
    totals = {}
    for name, state in zip(last, states, strict=True):
        product, region = parse_suffix(name[len(_PREFIX) :])[1]
        totals[key((region, product))] = state
    return totals


def _read_streams(entries: Sequence[tuple[bytes, bytes]]) -> dict[str, int]:
    return {name.decode(): struct.unpack(">q", value)[0] for name, value in entries}


def _read_quix(entries: Sequence[tuple[bytes, bytes]]) -> dict[str, int]:
    end = b'|"total"'
    return {name.removesuffix(end).decode(): int(value) for name, value in entries if name.endswith(end)}


def _read_faust(entries: Sequence[tuple[bytes, bytes]]) -> dict[str, int]:
    return {msgspec.json.decode(name, type=str): int(value) for name, value in entries}


_OURS: dict[str, Any] = {
    "publisher": "ours",
    "values": "-",
    "command": _worker,
    "read": _read_ours,
    "group": "-position",
    "ready": _worker_ready,
}
_BY_STREAMS: dict[str, Any] = {
    "values": "long",
    "install": _streams,
    "command": _streams_command,
    "read": _read_streams,
    "prints_ready": True,
}
_STREAMS_SAYS = f"{STREAMS}, exactly_once_v2, RocksDB, one thread, cache of 64 MiB, heap of 1 GB, SerialGC"
TOOLS: Sequence[Tool] = (
    Tool(
        "ours, native", "Publisher, `pipeline worker --name`", install=_native, env={"PIPELINE_NATIVE": "require"}, **_OURS
    ),
    Tool("ours, plain", "the same in pure Python", install=_plain, env={"PIPELINE_NATIVE": "no"}, **_OURS),
    Tool("Kafka Streams", f"{_STREAMS_SAYS}; a message for each delta", publisher="producer", **_BY_STREAMS),
    Tool("Kafka Streams, merged", "the same behind a dictionary that adds up deltas", publisher="merging", **_BY_STREAMS),
    Tool(
        "Quix Streams",
        f"{QUIX}, exactly-once, RocksDB; a message for each delta",
        "producer",
        "text",
        _venv(f"quix-{QUIX}", f"quixstreams=={QUIX}"),
        _python(f"quix-{QUIX}", "quix_app.py"),
        _read_quix,
        slow=1,
    ),
    Tool(
        "Faust",
        f"{FAUST}, stock: at least once, table in memory, its default commit interval of 2.8 s; a message for each delta",
        "producer",
        "text",
        _venv(f"faust-{FAUST}", f"faust-streaming=={FAUST}", "aiokafka==0.14.0", "cramjam>=2.9,<3"),
        _python(f"faust-{FAUST}", "faust_app.py"),
        _read_faust,
        slow=10,
    ),
)
