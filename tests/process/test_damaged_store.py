"""`pipeline up` whose store is damaged while it runs says so over HTTP, and recovers without a restart."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline import Publisher, Reader
from pipeline.errors import NotReady
from tests.embedded.test_damaged_store import flip_everywhere
from tests.process.load import metric
from tests.support import UpProcess, wait_until

SERIES = 3_000


def status_of(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.timeout(120)
def test_a_store_damaged_under_a_running_process(tmp_path: Path) -> None:
    """The first read gets 503 and when to come back; soon all is exact, counted, logged; a restart finds no damage."""
    with UpProcess(tmp_path / "data", "--set=partitions=2") as up:
        with Publisher(up.url) as publisher, Reader(up.url) as reader:
            view = publisher.sum("v", labels=("n",))
            for n in range(SERIES):
                view.add(n, n=str(n))
            assert reader.get("v", by=(), after=publisher.flush(30)).value() == sum(range(SERIES))
        assert up.terminate() == 0
        up.start()  # the stores are in files, and in no cache
        for number in range(2):
            flip_everywhere(up.data / "stores" / str(number))
        code, body = status_of(f"{up.url}/v1/views/v?by=")
        assert code == 503
        assert json.loads(body)["type"] == "urn:pipeline:error:NotReady"
        assert "rebuilt from the changelog" in json.loads(body)["detail"]

        def answered() -> bool:
            try:
                with Reader(up.url) as reader:
                    return bool(reader.get("v", by=()).value() == sum(range(SERIES)))
            except NotReady:
                return False

        wait_until(answered, "an exact answer")
        assert status_of(f"{up.url}/readyz")[0] == 200
        assert metric(up.url, m.STORES_REBUILT) == 2
        assert up.program.stderr().count("rebuilding the store") == 2
        assert up.terminate() == 0
        up.start()
        assert answered()
        assert metric(up.url, m.STORES_REBUILT) == 0
