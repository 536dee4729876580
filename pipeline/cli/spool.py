"""`pipeline spool`: what publishers have left in a spool folder, shown or sent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import Json, Set, To, load

if TYPE_CHECKING:
    from pipeline.publisher.rescue import DrainedSlot
    from pipeline.publisher.spool.slot import SlotInfo

spool = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The spool folder: a publisher's spool_dir.")]


@spool.command("ls")
def ls(folder: Folder, json: Json = False) -> None:
    """Show what is in a spool, and change nothing.

    \b
        pipeline spool ls ./spool
        pipeline spool ls ./spool --json

    One line for each process that records, or has left something: whether it lives, batches that are not acknowledged,
    deltas that are in no batch, the age of the oldest batch. Exit code 1 means that something in it is corrupt.
    """
    from pipeline.adapters.clock import SystemClock
    from pipeline.cli import console
    from pipeline.publisher.spool.orphan import inspect

    now_ms = SystemClock().now_ms()
    slots = inspect(folder)
    if json:
        console.print_json({"spool": str(folder), "slots": [_as_json(slot, now_ms) for slot in slots]})
    else:
        for slot in slots:
            console.show(_line(slot, now_ms))
        left = [slot for slot in slots if not slot.live]
        console.show(f"{len(slots) - len(left)} live, {len(left)} left, {sum([slot.bytes_total for slot in slots])} bytes")
    raise SystemExit(console.FAILED if any(slot.corrupt for slot in slots) else console.OK)


def _age_s(slot: SlotInfo, now_ms: int) -> float | None:
    return None if slot.oldest_ms is None else max(0, now_ms - slot.oldest_ms) / 1000


def _as_json(slot: SlotInfo, now_ms: int) -> dict[str, Any]:
    import msgspec

    return {**msgspec.structs.asdict(slot), "oldest_age_s": _age_s(slot, now_ms)}


def _line(slot: SlotInfo, now_ms: int) -> str:
    age_s = _age_s(slot, now_ms)
    parts = [
        f"{slot.slot}  {'live' if slot.live else 'left'}  epoch {slot.epoch}  {slot.bytes_total} bytes",
        f"producer {slot.producer or 'unknown'}",
        f"{slot.batch_count} batches ({slot.entry_count} entries) unacknowledged",
        f"{slot.delta_count} deltas waiting in {slot.series_count} series",
    ]
    if age_s is not None:
        parts.append(f"oldest {age_s:.0f} s")
    if slot.torn_bytes:
        parts.append(f"{slot.torn_bytes} bytes of an unfinished write")
    if slot.corrupt:
        parts.append(f"CORRUPT: {slot.corrupt}")
    return "; ".join(parts)


@spool.command("drain")
def drain(
    folder: Folder,
    to: To,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="S", min=0, help="How long to try, in seconds.")] = 30.0,
    force: Annotated[bool, typer.Option("--force", help="Send also what is so old that it may count twice.")] = False,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Send what processes that never come back have left.

    \b
        pipeline spool drain ./spool --to kafka://127.0.0.1:9092

    Each delta counts once, whatever was sent before. Slots of living processes are not touched; can be run at any time, and
    again. A task forgets a producer after producer_ttl_ms (7 days), so batches that were sealed longer ago than that less a
    day, and may have been sent then, need --force. Exit code 1 means that something is left, or is corrupt and was put
    aside.
    """
    from contextlib import closing

    from pipeline.adapters.clock import SystemClock
    from pipeline.cli import console
    from pipeline.connect import log_writer
    from pipeline.publisher.rescue import drain as drain_folder
    from pipeline.publisher.spool.orphan import find_slots
    from pipeline.settings import PublisherSettings

    console.configure_logging("warning")
    find_slots(folder)  # before anything is connected to
    config = load(set_)
    settings = PublisherSettings(producer_ttl_ms=config.publisher.producer_ttl_ms)
    bad = False
    with closing(log_writer(to, settings, config.kafka, config.client)) as writer:
        slots = []
        for slot in drain_folder(folder, writer, SystemClock(), settings, timeout_s=timeout_s, force=force):
            bad |= bool(slot.error or slot.report.corrupt)
            slots.append(slot)
            if not json:
                console.show(_drained_line(slot))
    if json:
        console.print_json({"spool": str(folder), "to": to, "slots": slots})
    raise SystemExit(console.FAILED if bad else console.OK)


def _drained_line(slot: DrainedSlot) -> str:
    if slot.live:
        return f"{slot.slot}  live: not touched"
    parts = [f"{slot.slot}  {slot.batch_count} batches acknowledged, {slot.delta_count} deltas were in none before"]
    report = slot.report
    for count, what in (
        (slot.left_count, "batches left"),
        (report.torn_bytes, "bytes of an unfinished write cut off"),
        (report.bad_count, "records can't be read, and are lost"),
    ):
        if count:
            parts.append(f"{count} {what}")
    if report.corrupt:
        parts.append(f"CORRUPT, put aside: {'; '.join(report.corrupt)}")
    if slot.error:
        parts.append(slot.error)
    return "; ".join(parts)
