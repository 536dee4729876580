"""The commands of `pipeline`. Each imports what it needs when it runs, so that `--help` is quick."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Annotated

import typer

from pipeline.cli.dashboards import dashboards
from pipeline.cli.dead_letters import dead_letters
from pipeline.cli.docs import docs
from pipeline.cli.get import get
from pipeline.cli.ingest import ingest
from pipeline.cli.inspect import inspect
from pipeline.cli.options import (
    DEFAULT_URL,
    AcceptLoss,
    Agents,
    Data,
    FromKafka,
    Host,
    Insecure,
    Json,
    LogJson,
    LogLevel,
    Name,
    Port,
    Processes,
    Set,
    Standbys,
    Static,
    StatusFrom,
    TlsCert,
    TlsClientCa,
    TlsKey,
    Version,
    check_group,
    listening,
    load,
    parse_partitions,
)
from pipeline.cli.publish_options import publish_rows
from pipeline.cli.spool import spool
from pipeline.cli.tokens import tokens
from pipeline.cli.topics import topics
from pipeline.cli.views import views
from pipeline.cli.watch import watch
from pipeline.errors import Exit, Invalid, PipelineError

app = typer.Typer(
    name="pipeline",
    epilog="Exit codes: 0 fine, 1 failed, 2 the call or a setting is wrong, 3 start it again, 4 a person must decide first.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def main(_: Version = False) -> None:
    """Count things in production: publish deltas, fold them exactly once, read merged views.

    \b
        pipeline demo                see it work, on this machine's own numbers
        pipeline up --data ./data    run log, worker and query API; then, elsewhere:
        printf 'path,ms\\n/,12\\n' | pipeline publish requests --value ms --labels path -
        pipeline get requests --by path
    """


@app.command()
def up(
    data: Data = None,
    port: Port = None,
    host: Host = None,
    insecure: Insecure = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    partitions: Annotated[
        int | None, typer.Option(metavar="N", help="Partitions of a new log; fixed once it exists.")
    ] = None,
    fsync: Annotated[bool | None, typer.Option("--fsync", help="Acknowledge only what survives power loss.")] = None,
    accept_loss: AcceptLoss = None,
    set_: Set = None,
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
    json: Json = False,
) -> None:
    """Run log, worker and query API in one process.

    \b
        pipeline up --data ./data --port 8080
        pipeline up --data ./data --fsync --set commit_interval_ms=20

    There is no broker: everything is in one directory, which one process has at a time. Publish to the URL it prints, read
    from it, open it in a browser (/docs). Ctrl-C or SIGTERM commits and stops; kill -9 loses nothing that was acknowledged.
    Settings come from pipeline.toml (or the file that PIPELINE_CONFIG names), then PIPELINE_* variables, then flags. Exit
    code 3 means that a commit failed: start it again. Exit code 4 means that something is lost, or the disk is full.
    """
    from pipeline.cli import console

    console.configure_logging(log_level, as_json=log_json)
    from pipeline.cli.services import run_up

    flags = listening(port, host, insecure, tls_cert, tls_key, tls_client_ca)
    config = load(set_, data=data, partitions=partitions, fsync=fsync, accept_loss=accept_loss, **flags)
    raise SystemExit(run_up(config, as_json=json))


@app.command()
def worker(
    from_: FromKafka,
    data: Data = None,
    partitions: Annotated[
        str | None, typer.Option(metavar="LIST", help="Which partitions, such as 0,2,5-7. Default: all, new ones too.")
    ] = None,
    name: Name = None,
    standbys: Standbys = None,
    static: Static = True,
    agents: Agents = "",
    processes: Processes = None,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True, help="Be a child of --processes.")] = False,
    port: Port = None,
    host: Host = None,
    insecure: Insecure = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    accept_loss: AcceptLoss = None,
    set_: Set = None,
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
    json: Json = False,
) -> None:
    """Fold deltas from Kafka into stores, exactly once.

    \b
        pipeline topics apply --to kafka://127.0.0.1:9092
        pipeline worker --from kafka://127.0.0.1:9092 --data ./w1 --port 8081
        pipeline worker --from kafka://127.0.0.1:9092 --data ./w1 --port 8081 --name w1
        pipeline worker --from kafka://127.0.0.1:9092 --data ./w2 --port 8082 --name w2
        pipeline worker --from kafka://127.0.0.1:9092 --data ./w --port 8083 --processes 2
        pipeline worker --from kafka://127.0.0.1:9092 --data ./w3 --port 8085 --name w3 -A shop:app

    With --name, start as many as wanted, on any host: they share the partitions, and keep copies of each other's warm. When
    one ends, in order or by kill -9, others go on with its partitions; when one comes, it is given its share. Without it,
    each partition must be folded by one worker. A worker that is started later for it, or with a name that is taken, fences
    the earlier one, which ends with exit code 3.

    -A runs agents of your own in the worker: MODULE, found from the current directory, has APP, a pipeline.faust_app().

    Stores are restored from the changelog; delete --data and they are built again. The port answers /metrics, /healthz,
    /readyz and /v1/status; views are read from `pipeline serve`. Ctrl-C or SIGTERM commits and stops; kill -9 is safe at any
    time. Exit code 3 means fenced, stalled, or a commit that failed: start it again. With --processes that is done here: a
    worker that fails is started again, after 0.5 s, then twice that, up to 30 s; not after 4, which a person must look into.
    """
    from pipeline.cli import console

    check_group(name, processes=processes, agents=agents, standbys=standbys, static=static)
    if supervised:
        from pipeline.roles.supervisor import die_with_parent

        die_with_parent()

    console.configure_logging(log_level, as_json=log_json)
    flags = listening(port, host, insecure, tls_cert, tls_key, tls_client_ca)
    config = load(set_, data=data, accept_loss=accept_loss, standby_count=standbys, **flags)
    if processes and not supervised:
        from pipeline.cli.processes import run_processes

        if partitions is not None:
            raise typer.BadParameter("--processes: they share all partitions; leave out --partitions")
        raise SystemExit(run_processes(processes, config, name=name, as_json=json))
    from pipeline.cli.services import run_worker

    listed = parse_partitions(partitions)
    raise SystemExit(run_worker(config, from_, partitions=listed, name=name, static=static, agents=agents, as_json=json))


@app.command()
def serve(
    from_: Annotated[
        str | None, typer.Option("--from", metavar="URL", help="The broker: kafka://host:port[,host:port...][/app].")
    ] = None,
    gather: Annotated[
        str | None, typer.Option(metavar="URL,...", help="Merge what the servers at these URLs have, with no data here.")
    ] = None,
    data: Data = None,
    ingest: Annotated[
        bool, typer.Option("--ingest", help="Be a gateway too: POST /v1/deltas and /v1/batches go to Kafka.")
    ] = False,
    partitions: Annotated[
        str | None, typer.Option(metavar="LIST", help="Follow only these partitions, such as 0,2,5-7. Default: all.")
    ] = None,
    port: Port = None,
    host: Host = None,
    insecure: Insecure = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    accept_loss: AcceptLoss = None,
    set_: Set = None,
    log_level: LogLevel = "warning",
    log_json: LogJson = False,
    json: Json = False,
) -> None:
    """Answer reads from a copy of the state on Kafka.

    \b
        pipeline serve --from kafka://127.0.0.1:9092 --data ./s1 --port 8080
        pipeline serve --from kafka://127.0.0.1:9092 --data ./s2 --port 8082 --ingest
        pipeline serve --gather http://10.0.0.1:8080,http://10.0.0.2:8080 --port 8080

    Its stores follow the changelog. As many servers as wanted, each with its own --data; reads never touch workers. While
    the broker is away it goes on answering, and says how stale the answers are. With --ingest a request is answered when
    the broker has what it brought. With --partitions it keeps only a part of the state; its answers are of that part, and
    name the partitions that they lack. With --gather it merges servers, of parts or of all: each partition is read from one
    that answers. If none has a partition, a read fails with 503, or with allow_partial=true names what is missing.
    """
    from pipeline.cli import console

    console.configure_logging(log_level, as_json=log_json)
    from pipeline.cli.services import run_gather, run_serve

    flags = listening(port, host, insecure, tls_cert, tls_key, tls_client_ca)
    if gather is not None:
        if from_ is not None or partitions is not None or ingest or data is not None or accept_loss:
            raise typer.BadParameter("--gather: the servers have the data; leave out --from, --data, --ingest and the like")
        urls = [url.strip() for url in gather.split(",") if url.strip()]
        raise SystemExit(run_gather(load(set_, **flags), urls, as_json=json))
    if from_ is None:
        raise typer.BadParameter("--from kafka://host:port, or --gather URL,... is needed")
    config = load(set_, data=data, accept_loss=accept_loss, **flags)
    listed = parse_partitions(partitions)
    raise SystemExit(run_serve(config, from_, ingest=ingest, partitions=listed, as_json=json))


app.command("publish")(publish_rows)


@app.command()
def status(url: StatusFrom = DEFAULT_URL, set_: Set = None, json: Json = False) -> None:
    """Show lag, staleness and restore of each partition.

    \b
        pipeline status --from http://127.0.0.1:8080
        pipeline status --from kafka://127.0.0.1:9092

    With the URL of a process, its status. With that of a broker, all workers with a --name: their partitions, active and
    standby, and how far each is. A member that does not answer within 2 s is shown as unreachable, with what is known
    without it. Exit code 1 if no member answers, there is none, or no broker answers within 5 s.
    """
    from pipeline.cli import console
    from pipeline.cli.status import run_overview, run_status

    console.configure_logging(console.QUIET)
    if url.startswith("kafka://"):
        config = load(set_)
        raise SystemExit(run_overview(url, config.kafka, config.client, as_json=json))
    raise SystemExit(run_status(url, as_json=json))


@app.command()
def demo(
    for_: Annotated[
        str | None, typer.Option("--for", metavar="TIME", help="How long, such as 20s or 2m. Not given: until Ctrl-C.")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="DIR", help="A new folder for the state, which is kept.")
    ] = None,
    port: Port = None,
    set_: Set = None,
    log_level: LogLevel = "warning",
    json: Json = False,
) -> None:
    """Try it on this machine's own numbers.

    \b
        pipeline demo --for 20s

    Records what this machine is doing, shows it live, and compares every answer with an independent count. Starts a server
    for the time of the run, on port 8080 or, if that is taken, a free one. Exit code 1 means that an answer was wrong.
    Where no terminal is, it runs for 20 s.
    """
    from pipeline.cli import console

    console.configure_logging(log_level)
    from pipeline.cli.demo import parse_duration_s, run_demo

    seconds = None if for_ is None else parse_duration_s(for_)
    raise SystemExit(run_demo(load(set_, port=port), data=data, port=port, seconds=seconds, as_json=json))


@app.command()
def verify(
    data: Data = None,
    from_: Annotated[
        str | None,
        typer.Option("--from", metavar="URL", help="Where the changelog is, if not in DIR: kafka://host:port[/app]."),
    ] = None,
    limit: Annotated[int, typer.Option(min=0, metavar="N", help="Differences that are listed for each partition.")] = 20,
    set_: Set = None,
    json: Json = False,
) -> None:
    """Compare every store with its changelog.

    \b
        pipeline verify --data ./data
        pipeline verify --data ./w1 --from kafka://127.0.0.1:9092

    Changes nothing, and needs free disk for one store. For when nothing runs on the directory. A store that is behind after
    kill -9 is no difference: the next start brings it up to date. Exit code 1 means that there are differences.
    """
    from pipeline.cli import console

    console.configure_logging("warning")
    from pipeline.cli.verify import run_verify

    raise SystemExit(run_verify(load(set_, data=data), url=from_, as_json=json, limit=limit))


@app.command()
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which benchmarks; without any, all.")
    ] = None,
    kafka: Annotated[
        bool, typer.Option("--kafka", help="Those on Kafka instead: a broker is started (Java and Maven are needed).")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="A small size: only to see that they run.")] = False,
    plots: Annotated[str | None, typer.Option("--plots", metavar="FOLDER", help="Draw the publisher's as SVG.")] = None,
    json: Json = False,
) -> None:
    """Measure speed and memory against their targets here.

    \b
        pipeline bench
        pipeline bench publisher fold-unique
        pipeline bench --kafka

    For a checkout. Each line has a baseline that was measured in the same run: on a busy machine, trust the ratios. Takes
    some minutes. Exit code 1 means that a target was not met.
    """
    from pipeline.cli.bench import run_bench

    raise SystemExit(run_bench(names or [], kafka=kafka, quick=quick, plots=plots, as_json=json))


app.command()(docs)
app.command()(get)
app.command()(watch)
app.add_typer(ingest, name="ingest", help="Take in what other programs send: StatsD.")
app.add_typer(views, name="views", help="List, drop or reset views.")
app.add_typer(inspect, name="inspect", help="Print what is in the log or a store, record by record.")
app.add_typer(topics, name="topics", help="Compare or set up the topics on a Kafka broker.")
app.add_typer(dead_letters, name="dead-letters", help="List, show or replay what was refused when it was folded.")
app.add_typer(dashboards, name="dashboards", help="Write dashboards for Grafana, and alerts for Prometheus.")
app.add_typer(tokens, name="tokens", help="Add, list or revoke the access tokens of servers.")
app.add_typer(spool, name="spool", help="Show what publishers left on disk, or send it.")


def _not_utf8() -> str | None:
    """Return the first argument of the command line whose bytes are no UTF-8."""
    return next((it for it in sys.argv[1:] if not it.isascii() and any("\ud800" <= c <= "\udfff" for c in it)), None)


def _show_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the traceback of an error that nobody expected, without the control characters of its text."""
    import traceback

    from pipeline.printable import printable_lines

    text = "".join(traceback.format_exception(kind, error, trace))
    sys.stderr.write(f"{printable_lines(text.rstrip())}\n")


def run() -> None:
    """Run the command of this process' arguments."""
    sys.excepthook = _show_traceback
    try:
        app(prog_name="pipeline")
    except UnicodeError:
        wrong = _not_utf8()  # names of files may be, but no other argument
        if wrong is None:
            raise
        from pipeline.cli import console

        raise SystemExit(console.explain(Invalid(f"an argument that is not UTF-8: {wrong!r:.200}"))) from None
    except PipelineError as error:
        from pipeline.cli import console

        raise SystemExit(console.wait_if_restart_is_useless(console.explain(error))) from None
    except SystemExit as error:
        if error.code == Exit.USAGE and error.__context__ is not None:  # raised by the parser, which has printed the error
            from pipeline.cli import console

            console.wait_if_restart_is_useless(Exit.USAGE)
        raise
