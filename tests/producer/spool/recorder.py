"""A process that records from several threads, acknowledges each delta by a pipe, and is killed: run by test_kill."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from pipeline.core.sequence import Outbox
from pipeline.producer.sealing import seal
from tests.producer.spool.support import VIEW, merged, new_spool, record, suffix, total

THREADS = 4


def main(folder: str, producer_id: str, pipe: int) -> None:
    """Record 1 again and again, until killed; one byte of the thread's number for each that returned."""
    sys.setswitchinterval(1e-5)
    spool = new_spool(Path(folder), producer_id, bytes_max=2**22)
    series = [spool.define(VIEW, suffix(n)) for n in range(THREADS)]

    def work(n: int) -> None:
        mark = bytes([n])
        while True:
            record(spool, series[n], 1)
            os.write(pipe, mark)

    for n in range(THREADS):
        threading.Thread(target=work, args=(n,), daemon=True).start()
    outbox = Outbox(producer_id, 0)
    waiting = dict.fromkeys(series, 0)
    for turn in range(10**9):
        for series_id, value in total(spool.drain()).items():
            waiting[series_id] += value
        items = [merged(series.index(key), value) for key, value in waiting.items() if value]
        spool.commit(
            *((seal(items, outbox, partition_count=2, batch_bytes_max=10**6, now_ms=1), []) if turn % 2 else ([], items))
        )
        if turn % 2:
            waiting = dict.fromkeys(series, 0)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
