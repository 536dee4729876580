"""The dashboard *Worker and restore*: folding, commits, partitions, restores, expiry, agents."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

import pipeline.metrics as m
from dashboards.source.parts import (
    TARGET,
    Panel,
    Query,
    board,
    graph,
    heat_of,
    largest,
    last_hour,
    of,
    per_second,
    quantiles,
    smallest,
    with_panels,
)


def worker() -> models.Dashboard:
    """Return the dashboard."""
    about = "How workers fold and commit, who has which partition, how restores get on, what expires, and agents."
    return with_panels(
        board("worker", "Worker and restore", about, m.INFO), [*_commits(), *_partitions(), *_series(), *_agents()]
    )


def _commits() -> list[str | Panel]:
    return [
        "Commits",
        heat_of(
            "Commit time",
            "From freezing an overlay to its being durable, over all workers. High: the broker is slow (disk, "
            "replication), or too many partitions share a worker's commit threads (commit_thread_count). At "
            "commit_timeout_ms the worker ends with code 3.",
            m.COMMIT_SECONDS,
        ),
        graph(
            "Commit time, quantiles", "The same as quantiles; see there.", quantiles(m.COMMIT_SECONDS), unit="s", width=12
        ),
        graph(
            "Commits, per second",
            "Commits by partition, and those made early because an overlay was full (overlay_entries_max, "
            "overlay_bytes_max). Many early ones: raise these if there is memory, or lower commit_interval_ms.",
            [
                per_second(m.COMMITS, "partition {{partition}}", "partition"),
                per_second(m.OVERLAY_FULL, "early: overlay full"),
            ],
            unit="cps",
        ),
        graph(
            "Entries a commit may have",
            "Entries that may be folded before a commit, learned from how long commits take. It begins at 1 with each "
            "start and rises with each quick commit. It stays low while there is lag: commits take too long.",
            smallest(m.COMMIT_BOUND, "partition {{partition}}"),
        ),
        graph(
            "Position, per second",
            "Records by which the position of each partition rises. 0 while there is lag: the partition stands still.",
            Query(f"sum by (partition) (deriv({of(m.NEXT_OFFSET)}[$__rate_interval]))", "partition {{partition}}"),
            unit="cps",
            from_zero=False,
            alert="PipelineStale",
        ),
    ]


def _partitions() -> list[str | Panel]:
    role = of(m.INFO, 'role=~"worker|up"')
    owned = f"count by (instance) ({of(m.LAG)} and on ({TARGET}) {role})"
    return [
        "Partitions and restore",
        graph(
            "Partitions by worker",
            "Partitions that each worker folds. With --name they share them evenly. Less in all than the topic has: "
            "nobody folds the rest. More: two workers believe that they have the same one, and one of them is about to "
            "be fenced.",
            [Query(owned, "{{instance}}"), Query(f"sum({owned})", "all")],
        ),
        graph(
            "Restore: records to go",
            "Changelog records that restores have still to read; 0 when all is restored. It does not fall: the broker "
            "is away, or a foreign transaction hangs.",
            largest(m.RESTORE_REMAINING, "{{instance}} partition {{partition}}", "instance, partition"),
            alert="PipelineRestoreStuck",
        ),
        graph(
            "Restore: records applied, per second",
            "Changelog records that restores, standbys and servers apply. Servers and standbys follow as fast as "
            "workers commit.",
            per_second(m.RESTORE_ENTRIES, "{{instance}}", "instance"),
            unit="cps",
        ),
        graph(
            "Fenced and stalled, last hour",
            "Partitions lost because another worker had taken them over before this one let go, and partitions that "
            "stood still until their worker ended itself. Some fences are normal when workers come and go.",
            [
                last_hour(m.FENCED, "fenced {{instance}}", "instance"),
                last_hour(m.STALLS, "stalled {{instance}}", "instance"),
            ],
            alert="PipelineRestartLoop",
        ),
        graph(
            "Stores rebuilt, last hour",
            "Stores deleted and restored from the changelog because they could not be trusted. Once after a topic was "
            "made anew is normal. Again and again: look at the disk; the log has the reason.",
            last_hour(m.STORES_REBUILT, "{{instance}}", "instance"),
            alert="PipelineStoresRebuilt",
        ),
        graph(
            "Stores set aside, last hour",
            "Stores that knew more than their changelog: kept under another name, and restored from what the changelog "
            "says, because the process was told to accept the loss.",
            last_hour(m.STORES_SET_ASIDE, "{{instance}}", "instance"),
            alert="PipelineLoss",
        ),
    ]


def _series() -> list[str | Panel]:
    return [
        "Series and producers",
        graph(
            "Expired, per second",
            "Series deleted at the end of their retention; entries refused because they came after it, which are dead "
            "letters. Many of these: the retention is shorter than publishers can be away, or a clock is behind.",
            [per_second(m.SERIES_EXPIRED, "series"), per_second(m.ENTRIES_EXPIRED, "entries that came too late")],
            unit="cps",
            alert="PipelineDeadLetters",
        ),
        graph(
            "Series overflowed, per second",
            "Entries merged into an overflow series because their view has series_max series in the partition. Totals "
            "stay exact.",
            per_second(m.SERIES_OVERFLOWED, "partition {{partition}}", "partition"),
            unit="cps",
            alert="PipelineSeriesOverflow",
        ),
        graph(
            "Producers forgotten, last hour",
            "Producers that were silent for producer_ttl_ms. Nothing to do: a publisher holds back what is older.",
            last_hour(m.PRODUCERS_FORGOTTEN, "all"),
        ),
    ]


def _agents() -> list[str | Panel]:
    return [
        "Agents (workers that run an app of yours, -A)",
        graph(
            "Agent errors, last hour",
            "Events at which an agent raised, and messages that could not be decoded for it. They count as done unless "
            'the app has on_error="stop". The log has each with its partition, offset and place.',
            last_hour(m.AGENT_ERRORS, "{{reason}} {{topic}}", "topic, reason", always=True),
            alert="PipelineAgentErrors",
        ),
        graph(
            "Agent commits put off, last hour",
            "Times that offsets of what agents read were not committed, because what they recorded was not "
            "acknowledged. What is behind the last commit is read, and counted, again if the worker dies now.",
            last_hour(m.AGENT_COMMITS_FAILED, "{{instance}}", "instance"),
            alert="PipelineAgentErrors",
        ),
        graph(
            "Changes taken in, per second",
            "Changes of views that agents have taken in. None, while entries are committed to the view: the agent "
            "hangs, or its worker does not fold.",
            per_second(m.CHANGES, "{{view}}", "view", always=True),
            unit="cps",
        ),
    ]
