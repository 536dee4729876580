"""Faults, each injected into a running pipeline that a real Prometheus scrapes: its alert fires, and no other.

The rules are those of dashboards/ with all durations shortened by one factor. All faults are there at once, in apps or
partitions of their own, so that they share one Prometheus, one server and the time that alerts take to fire.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from confluent_kafka import KafkaException, Producer, TopicPartition

from pipeline import BufferFull, PipelineError, Publisher
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Definition, Group, series_suffix
from tests.broker.kafka import App, Port, admin_client, create_topics, delete_topics, new_app
from tests.broker.test_dashboards import Exposed
from tests.prometheus import Prometheus, program
from tests.support import ROOT, UpProcess, wait_until

RULES = ROOT / "dashboards" / "rules.yml"
FACTOR = 30
"""Divisor of all durations of the rules: 5 minutes are 10 s here. Bounds on numbers stay, 60 s of staleness among them."""
UNITS_MS = {"m": 60_000, "h": 3_600_000, "d": 86_400_000}
STALE, SHRINKING, REFUSED, FENCED, STUCK = range(5)
"""Partitions of the app on Kafka: each has one fault."""
DISK_BYTES = 64 * 2**20
Fired = set[tuple[str, str]]


def shortened() -> Any:
    """Return the rules with durations divided by `FACTOR`."""

    def short(match: re.Match[str]) -> str:
        return f"{int(match[1]) * UNITS_MS[match[2]] // FACTOR}ms"

    rules = yaml.safe_load(RULES.read_text())
    for rule in (rule for group in rules["groups"] for rule in group["rules"]):
        rule["expr"] = re.sub(r"(?<=\[)(\d+)([mhd])(?=\])", short, rule["expr"])
        if "for" in rule:
            rule["for"] = re.sub(r"(\d+)([mhd])", short, rule["for"])
    return rules


def send(app: App, topic: str, partition: int, *values: bytes) -> None:
    """Append records."""
    producer = Producer({"bootstrap.servers": app.bootstrap, "log_level": 0})
    for value in values:
        producer.produce(app.topic(topic), value, partition=partition)
    assert producer.flush(30) == 0


def transaction(app: App, transactional_id: str) -> Producer:
    """Return a new owner of a transactional id; the one before is fenced by then."""
    made = Producer({"bootstrap.servers": app.bootstrap, "transactional.id": transactional_id, "log_level": 0})
    made.init_transactions(30)
    return made


def fence(app: App, worker: UpProcess, sequence: int) -> None:
    """Take a partition from its worker, which ends with code 3, and start that again, as a supervisor does."""
    other = transaction(app, f"{app.app}-{FENCED}")
    group = Group(Definition("v", "sum"), [series_suffix(())], [1])
    send(app, "deltas", FENCED, encode_batch(Batch("p", 0, FENCED, sequence, 0, 1_000, [group])))
    assert worker.program.wait(30) == 3, worker.program.stderr()
    del other
    worker.start()


class World:
    """Processes without a fault so far, and their Prometheus."""

    def __init__(self, app: App, folder: Path, stack: ExitStack, disk: Path | None) -> None:
        self.app, self.disk = app, disk
        worker = ("worker", "--from", app.url)
        self.roles = {
            "server": UpProcess(folder / "server", command=("serve", "--from", app.url)),
            "stopped": UpProcess(folder / "stopped", "--partitions", str(REFUSED), command=worker),
            "fenced": UpProcess(folder / "fenced", "--partitions", str(FENCED), command=worker),
            "up": UpProcess((disk or folder) / "up"),
        }
        port = Port()
        stack.callback(port.close)
        self.stuck = UpProcess(folder / "stuck", "--partitions", str(STUCK), command=worker, port=port.number)
        for role in (*self.roles.values(), self.stuck):
            stack.callback(role.kill)
            role.start(wait_ready=False)
        for role in self.roles.values():
            role.wait_ready()
        self.dropping, self.filling = Exposed(), Exposed()
        for exposed in (self.dropping, self.filling):
            stack.callback(exposed.close)
        self.prometheus = Prometheus(folder, self._config(folder))
        stack.callback(self.prometheus.close)

    def _config(self, folder: Path) -> Any:
        rules = folder / "rules.yml"
        rules.write_text(yaml.safe_dump(shortened()))
        targets = {name: role.url.removeprefix("http://") for name, role in {**self.roles, "stuck": self.stuck}.items()}
        exposed = {"dropping": self.dropping, "filling": self.filling}
        targets |= {name: f"127.0.0.1:{it.server_port}" for name, it in exposed.items()}
        jobs = [{"targets": [address], "labels": {"app": name}} for name, address in targets.items()]
        return {
            "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
            "rule_files": [str(rules)],
            "scrape_configs": [{"job_name": "all", "static_configs": jobs}],
        }

    def fired(self) -> Fired:
        """Return each alert that fires or has fired, with the app and the partition where it did."""
        found = self.prometheus.vector('max_over_time(ALERTS{alertstate="firing"}[10m])')
        labels = [dict(it) for it in found]
        return {(it["alertname"], it["app"] + it.get("partition", "")) for it in labels}


@pytest.fixture
def disk() -> Iterator[Path | None]:
    """A small file system; None where none can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def world(kafka: str, disk: Path | None, tmp_path: Path) -> Iterator[World]:
    """Run everything, with two faults that must be there before: a partition nobody folds, and a restore that can't end."""
    program("prometheus")
    app = new_app(kafka)
    create_topics(kafka, app.app, 5)
    with ExitStack() as stack:
        stack.callback(delete_topics, kafka, app.app)
        send(app, "deltas", STALE, b"nobody folds this")
        hanging = transaction(app, "foreign")
        hanging.begin_transaction()
        hanging.produce(app.topic("changelog"), b"value", b"key", partition=STUCK)
        hanging.flush(30)
        stack.callback(end, hanging)
        yield World(app, tmp_path, stack, disk)


def end(hanging: Producer) -> None:
    """Abort a transaction, unless the broker has done so meanwhile."""
    with suppress(KafkaException):
        hanging.abort_transaction(30)


def shrink(app: App) -> None:
    """Let retention delete more than half of a partition that nobody folds."""
    send(app, "deltas", SHRINKING, *[b"nobody folds this"] * 20)
    admin = admin_client(app.bootstrap)
    for gone in admin.delete_records([TopicPartition(app.topic("deltas"), SHRINKING, 12)]).values():
        gone.result(30)


def drop(world: World) -> None:
    """Record more than fits."""
    with Publisher(
        world.roles["up"].url, buffer_bytes_max=65_536, on_full="drop_newest", metrics=world.dropping.metrics
    ) as publisher:
        wait_until(lambda: world.prometheus.vector('pipeline_publisher_dropped_total{app="dropping"}'), "counters at 0")
        many = publisher.max("many", labels=("n",))
        for series in range(3_000):
            many.labels(str(series)).observe(1)


def fill_spool(world: World, folder: Path, port: Port) -> Publisher:
    """Record into a spool, while the log is away, until little room is left."""
    publisher = Publisher(
        f"http://127.0.0.1:{port.number}",
        durability="process",
        spool_dir=str(folder),
        spool_bytes_max=5_000_000,
        flush_interval_ms=20,
        metrics=world.filling.metrics,
    )
    view, spool = publisher.sum("v", labels=("n",)), world.filling.metrics.registry
    with suppress(BufferFull):  # on a busy machine the metric, which is as of the last flush, comes too late
        for number in itertools.count():
            view.add(1, n=f"{number:01000}")
            if number % 50 == 0:
                time.sleep(0.05)
                if (spool.get_sample_value("pipeline_publisher_spool_bytes") or 0) > 2_700_000:
                    break
    return publisher


@pytest.mark.long
@pytest.mark.timeout(300)
def test_each_fault_has_its_alert_and_no_other(world: World, tmp_path: Path) -> None:
    """A fault fires its alert where it is, and nothing fires elsewhere."""
    wait_until(world.prometheus.healthy, "a first scrape of everything")
    app, port = world.app, Port()
    publisher = fill_spool(world, tmp_path / "spool", port)
    try:
        shrink(app)
        send(app, "deltas", REFUSED, b"\xff no batch")
        drop(world)
        if world.disk is not None:
            (world.disk / "filler").write_bytes(bytes(DISK_BYTES - used(world.disk) - DISK_BYTES // 20))
        for sequence in range(12):  # three starts, and more where they take long
            fence(app, world.roles["fenced"], sequence)
            if ("PipelineRestartLoop", "fenced") in world.fired():
                break
        refused = ("PipelineDeadLetters", f"stopped{REFUSED}")
        wait_until(lambda: refused in world.fired(), f"{refused}")
        world.roles["stopped"].kill()
        expected = {
            refused,
            ("PipelineStale", f"server{STALE}"),
            ("PipelineRetentionMargin", f"server{SHRINKING}"),
            ("PipelineRestoreStuck", f"stuck{STUCK}"),
            ("PipelineRestartLoop", "fenced"),
            ("PipelineProcessDown", "stopped"),
            ("PipelinePublisherDropping", "dropping"),
            ("PipelineSpoolFilling", "filling"),
            *([] if world.disk is None else [("PipelineDiskFilling", "up")]),
        }
        wait_until(lambda: expected <= world.fired(), "all alerts", 90, seen=lambda: f"missing: {expected - world.fired()}")
        # On a busy machine a minute has passed by now, and a partition that nobody folds is stale at last.
        assert world.fired() - {("PipelineStale", f"server{SHRINKING}")} == expected
        for alert in world.prometheus.api("alerts")["alerts"]:
            assert not re.search("error|%!", " ".join(alert["annotations"].values())), alert
    finally:
        with suppress(PipelineError):
            publisher.close(timeout_s=0)
        port.close()


def used(folder: Path) -> int:
    """Return the bytes of a file system that are in use."""
    done = subprocess.run(["df", "-B1", "--output=used", str(folder)], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])
