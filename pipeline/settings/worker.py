"""Settings of the log, of workers and of gateways from other protocols."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.limits import TaskLimits
from pipeline.settings.base import Checked, setting


@dataclass(frozen=True)
class LogSettings(Checked):
    """Settings of the embedded log and of the stores beside it."""

    data: str = setting("./pipeline-data", "the state folder: log, stores and lock")
    partitions: int = setting(
        0, "partitions of a new log; 0: what topics/*.toml say. Fixed once the log exists", least=0, most=1_024
    )
    fsync: bool = setting(False, "acknowledge only what survives power loss, not just kill -9")
    log_write_buffer_bytes: int = setting(33_554_432, "memory of the log's newest records", least=1_048_576)
    store_write_buffer_bytes: int = setting(67_108_864, "memory of unflushed entries, all stores together", least=1_048_576)
    store_cache_bytes: int = setting(67_108_864, "memory of cached blocks, all stores together", least=1_048_576)
    maintenance_interval_ms: int = setting(10_000, "how often retention and compaction look for work", least=10)
    compaction_keys_max: int = setting(200_000, "keys that one pass of changelog compaction holds in memory", least=1)


@dataclass(frozen=True)
class WorkerSettings(Checked):
    """Settings of a worker."""

    commit_interval_ms: int = setting(100, "longest time between folding a record and committing it", least=1)
    commit_timeout_ms: int = setting(
        30_000, "a commit that is undecided after this ends the process with code 3; the log may be away for less", least=10
    )
    transactions_per_s_max: int = setting(200, "commits that a worker begins in a second, over all partitions", least=1)
    commit_thread_count: int = setting(4, "commits of different partitions that can be under way at once", least=1, most=64)
    fetch_record_count_max: int = setting(1_000, "records that one poll of the log returns", least=1)
    fetch_bytes_max: int = setting(2_097_152, "bytes that one poll of the log returns of a partition, about", least=1_024)
    restore_fetch_count_max: int = setting(20_000, "changelog records that one poll of a restore returns", least=1)
    restore_thread_count: int = setting(4, "partitions that a worker restores at once", least=1, most=64)
    restore_buffer_entries_max: int = setting(
        100_000, "entries a restore holds back for a commit boundary before it applies them unfinished", least=1
    )
    overlay_entries_max: int = setting(50_000, "folded, uncommitted entries of a partition; then it commits early", least=1)
    overlay_bytes_max: int = setting(33_554_432, "the same in bytes of the folded records", least=1_024)
    cache_entries_max: int = setting(100_000, "committed states a partition keeps in memory", least=0)
    cache_bytes_max: int = setting(67_108_864, "the same in bytes of their encodings", least=0)
    producer_ttl_ms: int = setting(604_800_000, "a producer silent for so long is forgotten", least=1_000)
    closed_producer_ttl_ms: int = setting(
        3_600_000,
        "a producer that was closed in order is forgotten after so long, when no copy of a batch can come",
        least=0,
    )
    letter_ttl_ms: int = setting(
        7_776_000_000,
        "a dead letter that was replayed is remembered for so long, so that it counts once; longer than they are kept",
        least=1_000,
    )
    producers_max: int = setting(100_000, "producers a partition keeps in memory; its store remembers all of them", least=1)
    views_max: int = setting(10_000, "definitions of views in a partition; what would add one is dead-lettered", least=1)
    series_max: int = setting(
        1_000_000,
        "series of a definition in a partition; what is beyond is merged into a series with the label values __overflow__",
        least=1,
    )
    ts_ahead_max_ms: int = setting(
        3_600_000,
        "how far the time of a `last` value, or the start of a window, may be ahead of its record's; else dead-lettered",
        least=0,
    )
    expired_entries_max: int = setting(
        500,
        "entries that a commit examines to delete what has expired; as many as the commit before added, if that is more",
        least=1,
    )
    mirror_interval_ms: int = setting(
        5_000, "how often positions are mirrored to the group `APP-position`, for lag tools; 0: never. Kafka only", least=0
    )
    standby_count: int = setting(
        1, "copies of each partition that other workers keep warm, to take over at once; for workers with a name", least=0
    )
    session_timeout_ms: int = setting(
        6_000,
        "a worker with a name that is silent for so long has lost its partitions; one that is back sooner has kept them",
        least=1_000,
    )
    revoke_timeout_ms: int = setting(
        3_000, "how long a worker may hold others up to commit before partitions move; what is not is folded again", least=0
    )
    stall_timeout_ms: int = setting(
        15_000,
        "a partition with lag whose position stands still for so long ends the process with code 3, if the log is there; "
        "0: never. Kafka only",
        least=0,
    )
    accept_loss: bool = setting(
        False,
        "go on although records are lost: deleted before they were folded, gone from a damaged log, or only in a store that "
        "is ahead of its changelog; the better copy is kept aside. An embedded log is read as a whole at each start then",
    )

    def task_limits(self) -> TaskLimits:
        """Return the limits that `core.task` enforces."""
        return TaskLimits(**{name: getattr(self, name) for name in TaskLimits.__struct_fields__})


@dataclass(frozen=True)
class IngestSettings(Checked):
    """Settings of `pipeline ingest`."""

    ingest_line_bytes_max: int = setting(
        8_192, "longest StatsD line; a longer one is left out and counted", least=64, most=65_536
    )
    ingest_packet_bytes_max: int = setting(
        65_535, "largest UDP packet; a larger one is left out and counted", least=64, most=65_535
    )
    ingest_connections_max: int = setting(256, "open TCP connections; one more is closed at once and counted", least=1)
    ingest_idle_timeout_ms: int = setting(
        600_000, "a TCP connection on which no StatsD line ends for so long is closed", least=10
    )
    ingest_views_max: int = setting(
        2_000, "views that StatsD lines can make; a line that needs one more is left out and counted", least=1, most=10_000
    )
    ingest_series_max: int = setting(
        200_000, "label sets, members of sets among them, that StatsD lines can make; the same", least=1
    )
    ingest_sender_share: int = setting(
        50,
        "percent of these views and series that the lines of one address can make; 100: one can take all",
        least=1,
        most=100,
    )
    ingest_observations_max: int = setting(
        10_000, "observations for which the values of one StatsD timer line, by its sample rate, can stand", least=1
    )
    ingest_dialect: str = setting(
        "auto",
        "what a sign before a StatsD gauge's value means: a step (`statsd`), the value's own sign (`dogstatsd`), or a step "
        "unless the line names a container, external data or a cardinality as Datadog's clients do (`auto`)",
    )
    ingest_timers: str = setting(
        "means", "what new StatsD timers, histograms and distributions become: `means`, with max and count, or `histogram`"
    )
    ingest_sets: str = setting(
        "members", "what new StatsD sets become: a sum with a series for each of its `members`, or `distinct`, an estimate"
    )
    ingest_receive_buffer_bytes: int = setting(
        4_194_304, "UDP packets that wait in the kernel; it may grant less (`net.core.rmem_max`), and says so", least=4_096
    )
