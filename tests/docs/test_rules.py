"""dashboards/rules.yml: each alert fires when it should and no other does, and the runbook has an entry for it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.metrics import CATALOGUE
from tests.prometheus import program
from tests.support import ROOT

FILE = ROOT / "dashboards" / "rules.yml"
RUNBOOK = ROOT / "pipeline" / "docs" / "operations.md"
RULES: dict[str, dict[str, Any]] = {
    rule["alert"]: rule for group in yaml.safe_load(FILE.read_text())["groups"] for rule in group["rules"]
}
AT, PART, INFO = 'job="j",instance="i"', 'job="j",instance="i",partition="0"', 'pipeline_info{job="j",instance="i"}'
Series = dict[str, str]

FIRES: dict[str, list[Series]] = {
    "PipelineDeadLetters": [{f"pipeline_dead_letters_total{{{PART}}}": "0x9 1x30"}],
    "PipelinePublisherDropping": [{f'pipeline_publisher_dropped_total{{{AT},reason="closed"}}': "0x18 7x9"}],
    "PipelinePublisherHoldsBack": [{f"pipeline_publisher_batches_held_back{{{AT}}}": "1x30"}],
    "PipelineSeriesOverflow": [
        {f"pipeline_series_overflowed_total{{{PART}}}": "0x9 1x30"},
        {f"pipeline_publisher_series_overflowed_total{{{AT}}}": "0x9 1x30"},
    ],
    "PipelineLoss": [
        {f'pipeline_log_lost_total{{{AT},topic="deltas"}}': "3x30"},
        {f"pipeline_stores_set_aside_total{{{PART}}}": "1x30"},
    ],
    "PipelineForeignRecords": [{f"pipeline_changelog_foreign_records_total{{{PART}}}": "0x9 1x30"}],
    "PipelineViewsLeftOut": [{f'pipeline_view_omitted{{{AT},view="v",reason="series_max"}}': "1x30"}],
    "PipelineStale": [
        {f"pipeline_staleness_seconds{{{PART}}}": "61x30"},
        {f"pipeline_staleness_seconds{{{PART}}}": " ".join(["Inf"] * 30)},
    ],
    "PipelineProcessDown": [{f"up{{{AT}}}": "1x9 0x30", INFO: "1x9 stale"}],
    "PipelineRestartLoop": [{f"process_start_time_seconds{{{AT}}}": "1x9 2 3 4x30", INFO: "1x30"}],
    "PipelineRestoreStuck": [{f"pipeline_restore_remaining_records{{{PART}}}": "9x30", INFO: "1x30"}],
    "PipelineNotReady": [{f"pipeline_ready{{{AT}}}": "0x30", INFO: "1x30"}],
    "PipelineHeldUp": [{f"pipeline_held_up_records{{{PART}}}": "1x30"}],
    "PipelineServerErrors": [
        {
            f'pipeline_http_requests_total{{{AT},path="/v1/views/{{view}}",status="503"}}': "0+6x30",
            f'pipeline_http_requests_total{{{AT},path="/v1/views/{{view}}",status="200"}}': "0+94x30",
        }
    ],
    "PipelineLag": [{f"pipeline_lag_records{{{PART}}}": "100001x30"}],
    "PipelineRetentionMargin": [
        {
            f"pipeline_retention_margin_records{{{PART}}}": "99x30",
            f"pipeline_lag_records{{{PART}}}": "100x30",
            f"pipeline_log_start_offset{{{PART}}}": "1x30",
        }
    ],
    "PipelineDiskFilling": [{f"pipeline_disk_free_bytes{{{AT}}}": "9x30", f"pipeline_disk_bytes{{{AT}}}": "100x30"}],
    "PipelineSpoolFilling": [
        {f"pipeline_publisher_spool_bytes{{{AT}}}": "51x30", f"pipeline_publisher_spool_bytes_max{{{AT}}}": "100x30"}
    ],
    "PipelinePublisherStuck": [
        {
            f"pipeline_publisher_batches_waiting{{{AT}}}": "1x30",
            f"pipeline_publisher_batches_total{{{AT}}}": "5x30",
            f"pipeline_publisher_spool_bytes_max{{{AT}}}": "0x30",
        }
    ],
    "PipelineStoresRebuilt": [{f"pipeline_stores_rebuilt_total{{{PART}}}": "0x9 1x4 2x30"}],
    "PipelineUnexpectedErrors": [{f'pipeline_thread_errors_total{{{AT},thread="t"}}': "0x9 1x30"}],
    "PipelineTokensUnreadable": [{f"pipeline_tokens_file_errors_total{{{AT}}}": "0x9 1x30"}],
    "PipelineAgentErrors": [
        {f'pipeline_agent_errors_total{{{AT},topic="t",reason="raised"}}': "0x9 1x30"},
        {f"pipeline_agent_commits_failed_total{{{AT}}}": "0x9 1x30"},
    ],
}
"""Series, one sample a minute, by which each alert fires after 20 minutes."""

QUIET: dict[str, Series] = {
    "counters that stand still": {f"pipeline_dead_letters_total{{{PART}}}": "7x30"},
    "a moment of staleness": {f"pipeline_staleness_seconds{{{PART}}}": "1x17 99x30"},
    "lag where staleness is known": {
        f"pipeline_lag_records{{{PART}}}": "100001x30",
        'pipeline_staleness_seconds{job="j",instance="s",partition="0"}': "1x30",
    },
    "a process of another program": {f"up{{{AT}}}": "0x30", f"process_start_time_seconds{{{AT}}}": "1+1x30"},
    "two starts": {f"process_start_time_seconds{{{AT}}}": "1x9 2 3x30", INFO: "1x30"},
    "a restore that goes on": {
        f"pipeline_restore_remaining_records{{{PART}}}": "900-9x30",
        f"pipeline_ready{{{AT}}}": "0x30",
        INFO: "1x30",
    },
    "a process without a role": {f"pipeline_ready{{{AT}}}": "0x30"},
    "lag of a new topic": {
        f"pipeline_retention_margin_records{{{PART}}}": "0x30",
        f"pipeline_lag_records{{{PART}}}": "100x30",
        f"pipeline_log_start_offset{{{PART}}}": "0x30",
    },
    "all that is kept is folded": {
        f"pipeline_retention_margin_records{{{PART}}}": "0x30",
        f"pipeline_lag_records{{{PART}}}": "0x30",
        f"pipeline_log_start_offset{{{PART}}}": "50x30",
    },
    "a publisher without a spool, and no disk": {
        f"pipeline_publisher_spool_bytes{{{AT}}}": "0x30",
        f"pipeline_publisher_spool_bytes_max{{{AT}}}": "0x30",
        f"pipeline_disk_free_bytes{{{AT}}}": "0x30",
        f"pipeline_disk_bytes{{{AT}}}": "0x30",
    },
    "batches that wait and are acknowledged": {
        f"pipeline_publisher_batches_waiting{{{AT}}}": "1x30",
        f"pipeline_publisher_batches_total{{{AT}}}": "0+5x30",
    },
    "a restoring process tells its load balancer": {
        f'pipeline_http_requests_total{{{AT},path="/readyz",status="503"}}': "0+6x30"
    },
    "one store rebuilt": {f"pipeline_stores_rebuilt_total{{{PART}}}": "0x9 1x30"},
}
"""Series by which nothing fires."""


def promtool(*arguments: str) -> None:
    """Run promtool; skip the test if there is none, or fail it under PIPELINE_REQUIRE_KAFKA=1."""
    done = subprocess.run([program("promtool"), *arguments], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def unit_test(name: str, series: Series, alerts: list[str]) -> dict[str, Any]:
    """Return a promtool test: with these series, exactly these alerts fire after 20 minutes."""
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": it, "values": values} for it, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "20m",
                "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts],
            }
        ],
    }


def test_each_fires_alone(tmp_path: Path) -> None:
    """promtool sees each alert fire on the series of its fault, and no other; none on series that look like faults."""
    assert FIRES.keys() == RULES.keys()
    cases = [unit_test(alert, series, [alert]) for alert, variants in FIRES.items() for series in variants]
    cases += [unit_test(name, series, []) for name, series in QUIET.items()]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(FILE)], "evaluation_interval": "1m", "tests": cases}))
    promtool("test", "rules", str(file))


def test_rules_are_valid() -> None:
    """promtool accepts the rules and the scrape config that loads them."""
    promtool("check", "rules", str(FILE))
    promtool("check", "config", str(FILE.with_name("prometheus.yml")))


@pytest.mark.parametrize("alert", RULES)
def test_rule_is_well_made(alert: str) -> None:
    """An alert has a severity, says what it is, names metrics that there are and no job, and links to its runbook entry."""
    rule = RULES[alert]
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"].keys() == {"summary", "description", "runbook_url"}
    assert rule["annotations"]["runbook_url"] == f"pipeline/docs/operations.md#{alert.lower()}"
    assert "job=" not in rule["expr"]
    known = {metric.name for metric in CATALOGUE} | {"pipeline_view_omitted"}
    assert set(re.findall(r"\bpipeline_\w+", rule["expr"])) <= known


def test_runbook_has_each_alert() -> None:
    """The runbook has one entry for each alert, in their order: symptom, meaning, command, and what done is."""
    _, *entries = re.split(r"^### (?=Pipeline)", RUNBOOK.read_text(), flags=re.MULTILINE)
    assert [entry.split("\n", 1)[0] for entry in entries] == [*RULES]
    for entry in entries:
        parts = re.findall(r"^- \*\*(\w+)\.\*\* ", entry, flags=re.MULTILINE)
        assert parts == ["Symptom", "Meaning", "Command", "Done"], entry
        assert "`" in entry.partition("**Command.**")[2].partition("**Done.**")[0], entry
