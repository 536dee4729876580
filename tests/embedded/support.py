"""Children of these tests, and checks of the log that they leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.contracts.support import DEADLINE_S, Row, read
from tests.embedded.children import TRANSACTION_RECORDS, open_log

ROOT = Path(__file__).resolve().parents[2]


@contextmanager
def child(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a child that is gone when the body is left."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.embedded.children", *map(str, arguments)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pipesize=2**20,  # a child that has to wait for its parent would be killed in that wait only
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def run_child(*arguments: object) -> list[str]:
    """Return everything that a child prints, which must end by itself and well."""
    with child(*arguments) as process:
        said, _ = process.communicate(timeout=3 * DEADLINE_S)
    assert process.returncode == 0, f"exit code {process.returncode}; it said {said[-1000:]}"
    return said.splitlines()


def wait_for_line(process: subprocess.Popen[str], word: str) -> str:
    """Return the first line that starts with `word`."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line
    raise AssertionError(f"the child ended and never said {word}")


def kill_after(process: subprocess.Popen[str], seconds: float) -> list[str]:
    """Let a child work for so long, kill -9 it, and return what it printed."""
    time.sleep(seconds)
    process.kill()
    assert process.stdout is not None
    return process.stdout.readlines()  # not communicate(): that forgets what was read ahead


def _name(row: Row) -> str:
    return (row.value or b"").split(b" ")[0].decode()


class Acknowledged:
    """Acknowledgements that children of a log got, and the check that the log still has the records."""

    def __init__(self) -> None:
        self.values: dict[int, str] = {}
        self.transactions: set[str] = set()

    def note(self, lines: list[str]) -> int:
        """Note the acknowledgements in a child's lines, and return their number."""
        count = 0
        for line in lines:
            word, *rest = line.rstrip("\n").split(" ")
            if not line.endswith("\n") or word not in ("A", "T"):
                continue
            count += 1
            if word == "A":
                assert int(rest[0]) not in self.values, "an offset was given twice"
                self.values[int(rest[0])] = rest[1]
            else:
                self.transactions.add(rest[0])
        return count

    def check(self, path: Path) -> None:
        """Check that the log has all of them, whole and in order, and goes on behind them."""
        log = open_log(path)
        try:
            rows = {row.offset + 1: _name(row) for row in read(log, "events", 0)}
            assert {covers: rows.get(covers) for covers in self.values} == self.values
            assert len(rows) - len(self.values) <= self.unsure + 1, "far more is there than was ever sent"
            parts = {
                topic: Counter(_name(row) for partition in range(2) for row in read(log, topic, partition))
                for topic in ("table", "notes")
            }
            assert parts["table"] == parts["notes"]
            assert set(parts["table"].values()) <= {TRANSACTION_RECORDS}
            assert self.transactions <= parts["table"].keys()
            self.unsure += 1
            end = log.watermarks("events", 0).end_offset
            assert end >= max(self.values, default=0)
        finally:
            log.close()

    unsure = 0
    """Number of appends that may have been under way when a child was killed: one a life."""
