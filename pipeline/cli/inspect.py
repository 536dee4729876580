"""The commands of `pipeline inspect`; `record_text` prints records, and is imported when one runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import Data, Set, load, parse_partitions

if TYPE_CHECKING:
    from pipeline.worker.inspect import Range

inspect = typer.Typer(no_args_is_help=True, rich_markup_mode=None)

Broker = Annotated[
    str | None,
    typer.Option("--from", metavar="URL", help="A broker: kafka://host:port[/app]. Without it, the log in --data."),
]
Partition = Annotated[str | None, typer.Option("--partition", metavar="LIST", help="Only these, such as 0,2,5-7.")]
Start = Annotated[int, typer.Option("--start", metavar="N", min=0, help="From this offset of each partition.")]
End = Annotated[
    int | None, typer.Option("--end", metavar="N", min=0, help="Up to before this offset. Default: what is there now.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many.")]
View = Annotated[str, typer.Option("--view", metavar="NAME", help="Only what is about this view.")]
Follow = Annotated[bool, typer.Option("--follow", "-f", help="Go on with what comes, until Ctrl-C. With --from only.")]
Lines = Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")]
SeriesMax = Annotated[
    int | None, typer.Option("--series", metavar="N", min=0, help="Of each group, print so many series. Default: all.")
]


@inspect.callback()
def main() -> None:
    """Print what is in the log or in a store, record by record, and change nothing.

    Clients of a broker are not disturbed. A data directory must not be in use: stop `pipeline up` or the worker first, or
    copy it. Producers are shown by a fingerprint, as in logs and dead letters, never by the id that lets them send.
    """


@inspect.command("deltas")
def deltas(
    url: Broker = None,
    data: Data = None,
    partition: Partition = None,
    start: Start = 0,
    end: End = None,
    limit: Limit = None,
    view: View = "",
    series: SeriesMax = None,
    follow: Follow = False,
    set_: Set = None,
    json: Lines = False,
) -> None:
    """Print the records of the deltas topic: batches, or why a record is none.

    \b
        pipeline inspect deltas --data ./data --view requests --limit 5
        pipeline inspect deltas --from kafka://127.0.0.1:9092 --partition 0 --start 1200 --json
        pipeline inspect deltas --from kafka://127.0.0.1:9092 --follow

    Of each batch its place, when the log took it, its producer, epoch, sequence and floor, the orders in it, and its groups:
    view, kind, labels, and of each series the state that is merged into what was there.
    """
    from pipeline.cli.record_text import record_lines, show
    from pipeline.roles.offline import open_log
    from pipeline.topics import DELTAS
    from pipeline.worker.inspect import read_deltas

    config = load(set_, data=data)
    _check_follow(follow, url, end)
    with open_log(url, config.log, config.kafka, DELTAS) as log:
        wanted = _range(partition, log.partition_count(DELTAS), start, end, follow)
        show(read_deltas(log, wanted, view=view, series_max=series), record_lines, limit, as_json=json, soon=follow)


@inspect.command("changelog")
def changelog(
    url: Broker = None,
    data: Data = None,
    partition: Partition = None,
    start: Start = 0,
    end: End = None,
    limit: Limit = None,
    view: View = "",
    follow: Follow = False,
    set_: Set = None,
    json: Lines = False,
) -> None:
    """Print the records of the changelog, which is the state: commit by commit, each ending with its position.

    \b
        pipeline inspect changelog --data ./data --view requests
        pipeline inspect changelog --from kafka://127.0.0.1:9092 --partition 3 --json

    Series with their labels and states, definitions, producers, positions, fence records of new owners, tombstones, and
    foreign records, which no worker wrote.
    """
    from pipeline.cli.record_text import changelog_lines, show
    from pipeline.roles.offline import open_log
    from pipeline.topics import CHANGELOG
    from pipeline.worker.inspect import read_changelog

    config = load(set_, data=data)
    _check_follow(follow, url, end)
    with open_log(url, config.log, config.kafka, CHANGELOG) as log:
        wanted = _range(partition, log.partition_count(CHANGELOG), start, end, follow)
        show(read_changelog(log, wanted, view=view), changelog_lines, limit, as_json=json, soon=follow)


@inspect.command("store")
def store(
    data: Data = None,
    partition: Partition = None,
    limit: Limit = None,
    view: View = "",
    set_: Set = None,
    json: Lines = False,
) -> None:
    """Print the entries of the stores in a data directory, in the order of their keys, and what each store says of itself.

    \b
        pipeline inspect store --data ./data --view requests
        pipeline inspect store --data ./w1 --partition 0 --json

    The same entries as in the changelog, the newest of each, up to the offset that its meta entry names.
    """
    from itertools import chain

    from pipeline.cli.record_text import show, store_lines
    from pipeline.roles.offline import open_stores
    from pipeline.worker.inspect import read_store

    config = load(set_, data=data)
    with open_stores(config.log, parse_partitions(partition)) as stores:
        entries = chain.from_iterable(read_store(number, it, view=view) for number, it in stores)
        show(entries, store_lines, limit, as_json=json)


def _check_follow(follow: bool, url: str | None, end: int | None) -> None:
    if follow and url is None:
        raise typer.BadParameter("--follow: nothing is written to a data directory while it is inspected")
    if follow and end is not None:
        raise typer.BadParameter("--follow goes on; --end ends: one of them")


def _range(listed: str | None, count: int, start: int, end: int | None, follow: bool) -> Range:
    from pipeline.errors import Invalid
    from pipeline.worker.inspect import Range

    numbers = parse_partitions(listed)
    for number in numbers or ():
        if number >= count:
            raise Invalid(f"there is no partition {number}, of {count}")
    return Range([*range(count)] if numbers is None else numbers, start, end, follow)
