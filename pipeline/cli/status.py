"""`pipeline status`: the status of one process, or of all workers of an app, as tables or as JSON."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.cli import console
from pipeline.cli.table import TextTable, fetched
from pipeline.core.answer import MemberStatus, RestoreStatus, Status, known
from pipeline.settings import ClientSettings, KafkaSettings

_UNKNOWN = "?"


def run_status(url: str, *, as_json: bool) -> int:
    """Print the status of one process; return the exit code."""
    status = fetched(url, "/v1/status", Status, as_json=as_json)
    if status is None:
        return console.OK
    owned = ("committed_by",) if any(known(it.owner) for it in status.partitions) else ()
    figures = ("next_offset", "end_offset", "lag", "commit", "staleness", "restore")
    table = TextTable("partition", "phase", *owned, right=figures)
    at_ms = known(status.at_ms)
    for it in status.partitions:
        committed_at_ms, staleness_ms = known(it.committed_at_ms), known(it.staleness_ms)
        age_ms = at_ms - committed_at_ms if at_ms and committed_at_ms else None
        stale = "" if staleness_ms is None else f"{staleness_ms:,} ms"
        numbers = ("" if it is None else f"{it:,}" for it in map(known, (it.next_offset, it.end_offset, it.lag)))
        owner = (console.printable(known(it.owner) or ""),) if owned else ()
        table.add_row(str(it.partition), it.phase, *owner, *numbers, _age(age_ms), stale, _restore(known(it.restore)))
    for it in known(status.standbys) or ():
        table.add_row(
            str(it.partition), f"standby, {it.phase}", *[""] * len(owned), "", "", "", "", "", _restore(known(it.restore))
        )
    table.print()
    for member in known(status.members) or ():
        console.show(f"member {console.printable(member.name)} {console.printable(member.url)}: {_has(member)}")
    if fenced_count := known(status.fenced_count):
        console.show(f"fenced {fenced_count:,} times")
    for left in known(status.ingest_left_out) or ():
        first = f", the first: {console.printable(left.first)}" if left.first else ""
        console.show(f"left out by ingest: {left.count:,} {left.protocol} {left.reason}{first}")
    lag = sum(known(it.lag) or 0 for it in status.partitions)
    console.show(f"{'ready' if status.ready else 'not ready: restoring'}, lag {lag:,} records")
    return console.OK


def run_overview(url: str, settings: KafkaSettings, client: ClientSettings, *, as_json: bool) -> int:
    """Print the statuses of all workers of an app; return the exit code, 1 if none answers."""
    from pipeline.roles.overview import MemberOverview, overview

    found = overview(url, settings, client)
    code = console.OK if any(member.error is None for member in found.members) else console.FAILED
    if as_json:
        console.print_json(found)
        return code

    def state(it: MemberOverview) -> str:
        if it.error is not None:
            return f"unreachable: {it.error}"
        return "ready" if it.ready else "restoring"

    table = TextTable("member", "url", "partitions", "standbys", right=("lag", "fenced", "state"))
    for member in found.members:
        has = (_numbers(member.partitions), _numbers(member.standbys), _count(member.lag), _count(member.fenced_count))
        table.add_row(*map(console.printable, (member.name, member.url, *has, state(member))))
    table.print()
    console.show("")
    table = TextTable("partition", "member", "phase", right=("next_offset", "end_offset", "lag", "commit", "restore"))
    for it in found.partitions:
        offsets = (_count(it.next_offset), _count(it.end_offset), _count(it.lag))
        owner = console.printable(it.member or "nobody")
        table.add_row(str(it.partition), owner, it.phase, *offsets, _age(it.commit_age_ms), _restore(it.restore))
        for copy in it.standbys:
            name, phase = console.printable(copy.member), f"standby, {copy.phase}"
            table.add_row(str(it.partition), name, phase, "", "", "", "", _restore(copy.restore))
    table.print()
    for note in found.notes:
        console.print_error(note)
    lags = [it.lag for it in found.partitions]
    unknown = f", that of {lags.count(None)} partitions unknown" if None in lags else ""
    moving = "" if found.group_state == "Stable" else f", partitions are moving ({console.printable(found.group_state)})"
    count = len(found.members)
    console.show(f"{count} member{'s' * (count != 1)}, lag {sum(lag or 0 for lag in lags):,} records{unknown}{moving}")
    return code


def _has(member: MemberStatus) -> str:
    partitions = f"partitions {_numbers(member.partitions)}" if member.partitions else "no partitions"
    return partitions + (f", standbys {_numbers(member.standbys)}" if member.standbys else "")


def _numbers(partitions: Sequence[int] | None) -> str:
    return _UNKNOWN if partitions is None else ", ".join(map(str, partitions))


def _count(number: int | None) -> str:
    return _UNKNOWN if number is None else f"{number:,}"


def _age(age_ms: int | None) -> str:
    return "" if age_ms is None else f"{max(0, age_ms) / 1000:,.1f} s ago"


def _restore(it: RestoreStatus | None) -> str:
    return "" if it is None else f"{it.entries:,} entries, {it.remaining:,} to go, {it.seconds_left:,.0f} s left"
