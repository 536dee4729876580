"""Logs and stores opened read-only, for inspection."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.kafka.log import KafkaLog
from pipeline.adapters.kafka.options import parse_url
from pipeline.adapters.rocks import RocksStores
from pipeline.errors import Invalid, NotFound
from pipeline.ports import Log, Store
from pipeline.secret import redacted_url
from pipeline.settings import KafkaSettings, LogSettings


def data_folder(path: str) -> Path:
    """Return the path of a data directory; `Invalid` if there is none."""
    folder = Path(path).expanduser().absolute()
    if not (folder / "VERSION").is_file():  # opening would make one
        raise Invalid(f"{folder} is not a data directory")
    return folder


@contextmanager
def open_log(url: str | None, settings: LogSettings, kafka: KafkaSettings, *topic_names: str) -> Iterator[Log]:
    """Open the log of a broker, kafka://host:port[/app], or without a URL that of a data directory which no process has.

    Raises `Invalid` if there is no log, or no such topic in it; `Unavailable` if a process has it, or no broker answers.
    """
    if url is not None:
        if not url.startswith("kafka://"):
            raise Invalid(f"{redacted_url(url)!r:.200} is no broker; of `pipeline up`, stop it and say --data DIR")
        with closing(KafkaLog(parse_url(url), kafka, SystemClock())) as log:
            log.connect(topic_names)
            yield log
        return
    with DataDir(data_folder(settings.data)) as data:
        try:
            embedded = EmbeddedLog(data.log, topics.load(), settings, SystemClock(), read_only=True)
        except NotFound:
            raise Invalid(f"{data.path} has no log: nothing was ever published to it") from None
        with closing(embedded):
            yield embedded


@contextmanager
def open_stores(settings: LogSettings, partitions: list[int] | None) -> Iterator[Iterator[tuple[int, Store]]]:
    """Open the stores of these partitions, or of all, one after the other, in a data directory which no process has.

    Raises `Invalid` if it is no data directory, `NotFound` if a partition has no store.
    """
    folder = data_folder(settings.data)
    with (
        DataDir(folder, with_log=(folder / "log").is_dir()) as data,
        closing(RocksStores(data.stores, settings, read_only=True)) as stores,
    ):
        there = sorted(int(it.name) for it in data.stores.glob("*") if it.name.isdecimal())

        def each() -> Iterator[tuple[int, Store]]:
            for number in there if partitions is None else partitions:
                with closing(stores.open(number)) as store:
                    yield number, store

        yield each()
