"""`pipeline dead-letters`: what was refused when it was folded, shown and replayed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from pipeline.cli.options import DEFAULT_URL, Json, Set, load
from pipeline.errors import Invalid

dead_letters = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

FromLog = Annotated[
    str | None,
    typer.Option(
        "--from", metavar="URL", help=f"http://host:port of a server, or kafka://host:port[/app]. Default: {DEFAULT_URL}."
    ),
]
Stopped = Annotated[str | None, typer.Option("--data", metavar="DIR", help="The folder of a `pipeline up` that is stopped.")]
View = Annotated[str, typer.Option("--view", metavar="VIEW", help="Only groups of this view.")]
Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Only letters whose reason has this in it.")]
Partition = Annotated[int | None, typer.Option("--partition", metavar="N", min=0, help="Only letters of this partition.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help="Only since then: 2h, 1d, ms since 1970, or RFC 3339.")
]


def _place(url: str | None, data: str | None) -> dict[str, Any]:
    if url is not None and data is not None:
        raise Invalid("--from is a server or a broker, --data a folder that no process has: one of them")
    return {"url": url or DEFAULT_URL, "data": data}


@dead_letters.command("ls")
def ls(
    url: FromLog = None,
    data: Stopped = None,
    view: View = "",
    reason: Reason = "",
    partition: Partition = None,
    since: Since = None,
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="Most letters listed.")] = 100,
    set_: Set = None,
    json: Json = False,
) -> None:
    """List the letters that are there: by partition, the oldest first.

    \b
        pipeline dead-letters ls
        pipeline dead-letters ls --from kafka://127.0.0.1:9092 --view revenue --since 2h --json
        pipeline dead-letters ls --data ./data

    A record that can't be folded, or one group of it, is kept as a dead letter with its reason. Letters that were replayed
    are not listed. Time is when the log accepted the record; the producer is shown by its fingerprint.
    """
    from pipeline.cli import console, letters
    from pipeline.roles.dead_letters import open_letters

    console.configure_logging(console.QUIET)
    only = letters.letter_filter(view=view, reason=reason, partition=partition, since=since)
    with open_letters(load(set_), **_place(url, data)) as source:
        raise SystemExit(letters.run_ls(source, only, limit, as_json=json))


@dead_letters.command("show")
def show(
    key: Annotated[str, typer.Argument(metavar="KEY", help="The letter's key, as listed.")],
    url: FromLog = None,
    data: Stopped = None,
    series: Annotated[
        int, typer.Option("--series", metavar="N", min=1, max=100_000, help="Most series shown of each group.")
    ] = 1_000,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Show a letter with what it holds: groups, series, states.

    \b
        pipeline dead-letters show 1f2e3d4c.0-17-2
    """
    from pipeline.cli import console, letters
    from pipeline.roles.dead_letters import open_letters

    console.configure_logging(console.QUIET)
    with open_letters(load(set_), **_place(url, data)) as source:
        raise SystemExit(letters.run_show(source, key, series, as_json=json))


@dead_letters.command("replay")
def replay(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Which letters; without any, all.")] = None,
    url: FromLog = None,
    view: View = "",
    reason: Reason = "",
    partition: Partition = None,
    since: Since = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what could be replayed, and change nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Don't ask, on a terminal.")] = False,
    forgotten: Annotated[
        bool,
        typer.Option(
            "--forgotten", help="Count whole records, too, of which it is not known any more whether they were counted."
        ),
    ] = False,
    timeout_s: Annotated[
        float | None, typer.Option("--timeout", metavar="S", min=1, help="How long to wait for workers, for each 1,000.")
    ] = None,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Fold letters once more, when what they were refused for is mended.

    \b
        pipeline dead-letters replay --view revenue --dry-run
        pipeline dead-letters replay --view revenue
        pipeline dead-letters replay --from kafka://127.0.0.1:9092 1f2e3d4c.0-17-2 1f2e3d4c.0-18-2

    Each letter counts once, however often it is replayed, and by however many at once. Waits until workers have folded
    them, and says of each: counted, counted before, refused again (with its reason; it stays), or not replayed (and why; it
    stays). Of a record that was refused as a whole the worker checks whether it was counted after all, for as long as it
    remembers its producer (producer_ttl_ms); later that needs --forgotten. Exit code 1 means that something stays.
    """
    from pipeline.cli import console, letters
    from pipeline.roles.dead_letters import open_letters

    console.configure_logging(console.QUIET)
    only = letters.letter_filter(view=view, reason=reason, partition=partition, since=since, keys=keys or [])
    with open_letters(load(set_), **_place(url, None)) as source:
        code = letters.run_replay(
            source,
            only,
            dry_run=dry_run,
            forgotten=forgotten,
            timeout_s=timeout_s,
            confirm=not yes,
            as_json=json,
        )
        raise SystemExit(code)
