"""A data directory that no process has is read without a server, and not changed."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import AsyncReader, Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.core.query import Query
from pipeline.core.token import Token
from pipeline.errors import Invalid, LogCorrupt, NewerFormat, NotFound, NotReady, PipelineError, StoreCorrupt, Unavailable
from pipeline.publisher.client import BasePublisher
from pipeline.roles.embedded import Engine
from pipeline.settings import LogSettings, PublisherSettings
from tests.embedded.test_damage import flip
from tests.support import UpProcess

MINUTE_MS = 60_000
START_MS = 1_600_000_020_000


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Token]:
    """Return a directory that an `Engine` has left, and the token of what it holds."""
    folder = tmp_path_factory.mktemp("stopped") / "data"
    engine = Engine(LogSettings(data=str(folder), partitions=3))
    engine.start()
    assert engine.wait_ready(30)
    publisher = BasePublisher(engine.log, SystemClock(), PublisherSettings())
    hits = publisher.sum("hits", labels=("region", "shop"))
    by_minute = publisher.histogram("latency", labels=("region",), window_s=60)
    for i in range(200):
        hits.add(1, region=f"r{i % 3}", shop=f"s{i}")
        by_minute.observe(i, ts_ms=START_MS + i % 5 * MINUTE_MS, region="eu")
    token = publisher.flush(30)
    while any(engine.reader.partitions()[n].next_offset < offset for n, offset in token.next_offsets.items()):
        pass
    assert engine.reader.read(Query("hits", by=()), deadline_s=1e12).series[0].value == 200
    assert engine.stop()
    publisher.close()
    return folder, token


@pytest.fixture
def reader(stopped: tuple[Path, Token]) -> Iterator[Reader]:
    with Reader(f"embedded:{stopped[0]}") as opened:
        yield opened


def state_of(folder: Path) -> dict[str, bytes]:
    """Return the content of each file. The time of a change says nothing: rocksdict writes its own note anew, unchanged."""
    return {str(it): it.read_bytes() if it.is_file() else b"" for it in folder.rglob("*")}


def test_a_stopped_directory_answers_as_a_server_does(stopped: tuple[Path, Token], reader: Reader) -> None:
    """All parameters of reads work, answers are complete, and staleness counts from the end of the log, which is known."""
    total = reader.get("hits", by=(), after=stopped[1], max_staleness_ms=10_000)
    assert total.value() == 200
    assert total.as_of.staleness_ms is not None
    assert total.as_of.staleness_ms < 10_000
    assert reader.get("hits", where={"region": "r1", "shop": "s4"}).value() == 1
    assert [it.value for it in reader.get("hits", by="region", top=2)] == [67, 67]
    answer = reader.get("latency", start=START_MS, end=START_MS + 5 * MINUTE_MS, step="1m", q=0.5, by=())
    assert [value["count"] for _, value in answer.series[0].points] == [40] * 5
    assert {(it.name, it.kind) for it in reader.views()} == {("hits", "sum"), ("latency", "histogram")}
    both = reader.query([{"view": "hits", "by": ()}, {"view": "hits", "by": ("region",)}])
    assert [len(it.series) for it in both] == [1, 3]
    status = reader.status()
    assert (status["role"], status["ready"], {it["phase"] for it in status["partitions"]}) == ("stopped", True, {"stopped"})
    with pytest.raises(NotFound, match="hits"):
        reader.get("hit")
    with pytest.raises(Invalid, match="no label"):
        reader.get("hits", by="planet")
    with pytest.raises(NotReady):
        reader.get("hits", after=Token({0: 10**9}, stopped[1].topic_id), timeout_ms=50)


def test_reading_changes_nothing(stopped: tuple[Path, Token]) -> None:
    """No file of the directory is made, removed or changed while it is read, by several readers at once."""
    before = state_of(stopped[0])
    with Reader(f"embedded:{stopped[0]}") as one, Reader(f"embedded:{stopped[0]}") as other:
        assert one.get("hits", by=()).value() == other.get("hits", by=()).value() == 200
        assert state_of(stopped[0]) == before
    assert state_of(stopped[0]) == before


def test_readers_and_processes_exclude_each_other(stopped: tuple[Path, Token]) -> None:
    """A directory that a process has is not read, nothing starts on one that is read, and after `close` both can."""
    url = f"embedded:{stopped[0]}"
    with DataDir(stopped[0]), pytest.raises(Unavailable, match="in use by process"):
        Reader(url)
    reader = Reader(url)
    with pytest.raises(Unavailable, match="in use"):
        DataDir(stopped[0])
    reader.close()
    reader.close()
    with pytest.raises(Invalid, match="closed"):
        reader.get("hits")
    DataDir(stopped[0]).close()


def test_an_async_reader_of_a_stopped_directory(stopped: tuple[Path, Token]) -> None:
    """`AsyncReader` reads it, too."""

    async def totals() -> list[object]:
        async with AsyncReader(f"embedded:{stopped[0]}") as reader:
            watched = [it.value() async for it in reader.watch("hits", by=())]
            return [(await reader.get("hits", by=())).value(), *watched]

    assert asyncio.run(totals()) == [200, 200]


def test_a_watch_of_a_stopped_directory(reader: Reader) -> None:
    """Nothing changes there, so the first answer is the last; errors are those of `get`."""
    assert [it.value() for it in reader.watch("hits", by=(), max_staleness_ms=10_000)] == [200]
    with pytest.raises(NotFound, match="hits"):
        next(reader.watch("hit"))


@pytest.mark.parametrize(
    ("what", "error", "text"),
    [
        ("nothing", Invalid, "not a data directory"),
        ("foreign", Invalid, "not a data directory"),
        ("newer", NewerFormat, "version 9"),
        ("no store", NotReady, "pipeline up"),
        ("no log", PipelineError, "log"),
        ("damaged", StoreCorrupt, "pipeline up"),
    ],
)
def test_what_is_no_whole_directory(
    stopped: tuple[Path, Token], tmp_path: Path, what: str, error: type[PipelineError], text: str
) -> None:
    """Anything but a whole data directory is refused with an error that says what it is, never with a number."""
    folder = tmp_path / "copy"
    if what == "foreign":
        (folder / "photos").mkdir(parents=True)
    elif what != "nothing":
        shutil.copytree(stopped[0], folder)
    if what == "newer":
        (folder / "VERSION").write_text("9\n")
    elif what == "no store":
        shutil.rmtree(folder / "stores" / "1")
    elif what == "no log":
        shutil.rmtree(folder / "log")
    elif what == "damaged":
        for file in (folder / "stores").rglob("*.sst"):
            flip(file, 0.3)
    with pytest.raises(error, match=text), Reader(f"embedded:{folder}") as reader:
        reader.get("hits", by=())
    assert what != "nothing" or not folder.exists()


KILLED = """
import os, sys, time
from pathlib import Path
from pipeline import topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.publisher.client import BasePublisher
from pipeline.settings import LogSettings, PublisherSettings

with DataDir(Path(sys.argv[1])) as data:
    log = EmbeddedLog(data.log, topics.load(), LogSettings(data=sys.argv[1], partitions=3), SystemClock())
    publisher = BasePublisher(log, SystemClock(), PublisherSettings())
    for _ in range(5):
        publisher.sum("hits", labels=("region", "shop")).add(1, region="r0", shop="s0")
        publisher.flush(30)
    time.sleep(2.5)  # the end of the log is noted beside it
    os._exit(9)
"""


def test_a_log_that_lost_its_tail_is_refused(stopped: tuple[Path, Token], tmp_path: Path) -> None:
    """Records that were accepted and are gone are an error, not an answer that claims to be fresh."""
    folder = tmp_path / "copy"
    shutil.copytree(stopped[0], folder)
    subprocess.run([sys.executable, "-c", KILLED, str(folder)], check=False)
    for file in (folder / "log").glob("*.log"):
        os.truncate(file, 0)
    with pytest.raises(LogCorrupt, match="gone"):
        Reader(f"embedded:{folder}")


def test_a_killed_server_has_to_be_started_first(tmp_path: Path) -> None:
    """Commits that are in the changelog alone are an error, not a view that is unknown."""
    with UpProcess(tmp_path / "data") as up, Publisher(up.url) as publisher:
        publisher.sum("hits").add(3)
        token = publisher.flush()
        with Reader(up.url) as reader:
            assert reader.get("hits", after=token).value() == 3
        up.kill()
        with pytest.raises(NotReady, match="not restored to its end: start `pipeline up` on it once"):
            Reader(f"embedded:{tmp_path / 'data'}")
        up.start()
        assert up.terminate() == 0
        with Reader(f"embedded:{tmp_path / 'data'}") as stopped:
            assert stopped.get("hits").value() == 3


def test_a_log_of_an_older_copy_is_refused(stopped: tuple[Path, Token], tmp_path: Path) -> None:
    """Stores that reflect more than the log has are an error."""
    folder, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(stopped[0], folder)
    shutil.copytree(stopped[0], other)
    engine = Engine(LogSettings(data=str(other), partitions=3))
    engine.start()
    assert engine.wait_ready(30)
    publisher = BasePublisher(engine.log, SystemClock(), PublisherSettings())
    publisher.sum("hits", labels=("region", "shop")).add(1, region="r0", shop="s0")
    token = publisher.flush(30)
    while any(engine.reader.partitions()[n].next_offset < offset for n, offset in token.next_offsets.items()):
        pass
    assert engine.stop()
    publisher.close()
    shutil.rmtree(folder / "stores")
    shutil.copytree(other / "stores", folder / "stores")
    with pytest.raises(LogCorrupt, match="older copy"):
        Reader(f"embedded:{folder}")
