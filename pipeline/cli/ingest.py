"""The commands of `pipeline ingest`; what they do is in a module of its own, which is imported when one runs."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import DEFAULT_URL, Insecure, Json, LogJson, LogLevel, Set, To, load

ingest = typer.Typer(no_args_is_help=True, rich_markup_mode=None)


@ingest.callback()
def main() -> None:
    """Take in what other programs send, and publish it as deltas."""


@ingest.command("statsd")
def ingest_statsd(
    to: To = DEFAULT_URL,
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65_535, help="Port for UDP and TCP; 0 picks a free one.")
    ] = 8125,
    host: Annotated[str, typer.Option(metavar="ADDRESS", help="Address to listen on.")] = "127.0.0.1",
    insecure: Insecure = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=A,B", help="The tags of a metric, for its view; else those of its first line. Repeatable."
        ),
    ] = None,
    dialect: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Gauges of -5 and +5 are steps (statsd) or values (dogstatsd). Default: auto."),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, max=65_535, help="Serve /metrics, /healthz, /readyz and /v1/status here too."),
    ] = None,
    set_: Set = None,
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
    json: Json = False,
) -> None:
    """Take StatsD lines from UDP and TCP, with DogStatsD's tags.

    \b
        pipeline ingest statsd --port 8125 --to http://127.0.0.1:8080
        echo 'checkout.orders:1|c|@0.1|#region:eu' > /dev/udp/127.0.0.1/8125
        pipeline ingest statsd --labels checkout.orders=region,plan --metrics-port 9125
        pipeline ingest statsd --dialect dogstatsd --set ingest_timers=histogram --set ingest_sets=distinct

    A name becomes a view, its dots and dashes underscores: a counter a sum, a gauge a last, a timer NAME_ms (mean),
    NAME_ms_max and NAME_ms_count, a histogram the same without _ms, a set a sum with a label `member` for each member. With
    the settings above a timer or histogram becomes one histogram, and a set a distinct. Tags are labels. A view's labels are
    those that the server knows (--to http://...), that --labels says, or the tags of the first line: a line that lacks one
    has it empty, and one that has another is left out.

    What can't be recorded is left out and counted by reason; a log line a minute has an example of each. While the
    server is away deltas merge in memory, up to buffer_bytes_max. Ctrl-C or SIGTERM publishes what has arrived, and says
    how many lines that were. Exit code 1 means that not all of it was acknowledged.
    """
    from pipeline.cli import console

    console.configure_logging(log_level, as_json=log_json)
    from pipeline.cli.statsd import run_statsd

    config = load(set_, ingest_dialect=dialect, insecure=insecure)
    raise SystemExit(run_statsd(config, to, host, port, labels=labels or [], metrics_port=metrics_port, as_json=json))
