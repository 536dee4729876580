"""The docs' agents, on a broker."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from confluent_kafka import Producer

from tests.broker.agents import SESSION_MS, Source
from tests.broker.kafka import App
from tests.docs.test_readme import blocks
from tests.support import Program


def test_they_are_short() -> None:
    """Every example takes under twenty lines, including blank ones and imports."""
    (code,) = blocks("py")
    head, first, second = code.split("\n\n\n")
    assert len((head + first).splitlines()) < 20
    assert len((head + second).splitlines()) < 20


@pytest.mark.timeout(120)
def test_they_do_what_it_says(app: App, tmp_path: Path) -> None:
    """One agent counts a topic's events, the other is told when a sum has passed its limit."""
    (code,) = blocks("py")
    (command,) = blocks("shell")
    source = Source(app, tmp_path)
    assert '"orders"' in code
    source.write(code.replace('"orders"', f'"{source.topic}"'))
    assert "kafka://127.0.0.1:9092" in command
    words = shlex.split(command.replace("kafka://127.0.0.1:9092", app.url).replace("8081", "0"))
    producer = Producer({"bootstrap.servers": app.bootstrap})
    for amount, region in ((400, "eu"), (700, "us"), (599, "eu"), (300, "us"), (1, "eu")):
        producer.produce(source.topic, json.dumps({"amount": amount, "region": region}).encode())
    assert producer.flush(30) == 0
    settings = ("--set", "commit_interval_ms=20", "--set", f"session_timeout_ms={SESSION_MS}")
    with Program(*words[1:], *settings, stderr=tmp_path / "stderr", cwd=tmp_path) as program:
        said = sorted(program.read_line() for _ in range(3))
    assert said[0] == "eu has reached 1000\n", said
    assert said[1].startswith("ready at ")
    assert said[2] == "us has reached 1000\n"
