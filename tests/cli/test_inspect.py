"""`pipeline inspect`: every record of log and store, for a person and as JSON, whatever bytes are in it."""

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Control, Definition, Group, fingerprint, series_suffix
from pipeline.ports import Message
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings
from pipeline.topics import CHANGELOG, DELTAS
from tests.cli.conftest import Here
from tests.support import PROGRAM, environment, wait_until

NASTY = "\x1b[2J\x9b31m\r\n"
SECRET = "the-id-of-a-producer"
VIEW, OTHER = Definition("shown", "sum", ("a",)), Definition("other", "mean")


def batch(sequence: int, *groups: Group, **more: Any) -> bytes:
    return encode_batch(Batch(SECRET, 0, 0, sequence, 0, 1, [*groups], **more))


VALUES: list[bytes | None] = [
    batch(
        0,
        Group(VIEW, [series_suffix((NASTY,)), series_suffix(("plain",))], [1, 2]),
        Group(OTHER, [series_suffix(())], [(3, 2)]),
    ),
    NASTY.encode(),
    batch(1, Group(OTHER, [series_suffix(())], [(1, 1)])),
    batch(2, controls=[Control("reset", "shown")]),
    batch(3, Group(VIEW, [series_suffix(("new",))], [2**70])),
    batch(4, Group(Definition(NASTY, "sum"), [series_suffix(())], [1])),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory whose server has ended, with a stranger's record in its changelog."""
    path = tmp_path_factory.mktemp("inspect") / "data"
    settings = LogSettings(data=str(path), partitions=2)
    engine = Engine(settings)
    engine.start()
    try:
        assert engine.wait_ready(30)
        for value in VALUES:
            (result,) = engine.log.append([Message(DELTAS, 0, None, value)], timeout_s=10)
            assert isinstance(result, int), result
            wait_until(lambda: all(it.lag == 0 for it in engine.status().partitions), "everything folded")
    finally:
        assert engine.stop()
    log = EmbeddedLog(path / "log", topics.load(), settings, SystemClock())
    log.append([Message(CHANGELOG, 0, NASTY.encode(), b"\x00\xff")], timeout_s=10)
    log.close()
    return path


def lines(here: Here, *arguments: str) -> list[dict[str, Any]]:
    done = here("inspect", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_deltas(data: Path, here: Here) -> None:
    """Each record is shown at its place; one that is no batch with the reason."""
    found = lines(here, "deltas", "--data", str(data))
    assert [(it["partition"], it["offset"]) for it in found] == [(0, n) for n in range(len(VALUES))]
    first = found[0]["batch"]
    assert (first["producer"], first["sequence"]) == (fingerprint(SECRET), 0)
    assert [it["view"] for it in first["groups"]] == ["shown", "other"]
    assert first["groups"][0]["series"][0] == {"labels": {"a": NASTY}, "state": 1, "answer": 1}
    assert "version byte 1b" in found[1]["reason"]
    assert "does not match" in found[5]["batch"]["groups"][0]["reason"]
    assert found[3]["batch"]["controls"] == [{"action": "reset", "view": "shown", "kind": "", "labels": None}]
    assert found[4]["batch"]["groups"][0]["series"][0]["state"] == 2**70


def test_parts_of_deltas(data: Path, here: Here) -> None:
    """Records are selected by offsets, count, partition and view."""
    where = "deltas", "--data", str(data)
    assert [it["offset"] for it in lines(here, *where, "--start", "1", "--end", "3")] == [1, 2]
    assert [it["offset"] for it in lines(here, *where, "--limit", "2")] == [0, 1]
    assert lines(here, *where, "--partition", "1") == []
    assert lines(here, *where, "--start", "99") == []
    about = lines(here, *where, "--view", "shown")
    assert [it["offset"] for it in about] == [0, 3, 4]
    assert [len(it["batch"]["groups"]) for it in about] == [1, 0, 1]
    assert "and 1 more" in here("inspect", *where, "--series", "1").stdout


def test_changelog(data: Path, here: Here) -> None:
    """Fences, definitions, series by label names, tombstones, producers by fingerprint, and positions are shown."""
    found = lines(here, "changelog", "--data", str(data), "--partition", "0")
    kinds = {it["entry"]["what"] for it in found}
    assert kinds == {"fence", "definition", "series", "producer", "position", "foreign"}
    series = [it["entry"] for it in found if it["entry"]["what"] == "series" and it["entry"]["view"] == "shown"]
    assert [(it["series"]["labels"]["a"], it.get("tombstone", False)) for it in series] == [
        ("plain", False), (NASTY, False), ("plain", True), (NASTY, True), ("new", False),
    ]  # fmt: skip
    assert series[-1]["series"]["answer"] == 2**70
    (producer,) = {it["entry"]["producer"] for it in found if it["entry"]["what"] == "producer"}
    assert producer == fingerprint(SECRET)
    assert {it["entry"]["view"] for it in lines(here, "changelog", "--data", str(data), "--view", "other")} == {"other"}


def test_store(data: Path, here: Here) -> None:
    """The newest value of each entry is shown, and the changelog offset that the store reflects."""
    found = lines(here, "store", "--data", str(data))
    state = {(it["entry"]["view"], *it["entry"]["series"]["labels"].values()): it["entry"]["series"]["state"]
             for it in found if it["entry"]["what"] == "series"}  # fmt: skip
    assert state == {("shown", "new"): 2**70, ("other",): [4, 3]}
    metas = [it for it in found if it["entry"]["what"] == "meta"]
    assert [it["partition"] for it in metas] == [0, 1]
    assert metas[0]["entry"]["fields"]["changelog_next_offset"] > 0
    (one,) = [it for it in lines(here, "store", "--data", str(data), "--view", "shown") if it["entry"]["what"] == "series"]
    assert one["entry"]["definition_id"]


@pytest.mark.parametrize("what", ["deltas", "changelog", "store"])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_nothing_steers_the_terminal(data: Path, here: Here, what: str, options: list[str]) -> None:
    """No control character and no id of a producer is printed."""
    done = here("inspect", what, "--data", str(data), *options)
    assert done.returncode == 0, done.stderr
    assert not [c for c in done.stdout if c != "\n" and not c.isprintable()]
    assert SECRET not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["deltas", "--from", "http://127.0.0.1:1"], "is no broker"),
        (["deltas", "--data", "/nowhere"], "is not a data directory"),
        (["store", "--data", "/nowhere"], "is not a data directory"),
        (["deltas", "--follow"], "--follow"),
        (["deltas", "--partition", "x"], "--partition"),
        (["deltas", "--partition", "7"], "no partition 7"),
        (["store", "--partition", "7"], "7"),
    ],
)
def test_what_is_refused(data: Path, here: Here, arguments: list[str], says: str) -> None:
    """A wrong call is refused with the reason."""
    more = [] if {"--data", "--from"} & {*arguments} else ["--data", str(data)]
    done = here("inspect", *arguments, *more)
    assert done.returncode == 2, done.stdout
    assert says in done.stderr


def test_a_pipe_that_is_closed(data: Path) -> None:
    """`| head` ends the command in order."""
    command = shlex.join([*PROGRAM, "inspect", "changelog", "--data", str(data), "--json"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 1"],
        check=False,
        capture_output=True,
        env=environment(),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        process = subprocess.Popen(
            [*PROGRAM, "inspect", "deltas", "--data", str(data)], stdout=closed, stderr=subprocess.PIPE, env=environment()
        )
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")


def test_ctrl_c_ends_it_in_order(data: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the command in order, even if the output is read slowly."""
    read, write = os.pipe()
    with os.fdopen(write, "wb") as out, os.fdopen(read, "rb") as slow:
        script = (
            "import itertools, sys; from pipeline.cli.record_text import show;"
            "show(itertools.repeat('x' * 1000), lambda it: iter([it]), None, as_json=False)"
        )
        process = subprocess.Popen([PROGRAM[0], "-c", script], stdout=out, stderr=subprocess.PIPE, env=environment())
        assert slow.read(1)
        process.send_signal(signal.SIGINT)
        out.close()
        while slow.read(2**20):
            pass
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")
