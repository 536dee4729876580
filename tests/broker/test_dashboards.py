"""Every panel of every dashboard, run by a real Prometheus that scrapes a running pipeline."""

from __future__ import annotations

import itertools
import json
import re
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import pytest
import yaml
from confluent_kafka import Producer

from pipeline import Publisher, Reader
from pipeline.adapters.prometheus import PrometheusMetrics
from pipeline.metrics import CATALOGUE
from tests.broker.kafka import App, create_topics, delete_topics, new_app
from tests.prometheus import Prometheus, program
from tests.support import ROOT, UpProcess, everything, wait_until

FOLDER = ROOT / "dashboards"
CONFIG = FOLDER / "prometheus.yml"
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
OWN = [name for name in DASHBOARDS if name != "views"]
NOT_SHOWN = {
    "pipeline_access_tokens": "a number that only an operator changes; that the file can't be read is on Health",
    "pipeline_gather_server_up": "a gatherer that lacks a partition is not ready, which Health shows; this says why",
    "pipeline_otlp_streams": "the oldest make room; what that costs is among the lines that are left out, by reason",
    "pipeline_native_produce": "it changes with the installation only; what it costs is on the panel of commit times",
}
"""Metrics that are on no panel, and why."""
QUANTILES = ("Commit time, quantiles", "Time to acknowledge, quantiles")
RATE_INTERVAL = "10s"
COUNTER, GAUGES, HISTOGRAM = "orders_total", ("pace", "balance", "peak"), "took"
WINDOWED = "visits"
ODD = ('say "x"', "back\\slash", "two\nlines", "été", "")


class Target(NamedTuple):
    """One query of a panel."""

    dashboard: str
    panel: str
    ref: str
    expr: str
    instant: bool


def panels(dashboard: str) -> list[dict[str, Any]]:
    """Return the panels that show something."""
    return [panel for panel in DASHBOARDS[dashboard]["panels"] if panel["type"] != "row"]


def targets(dashboard: str) -> list[Target]:
    return [
        Target(dashboard, panel["title"], target["refId"], target["expr"], target["instant"])
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def replaced(addresses: Mapping[str, str]) -> Any:
    """Return dashboards/prometheus.yml with each target's address replaced."""
    config = yaml.safe_load(CONFIG.read_text())
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms"}
    config["rule_files"] = []
    for job in config["scrape_configs"]:
        for group in job["static_configs"]:
            wanted = [*group["targets"], *([] if group["targets"] else [job["job_name"]])]
            group["targets"] = [addresses[target] for target in wanted if target in addresses]
    for remote in config["remote_read"]:
        remote["url"] = remote["url"].replace("server:8080", addresses["server:8080"])
    return config


class Exposed(ThreadingHTTPServer):
    """The metrics of this process' publishers, as an app would expose them."""

    daemon_threads = True

    def __init__(self) -> None:
        self.metrics = metrics = PrometheusMetrics()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body, media_type = metrics.render(self.headers.get("Accept", ""))
                self.send_response(200)
                self.send_header("Content-Type", media_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                with suppress(ConnectionError):  # Prometheus has given up, or is gone
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join(30)
        self.server_close()


class Load(threading.Thread):
    """Records something for every panel, again and again, until it is closed."""

    def __init__(self, app: App, server: str, metrics: PrometheusMetrics) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._stopping = threading.Event()
        self._direct = Publisher(app.url, flush_interval_ms=20, metrics=metrics)
        self._gateway = Publisher(server, flush_interval_ms=20)
        self._full = Publisher(app.url, buffer_bytes_max=65_536, on_full="drop_newest", metrics=metrics)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for number in itertools.count():
                self._once(number)
                if self._stopping.wait(0.1):
                    return
        except BaseException as error:
            self.error = error

    def _once(self, number: int) -> None:
        orders = self._direct.sum(COUNTER, labels=("region", "product"), monotone=True)
        for region, odd in itertools.product("abcdefgh", ODD):
            orders.labels(region, odd).add(number + 0.5)
        self._direct.mean("pace", labels=("region",)).labels("a").observe(number % 7)
        self._direct.sum("balance").add(number)
        self._direct.sum(WINDOWED, labels=("region",), window_s=5).labels("a").add(number)
        self._direct.histogram("took").observe(0.001 * (1 + number % 50))
        self._direct.sum("hidden", labels=("__reserved",)).labels("x").add(1)
        for series in range(2000):
            self._full.max("many", labels=("n",)).labels(str(series)).observe(1)
        peak = self._gateway.max("peak", labels=("instance", "region"))
        for region, odd in itertools.product("abc", ODD):
            peak.labels(odd, region).observe(number * 2.0**60)
        post(f"{self._server}/v1/deltas", [{"view": "balance", "kind": "sum", "value": -1}])

    def close(self) -> None:
        """End, and wait until everything is acknowledged."""
        self._stopping.set()
        self.join(30)
        for publisher in (self._direct, self._gateway, self._full):
            publisher.close()
        assert self.error is None, self.error


def post(url: str, body: Any) -> None:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30):
        pass


def send_garbage(app: App) -> None:
    """Send one record that is no batch."""
    producer = Producer({"bootstrap.servers": app.bootstrap, "log_level": 0})
    producer.produce(app.topic("deltas"), b"\xff no batch", partition=1)
    assert producer.flush(30) == 0


class World(NamedTuple):
    """A pipeline that Prometheus scrapes."""

    prometheus: Prometheus
    server: str
    load: Load


@pytest.fixture(scope="module")
def world(kafka: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Run two workers, a query server, a publishing app, and Prometheus, which sees them all before the first delta."""
    program("prometheus")
    folder = tmp_path_factory.mktemp("dashboards")
    app = new_app(kafka)
    create_topics(kafka, app.app)
    with ExitStack() as stack:
        stack.callback(delete_topics, kafka, app.app)
        roles = {
            "worker-a": UpProcess(folder / "a", "--partitions", "0-1", command=("worker", "--from", app.url)),
            "worker-b": UpProcess(folder / "b", "--partitions", "2-3", command=("worker", "--from", app.url)),
            "server": UpProcess(folder / "s", "--ingest", command=("serve", "--from", app.url)),
            "up": UpProcess(folder / "up"),
        }
        for role in roles.values():
            stack.callback(role.kill)
            role.start(wait_ready=False)
        for role in roles.values():
            role.wait_ready()
        exposed = Exposed()
        stack.callback(exposed.close)
        addresses = {f"{name}:8080": role.url.removeprefix("http://") for name, role in roles.items()}
        addresses["127.0.0.1:8080"] = addresses["up:8080"]  # its default address
        addresses["pipeline-publishers"] = f"127.0.0.1:{exposed.server_port}"
        prometheus = Prometheus(folder, replaced(addresses))
        stack.callback(prometheus.close)
        wait_until(prometheus.healthy, "a first scrape of everything")
        load = Load(app, roles["server"].url, exposed.metrics)
        stack.callback(load.close)
        load.start()
        send_garbage(app)
        with Reader(roles["server"].url) as reader:
            wait_until(
                lambda: {COUNTER, *GAUGES, HISTOGRAM, "hidden", "many"} <= {view.name for view in reader.views()},
                "all views",
            )
            reader.get(COUNTER)
        yield World(prometheus, roles["server"].url, load)


def filled(template: str, values: Mapping[str, str]) -> str:
    """Return a template with its variables replaced, as Grafana would."""
    known = dict.fromkeys(("cluster", "app", "instance"), ".*")
    known |= {
        "job": "pipeline-views",
        "__rate_interval": RATE_INTERVAL,
        "limit": "500",
        "histogram": f"{HISTOGRAM}_bucket",
        **values,
    }
    return re.sub(r"\$(\w+)", lambda match: known[match[1]], template)


def variable(dashboard: str, name: str) -> dict[str, Any]:
    (found,) = (it for it in DASHBOARDS[dashboard]["templating"]["list"] if it["name"] == name)
    return dict(found)


def options(prometheus: Prometheus, name: str, values: Mapping[str, str], dashboard: str = "views") -> list[str]:
    """Return what Grafana would offer for a variable of a dashboard, given those before it."""
    asked = variable(dashboard, name)
    query = filled(asked["query"]["query"], values)
    if match := re.fullmatch(r"label_names\((.+)\)", query):
        found = prometheus.api("labels", match=f'{{__name__=~".*{match[1]}.*"}}')
    else:
        match = re.fullmatch(r"label_values\((.+), (\w+)\)", query)
        assert match, query
        found = prometheus.api(f"label/{match[2]}/values", match=match[1])
    return [it for it in sorted(found) if re.search(asked["regex"].strip("/"), it)]


def literal(value: str) -> str:
    """Return a regular expression for one value, as it stands between quotes in PromQL."""
    return json.dumps(re.escape(value), ensure_ascii=False)[1:-1]


@pytest.mark.parametrize("name", DASHBOARDS)
def test_json_is_what_the_source_makes(name: str) -> None:
    """The JSON is that of the typed builder: `python -m dashboards.source` writes it."""
    pytest.importorskip("grafana_foundation_sdk")
    from dashboards.source.__main__ import BUILDERS, rendered

    assert DASHBOARDS.keys() == BUILDERS.keys()
    assert (FOLDER / f"{name}.json").read_text() == rendered(name)


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboard_is_well_made(name: str) -> None:
    """Each panel says what it means and what to do, has a unit, a place of its own, and the data source of the variable."""
    dashboard = DASHBOARDS[name]
    assert (dashboard["uid"], dashboard["refresh"], dashboard["style"]) == (f"pipeline-{name}", "5s", "dark")
    variables = [it["name"] for it in dashboard["templating"]["list"]]
    assert variables[:4] == ["datasource", "cluster", "app", "instance"]
    assert [it["name"] for it in dashboard["annotations"]["list"]] == ["Restarts", "Rebalances"]
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        own = set(itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"])))
        assert not own & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= own
    for panel in panels(name):
        title = panel["title"]
        assert len(panel["description"]) > 40 or title in ("$view now", *QUANTILES), title
        assert panel["fieldConfig"]["defaults"]["unit"], title
        assert all(it["datasource"]["uid"] == "${datasource}" for it in (panel, *panel["targets"])), title


def test_links_lead_to_the_runbook() -> None:
    """A panel leads to each alert's entry in the runbook, and to no other."""
    rules = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    known = {rule["alert"]: rule["annotations"]["runbook_url"] for group in rules for rule in group["rules"]}
    links = {
        link["title"].removeprefix("Runbook: "): link["url"]
        for name in DASHBOARDS
        for panel in panels(name)
        for link in panel.get("links", ())
    }
    assert links == known


def test_names_are_known() -> None:
    """A query names metrics that the catalogue has, and no job."""
    known = {metric.name for metric in CATALOGUE} | {"pipeline_view_omitted", "pipeline_view_staleness_seconds"}
    for target in (it for name in DASHBOARDS for it in targets(name)):
        assert 'job="' not in target.expr
        assert {it.removesuffix("_bucket") for it in re.findall(r"\bpipeline_\w+", target.expr)} <= known, target.panel


def test_every_metric_is_shown() -> None:
    """Each metric of the catalogue is on some panel, or there is a reason why not."""
    shown = {
        it.removesuffix("_bucket")
        for name in DASHBOARDS
        for t in targets(name)
        for it in re.findall(r"\bpipeline_\w+", t.expr)
    }
    missing = {metric.name for metric in CATALOGUE} - shown
    assert missing == NOT_SHOWN.keys(), "give it a panel in dashboards/source, and run python -m dashboards.source"


@pytest.mark.parametrize(
    "target", [it for name in OWN for it in targets(name)], ids=lambda it: f"{it.dashboard}-{it.panel}-{it.ref}"
)
def test_panel_has_data(world: World, target: Target) -> None:
    """Every query of the dashboards of our own metrics answers with numbers."""
    wait_until(lambda: world.prometheus.numbers(filled(target.expr, {}), instant=target.instant), f"data: {target.expr}", 15)


@pytest.mark.parametrize("name", OWN)
def test_variables_and_annotations_are_answered(world: World, name: str) -> None:
    """Clusters, apps and instances are those of the scrape config; the queries of annotations are valid."""
    found = {it: options(world.prometheus, it, {}, name) for it in ("cluster", "app", "instance")}
    assert found["cluster"] == ["local"]
    assert found["app"] == ["pipeline", "up"]
    assert len(found["instance"]) == (5 if name == "publishers" else 4)
    for annotation in DASHBOARDS[name]["annotations"]["list"]:
        world.prometheus.vector(filled(annotation["expr"], {}))


def test_panels_tell_what_happened(world: World) -> None:
    """Panels show load in and out, one dead letter, all processes up, no restart and no store rebuilt."""
    by_title = {(name, panel["title"]): panel["targets"] for name in OWN for panel in panels(name)}

    def shown(name: str, title: str, index: int = 0) -> list[float]:
        target = by_title[name, title][index]
        return world.prometheus.numbers(filled(target["expr"], {}), instant=target["instant"])

    wait_until(lambda: 0.9 < sum(shown("health", "Dead letters, last hour")) < 1.9, "one dead letter, extrapolated")
    wait_until(
        lambda: shown("health", "Processes up") == [1.0], "all are up: on a busy machine one scrape can take too long"
    )
    should_be_0 = [
        ("health", title) for title in ("Restarts, last hour", "Reads refused, per second", "Unexpected errors, last hour")
    ]
    should_be_0 += [("worker", title) for title in ("Stores rebuilt, last hour", "Fenced and stalled, last hour")]
    should_be_0 += [("worker", "Restore: records to go"), ("kafka", "Records held up")]
    for name, title in should_be_0:
        assert set(shown(name, title)) == {0.0}, title
    wait_until(lambda: min(shown("worker", "Entries a commit may have")[-4:]) > 1, "commits that are quick")
    by_worker, of_all = (
        world.prometheus.vector(filled(it["expr"], {})) for it in by_title["worker", "Partitions by worker"]
    )
    assert (sorted(by_worker.values()), [*of_all.values()]) == ([2.0, 2.0, 4.0], [8.0])
    assert min(shown("health", "Retention margin")) >= 0
    rising = [
        ("health", "Accepted by servers, per second"),
        ("health", "Entries, per second"),
        ("publishers", "Published, per second"),
    ]
    for (name, title), index in itertools.product(rising, (0, 1)):
        wait_until(lambda n=name, t=title, i=index: max(shown(n, t, i)) > 0, f"{title} {index}")
    wait_until(lambda: max(shown("publishers", "Given up, per second")) > 0, "deltas that are dropped")
    wait_until(lambda: max(shown("worker", "Commit time, quantiles")) > 0, "commits")
    assert max(shown("worker", "Commit time, quantiles")) <= 10
    assert 0 <= shown("health", "Staleness")[0] < 30


@pytest.mark.long
def test_views_has_data_for_every_choice(world: World) -> None:
    """Every query of *Views* answers with numbers, whichever view, label and value are chosen."""
    prometheus = world.prometheus
    expected = {COUNTER, *GAUGES, "many", f"{HISTOGRAM}_count", f"{HISTOGRAM}_sum"}
    assert options(prometheus, "job", {}) == ["pipeline-views"]
    wait_until(lambda: options(prometheus, "histogram", {}) == [f"{HISTOGRAM}_bucket"], "the histogram as a choice")
    wait_until(lambda: set(options(prometheus, "view", {})) == expected, "all views as choices")
    for view in expected:
        labels = options(prometheus, "label", {"view": view})
        assert "instance" in labels
        for label in labels:
            chosen = {"view": view, "label": label}
            found = options(prometheus, "value", chosen)
            assert found, chosen
            for value in (variable("views", "value")["allValue"], literal(found[-1])):
                for target in targets("views"):
                    expr = filled(target.expr, {**chosen, "value": value})
                    wait_until(lambda e=expr, t=target: prometheus.numbers(e, instant=t.instant), f"data: {expr}", 15)


def test_views_shows_windows(world: World) -> None:
    """A view with windows, which is read and not scraped, is drawn if somebody writes its name."""
    for target in (it for it in targets("views") if it.panel in ("$view", "$view now")):
        expr = filled(target.expr, {"view": WINDOWED, "label": "region", "value": "a"})
        wait_until(lambda e=expr, t=target: world.prometheus.numbers(e, instant=t.instant), f"data: {expr}", 30)


def test_values_are_those_of_the_query_api(world: World) -> None:
    """Every series of a counter view and of gauge views has the same value through PromQL as through the query API."""
    world.load.close()
    (table,) = (it for it in targets("views") if it.panel == "$view now")
    for view in (COUNTER, *GAUGES):
        with Reader(world.server) as reader:
            answer = reader.get(view, after=everything(reader))
        expected = {
            frozenset((as_scraped(name), value) for name, value in series.labels.items() if value): float(series.value)
            for series in answer.series
        }
        assert len(expected) == {COUNTER: 40, "pace": 1, "balance": 1, "peak": 15}[view]
        expr = filled(table.expr, {"view": view, "label": "instance", "value": ".*"})
        wait_until(lambda e=expr, x=expected: world.prometheus.vector(e) == x, f"the API's values of {view}: {expected}", 15)


def as_scraped(label: str) -> str:
    """Return the name under which Prometheus has a label of a view that it uses itself."""
    return f"exported_{label}" if label in ("instance", "job") else label
