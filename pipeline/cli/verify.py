"""`pipeline verify`: compares each store with its changelog, and changes neither."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.integrity import describe_gaps, find_gaps
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.adapters.rocks import RocksStores
from pipeline.cli import console
from pipeline.config import Config
from pipeline.errors import Invalid, LogCorrupt, NotFound
from pipeline.roles.offline import data_folder
from pipeline.topics import CHANGELOG, DELTAS
from pipeline.worker.verify import Difference, Result, VerifyProgress, verify

if TYPE_CHECKING:
    from pipeline.adapters.kafka.log import KafkaLog

_SCRATCH = "verify.tmp"
_TEXT_MAX = 200


def run_verify(config: Config, *, url: str | None = None, as_json: bool, limit: int) -> int:
    """Verify the data directory, print at most `limit` differences a partition, and return the exit code.

    The changelog is at the broker `url`, or in the directory, where every record of the log is read, too. Raises
    `Unavailable` if another process has the directory, or no broker answers, `Invalid` if it is no data directory.
    """
    path = data_folder(config.log.data)
    with DataDir(path, with_log=url is None) as data:
        if url is not None:
            from pipeline.adapters.kafka.options import parse_url

            data.check_app(parse_url(url).app)
        results, damage = _verify_all(data, config, limit, url)
    fine = all(result.fine for result in results) and not damage
    if as_json:
        console.print_json({"data": str(path), "fine": fine, "log": damage, "partitions": results})
    else:
        _print(results, damage, data.stores)
    return console.OK if fine else console.FAILED


def _log(data: DataDir, config: Config, url: str | None) -> EmbeddedLog | KafkaLog:
    clock = SystemClock()
    if url is not None:
        from pipeline.adapters.kafka.checks import check_topics
        from pipeline.adapters.kafka.log import KafkaLog
        from pipeline.adapters.kafka.options import parse_url

        log = KafkaLog(parse_url(url), config.kafka, clock)
        check_topics(log, (DELTAS, CHANGELOG))
        return log
    try:
        return EmbeddedLog(data.log, topics.load(), config.log, clock, read_only=True)
    except NotFound:
        raise Invalid(f"{data.path} has no log: nothing was ever published to it") from None


def _damage_of(log: EmbeddedLog | KafkaLog) -> str:
    """Return the damage of an embedded log after reading all of it; empty without damage, and for a broker's log."""
    if not isinstance(log, EmbeddedLog):
        return ""
    try:
        gaps = find_gaps(log, full=True)
    except LogCorrupt as error:
        return str(error)
    return describe_gaps(gaps) if gaps else ""


def _verify_all(data: DataDir, config: Config, limit: int, url: str | None) -> tuple[list[Result], str]:
    clock = SystemClock()
    described = topics.load()
    log = _log(data, config, url)
    scratch_path = data.path / _SCRATCH
    with closing(log), _bars() as progress:
        shutil.rmtree(scratch_path, ignore_errors=True)  # left by a run that was killed; the directory is locked by this one
        stores = RocksStores(data.stores, config.log, read_only=True)
        scratch = RocksStores(scratch_path, config.log)
        try:
            results = [
                verify(
                    partition,
                    stores=stores,
                    scratch=scratch,
                    log=log,
                    clock=clock,
                    delete_retention_ms=described[CHANGELOG].delete_retention_ms,
                    fetch_count_max=config.worker.restore_fetch_count_max,
                    differences_max=limit,
                    progress=progress,
                )
                for partition in range(log.partition_count(CHANGELOG))
            ]
            return results, _damage_of(log)
        finally:
            shutil.rmtree(scratch_path, ignore_errors=True)


@contextmanager
def _bars() -> Iterator[Callable[[VerifyProgress], None]]:
    """Show a bar of the present partition and step on a terminal; yield the function that updates it."""
    with Progress(
        TextColumn("partition {task.fields[partition]}: {task.description:9}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} records"),
        TimeRemainingColumn(),
        console=console.err,
        transient=True,
        disable=not console.err.is_terminal,
    ) as bars:
        task = bars.add_task("", partition=0)
        showing: tuple[int, str] | None = None

        def show(progress: VerifyProgress) -> None:
            nonlocal showing
            if showing != (progress.partition, progress.doing):
                showing = progress.partition, progress.doing
                bars.reset(task, description=progress.doing, partition=progress.partition)
            bars.update(task, completed=progress.done, total=progress.total)

        yield show


def _print(results: Sequence[Result], damage: str, stores: Path) -> None:
    if damage:
        console.show(f"the log: {console.printable(damage)}", style="red")
    for result in results:
        bad = not result.fine
        console.show(f"partition {result.partition}: {_said(result)}", style="red" if bad else None)
        for difference in result.differences:
            console.show(f"  {console.printable(_difference(difference))}")
        if result.difference_count > len(result.differences):
            console.out.print(f"  and {result.difference_count - len(result.differences):,} more (--limit)")
    bad_stores = [result for result in results if not result.fine and result.verdict != "unreadable"]
    if damage or any(result.verdict in ("unreadable", "ahead") for result in results):
        console.out.print("The log is damaged. Keep everything as it is: the stores may be all there is.", soft_wrap=True)
    elif bad_stores:
        which = ", ".join(str(stores / str(result.partition)) for result in bad_stores)
        console.show(f"To repair: delete {which} and start again; they are restored from the changelog.")
    else:
        console.out.print(f"no differences in {sum(result.entries_compared for result in results):,} entries")


def _said(result: Result) -> str:
    compared = f"{result.entries_compared:,} entries compared"
    match result.verdict:
        case "equal":
            return f"equal, {compared}"
        case "behind":
            return (
                f"behind by {result.behind:,} records, consistent: {compared};"
                f" the next start sets {result.entries_superseded:,} more"
            )
        case "missing":
            return f"no store; the next start restores it from {result.changelog_record_count:,} records"
        case "stale":
            return f"not compared, because the next start makes it anew: {result.detail}"
        case "different":
            behind = f", behind by {result.behind:,} records" if result.behind else ""
            return f"{result.difference_count:,} differences, {compared}{behind}"
        case "ahead":
            return result.detail or (
                f"the store is ahead: it reflects the changelog up to {result.store_next_offset},"
                f" which ends at {result.changelog_end_offset}"
            )
        case "corrupt":
            return f"the store is corrupt: {result.detail}"
        case "unreadable":
            return f"the changelog can't be read: {result.detail}"


def _difference(difference: Difference) -> str:
    expected, found = _text(difference.expected), _text(difference.found)
    match difference.what:
        case "missing":
            return f"missing    {difference.entry}: the changelog has {expected}"
        case "extra":
            return f"extra      {difference.entry}: the store has {found}, the changelog nothing"
        case "different":
            return f"different  {difference.entry}: the changelog has {expected}, the store {found}"


def _text(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= _TEXT_MAX else f"{text[:_TEXT_MAX]}... ({len(text):,} characters)"
