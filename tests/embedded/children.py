"""Child processes to be killed, starved or forked: `python -m tests.embedded.children NAME ARGUMENT...`.

A child prints `WORD ...` a line, each line in one write, so that its parent reads only whole lines.
"""

from __future__ import annotations

import importlib
import os
import resource
import sys
import threading
import time
from pathlib import Path

from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.cleaner import Cleaner
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.rocks import RocksStores
from pipeline.errors import PipelineError
from pipeline.ports import Message
from pipeline.settings import LogSettings
from tests.contracts.support import TOPICS

NOBODY = 65_534
TRANSACTION_RECORDS = 5
STORE_KEYS = [b"%04d" % number for number in range(200)]


def say(*words: object) -> None:
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def open_log(path: str | Path, *, fsync: bool = False) -> EmbeddedLog:
    # The smallest buffer, so that even a short life moves records from memory to files.
    return EmbeddedLog(Path(path), TOPICS, LogSettings(fsync=fsync, log_write_buffer_bytes=2**20), SystemClock())


def append(path: str, fsync: str, value_bytes: str) -> None:
    """Append and commit for ever; print each acknowledgement: `A next_offset value`, `T value`."""
    log = open_log(path, fsync=fsync == "fsync")
    transaction = log.transaction("child")
    number = 0
    padding = os.urandom(int(value_bytes))  # nothing that compression could make small
    say("ready")
    while True:
        number += 1
        value = b"%d-%d" % (os.getpid(), number)
        messages = [
            Message(topic, at % 2, b"k%d" % at, value + b" " + padding)
            for at in range(TRANSACTION_RECORDS)
            for topic in ("table", "notes")
        ]
        try:
            transaction.commit(messages, timeout_s=10)
        except PipelineError as error:
            say("failed", type(error).__name__, error)
            break
        say("T", value.decode())
        (result,) = log.append([Message("events", 0, None, value + b" " + padding)], timeout_s=10)
        if isinstance(result, PipelineError):
            say("failed", type(result).__name__, result)
            break
        say("A", result, value.decode())
    (again,) = log.append([Message("events", 0, None, b"after the failure")], timeout_s=10)
    say("again", type(again).__name__, again)
    reader = log.reader("events")
    reader.assign({0: 0})
    say("readable", sum(len(r.values) for r in reader.poll(record_count_max=10**6, bytes_max=2**40, timeout_s=0)))
    log.close()


def starved(path: str, file_bytes: str, value_bytes: str) -> None:
    """Append until no file may grow any more, as on a full disk."""
    limit = int(file_bytes)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    append(path, "", value_bytes)


def store(path: str, file_bytes: str) -> None:
    """Write a store for ever, each time all of it: `W number`."""
    if int(file_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(file_bytes), int(file_bytes)))
    opened = RocksStores(Path(path), LogSettings(store_write_buffer_bytes=2**20)).open(0)
    (last,) = opened.get(STORE_KEYS[:1])
    number = int(last or b"0")
    say("ready")
    while True:
        number += 1
        try:
            opened.write(STORE_KEYS, [b"%01000d" % number] * len(STORE_KEYS))
        except PipelineError as error:
            say("failed", type(error).__name__, error)
            return
        say("W", number)


def close_store(path: str) -> None:
    """Close, and destroy, stores whose newest entries no longer fit on the disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    stores = RocksStores(Path(path), LogSettings())
    for partition in range(3):
        stores.open(partition).write(STORE_KEYS, [b"%01000d" % partition] * len(STORE_KEYS))
    stores.destroy(2)  # not even closed before
    stores.open(2).write([b"k"], [b"v"])
    try:
        stores.close()
    except PipelineError as error:
        say("failed", type(error).__name__, error)
    RocksStores(Path(path), LogSettings()).open(2)
    say("closed", "all")


def hold(path: str) -> None:
    """Hold a data directory until stdin ends."""
    with DataDir(path):
        say("ready", os.getpid())
        sys.stdin.read()


def hold_and_fork(path: str) -> None:
    """Hold a data directory, have a child that lives on until stdin ends, and wait to be killed."""
    with DataDir(path):
        if os.fork() == 0:
            say("ready")
            sys.stdin.read()
            os._exit(0)
        time.sleep(60)


def refused(kind: str, path: str) -> None:
    """Open something as a user who may not write there."""
    importlib.import_module("pickle")  # rocksdict wants it, and nobody may not read everywhere
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    try:
        if kind == "datadir":
            DataDir(path)
        elif kind == "log":
            open_log(path)
        else:
            RocksStores(Path(path), LogSettings()).open(0)
    except PipelineError as error:
        say("refused", type(error).__name__, error)
    else:
        say("opened")


def fork(path: str, how: str) -> None:
    """Fork with everything open and in use; the child ends like any process, the parent goes on."""
    data = DataDir(path)
    log = open_log(data.log)
    stores = RocksStores(data.stores, LogSettings())
    opened = stores.open(0)
    log.append([Message("events", 0, None, b"before")], timeout_s=10)
    opened.write([b"before"], [b""])
    view = opened.snapshot()
    reader = log.reader("events")
    reader.assign({0: 0})
    held = threading.Event()

    def hold_the_lock() -> None:
        with log.changed:
            held.set()
            time.sleep(0.3)

    threading.Thread(target=hold_the_lock).start()
    held.wait()
    child = os.fork()
    if child == 0:
        if how == "use":
            (result,) = log.append([Message("events", 0, None, b"child")], timeout_s=10)
            say("child", type(result).__name__, result)
            for call in (
                lambda: log.transaction("child"),
                lambda: reader.poll(record_count_max=1, bytes_max=1, timeout_s=0),
            ):
                try:
                    call()
                except PipelineError as error:
                    say("child", type(error).__name__, error)
        if how == "close":
            log.close()
            data.close()
        sys.exit(0)
    _, status = os.waitpid(child, 0)
    say("child ended", os.waitstatus_to_exitcode(status))
    assert isinstance(log.append([Message("events", 0, None, b"after")], timeout_s=10)[0], int)
    opened.write([b"after"], [b""])
    assert view.get([b"before", b"after"]) == [b"", None]
    del view
    stores.close()
    log.close()
    data.close()
    say("parent", "fine")


def leave(path: str) -> None:
    """End while the cleaner is at work, and close nothing."""
    log = open_log(path)
    settings = LogSettings(maintenance_interval_ms=10, compaction_keys_max=10)
    Cleaner(log, settings, SystemClock()).start()
    transaction = log.transaction("child")
    for number in range(30):
        transaction.commit([Message("table", at % 4, b"%d" % at, b"%d" % number) for at in range(2_000)], timeout_s=10)
    say("left")


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
