"""Dead letters from where they are: a server, a broker, or the folder of a stopped process; and how they are printed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode

import msgspec
import typer

import pipeline.topics as topics
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpReader
from pipeline.cli import console
from pipeline.cli.rows import parse_time_ms
from pipeline.cli.table import TextTable
from pipeline.config import Config
from pipeline.core.description import describe_letter
from pipeline.errors import Invalid, NotFound, Unavailable
from pipeline.ports import Log
from pipeline.query.dead_letters import DeadLetters, Listing, Outcome, Place, Replayed, Wanted
from pipeline.topics import DEAD_LETTERS, DELTAS

_PAGE = 1_000
_TIMEOUT_S = 60.0
_READ_TIMEOUT_S = 600.0
"""Of a server that reads a topic of millions of letters for us."""
_AGO = re.compile(r"([0-9]{1,9})(s|m|h|d)")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FINE = ("counted", "counted before", "replayable")


class How(msgspec.Struct, frozen=True):
    """How letters are replayed."""

    dry_run: bool = False
    forgotten: bool = False
    timeout_s: float | None = None


class LetterSource(Protocol):
    """Where letters are."""

    def listing(self, wanted: Wanted, limit: int) -> Listing: ...

    def show(self, key: str, series_max: int) -> dict[str, Any]: ...

    def replay(self, wanted: Wanted, how: How) -> Replayed: ...


class LogSource:
    """Letters of a log that this process reads itself."""

    def __init__(self, log: Log) -> None:
        self._letters = DeadLetters(log, SystemClock())

    def listing(self, wanted: Wanted, limit: int) -> Listing:
        return self._letters.listing(wanted, limit)

    def show(self, key: str, series_max: int) -> dict[str, Any]:
        found: dict[str, Any] = msgspec.json.decode(
            msgspec.json.encode(describe_letter(key.encode(), self._letters.get(key), series_max=series_max))
        )
        return found

    def replay(self, wanted: Wanted, how: How) -> Replayed:
        timeout_s = how.timeout_s or _TIMEOUT_S
        return self._letters.replay(wanted, limit=_PAGE, timeout_s=timeout_s, dry_run=how.dry_run, forgotten=how.forgotten)


class _Answered(msgspec.Struct):
    outcomes: list[Outcome]
    after: str | None


class HttpSource:
    """Letters of a server that takes deltas."""

    def __init__(self, reader: HttpReader, url: str) -> None:
        self._reader = reader
        self._url = url

    def listing(self, wanted: Wanted, limit: int) -> Listing:
        query: dict[str, Any] = {"limit": limit}
        for name, value in (("view", wanted.view), ("reason", wanted.reason), ("since_ms", wanted.since_ms)):
            if value:
                query[name] = value
        if wanted.partition is not None:
            query["partition"] = wanted.partition
        found: Listing = self._answer(f"/v1/dead-letters?{urlencode(query, quote_via=quote)}", Listing)
        return found

    def show(self, key: str, series_max: int) -> dict[str, Any]:
        found: dict[str, Any] = self._answer(f"/v1/dead-letters/{quote(key, safe='')}?series={series_max}", dict[str, Any])
        return found

    def replay(self, wanted: Wanted, how: How) -> Replayed:
        order = {
            "keys": sorted(wanted.keys),
            "view": wanted.view,
            "reason": wanted.reason,
            "partition": wanted.partition,
            "since_ms": wanted.since_ms,
            "after": "" if wanted.after is None else str(wanted.after),
            "limit": _PAGE,
            "timeout_ms": None if how.timeout_s is None else int(how.timeout_s * 1000),
            "dry_run": how.dry_run,
            "forgotten": how.forgotten,
        }
        done = self._answer("/v1/dead-letters/replay", _Answered, msgspec.json.encode(order))
        return Replayed(done.outcomes, None if done.after is None else Place.parse(done.after))

    def _answer(self, path: str, kind: Any, body: bytes | None = None) -> Any:
        answer = self._reader.fetch(path, timeout_s=_READ_TIMEOUT_S, body=body)
        try:
            return msgspec.json.decode(answer, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Unavailable(f"{self._url}: not an answer of this API: {error}") from None


@contextmanager
def opened(config: Config, *, url: str, data: str | None) -> Iterator[LetterSource]:
    """The letters of a server, of a broker, or of a folder that no process has."""
    if data is not None:
        with _stopped(config, data) as log:
            yield LogSource(log)
    elif url.startswith("kafka:"):
        from pipeline.adapters.kafka.log import KafkaLog
        from pipeline.adapters.kafka.options import parse_url

        with closing(KafkaLog(parse_url(url), config.kafka, SystemClock())) as kafka:
            kafka.connect((DELTAS, DEAD_LETTERS))
            yield LogSource(kafka)
    else:
        with HttpReader(url) as reader:
            yield HttpSource(reader, url)


@contextmanager
def _stopped(config: Config, folder: str) -> Iterator[Log]:
    from pipeline.adapters.datadir import DataDir
    from pipeline.adapters.embedded.log import EmbeddedLog

    path = Path(folder).expanduser().absolute()
    if not (path / "VERSION").is_file():  # opening would make one
        raise Invalid(f"{path} is not a data directory")
    with DataDir(path) as data:
        try:
            log = EmbeddedLog(data.log, topics.load(), config.log, SystemClock(), read_only=True)
        except NotFound:
            raise Invalid(f"{path} has no log: nothing was ever published to it") from None
        with closing(log):
            yield log


def wanted(*, view: str, reason: str, partition: int | None, since: str | None, keys: Sequence[str] = ()) -> Wanted:
    """Which letters the command line asks for."""
    return Wanted(frozenset(keys), view, reason, partition, 0 if since is None else parse_since(since))


def parse_since(text: str) -> int:
    """Milliseconds since 1970, from a time ago such as `2h`, an int, or RFC 3339."""
    match = _AGO.fullmatch(text.strip())
    if match is not None:
        return max(0, SystemClock().now_ms() - int(match[1]) * _UNIT_MS[match[2]])
    try:
        return max(0, parse_time_ms(text, "since"))
    except Invalid:
        raise Invalid(f"--since {text[:50]!r}: 30s, 5m, 2h, 1d, ms since 1970, or RFC 3339 with its offset") from None


def run_ls(source: LetterSource, asked: Wanted, limit: int, *, as_json: bool) -> int:
    """Print the letters; the exit code."""
    found = source.listing(asked, limit)
    if as_json:
        console.print_json(found)
        return console.OK
    if found.letters:
        table = TextTable("key", "view", "producer", "time", "reason", right=("series", "bytes"))
        for it in found.letters:
            cells = it.key, it.view or "-", it.producer or "-", _time(it.at_ms), it.reason
            table.add_row(*map(console.printable, cells), f"{it.series_count:,}", f"{it.size_bytes:,}")
        table.print()
    print(_totals(found))
    return console.OK


def _totals(found: Listing) -> str:
    said = f"{found.letter_count:,} dead letter{'' if found.letter_count == 1 else 's'}, {found.bytes_total:,} bytes"
    if len(found.letters) < found.letter_count:
        said = f"{said}; the first {len(found.letters):,} are listed (--limit)"
    if found.foreign_count:
        said = f"{said}; {found.foreign_count:,} records of the topic are none, and no worker wrote them"
    return said


def _time(at_ms: int) -> str:
    try:
        return datetime.fromtimestamp(at_ms / 1000, UTC).isoformat(sep=" ", timespec="milliseconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return str(at_ms)


def run_show(source: LetterSource, key: str, series_max: int, *, as_json: bool) -> int:
    """Print a letter; the exit code."""
    found = source.show(key, series_max)
    if as_json:
        console.print_json(found)
        return console.OK
    print(console.printable(f"{found['key']}: record {found['offset']} of partition {found['partition']}"))
    for name, value in (
        ("time", _time(found["at_ms"])),
        ("reason", found["reason"]),
        ("view", found.get("view") or "-: the whole record was refused"),
        ("bytes", f"{found.get('raw_size_bytes', 0):,}"),
    ):
        print(console.printable(f"  {name}: {value}"))
    batch = found.get("batch")
    if batch is None:
        print(
            f"  what it holds can't be decoded; it begins with {found['raw']}" if found.get("raw") else "  no bytes are kept"
        )
        return console.OK
    origin = batch.get("origin") or {"producer": batch["producer"], "sequence": batch["sequence"]}
    print(f"  producer: {origin['producer']}, sequence {origin['sequence']}, sealed {_time(batch['created_at_ms'])}")
    for group in batch["groups"]:
        _print_group(group)
    return console.OK


def _print_group(group: dict[str, Any]) -> None:
    definition = group.get("definition")
    if definition is None:
        print(console.printable(f"  group {group['index']} of view {group['view']}: {group.get('reason', '')}"))
        return
    labels = ", ".join(definition["labels"])
    count, series = group.get("series_count", 0), group.get("series", [])
    print(console.printable(f"  group {group['index']}: {definition['kind']} {group['view']}({labels}), {count:,} series"))
    table = TextTable("    " + "labels", "state", right=("answer",))
    for it in series:
        pairs = ", ".join(f"{name}={value}" for name, value in it["labels"].items())
        cells = f"    {pairs}", msgspec.json.encode(it["state"]).decode(), msgspec.json.encode(it["answer"]).decode()
        table.add_row(*map(console.printable, cells))
    table.print()
    if len(series) < count:
        print(f"    and {count - len(series):,} more (--series)")


def run_replay(source: LetterSource, asked: Wanted, how: How, *, ask: bool, as_json: bool) -> int:
    """Replay letters, and print what becomes of each; the exit code, 1 if one stays that was to be counted."""
    total = len(asked.keys) or source.listing(asked, 1).letter_count
    asks = ask and not how.dry_run and total and sys.stdin.isatty() and sys.stdout.isatty()
    if asks and not typer.confirm(f"Replay {total:,} dead letter{'' if total == 1 else 's'}?"):
        return console.FAILED
    outcomes: list[Outcome] = []
    while True:
        done = source.replay(asked, how)
        outcomes += done.outcomes
        for it in () if as_json else done.outcomes:
            print(console.printable(f"{it.key}  {it.result}" + (f": {it.reason}" if it.reason else "")))
        if done.after is None:
            break
        if console.err.is_terminal and not as_json:
            console.err.print(f"{len(outcomes):,} of {total:,}")
        asked = msgspec.structs.replace(asked, after=done.after)
    counts: dict[str, int] = {}
    for it in outcomes:
        counts[it.result] = counts.get(it.result, 0) + 1
    if as_json:
        console.print_json({"outcomes": outcomes, "counts": counts})
    else:
        print(", ".join(f"{count:,} {result}" for result, count in counts.items()) or "no dead letters")
    return console.OK if all(it.result in _FINE for it in outcomes) else console.FAILED
