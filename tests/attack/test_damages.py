"""Seeded damages to each kind of file of a data directory: what is read is right, healed, or refused with words.

The files of spools have such a test in tests/publisher/spool/test_damage.py. There are no snapshots.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import pytest

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.tokens_file import TokensFile
from pipeline.core.query import Query
from pipeline.errors import Invalid, PipelineError
from pipeline.ports import RawDelta
from pipeline.roles.embedded import Engine
from pipeline.roles.tokens import new_token
from pipeline.settings import LogSettings
from tests.support import LONG, wait_until

SEEDS = 200 if LONG else 3
PARTITIONS = 2
SERIES = 300
KINDS = {
    "log": "log/*",
    "store": "stores/*/*",
    "beside": "*",
}
"""By kind of file, where its files are: those beside log and stores are VERSION, LOCK and the log's checkpoint."""
WAYS = ("flip", "flip", "flip", "truncate", "zeros", "duplicate", "larger", "gone", "swap", "foreign")
LATER_S = 1e12


class Origins(NamedTuple):
    """Two data directories as kill -9 leaves them, the second one of other deltas, and the first one's total."""

    ours: Path
    other: Path
    total: int


def settings_of(data: Path) -> LogSettings:
    return LogSettings(data=str(data), partitions=PARTITIONS)


def started(data: Path) -> Engine:
    """Return an engine that is ready, or raise what it ends with."""
    fatal: list[BaseException] = []
    engine = Engine(settings_of(data), on_fatal=fatal.append)
    try:
        engine.start()
        wait_until(lambda: fatal or engine.ready, "an engine that is ready or says why not", 30)
        if fatal:
            raise fatal[0]
    except BaseException:
        engine.stop()
        raise
    return engine


def total(engine: Engine) -> object:
    """Return the sum of everything, once all records are folded, read by two ways that must agree."""
    wait_until(lambda: all(it.lag == 0 for it in engine.reader.partitions()), "everything to be folded", 30)
    whole = engine.reader.read(Query("v", by=()), deadline_s=LATER_S).series[0].value
    assert sum(it.value for it in engine.reader.read(Query("v"), deadline_s=LATER_S).series) == whole  # type: ignore[misc]
    return whole


def recorded(data: Path, to: Path, factor: int) -> int:
    """Record to a data directory in rounds, most of which get into files, and copy it as it is; return its total."""
    expected = 0
    for _ in range(4):
        engine = started(data)
        for turn in range(3):
            values = {str(n): factor * (n + turn + 1) for n in range(SERIES)}
            engine.ingest.deltas([RawDelta("v", "sum", {"n": n}, value) for n, value in values.items()])
            expected += sum(values.values())
        assert total(engine) == expected
        if _ == 3:
            shutil.copytree(data, to)
        assert engine.stop()
    return expected


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    folder = tmp_path_factory.mktemp("origins")
    ours = recorded(folder / "a", folder / "ours", 1)
    recorded(folder / "b", folder / "other", 1_000_000)
    return Origins(folder / "ours", folder / "other", ours)


def damage(data: Path, other: Path, kind: str, chance: random.Random) -> str:
    """Damage a file of a kind, and return how."""
    files = sorted(it for it in data.glob(KINDS[kind]) if it.is_file() and not it.name.startswith(("LOG", "OPTIONS")))
    file, way = chance.choice(files), chance.choice(WAYS)
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content)) if content else 0
    if way == "gone":
        file.unlink()
    elif way == "swap":
        another = chance.choice(files)
        file.write_bytes(another.read_bytes())
        another.write_bytes(content)
    elif way == "foreign":
        there = [it for it in (other / file.relative_to(data).parent).glob(f"*{file.suffix}") if it.is_file()]
        same = [it for it in there if it.name == file.name] or there
        file.write_bytes(chance.choice(sorted(same)).read_bytes() if same else b"")
    else:
        block = content[place : place + 512]
        if way == "flip" and content:
            content[place] ^= 1 << chance.randrange(8)
        elif way == "truncate":
            del content[place:]
        elif way == "zeros":
            content[place : place + 512] = bytes(len(block))
        elif way == "duplicate":
            content[place:place] = block
        elif way == "larger":
            content += chance.choice((bytes(5_000), chance.randbytes(5_000), bytes(content)))
        file.write_bytes(content)
    return f"{way} {file.relative_to(data)}"


def outcome(data: Path, truth: int) -> str:
    """Return what comes of a damaged data directory. Any error but one with words is raised."""
    try:
        engine = started(data)
    except PipelineError as error:
        return _refused(error)
    try:
        for _ in range(3):
            try:
                found = total(engine)
            except PipelineError as error:
                said = _refused(error)
                wait_until(lambda: engine.ready, "a rebuild", 30)
            else:
                return "right" if found == truth else f"WRONG: {found}, not {truth}"
        return said
    finally:
        engine.stop()


def _refused(error: PipelineError) -> str:
    assert str(error)
    return f"refused: {type(error).__name__}"


@pytest.mark.timeout(3_600 if LONG else 120)
@pytest.mark.parametrize("kind", KINDS)
def test_no_damage_is_silent(origins: Origins, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A damaged file leads to the right numbers or to an error that says what is damaged: never to another number."""
    seen: Counter[str] = Counter()
    wrong = []
    for seed in range(SEEDS):
        chance = random.Random(f"{kind}{seed}")
        data = tmp_path / "data"
        shutil.copytree(origins.ours, data)
        what = damage(data, origins.other, kind, chance)
        found = outcome(data, origins.total)
        seen[found if not found.startswith("WRONG") else "WRONG"] += 1
        if found.startswith("WRONG"):
            wrong.append((seed, what, found))
        shutil.rmtree(data)
    with capsys.disabled() if LONG else nullcontext():
        print(f"\n{kind}: {dict(seen)}")
    assert not wrong


def test_a_tokens_file(tmp_path: Path) -> None:
    """A damaged file of tokens is refused with its path, or its entries are what they were but for the damaged one."""
    path, damaged = tmp_path / "tokens", tmp_path / "damaged"
    entries = [new_token(f"t{n}", ["read"], views=["v*"], labels=["team=a"])[0] for n in range(3)]
    TokensFile(str(path), SystemClock()).change(lambda _: entries)
    for seed in range(SEEDS):
        chance = random.Random(seed)
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content))
        match chance.choice(("flip", "truncate", "zeros", "larger", "twice")):
            case "flip":
                content[place] ^= 1 << chance.randrange(8)
            case "truncate":
                del content[place:]
            case "zeros":
                content[place : place + 64] = bytes(len(content[place : place + 64]))
            case "larger":
                content += chance.randbytes(2_000)
            case "twice":
                content *= 2
        damaged.write_bytes(content)
        damaged.chmod(0o600)
        try:
            found = TokensFile(str(damaged), SystemClock()).read()
        except Invalid as error:
            _refused(error)
        else:
            assert len([it for it in found if it not in entries]) <= 1, seed
