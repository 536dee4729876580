"""`pipeline dead-letters`: prints dead letters, and the results of replaying them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import typer

from pipeline.adapters.clock import SystemClock
from pipeline.cli import console
from pipeline.cli.rows import parse_time_ms
from pipeline.cli.table import TextTable
from pipeline.errors import Invalid
from pipeline.query.dead_letters import LetterFilter, Listing, Outcome
from pipeline.roles.dead_letters import LetterSource

_AGO = re.compile(r"([0-9]{1,9})(s|m|h|d)")
_UNIT_MS = {"s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_FINE = ("counted", "counted before", "replayable")


def letter_filter(
    *, view: str, reason: str, partition: int | None, since: str | None, keys: Sequence[str] = ()
) -> LetterFilter:
    """Return the filter that the command line asks for."""
    return LetterFilter(frozenset(keys), view, reason, partition, 0 if since is None else parse_since(since))


def parse_since(text: str) -> int:
    """Return milliseconds since 1970 from a time ago such as `2h`, an int, or RFC 3339."""
    match = _AGO.fullmatch(text.strip())
    if match is not None:
        return max(0, SystemClock().now_ms() - int(match[1]) * _UNIT_MS[match[2]])
    try:
        return max(0, parse_time_ms(text, "since"))
    except Invalid:
        raise Invalid(f"--since {text[:50]!r}: 30s, 5m, 2h, 1d, ms since 1970, or RFC 3339 with its offset") from None


def run_ls(source: LetterSource, only: LetterFilter, limit: int, *, as_json: bool) -> int:
    """Print the letters; return the exit code."""
    found = source.listing(only, limit)
    if as_json:
        console.print_json(found)
        return console.OK
    if found.letters:
        table = TextTable("key", "view", "producer", "time", "reason", right=("series", "bytes"))
        for it in found.letters:
            cells = it.key, it.view or "-", it.producer or "-", _time(it.at_ms), it.reason
            table.add_row(*map(console.printable, cells), f"{it.series_count:,}", f"{it.size_bytes:,}")
        table.print()
    console.show(_totals(found))
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
    """Print a letter; return the exit code."""
    found = source.show(key, series_max)
    if as_json:
        console.print_json(found)
        return console.OK
    console.show(f"{found['key']}: record {found['offset']} of partition {found['partition']}")
    for name, value in (
        ("time", _time(found["at_ms"])),
        ("reason", found["reason"]),
        ("view", found.get("view") or "-: the whole record was refused"),
        ("bytes", f"{found.get('raw_size_bytes', 0):,}"),
    ):
        console.show(f"  {name}: {value}")
    batch = found.get("batch")
    if batch is None:
        console.show(
            f"  what it holds can't be decoded; it begins with {found['raw']}" if found.get("raw") else "  no bytes are kept"
        )
        return console.OK
    origin = batch.get("origin") or {"producer": batch["producer"], "sequence": batch["sequence"]}
    console.show(f"  producer: {origin['producer']}, sequence {origin['sequence']}, sealed {_time(batch['created_at_ms'])}")
    for group in batch["groups"]:
        _print_group(group)
    return console.OK


def _print_group(group: dict[str, Any]) -> None:
    definition = group.get("definition")
    if definition is None:
        console.show(f"  group {group['index']} of view {group['view']}: {group.get('reason', '')}")
        return
    labels = ", ".join(definition["labels"])
    count, series = group.get("series_count", 0), group.get("series", [])
    console.show(f"  group {group['index']}: {definition['kind']} {group['view']}({labels}), {count:,} series")
    table = TextTable("    " + "labels", "state", right=("answer",))
    for it in series:
        pairs = ", ".join(f"{name}={value}" for name, value in it["labels"].items())
        cells = f"    {pairs}", msgspec.json.encode(it["state"]).decode(), msgspec.json.encode(it["answer"]).decode()
        table.add_row(*map(console.printable, cells))
    table.print()
    if len(series) < count:
        console.show(f"    and {count - len(series):,} more (--series)")


def run_replay(
    source: LetterSource,
    only: LetterFilter,
    *,
    dry_run: bool,
    forgotten: bool,
    timeout_s: float | None,
    confirm: bool,
    as_json: bool,
) -> int:
    """Replay letters and print the result of each; return the exit code, 1 if one stays that was to be counted."""
    total = len(only.keys) or source.listing(only, 1).letter_count
    asks = confirm and not dry_run and total and sys.stdin.isatty() and sys.stdout.isatty()
    if asks and not typer.confirm(f"Replay {total:,} dead letter{'' if total == 1 else 's'}?"):
        return console.FAILED
    outcomes: list[Outcome] = []
    while True:
        done = source.replay_page(only, timeout_s=timeout_s, dry_run=dry_run, forgotten=forgotten)
        outcomes += done.outcomes
        for it in () if as_json else done.outcomes:
            console.show(f"{it.key}  {it.result}" + (f": {it.reason}" if it.reason else ""))
        if done.after is None:
            break
        if console.err.is_terminal and not as_json:
            console.err.print(f"{len(outcomes):,} of {total:,}")
        only = msgspec.structs.replace(only, after=done.after)
    counts = Counter([it.result for it in outcomes])
    if as_json:
        console.print_json({"outcomes": outcomes, "counts": counts})
    else:
        console.show(", ".join(f"{count:,} {result}" for result, count in counts.items()) or "no dead letters")
    return console.OK if all(it.result in _FINE for it in outcomes) else console.FAILED
