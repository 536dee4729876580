"""`pipeline verify` shows how stores and changelog differ, finds planted differences, and changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec import structs

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.embedded.cleaner import Cleaner
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.http import HttpReader
from pipeline.adapters.memory import MemoryLog, MemoryStores
from pipeline.adapters.rocks import RocksStores
from pipeline.cli.verify import run_verify
from pipeline.config import load
from pipeline.connect import Publisher
from pipeline.core.codec import encode_fence, encode_position, encode_states
from pipeline.core.kinds import KINDS
from pipeline.core.record import (
    FENCE_KEY,
    POSITION_KEY,
    STORE_META_KEY,
    Definition,
    Fence,
    Position,
    series_prefix,
    series_suffix,
)
from pipeline.errors import NotFound
from pipeline.ports import Message, RawDelta
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings
from pipeline.topics import CHANGELOG
from pipeline.worker.follower import StoreMeta, write_entries
from pipeline.worker.foreign import Barrier
from pipeline.worker.restore import restore
from pipeline.worker.verify import Result, VerifyProgress, verify
from tests.support import UpProcess, pipeline, wait_until

SERIES = 40
SETTINGS = LogSettings(partitions=2)


def settings(data: Path) -> LogSettings:
    return LogSettings(data=str(data), partitions=2)


def fold(data: Path, start: int) -> None:
    """Run an engine on `data`, and let it fold two deltas for each of some series."""
    engine = Engine(settings(data))
    engine.start()
    try:
        assert engine.wait_ready(30)
        for _ in range(2):  # two batches: the second supersedes entries of the first
            deltas = [RawDelta("revenue", "sum", {"region": f"r{n}"}, n) for n in range(start, start + SERIES)]
            engine.ingest.deltas([*deltas, RawDelta("note", "last", {}, f"from {start}", 1_000 + start)])
            wait_until(lambda: all(it.lag == 0 for it in engine.status().partitions), "everything folded")
    finally:
        assert engine.stop()


class Folders(NamedTuple):
    """One data directory at two times."""

    early: Path
    late: Path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Make two successive runs, whose folders are to be copied, not changed."""
    early, late = tmp_path_factory.mktemp("verify") / "early", tmp_path_factory.mktemp("verify") / "late"
    fold(early, 0)
    shutil.copytree(early, late)
    fold(late, SERIES // 2)
    return Folders(early, late)


@pytest.fixture
def data(folders: Folders, tmp_path: Path) -> Path:
    """A data directory after a normal run."""
    return shutil.copytree(folders.early, tmp_path / "data")


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Any:
    """Verify a directory, and return the exit code and the findings by partition."""

    def run(data: Path, limit: int = 20) -> tuple[int, list[dict[str, Any]]]:
        code = run_verify(load({"data": str(data)}), as_json=True, limit=limit)
        said = json.loads(capsys.readouterr().out)
        assert said["fine"] is (code == 0)
        assert run_verify(load({"data": str(data)}), as_json=False, limit=limit) == code
        text = capsys.readouterr().out
        assert ("no differences in" in text) is (code == 0)
        return code, said["partitions"]

    return run


def files(folder: Path) -> dict[str, bytes]:
    """Return every byte of a log or of stores, except RocksDB's own log and lock, which hold no data."""
    found = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("LO")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def plant(data: Path, partition: int, key: bytes, value: bytes | None) -> bytes | None:
    """Change an entry of a stopped store, and return its former value."""
    stores = RocksStores(data / "stores", SETTINGS)
    store = stores.open(partition)
    (before,) = store.get([key])
    store.write([key], [value])
    stores.close()
    return before


REVENUE = Definition("revenue", "sum", ("region",))


def series_key(data: Path, region: str) -> tuple[int, bytes]:
    """Return the partition that holds a series of `revenue`, and its key."""
    key = series_prefix(REVENUE) + series_suffix((region,))
    stores = RocksStores(data / "stores", SETTINGS, read_only=True)
    (partition,) = [number for number in range(2) if stores.open(number).get([key]) != [None]]
    stores.close()
    return partition, key


def test_after_a_run_there_is_no_difference(data: Path, check: Any) -> None:
    """Every entry of every store, series, definitions, producers and position, is compared and equal."""
    code, partitions = check(data)
    assert (code, [p["verdict"] for p in partitions]) == (0, ["equal", "equal"])
    # series of `revenue`; in one partition `note`; in each the definitions, the producer and the position
    assert sum(p["entries_compared"] for p in partitions) >= SERIES + 1 + 2 * 3 + 1
    for p in partitions:
        assert p["store_position"] == p["changelog_position"]
        assert p["store_next_offset"] == p["changelog_end_offset"] > 0


def test_nothing_is_changed(folders: Folders, data: Path, check: Any) -> None:
    """No byte of log and stores changes, also where a store is behind; nothing is left in the directory."""
    shutil.rmtree(data / "log")
    shutil.copytree(folders.late / "log", data / "log")
    before = files(data)
    code, partitions = check(data)
    assert (code, {p["verdict"] for p in partitions}) == (0, {"behind"})
    assert files(data) == before
    assert {path.name for path in data.iterdir()} == {"LOCK", "VERSION", "log", "log.ends", "stores"}


def planted_value(data: Path) -> tuple[int, dict[str, Any]]:
    partition, key = series_key(data, "r7")
    plant(data, partition, key, encode_states(KINDS["sum"], [99])[0])
    return partition, {"what": "different", "entry": 'revenue{region="r7"}', "expected": 14, "found": 99}


def missing_key(data: Path) -> tuple[int, dict[str, Any]]:
    partition, key = series_key(data, "r7")
    plant(data, partition, key, None)
    return partition, {"what": "missing", "entry": 'revenue{region="r7"}', "expected": 14, "found": None}


def extra_key(data: Path) -> tuple[int, dict[str, Any]]:
    key = series_prefix(REVENUE) + series_suffix(("nowhere",))
    plant(data, 1, key, encode_states(KINDS["sum"], [5])[0])
    return 1, {"what": "extra", "entry": 'revenue{region="nowhere"}', "expected": None, "found": 5}


def wrong_position(data: Path) -> tuple[int, dict[str, Any]]:
    before = plant(data, 0, POSITION_KEY, encode_position(Position(1, 2, 3)))
    assert before is not None
    found = structs.asdict(Position(1, 2, 3))
    return 0, {"what": "different", "entry": "the position", "expected": None, "found": found}


def no_position(data: Path) -> tuple[int, dict[str, Any]]:
    plant(data, 0, POSITION_KEY, None)
    return 0, {"what": "missing", "entry": "the position", "expected": None, "found": None}


def unknown_key(data: Path) -> tuple[int, dict[str, Any]]:
    plant(data, 0, b"\xfe\x01", b"\xff")
    return 0, {"what": "extra", "entry": "unknown key fe01", "expected": None, "found": "ff"}


@pytest.mark.parametrize(
    "planted", [planted_value, missing_key, extra_key, wrong_position, no_position, unknown_key], ids=lambda f: f.__name__
)
def test_a_planted_difference_is_found(planted: Any, data: Path, check: Any) -> None:
    """Exactly the changed entry is named, with its right value and its present one; the exit code is 1."""
    partition, difference = planted(data)
    code, partitions = check(data)
    assert code == 1
    result, other = partitions[partition], partitions[1 - partition]
    assert (result["verdict"], result["difference_count"], other["verdict"]) == ("different", 1, "equal")
    (found,) = result["differences"]
    if difference["entry"] == "the position":
        assert found["expected"] == result["changelog_position"]
        found["expected"] = None
    assert found == difference


def test_a_planted_difference_in_a_store_that_is_behind(folders: Folders, data: Path, check: Any) -> None:
    """A difference that the next restore would not mend is found also in a store that is behind."""
    planted_value(data)  # r7 belongs to the first run only
    shutil.rmtree(data / "log")
    shutil.copytree(folders.late / "log", data / "log")
    code, partitions = check(data)
    assert (code, sum(p["difference_count"] for p in partitions)) == (1, 1)
    assert all(p["behind"] > 0 for p in partitions)


def test_differences_are_limited(data: Path, check: Any) -> None:
    """All differences are counted, some are listed."""
    for n in range(5):
        plant(data, 0, series_prefix(REVENUE) + series_suffix((f"x{n}",)), encode_states(KINDS["sum"], [n])[0])
    _, partitions = check(data, limit=2)
    assert (partitions[0]["difference_count"], len(partitions[0]["differences"])) == (5, 2)


def test_a_compacted_changelog_is_as_good(folders: Folders, data: Path, check: Any) -> None:
    """Compaction between the store's offset and the end removes nothing that the comparison needs."""
    shutil.rmtree(data / "log")
    shutil.copytree(folders.late / "log", data / "log")
    log = EmbeddedLog(data / "log", topics.load(), SETTINGS, SystemClock())
    assert Cleaner(log, SETTINGS, SystemClock()).clean(dirty_count_min=1) > 0
    log.close()
    code, partitions = check(data)
    assert (code, {p["verdict"] for p in partitions}) == (0, {"behind"})
    assert all(p["entries_compared"] > 0 and p["entries_superseded"] > 0 for p in partitions)
    planted_value(data)
    assert check(data)[0] == 1


def test_a_store_that_is_ahead(folders: Folders, data: Path, check: Any) -> None:
    """A store ahead of its changelog, as after the loss of a log, is reported as such."""
    shutil.rmtree(data / "stores")
    shutil.copytree(folders.late / "stores", data / "stores")
    code, partitions = check(data)
    assert (code, {p["verdict"] for p in partitions}) == (1, {"ahead"})


def test_a_corrupt_store(data: Path, capsys: pytest.CaptureFixture[str], check: Any) -> None:
    """Bytes that RocksDB can't trust are reported with advice; deleting that store is all it takes."""
    (table, *_) = sorted((data / "stores" / "1").glob("*.sst"))
    table.write_bytes(table.read_bytes()[:20] + b"\xa5" * 40 + table.read_bytes()[60:])
    assert run_verify(load({"data": str(data)}), as_json=False, limit=20) == 1
    said = capsys.readouterr().out
    assert "partition 1: the store is corrupt" in said
    assert f"delete {data / 'stores' / '1'}" in said
    shutil.rmtree(data / "stores" / "1")
    code, partitions = check(data)
    assert (code, [p["verdict"] for p in partitions]) == (0, ["equal", "missing"])


@pytest.mark.parametrize("left", ["nothing", "empty folder", "empty store"])
def test_no_store(left: str, data: Path, check: Any) -> None:
    """A missing or empty store is no difference: the next start restores it, and none is made now."""
    shutil.rmtree(data / "stores" / "0")
    if left != "nothing":
        (data / "stores" / "0").mkdir()
    if left == "empty store":
        stores = RocksStores(data / "stores", SETTINGS)
        stores.open(0)
        stores.close()
    code, partitions = check(data)
    assert (code, partitions[0]["verdict"]) == (0, "behind" if left == "empty store" else "missing")
    assert partitions[0]["behind"] == partitions[0]["changelog_record_count"] > 0
    assert (data / "stores" / "0").exists() is (left != "nothing")


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    """A wrong --data is a usage error, and nothing is made there."""
    done = pipeline("verify", "--data", str(tmp_path / "typo"))
    assert (done.returncode, done.stdout) == (2, "")
    assert "not a data directory" in done.stderr
    assert not (tmp_path / "typo").exists()


def test_while_up_runs_and_after_it_was_killed(tmp_path: Path) -> None:
    """Verify is refused while `up` has the directory; after kill -9 stores are behind, consistent, and untouched."""
    with UpProcess(tmp_path / "data") as up:
        with Publisher(up.url) as publisher, HttpReader(up.url) as reader:
            revenue = publisher.sum("revenue", labels=("region",))
            for n in range(SERIES):
                revenue.add(n, region=f"r{n}")
            total = reader.get("revenue", by=(), after=publisher.flush()).value()
        refused = pipeline("verify", "--data", str(up.data))
        assert refused.returncode == 1
        assert f"in use by process {up.program.process.pid}" in refused.stderr
        up.kill()
        before = files(up.data)
        done = pipeline("verify", "--data", str(up.data), "--json")
        assert done.returncode == 0, done.stdout
        assert {p["verdict"] for p in json.loads(done.stdout)["partitions"]} == {"behind"}
        assert files(up.data) == before
        up.start()
        with HttpReader(up.url) as reader:
            assert reader.get("revenue", by=()).value() == total
        assert up.terminate() == 0
    done = pipeline("verify", "--data", str(up.data))
    assert done.returncode == 0
    assert done.stdout.count(": equal, ") == 4


# The comparison by itself


class ManualClock(SystemClock):
    def __init__(self) -> None:
        self.at_ms = 1_000_000

    def now_ms(self) -> int:
        return self.at_ms


class Bench:
    """A changelog and a store in memory."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.log = MemoryLog({CHANGELOG: 1}, self.clock.now_ms)
        self.stores = MemoryStores()
        self._end = 0
        """Offset behind the last position record."""

    def commit(self, entries: dict[bytes, bytes | None], *, boundary: bool = True) -> None:
        messages = [Message(CHANGELOG, 0, key, value) for key, value in entries.items()]
        if boundary:
            begin_offset = self.log.watermarks(CHANGELOG, 0).end_offset
            place = {"begin_offset": begin_offset, "previous_end_offset": self._end}
            position = encode_position(Position(0, self.clock.now_ms(), 0, **place))
            messages.append(Message(CHANGELOG, 0, POSITION_KEY, position))
            self._end = begin_offset + len(messages)
        self.log.append(messages, timeout_s=1)

    def restore(self) -> None:
        fence = encode_fence(Fence("pipeline-0:x", self.clock.now_ms()))
        (end_offset,) = self.log.append([Message(CHANGELOG, 0, FENCE_KEY, fence)], timeout_s=1)
        assert isinstance(end_offset, int)
        barrier = Barrier(end_offset - 1, "pipeline-0:x")
        store, bounds = self.stores.open(0), {"fetch_count_max": 10, "buffer_entries_max": 10}
        restore(0, store, self.log, self.clock, barrier=barrier, fence=lambda: barrier, **bounds)

    def verify(self, **changed: Any) -> Result:
        arguments: dict[str, Any] = {
            "stores": self.stores,
            "scratch": MemoryStores(),
            "log": self.log,
            "clock": self.clock,
            "delete_retention_ms": 1_000,
            "fetch_count_max": 3,
            "differences_max": 5,
        }
        return verify(0, **{**arguments, **changed})


A, B, C = (series_prefix(Definition("v", "sum", ("a",))) + series_suffix((name,)) for name in "abc")
ONE, TWO = encode_states(KINDS["sum"], [1, 2])


def test_deleted_entries() -> None:
    """An entry that the changelog deleted must be gone from the store, unless the deletion comes later."""
    bench = Bench()
    bench.commit({A: ONE, B: ONE, C: ONE})
    bench.commit({A: None})
    bench.restore()
    assert bench.verify().verdict == "equal"
    bench.commit({B: None, C: TWO})
    result = bench.verify()
    assert (result.verdict, result.behind, result.entries_superseded) == ("behind", 3, 3)
    bench.log.compact(CHANGELOG, 0, 8)
    assert bench.verify().verdict == "behind"
    bench.stores.open(0).write([A], [ONE])
    (difference,) = bench.verify().differences
    assert (difference.what, difference.entry, difference.found) == ("extra", 'v{label0="a"}', 1)


def test_a_worker_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Records behind the end that was asked for, perhaps half a commit, are no difference."""
    bench = Bench()
    bench.commit({A: ONE, B: ONE})
    bench.restore()
    end = bench.log.watermarks(CHANGELOG, 0)
    bench.commit({A: TWO, C: TWO}, boundary=False)
    monkeypatch.setattr(bench.log, "watermarks", lambda *_: end)
    for fetch_count_max in (1, 4, 10):
        result = bench.verify(fetch_count_max=fetch_count_max)
        assert (result.verdict, result.behind, result.changelog_record_count) == ("equal", 0, 3)


def test_a_store_away_for_too_long() -> None:
    """A store that can have missed tombstones is not compared: the next start makes it anew."""
    bench = Bench()
    bench.commit({A: ONE, B: ONE})
    bench.restore()
    bench.commit({A: None})
    bench.log.compact(CHANGELOG, 0, bench.log.watermarks(CHANGELOG, 0).end_offset, drop_tombstones=True)
    bench.clock.at_ms += 1_001
    result = bench.verify()
    assert (result.verdict, result.fine) == ("stale", True)


def test_a_restore_that_was_interrupted() -> None:
    """A store between two boundaries is behind, and its entries must be right."""
    bench = Bench()
    bench.commit({A: ONE})
    bench.restore()
    end = bench.log.watermarks(CHANGELOG, 0).end_offset
    bench.commit({B: ONE, C: ONE})
    topic_id = bench.log.topic_id(CHANGELOG)
    meta = StoreMeta(changelog_next_offset=end + 1, between_boundaries=True, topic_id=topic_id)
    write_entries(bench.stores.open(0), [B], [ONE], meta)
    assert bench.verify().verdict == "behind"
    write_entries(bench.stores.open(0), [B], [TWO], meta)
    assert bench.verify().verdict == "different"


def test_a_changelog_that_ends_behind_the_last_commit() -> None:
    """Records after the last commit belong to none: they are left out, counted, and are no difference."""
    bench = Bench()
    bench.commit({A: ONE})
    bench.restore()
    bench.commit({B: ONE}, boundary=False)
    result = bench.verify()
    assert (result.verdict, result.fine, result.changelog_foreign_count) == ("equal", True, 1)


def test_a_store_that_is_not_there() -> None:
    """`NotFound` means that there is nothing to compare; a store without a trustworthy meta is corrupt."""

    class Nowhere(MemoryStores):
        def open(self, partition: int) -> Any:
            raise NotFound("no store")

    bench = Bench()
    bench.commit({A: ONE})
    assert bench.verify(stores=Nowhere()).verdict == "missing"
    bench.restore()
    bench.stores.open(0).write([STORE_META_KEY], [b"\xc1"])
    assert bench.verify().verdict == "corrupt"


def test_progress_never_goes_beyond_its_total() -> None:
    """Progress rises to the end of the changelog, also while entries are compared."""
    bench = Bench()
    bench.commit({A: ONE, B: ONE, C: ONE})
    bench.restore()
    seen: list[VerifyProgress] = []
    bench.verify(progress=seen.append)
    reading = [step for step in seen if step.doing == "reading"]
    assert [step.done for step in reading] == sorted(step.done for step in reading)
    assert reading[-1].done == reading[-1].total == 5, "four of the commit, and the fence record"
    assert {step.doing for step in seen} == {"reading", "comparing"}
