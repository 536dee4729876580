"""The command `pipeline publish`: its options; what it does is in `publish`, which is imported when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import DEFAULT_URL, Json, Set, To, load

View = Annotated[str, typer.Argument(metavar="VIEW", help="Name of the view.")]
Source = Annotated[str, typer.Argument(metavar="FILE|-", help="A file, or - for standard input.")]
Kind = Annotated[str, typer.Option(metavar="KIND", help="sum, min, max, mean, last, histogram, distinct or topk.")]
Value = Annotated[str | None, typer.Option(metavar="COLUMN", help="Where the value is. Without it a sum counts lines.")]
Labels = Annotated[str, typer.Option(metavar="A,B", help="Columns that are labels; label=column where the names differ.")]
Ts = Annotated[str | None, typer.Option(metavar="COLUMN", help="For kind last or windows: when; a number, or RFC 3339.")]
TsUnit = Annotated[str | None, typer.Option(metavar="UNIT", help="Of --ts: s, ms, us or ns since 1970. Default: ms.")]
Windows = Annotated[int | None, typer.Option(metavar="N", min=0, help="Length of the view's windows in seconds; 0: none.")]
Retention = Annotated[
    int | None, typer.Option(metavar="N", min=0, help="Seconds for which windows, or silent series, are kept; 0: for ever.")
]
Spread = Annotated[
    int | None, typer.Option(metavar="N", help="Partitions over which each series is spread. Default: setting spread.")
]
Format = Annotated[
    str | None, typer.Option("--format", metavar="csv|ndjson", help="Default: by the name's ending, else csv.")
]
Delimiter = Annotated[
    str | None, typer.Option(metavar="CHAR", help="Between the cells of a CSV: one character, or tab. Default: a comma.")
]
Encoding = Annotated[
    str | None, typer.Option(metavar="NAME", help="Of the text, such as latin-1. Default: its byte order mark's, or UTF-8.")
]
Monotone = Annotated[
    bool, typer.Option("--monotone", help="A sum that never falls, a counter: a negative value is a bad line.")
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Report bad lines, leave them out, and go on.")]
StartLine = Annotated[int, typer.Option(metavar="N", min=1, help="Go on at this line of the input.")]
TimeoutMs = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="How long the server may be away. Setting close_timeout_ms.")
]


def publish_rows(
    view: View, source: Source, to: To = DEFAULT_URL, kind: Kind = "sum", value: Value = None, labels: Labels = "",
    ts: Ts = None, ts_unit: TsUnit = None, window_s: Windows = None, retention_s: Retention = None, spread: Spread = None,
    format_: Format = None, delimiter: Delimiter = None, encoding: Encoding = None, monotone: Monotone = False,
    skip_bad: SkipBad = False, start_line: StartLine = 1, timeout_ms: TimeoutMs = None, set_: Set = None, json: Json = False,
) -> None:  # fmt: skip
    """Publish a CSV or NDJSON file, or a pipe, as deltas.

    \b
        pipeline publish revenue --value amount --labels region,product sales.csv
        pipeline publish logins --labels country=Land --format ndjson - < events.log
        pipeline publish price --kind last --value price --ts at --labels symbol quotes.csv
        pipeline publish visits --window-s 60 --retention-s 2592000 --ts at --ts-unit s --labels page visits.csv.gz
        pipeline publish sales --value Betrag --labels Land --delimiter ';' --encoding cp1252 sales.csv

    Input that is packed with gzip or zstd is unpacked. Lines end with LF, CR LF or CR. Each row is one delta. A CSV begins
    with a header line. Ints are exact at any size; other numbers are floats. For kind last, a CSV cell that is a JSON
    number, true, false, null or quoted text is that, and anything else is text. With --window-s each row is in the window
    of its time, that of --ts, or now. Rows whose windows have expired become dead letters. Without --window-s or
    --retention-s they are as the server knows the view.

    A bad line ends the run (exit code 1). Of a file nothing is published then: all of it is checked before the first row
    is sent. A pipe can't be read twice: its rows go as they come, so those before the bad line are published, and the
    run says which. With --skip-bad either goes on; bad lines are reported, the first 20 with their numbers.

    Ends when everything is acknowledged, and prints the token for `pipeline get --after`. Ctrl-C publishes what was read
    and says up to which line; --start-line goes on from there. Publishing a line twice counts it twice.
    """
    from pipeline.cli.publish import make_request, run_publish, with_timeout

    request = make_request(
        view=view,
        url=to,
        kind=kind,
        value=value,
        labels=labels,
        ts=ts,
        format_=format_,
        source=source,
        skip_bad=skip_bad,
        start_line=start_line,
        as_json=json,
        monotone=monotone,
        window_s=window_s,
        retention_s=retention_s,
        spread=spread,
        delimiter=delimiter,
        encoding=encoding,
        ts_unit=ts_unit,
    )
    config = load(set_)
    raise SystemExit(run_publish(request, with_timeout(config.publisher, timeout_ms), config.kafka, config.client))
