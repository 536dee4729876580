"""`pipeline ingest statsd`: runs the StatsD gateway, with a status line and a report at the end."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
from rich.progress import Progress, TextColumn

from pipeline.adapters.clock import SystemClock
from pipeline.cli import console
from pipeline.config import Config
from pipeline.core.statsd import prometheus_name
from pipeline.errors import Invalid
from pipeline.roles.signals import Stop, stopping_on_signals
from pipeline.roles.statsd import StatsdGateway

_SHOW_S = 0.2


class Ready(msgspec.Struct):
    """The first line of `--json`."""

    host: str
    port: int
    to: str
    receive_buffer_bytes: int
    metrics_url: str | None = None


class Report(msgspec.Struct):
    """The last line of `--json`."""

    complete: bool
    """True if everything that was recorded is acknowledged."""
    lines: int
    """Lines that arrived, with those that were left out."""
    left_out: dict[str, int]
    """Lines that were left out, by reason."""
    deltas: int
    entries: int
    batches: int
    token: str
    seconds: float
    error: str | None = None


def parse_labels(pairs: Sequence[str]) -> dict[str, list[str]]:
    """Return the labels of metrics from `NAME=A,B`, names and tags made Prometheus names."""
    labels: dict[str, list[str]] = {}
    for pair in pairs:
        source, equals, tags = pair.partition("=")
        name = prometheus_name(source.strip())
        found = [prometheus_name(tag.strip()) for tag in tags.split(",") if tag.strip()]
        if not equals or name is None or None in found:
            raise Invalid(f"--labels {pair:.100}: NAME=TAG,TAG is needed")
        if name in labels:
            raise Invalid(f"--labels {pair:.100}: the labels of {name} were given before")
        labels[name] = sorted({tag for tag in found if tag is not None})
    return labels


def run_statsd(
    config: Config, url: str, host: str, port: int, *, labels: Sequence[str], metrics_port: int | None, as_json: bool
) -> int:
    """Receive until SIGINT or SIGTERM, publish the rest, print a report; return the exit code."""
    parsed = parse_labels(labels)
    clock = SystemClock()
    with stopping_on_signals() as stop:
        started_s = clock.monotonic_s()
        gateway = StatsdGateway(config, url, host, port, labels=parsed, metrics_port=metrics_port, warn=console.note)
        try:
            _announce(gateway, url, as_json=as_json)
            gateway.start()
            _show_until(stop, gateway, clock)
            failure, token = gateway.stop()
            return _report(gateway, failure, token, round(clock.monotonic_s() - started_s, 3), as_json=as_json)
        finally:
            gateway.close()


def _announce(gateway: StatsdGateway, url: str, *, as_json: bool) -> None:
    host, port = gateway.address
    if as_json:
        console.print_json(Ready(host, port, url, gateway.receive_buffer_bytes, gateway.metrics_url))
        return
    shown = f"[{host}]" if ":" in host else host
    more = f", metrics at {gateway.metrics_url}/metrics" if gateway.metrics_url else ""
    console.show(f"StatsD on {shown}:{port}, UDP and TCP, to {url}{more}  (Ctrl-C stops)")


def _show_until(stop: Stop, gateway: StatsdGateway, clock: SystemClock) -> None:
    """Show the rate until a signal comes or receiving fails."""
    progress = Progress(
        TextColumn("{task.fields[lines]:,} lines, {task.fields[rate]:,.0f}/s, {task.fields[left_out]:,} left out"),
        console=console.err,
        disable=not console.err.is_terminal,
        transient=True,
    )
    with progress:
        task = progress.add_task("", lines=0, rate=0.0, left_out=0)
        lines, at_s = 0, clock.monotonic_s()
        while not stop.wait(_SHOW_S) and not gateway.failed:
            now_s, count = clock.monotonic_s(), gateway.sink.line_count
            rate = (count - lines) / max(now_s - at_s, 0.001)
            lines, at_s = count, now_s
            progress.update(task, lines=count, rate=rate, left_out=gateway.sink.refused.total())


def _report(gateway: StatsdGateway, failure: str | None, token: str, seconds: float, *, as_json: bool) -> int:
    stats, sink = gateway.publisher.stats(), gateway.sink
    deltas, entries, batches = stats["deltas"], stats["entries"], stats["batches"]
    if failure is not None:
        console.print_error(failure)
    if as_json:
        left_out = dict(sorted(sink.refused.items()))
        report = Report(failure is None, sink.line_count, left_out, deltas, entries, batches, token, seconds, failure)
        console.print_json(report)
    else:
        merged = f"{deltas:,} deltas in {entries:,} entries of {batches:,} batches"
        console.show(f"{sink.line_count:,} lines, {merged}, {seconds:.1f} s")
        if sink.refused:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in sink.refused.most_common())
            console.show(f"left out {sink.refused.total():,}: {reasons}")
        if token:
            console.show(f"token {token}")
    return console.OK if failure is None else console.FAILED
