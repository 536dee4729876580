"""Strangers without a token, and tenants beyond their bounds, while the file of tokens is rewritten and broken."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.tokens_file import TokensFile
from pipeline.core.grants import AccessToken, digest_of
from tests.attack.support import attacked, request, up_process
from tests.support import UpProcess

MB = 10**6
OPERATOR = {"Authorization": "Bearer operator"}
TENANT = {"Authorization": "Bearer tenant", "Content-Type": "application/json"}
WRITE = json.dumps([{"view": "bystander", "kind": "sum", "labels": {}, "value": 1_000_000}]).encode()
REQUESTS = [
    ("GET", "/v1/views/bystander", None),
    ("GET", "/v1/views", None),
    ("GET", "/metrics", None),
    ("GET", "/v1/views/bystander/stream", None),
    ("GET", "/v1/dead-letters", None),
    ("POST", "/v1/deltas", WRITE),
    ("POST", "/v1/batches", b"x" * MB),
    ("POST", "/v1/views/bystander/drop", b"{}"),
    ("POST", "/v1/dead-letters/replay", b"{}"),
]


def entry(token: str, *scopes: str, **labels: str) -> AccessToken:
    return AccessToken(token, digest_of(token.encode()).hex(), scopes, 0, labels=labels)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "tokens.json"
    known = [entry("operator", "read", "publish", "admin"), entry("tenant", "read", "publish", "admin", team="a")]
    TokensFile(str(path), SystemClock()).change(lambda _: known)
    return path


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory, tokens: Path) -> Iterator[UpProcess]:
    """A `pipeline up` that needs tokens."""
    with up_process(tmp_path_factory.mktemp("attack") / "data", env={"PIPELINE_TOKENS_FILE": str(tokens)}) as started:
        yield started


def guesses(seed: int) -> Iterator[dict[str, str]]:
    """Yield headers that hold no token: none, guesses, other schemes, long ones and bytes."""
    chance = random.Random(seed)
    while True:
        text = "".join(chance.choices("abcdefghijklmnopqrstuvwxyz0123456789_-", k=chance.choice([0, 8, 43, 1_000, 30_000])))
        yield chance.choice(
            [
                {},
                {"Authorization": f"Bearer {text}"},
                {"Authorization": f"Bearer operator{text or '='}"},
                {"Authorization": f"Basic {text}"},
                {"Authorization": "operator"},
                {"Authorization": "Bearer \xff\xfe"},
                {"Cookie": "token=operator", "X-Authorization": "Bearer operator"},
            ]
        )


@pytest.mark.parametrize("seconds", [2.0, pytest.param(60.0, marks=pytest.mark.long)])
def test_nobody_comes_in(up: UpProcess, tokens: Path, seconds: float) -> None:
    """No request without a known token is carried out, and the bearer of one is served, whatever becomes of the file."""
    ends_s = time.monotonic() + seconds
    good = tokens.read_bytes()
    statuses: Counter[int] = Counter()

    def stranger(seed: int) -> None:
        chance = random.Random(seed)
        for headers in guesses(seed):
            if time.monotonic() > ends_s:
                return
            method, path, body = chance.choice(REQUESTS)
            more = {"Content-Type": "application/json" if body is None or len(body) < MB else "application/octet-stream"}
            with suppress(OSError, http.client.HTTPException):  # cut off: refused as well
                statuses[request(up.port, method, path, body, {**more, **headers}).status] += 1

    def tenant() -> None:
        while time.monotonic() < ends_s:
            for method, path, body in REQUESTS:
                if path == "/v1/batches":
                    continue
                with suppress(OSError, http.client.HTTPException):
                    reply = request(up.port, method, path, body, TENANT)
                    found = reply.status, path
                    assert reply.status in (403, 404) or found == (200, "/v1/views"), (found, reply.body)
                    assert b"bystander" not in reply.body or reply.status != 200

    def writer() -> None:
        while time.monotonic() < ends_s:
            for content in (good[: len(good) // 2], b"", b'{"version":1,"tokens":[]', good):
                tokens.write_bytes(content)
                time.sleep(0.1)

    with attacked(up, headers=OPERATOR) as bystander:
        failed: list[BaseException] = []

        def run(work: object, *arguments: object) -> None:
            try:
                work(*arguments)  # type: ignore[operator]
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=run, args=(stranger, seed)) for seed in range(3)]
        threads += [threading.Thread(target=run, args=(work,)) for work in (tenant, writer)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tokens.write_bytes(good)
    assert not failed
    assert statuses
    assert {*statuses} <= {401, 413, 431}, statuses
    bystander.check(grown_bytes_max=100 * MB)
    assert not [it for it in bystander.failures if " 401 " in it], bystander
