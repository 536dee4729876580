"""The dashboard *Kafka and RocksDB*: the log in either mode, and the disks below it."""

from __future__ import annotations

from grafana_foundation_sdk.models import dashboard as models

import pipeline.metrics as m
from dashboards.source.parts import Panel, Query, board, graph, largest, of, ours, per_second, smallest, with_panels


def kafka() -> models.Dashboard:
    """Return the dashboard."""
    about = "The topics as workers and servers see them, the embedded log, and the disks of stores and logs."
    return with_panels(board("kafka", "Kafka and RocksDB", about, m.INFO), [*_topics(), *_embedded(), *_disks()])


def _topics() -> list[str | Panel]:
    return [
        "Topics",
        graph(
            "First record that is not folded",
            "Position of each partition in the topic deltas. It never falls, but for a topic that was made anew.",
            largest(m.NEXT_OFFSET, "partition {{partition}}"),
        ),
        graph(
            "First record that retention has left",
            "Start of each partition of the topic deltas. It must stay below the position.",
            largest(m.START_OFFSET, "partition {{partition}}"),
            alert="PipelineRetentionMargin",
        ),
        graph(
            "Retention margin",
            "The difference of the two: below 0 records are lost. Raise retention.ms of the topic first, then repair "
            "the lag.",
            smallest(m.RETENTION_MARGIN, "partition {{partition}}"),
            from_zero=False,
            alert="PipelineRetentionMargin",
        ),
        graph(
            "Records held up",
            "Records of deltas that can't be read, because a transaction that is none of ours is open in front of them."
            " If it stays, kafka-transactions.sh find-hanging and abort end it. 0 without Kafka.",
            Query(f"max by (partition) ({of(m.HELD_UP)}) or vector(0)", "partition {{partition}}"),
            alert="PipelineHeldUp",
        ),
        graph(
            "Offsets without a record, per second",
            "Offsets of deltas that hold no record: ends of transactions of others, or records that the log has lost.",
            per_second(m.DELTAS_HOLES, "partition {{partition}}", "partition"),
            unit="cps",
        ),
        graph(
            "Foreign records of the changelog, per second",
            "Changelog records that no owner of the partition wrote; they are left out. Take the right to write from "
            "others.",
            per_second(m.CHANGELOG_FOREIGN, "partition {{partition}}", "partition"),
            unit="cps",
            alert="PipelineForeignRecords",
        ),
    ]


def _embedded() -> list[str | Panel]:
    return [
        "Embedded log (pipeline up)",
        graph(
            "Appended, per second",
            "Records appended, by topic. More of changelog than of deltas: batches with many series.",
            per_second(m.LOG_APPENDED, "{{topic}}", "topic", always=True),
            unit="cps",
        ),
        graph(
            "Appended, bytes per second",
            "Bytes of keys and values appended, by topic; on the disk they are compressed.",
            per_second(m.LOG_BYTES, "{{topic}}", "topic", always=True),
            unit="Bps",
        ),
        graph(
            "Removed and lost, per second",
            "Records removed by retention (delete) and compaction (compact); and lost ones, found when the log was opened.",
            [
                per_second(m.LOG_REMOVED, "{{topic}}: {{by}}", "topic, by", always=True),
                per_second(m.LOG_LOST, "{{topic}}: lost", "topic", always=True),
            ],
            unit="cps",
            alert="PipelineLoss",
        ),
    ]


def _disks() -> list[str | Panel]:
    free = f"{of(m.DISK_FREE)} / ({of(m.DISK_BYTES)} > 0)"
    return [
        "Disks and RocksDB",
        graph(
            "Disk, free",
            "Part of the file system with the state folder that can still be written. At 0 the process ends with exit "
            "code 4.",
            Query(free, "{{instance}}"),
            unit="percentunit",
            alert="PipelineDiskFilling",
        ),
        graph(
            "Disk, used",
            "Bytes of that file system that are used, also by others.",
            Query(ours(f"{of(m.DISK_BYTES)} - {of(m.DISK_FREE)}"), "{{instance}}"),
            unit="bytes",
            alert="PipelineDiskFilling",
        ),
        graph(
            "Memory",
            "Resident memory of processes with stores: RocksDB's caches and write buffers are most of it "
            "(store_cache_bytes, store_write_buffer_bytes).",
            Query(ours(of("process_resident_memory_bytes")), "{{instance}}"),
            unit="bytes",
        ),
        graph(
            "Entries written to stores, per second",
            "Entries of commits, and changelog records that restores, standbys and servers apply.",
            [per_second(m.ENTRIES_COMMITTED, "commits"), per_second(m.RESTORE_ENTRIES, "restores and followers")],
            unit="cps",
            width=12,
        ),
        graph(
            "Stores not to be trusted, per second",
            "Stores that were rebuilt from the changelog, or set aside because they knew more than it.",
            [per_second(m.STORES_REBUILT, "rebuilt"), per_second(m.STORES_SET_ASIDE, "set aside")],
            unit="cps",
            width=12,
            alert="PipelineStoresRebuilt",
        ),
    ]
