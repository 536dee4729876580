"""The metric catalogue, as Prometheus sees it."""

import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

import pipeline.metrics as m
from pipeline.adapters.prometheus import PrometheusMetrics


def samples(metrics: PrometheusMetrics) -> dict[str, float]:
    """Return every sample of our own, by its name and labels as they are written."""
    families = text_string_to_metric_families(metrics.render()[0].decode())
    return {
        sample.name + str(dict(sorted(sample.labels.items())) or ""): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("pipeline_")
    }


def test_every_metric_of_the_catalogue_is_a_family() -> None:
    """Every metric has its name, help and type; names are unique and follow Prometheus' conventions."""
    text = PrometheusMetrics().render()[0].decode()
    names = [metric.name for metric in m.CATALOGUE]
    assert len(set(names)) == len(names) > 20
    for metric in m.CATALOGUE:
        assert f"# TYPE {metric.name} {metric.type}" in text
        assert f"# HELP {metric.name} {metric.help}" in text
        assert metric.name.endswith("_total") is (metric.type == "counter")
        assert metric.help.endswith(".")
        assert bool(metric.buckets) is (metric.type == "histogram")


@pytest.mark.parametrize("metric", m.CATALOGUE, ids=lambda metric: metric.name)
def test_each_records_under_its_labels(metric: m.Metric) -> None:
    """Label values stand in the metric's order, and may be of any type."""
    metrics = PrometheusMetrics()
    labels = [7, "x", 0.5][: len(metric.labels)]
    shown = str(dict(sorted(zip(metric.labels, map(str, labels), strict=True))) or "")
    record = {"counter": metrics.inc, "gauge": metrics.set, "histogram": metrics.observe}[metric.type]
    record(metric, 3, *labels)
    suffix = "_sum" if metric.type == "histogram" else ""
    assert samples(metrics)[metric.name + suffix + shown] == 3
    m.NO_METRICS.inc(metric, 1, *labels)
    m.NO_METRICS.set(metric, 1, *labels)
    m.NO_METRICS.observe(metric, 1, *labels)


def test_wrong_labels_are_a_bug() -> None:
    """Too many or too few labels are an error."""
    metrics = PrometheusMetrics()
    for labels in ([], [1, 2]):
        with pytest.raises((ValueError, AttributeError)):
            metrics.inc(m.COMMITS, 1, *labels)


def test_two_servers_in_one_process_do_not_meet() -> None:
    """Every server has a registry of its own."""
    one, other = PrometheusMetrics(), PrometheusMetrics()
    one.inc(m.COMMITS, 1, 0)
    assert "pipeline_commits_total{'partition': '0'}" in samples(one)
    assert "pipeline_commits_total{'partition': '0'}" not in samples(other)


def test_threads_lose_no_count() -> None:
    """Counters are exact with many threads."""
    metrics = PrometheusMetrics()
    threads = [threading.Thread(target=lambda: [metrics.inc(m.COMMITS, 1, i % 3) for i in range(3_000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(value for name, value in samples(metrics).items() if name.startswith("pipeline_commits_total")) == 12_000


def test_the_process_is_there_too() -> None:
    """CPU, memory and Python's version are included; the media type follows the Accept header."""
    metrics = PrometheusMetrics()
    body, media_type = metrics.render()
    assert b"process_cpu_seconds_total" in body
    assert b"python_info" in body
    assert media_type.startswith("text/plain")
    assert metrics.render("application/openmetrics-text")[1].startswith("application/openmetrics-text")


def test_a_partition_is_forgotten() -> None:
    """`forget` removes the gauges of one partition, and no counter; a gauge that is set again is shown again. Idempotent."""
    metrics = PrometheusMetrics()
    for partition in (1, 2):
        metrics.set(m.LAG, 5, partition)
        metrics.set(m.STALENESS, 5, partition)
        metrics.inc(m.COMMITS, 3, partition)
    metrics.forget(1)
    metrics.forget(1)
    m.NO_METRICS.forget(1)
    found = samples(metrics)
    assert {name for name in found if "'partition': '1'" in name and "_created" not in name} == {
        "pipeline_commits_total{'partition': '1'}"
    }
    assert found["pipeline_lag_records{'partition': '2'}"] == found["pipeline_staleness_seconds{'partition': '2'}"] == 5
    metrics.set(m.LAG, 7, 1)
    assert samples(metrics)["pipeline_lag_records{'partition': '1'}"] == 7


def test_what_is_forgotten_while_it_is_set_can_be_set_again() -> None:
    """A series that is set while it is forgotten is shown again, in whatever order the threads run."""
    metrics = PrometheusMetrics()
    stop = threading.Event()

    def forget() -> None:
        while not stop.is_set():
            metrics.forget(1)

    thread = threading.Thread(target=forget)
    thread.start()
    for value in range(20_000):
        metrics.set(m.LAG, value, 1)
    stop.set()
    thread.join()
    metrics.set(m.LAG, 1, 1)
    assert samples(metrics)["pipeline_lag_records{'partition': '1'}"] == 1
