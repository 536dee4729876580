"""Settings of publishers."""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.core.limits import SPREAD_MAX
from pipeline.errors import Invalid
from pipeline.settings.base import Checked, setting


@dataclass(frozen=True)
class PublisherSettings(Checked):
    """Settings of a `Publisher`; each is also one of its keywords."""

    flush_interval_ms: int = setting(
        100, "longest time that a delta waits before it is sealed into a batch, while the log keeps up", least=1
    )
    flush_interval_min_ms: int = setting(
        50,
        "shortest time between flushes, at most `flush_interval_ms`; between the two the publisher tunes itself: four times "
        "as long as the log needs to acknowledge",
        least=1,
    )
    snapshot_interval_ms: int = setting(
        100, "how often what threads have recorded is merged into the snapshot that `local()` reads", least=1
    )
    local_series_max: int = setting(
        100_000,
        "series that `local()` knows, all views together; further ones are left out, and said to be; 0: none",
        least=0,
    )
    batch_bytes_max: int = setting(
        524_288,
        "a batch is sealed before it grows beyond this; one series is never split",
        least=1_024,
        most=16_777_216,
    )
    buffer_bytes_max: int = setting(
        67_108_864,
        "memory of buffered series and of unacknowledged batches; `on_full` says what happens then",
        least=65_536,
    )
    on_full: str = setting(
        "block",
        "at `buffer_bytes_max`, for series that are new: `block`, `raise` BufferFull, or `drop_newest` (counted). With a "
        "`spool_dir`, batches wait on the disk before that",
    )
    block_timeout_ms: int = setting(10_000, "how long `block` waits before it raises BufferFull", least=0)
    durability: str = setting(
        "memory",
        "what survives when this process is killed: `memory` what was acknowledged, `process` every recorded delta, `disk` "
        "the same, and power loss too, up to `fsync_interval_ms`; the latter two need `spool_dir`",
    )
    spool_dir: str = setting("", "the folder of spools, shared by all processes of an app; each makes its own in it")
    spool_bytes_max: int = setting(
        1_073_741_824, "largest spool of a process; `on_full` says what happens then", least=4_194_304
    )
    fsync_interval_ms: int = setting(1_000, "`disk`: how often recorded deltas are forced to the disk", least=1)
    request_timeout_ms: int = setting(10_000, "how long one attempt to send waits for its acknowledgement", least=10)
    retry_backoff_ms: int = setting(50, "pause after a failed attempt; doubles up to `retry_backoff_max_ms`", least=1)
    retry_backoff_max_ms: int = setting(2_000, "longest pause between attempts", least=1)
    close_timeout_ms: int = setting(
        30_000, "how long `close()`, interpreter exit and Ctrl-C wait for the last flush", least=0
    )
    series_idle_ms: int = setting(60_000, "a buffered series that was silent for so long gives its memory back", least=1)
    series_max: int = setting(
        1_000_000,
        "series of a view that this process buffers; further ones merge into the series whose labels are all __overflow__",
        least=1,
    )
    ts_ahead_max_ms: int = setting(
        3_600_000, "how far `ts_ms` of a `last` value may be ahead of this machine's clock; else it is Invalid", least=0
    )
    producer_ttl_ms: int = setting(
        604_800_000,
        "how long workers remember a producer; a batch that may have been sent longer ago than that, less a day or half of "
        "it, is held back: it may be folded and forgotten, and would count twice",
        least=1_000,
    )
    spread: int = setting(
        1,
        "partitions over which a view without a `spread` of its own spreads each series, at most those that there are: then "
        "one series that many processes record to is folded by several workers",
        least=1,
        most=SPREAD_MAX,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.spool_dir and self.durability != "memory":
            raise Invalid(f"durability={self.durability} needs spool_dir, a folder")
