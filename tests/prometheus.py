"""A real Prometheus, run as Debian's package has it, in a process that never outlives the test."""

from __future__ import annotations

import json
import math
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from tests.broker.jars import Missing, need
from tests.broker.kafka import GUARDED, Port, absent

Samples = dict[frozenset[tuple[str, str]], float]
Matrix = dict[frozenset[tuple[str, str]], dict[int, float]]


def program(name: str) -> str:
    """Return the path of a program; skip the test if there is none, or fail it under PIPELINE_REQUIRE_KAFKA=1."""
    try:
        return need(name)
    except Missing:
        absent(Missing(f"no {name}: apt-get install prometheus"))


class Prometheus:
    """A Prometheus with a config and more options of its command line."""

    def __init__(self, folder: Path, content: Any, *more: str) -> None:
        self._port = Port()
        self.url = f"http://127.0.0.1:{self._port.number}"
        self._log = folder / "prometheus.log"
        config = folder / "prometheus.yml"
        config.write_text(yaml.safe_dump(content))
        options = (f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}", "--log.level=warn")
        listen = f"--web.listen-address=127.0.0.1:{self._port.number}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["sh", "-c", GUARDED, "sh", program("prometheus"), *options, listen, *more],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def close(self) -> None:
        self._process.kill()
        self._process.wait(30)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._port.close()

    def api(self, path: str, **parameters: Any) -> Any:
        """Return the `data` of an answer."""
        query = urllib.parse.urlencode({name.replace("match", "match[]"): value for name, value in parameters.items()})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def ready(self) -> bool:
        """Return whether Prometheus takes queries."""
        assert self._process.poll() is None, self._log.read_text()
        try:
            urllib.request.urlopen(f"{self.url}/-/ready", timeout=30).close()
        except OSError:
            return False
        return True

    def healthy(self) -> bool:
        """Return whether every target was scraped and none failed."""
        if not self.ready():
            return False
        found = self.api("targets")["activeTargets"]
        return bool(found) and all(target["health"] == "up" for target in found)

    def vector(self, expr: str) -> Samples:
        """Return the samples of an instant query by their labels."""
        result = self.api("query", query=expr)["result"]
        return {frozenset(it["metric"].items()): float(it["value"][1]) for it in result}

    def matrix(
        self, expr: str, *, start_ms: int, end_ms: int, step: str
    ) -> dict[frozenset[tuple[str, str]], dict[int, float]]:
        """Return the values of a range query by time in ms, by the labels of its series."""
        span = {"start": start_ms / 1_000, "end": end_ms / 1_000, "step": step}
        result = self.api("query_range", query=expr, **span)["result"]
        return {
            frozenset(it["metric"].items()): {round(at * 1_000): float(value) for at, value in it["values"]} for it in result
        }

    def numbers(self, expr: str, *, instant: bool) -> list[float]:
        """Return all numbers that a panel would show for the last 30 s; NaN is none."""
        if instant:
            found = list(self.vector(expr).values())
        else:
            now = float(self.api("query", query="time()")["result"][1])
            matrix = self.api("query_range", query=expr, start=now - 30, end=now, step="1s")["result"]
            found = [float(value) for series in matrix for _, value in series["values"]]
        return [number for number in found if not math.isnan(number)]
