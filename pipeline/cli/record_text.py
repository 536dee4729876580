"""Prints descriptions of records: as lines for a person, or one JSON object a line.

Control characters are escaped, so that published text can't control the terminal.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

import msgspec

from pipeline.cli import console
from pipeline.core.description import BatchText, DefinitionText, EntryText, RecordText, SeriesText
from pipeline.printable import printable_json
from pipeline.worker.inspect import ChangelogText, StoredText

_HELD_BYTES_MAX = 64 * 2**10
T = TypeVar("T")


def show(
    items: Iterable[T], lines: Callable[[T], Iterator[str]], limit: int | None, *, as_json: bool, soon: bool = False
) -> None:
    """Print up to `limit` items, with `soon` each as it comes. Ends in order at Ctrl-C, and when a pipe is closed."""
    held: list[str] = []
    size = 0
    try:
        for item in islice(items, limit):
            new = [json_line(item)] if as_json else [console.printable(line) for line in lines(item)]
            held += new
            size += sum(map(len, new))
            if soon or size >= _HELD_BYTES_MAX:
                _write(held)
                size = 0
        _write(held)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes to it at its end


def _write(lines: list[str]) -> None:
    if lines:
        console.write("".join([f"{line}\n" for line in lines]).encode())
        lines.clear()


def json_line(value: object) -> str:
    """Return the JSON of a value, safe for a terminal."""
    return printable_json(msgspec.json.encode(value)).decode()


def record_lines(it: RecordText) -> Iterator[str]:
    """Yield the lines of a record of the deltas topic."""
    place = f"{it.partition}@{it.offset}  {console.utc(it.at_ms)}  {it.size_bytes:,} bytes"
    if it.batch is None:
        yield f"{place}  NO BATCH: {it.reason}  {it.raw}"
        return
    yield f"{place}  {batch_head(it.batch)}" + (f"  WRONG PLACE: {it.reason}" if it.reason else "")
    yield from batch_lines(it.batch)


def batch_head(batch: BatchText) -> str:
    """Return producer, epoch and sequence of a batch as text."""
    head = f"producer {batch.producer}  epoch {batch.epoch}  sequence {batch.sequence}  floor {batch.floor}"
    if batch.closing:
        head += "  closing"
    if batch.letter:
        head += f"  replays letter {batch.letter}"
    if batch.origin is not None:
        head += f"  stands for sequence {batch.origin.sequence} of producer {batch.origin.producer}"
    return head


def batch_lines(batch: BatchText) -> Iterator[str]:
    """Yield the lines of a batch's controls and groups."""
    for control in batch.controls:
        kind = control.kind or "any kind"
        labels = "any labels" if control.labels is None else f"({', '.join(control.labels)})"
        yield f"    {control.action} {control.view}: {kind}, {labels}"
    for group in batch.groups:
        if group.definition is None:
            yield f"    {group.view}  REFUSED: {group.reason}"
            continue
        yield f"    {group.view}  {definition_words(group.definition)}: {group.series_count:,} series"
        for series in group.series:
            yield f"        {series_words(series)}"
        if len(group.series) < group.series_count:
            yield f"        and {group.series_count - len(group.series):,} more"


def definition_words(definition: DefinitionText) -> str:
    """Return a definition as text."""
    window = f" in windows of {definition.window_s} s" if definition.window_s else ""
    window += f" kept for {definition.retention_s} s" if definition.retention_s else ""
    return f"{'monotone ' * definition.monotone}{definition.kind}({', '.join(definition.labels)}){window}"


def series_words(series: SeriesText) -> str:
    """Return labels, window and state of a series as text."""
    expires = f", expires {console.utc(series.expires_at_ms)}" if series.expires_at_ms else ""
    return f"{labels_words(series)} = {json_line(series.state)}{expires}"


def labels_words(series: SeriesText) -> str:
    """Return labels and window of a series as text."""
    pairs = ", ".join(f"{name}={json_line(value)}" for name, value in series.labels.items())
    return f"{{{pairs}}}" + (f" window {console.utc(series.window_start_ms)}" if series.window_start_ms else "")


def changelog_lines(it: ChangelogText) -> Iterator[str]:
    """Yield the line of a record of the changelog."""
    yield f"{it.partition}@{it.offset}  {console.utc(it.at_ms)}  {entry_words(it.entry)}"


def store_lines(it: StoredText) -> Iterator[str]:
    """Yield the line of an entry of a store."""
    yield f"{it.partition}  {entry_words(it.entry)}"


def entry_words(it: EntryText) -> str:
    """Return an entry as one line."""
    fields = ", ".join(f"{name} {json_line(value)}" for name, value in it.fields.items())
    words = [f"{it.what:10}"]
    if it.what == "foreign":
        whose = f"producer {it.producer}" if it.producer else f"key {it.key}"
        words.append(f"{whose}: {it.reason}  value {it.value}")
    elif it.series is not None:
        words.append(f"{it.view} {it.definition_id} " + (labels_words if it.tombstone else series_words)(it.series))
    elif it.what == "definition":
        its = f" {definition_words(it.definition)}" if it.definition else ""
        words.append(f"{it.view} {it.definition_id}{its}")
    elif it.producer:
        words.append(it.producer)
    return "  ".join([*words, *([fields] if fields else []), *(["TOMBSTONE"] if it.tombstone else [])])
