"""Damaged bytes are neither passed off as data nor skipped in silence, and undamaged ones are not deleted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from pipeline.adapters.embedded.log import EmbeddedLog, checkpoint_path
from pipeline.adapters.rocks import RocksStores
from pipeline.core.record import STORE_META_KEY, definitions_prefix
from pipeline.errors import LogCorrupt, StoreCorrupt
from pipeline.ports import Message, Store
from pipeline.settings import LogSettings
from pipeline.topics import CHANGELOG
from tests.contracts.support import PARTITIONS, TOPICS, EmbeddedLab, ManualClock, append, appended, poll, read
from tests.embedded.worker import WORKER_TOPICS, entries, fold_all, new_partition, publish

KEYS = [b"%06d" % number for number in range(5_000)]
VALUE = b"v" * 50


def the_file(folder: Path, pattern: str) -> Path:
    """Return the newest file of this kind."""
    return sorted(folder.glob(pattern))[-1]


def flip(path: Path, at: float, size: int = 8) -> None:
    """Change some bytes, as a dying disk does."""
    with path.open("r+b") as file:
        file.seek(int(path.stat().st_size * at))
        old = file.read(size)
        file.seek(-len(old), 1)
        file.write(bytes(byte ^ 0xFF for byte in old))


@pytest.fixture
def stores(tmp_path: Path) -> RocksStores:
    """Stores of which 0 has 5,000 entries in a file."""
    made = RocksStores(tmp_path, LogSettings())
    store = made.open(0)
    store.write(KEYS, [VALUE] * len(KEYS))
    store.close()
    return made


def read_in_every_way(store: Store) -> None:
    for look in (
        lambda: store.get(KEYS),
        lambda: list(store.scan(b"", b"\xff")),
        lambda: list(store.snapshot().scan(KEYS[1], b"\xff")),
        lambda: store.snapshot().get(KEYS),
    ):
        try:
            assert len(look()) >= len(KEYS) - 1, "fewer entries than there are, and no error"
        except StoreCorrupt:
            continue
        raise AssertionError("a broken block was not noticed")


def test_a_broken_block_of_a_store(stores: RocksStores, tmp_path: Path) -> None:
    """Every way to read a store with a broken block raises StoreCorrupt, and none answers with less than there is."""
    flip(the_file(tmp_path / "0", "*.sst"), 0.3)
    store = stores.open(0)
    read_in_every_way(store)
    store.close()


@pytest.mark.parametrize("damage", ["flip", "empty", "gone"])
@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST-*", "*.sst"])
def test_a_store_that_can_not_be_opened(stores: RocksStores, tmp_path: Path, name: str, damage: str) -> None:
    """Opening raises StoreCorrupt with the path; then the store can be destroyed and made anew."""
    path = the_file(tmp_path / "0", name)
    match damage:
        case "flip":
            flip(path, 0.4)
        case "empty":
            path.write_bytes(b"")
        case "gone":
            path.unlink()
    with pytest.raises(StoreCorrupt, match=str(tmp_path / "0")):
        list(stores.open(0).scan(b"", b"\xff"))
    stores.destroy(0)
    store = stores.open(0)
    assert list(store.scan(b"", b"\xff")) == []
    store.write([b"k"], [b"v"])
    store.close()


@pytest.mark.parametrize("how", ["open", "get", "scan", "snapshot"])
def test_a_store_can_be_replaced_while_its_error_is_handled(stores: RocksStores, tmp_path: Path, how: str) -> None:
    """An error holds every frame that it came through, but no frame holds the store's files."""
    flip(the_file(tmp_path / "0", "CURRENT" if how == "open" else "*.sst"), 0.3)
    try:
        store = stores.open(0)
        match how:
            case "get":
                store.get(KEYS)
            case "scan":
                dict(store.scan(b"", b"\xff"))
            case "snapshot":
                store.snapshot().get(KEYS)
        raise AssertionError("the damage was not noticed")
    except StoreCorrupt:
        if how != "open":
            store.close()
        stores.destroy(0)
        assert stores.open(0).get(KEYS[:1]) == [None]


# The log


@pytest.fixture
def log_lab(tmp_path: Path) -> EmbeddedLab:
    """A log with 12,000 records in a file, as four chunks of each of four partitions, each with disk blocks of its own."""
    lab = EmbeddedLab(tmp_path / "log")
    rng = random.Random(3)
    for _ in range(4):
        appended(lab.log, [Message("table", n % PARTITIONS, KEYS[n], rng.randbytes(50)) for n in range(3_000)])
    lab.embedded.flush()
    lab.reopen()  # what is in files by then is not looked at when it is opened, but when it is read
    return lab


def copy_of(lab: EmbeddedLab, path: Path) -> Path:
    """Copy the files of the log as they are, as after kill -9."""
    path.mkdir()
    for file in lab.path.iterdir():
        if file.name != "LOCK":
            (path / file.name).write_bytes(file.read_bytes())
    checkpoint_path(path).write_bytes(checkpoint_path(lab.path).read_bytes())
    return path


def open_copy(path: Path) -> EmbeddedLog:
    return EmbeddedLog(path, TOPICS, LogSettings(), ManualClock())


def test_a_broken_block_of_the_log(log_lab: EmbeddedLab, tmp_path: Path) -> None:
    """Each read of the block raises LogCorrupt, and never returns fewer records; other blocks can be read."""
    path = copy_of(log_lab, tmp_path / "copy")
    log_lab.embedded.close()
    flip(the_file(path, "*.sst"), 5.5 / 16)  # the second chunk of the second partition
    log = open_copy(path)
    for partition in (0, 2, 3):
        assert len(read(log, "table", partition)) == 3_000
    reader = log.reader("table")
    reader.assign({1: 0})
    assert len(poll(reader, record_count_max=750)[1]) == 750
    for _ in range(3):
        with pytest.raises(LogCorrupt, match=str(path)):
            poll(reader)
    log.close()


@pytest.mark.parametrize("name", ["CURRENT", "MANIFEST-*", "*.sst"])
def test_a_log_that_can_not_be_opened(log_lab: EmbeddedLab, tmp_path: Path, name: str) -> None:
    """Opening raises LogCorrupt, and touches no file of the log: there is nothing to restore it from."""
    path = copy_of(log_lab, tmp_path / "copy")
    log_lab.embedded.close()
    the_file(path, name).write_bytes(b"nonsense")
    before = {file.name: file.stat().st_size for file in path.iterdir() if not file.name.startswith("LOG")}
    for _ in range(2):
        with pytest.raises(LogCorrupt, match=str(path)):
            open_copy(path)
    after = {file.name: file.stat().st_size for file in path.iterdir()}
    assert {name: after.get(name) for name in before} == before


def write_ahead_log(lab: EmbeddedLab) -> list[int]:
    """Append 300 times to the write-ahead log only, and return its size after each."""
    sizes = []
    for number in range(300):
        append(lab.log, "events", 0, b"%d" % number + VALUE)
        sizes.append(the_file(lab.path, "*.log").stat().st_size)
    assert sizes[0] < sizes[-1] < 32_768
    return sizes


def test_a_torn_tail_is_what_kill_9_leaves(log_lab: EmbeddedLab, tmp_path: Path) -> None:
    """A log cut within an unacknowledged append lacks that one only, and goes on."""
    noted = checkpoint_path(log_lab.path).read_bytes()
    sizes = write_ahead_log(log_lab)
    for case, (number, cut) in enumerate([(299, 1), (299, 30), (299, sizes[299] - sizes[298] - 1), (150, 5), (0, 20)]):
        path = copy_of(log_lab, tmp_path / f"copy-{case}")
        with the_file(path, "*.log").open("r+b") as file:
            file.truncate(sizes[number] - cut)
        checkpoint_path(path).write_bytes(noted)  # of before: an append that was not acknowledged is not noted
        log = open_copy(path)
        assert [row.value for row in read(log, "events", 0)] == [b"%d" % n + VALUE for n in range(number)]
        assert append(log, "events", 0, b"next") == [number + 1]
        log.close()
        log = open_copy(path)
        assert read(log, "events", 0)[-1].value == b"next"
        assert sum(len(read(log, "table", partition)) for partition in range(PARTITIONS)) == 12_000
        log.close()
    log_lab.embedded.close()


def test_damage_before_the_tail_is_no_torn_tail(log_lab: EmbeddedLab, tmp_path: Path) -> None:
    """Acknowledged records that can't be read are LogCorrupt, not cut off, wherever in their bytes the damage is."""
    sizes = write_ahead_log(log_lab)
    (start, end) = sizes[99], sizes[100]
    for case, at in enumerate([start, start + 2, start + 6, start + 8, (start + end) // 2, end - 1]):
        path = copy_of(log_lab, tmp_path / f"copy-{case}")
        file = the_file(path, "*.log")
        flip(file, at / file.stat().st_size + 1e-9, size=1)
        with pytest.raises(LogCorrupt, match=str(path)):
            open_copy(path)
    log_lab.embedded.close()


def test_a_corrupt_changelog_does_not_cost_the_store(tmp_path: Path) -> None:
    """A partition that can't read its changelog stops, and leaves the store as it is: it may be the last good copy."""
    lab = EmbeddedLab(tmp_path / "log", topics=WORKER_TOPICS)
    stores = RocksStores(tmp_path / "stores", lab.settings)
    partition = new_partition(lab, stores)
    rng = random.Random(4)
    publish(lab.log, 0, [{rng.randbytes(20).hex(): 1 for _ in range(200)} for _ in range(10)])
    fold_all(partition, lab)
    expected = entries(partition)
    partition.store.write([STORE_META_KEY], [None])  # so that it restores, and reads the whole changelog
    partition.close()
    lab.embedded.flush()
    flip(the_file(lab.path, "*.sst"), 0.5, size=1)
    with pytest.raises(LogCorrupt, match="log"):
        lab.reopen()
    lab.embedded = lab.log = EmbeddedLog(lab.path, WORKER_TOPICS, lab.settings, lab.clock, read_only=True)
    with pytest.raises(LogCorrupt, match="log"):
        read_all(lab.embedded)
    kept = dict(stores.open(0).scan(b"", b"\xff"))
    assert kept == expected
    stores.close()
    lab.embedded.close()


def read_all(log: EmbeddedLog) -> None:
    """Read the changelog of the first partition to its end."""
    reader = log.reader(CHANGELOG)
    reader.assign({0: 0})
    while reader.poll(record_count_max=100, bytes_max=2**20, timeout_s=0):
        pass


@pytest.mark.parametrize("what", ["bytes", "block", "file"])
def test_a_worker_replaces_a_store_that_it_can_not_trust(tmp_path: Path, what: str) -> None:
    """A store with a bad entry, block or file is rebuilt from the changelog when its partition starts."""
    lab = EmbeddedLab(tmp_path / "log", topics=WORKER_TOPICS)
    stores = RocksStores(tmp_path / "stores", lab.settings)
    partition = new_partition(lab, stores)
    publish(lab.log, 0, [{f"page-{number}": number for number in range(300)}])
    fold_all(partition, lab)
    expected = entries(partition)
    if what == "bytes":
        partition.store.write([definitions_prefix("a_view") + bytes(8)], [b"nonsense"])
    partition.close()
    if what != "bytes":
        flip(the_file(tmp_path / "stores" / "0", "*.sst" if what == "block" else "CURRENT"), 0.01)
    partition = new_partition(lab, stores)
    assert entries(partition) == expected
    partition.close()
    lab.embedded.close()
