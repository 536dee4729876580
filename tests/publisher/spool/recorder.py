"""A process that records from several threads, acknowledges each delta by a pipe, and is killed: run by test_kill."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from pipeline.core.kinds import State
from pipeline.publisher.batching import Pending
from pipeline.publisher.spool.ring import encode_delta
from tests.publisher.spool.support import VIEW, Recorder, sealed, suffix

THREADS = 4


def main(folder: str, producer_id: str, pipe: int) -> None:
    """Record 1 again and again, until killed; one byte of the thread's number for each that returned."""
    sys.setswitchinterval(1e-5)
    recorder = Recorder(Path(folder), producer_id, bytes_max=2**22)
    spool, outbox = recorder.spool, recorder.outbox
    series = [recorder.define(n) for n in range(THREADS)]
    locks = [threading.Lock() for _ in range(2)]
    waiting: list[dict[int, State]] = [{}, {}]

    def work(n: int) -> None:
        mark, lock, states = bytes([n]), locks[n % 2], waiting[n % 2]
        while True:
            with lock:
                recorder.append(series[n], encode_delta(1), n % 2)
                states[n] = states.get(n, 0) + 1
            os.write(pipe, mark)

    for n in range(THREADS):
        threading.Thread(target=work, args=(n,), daemon=True).start()
    drained: dict[int, State] = {}
    for turn in range(10**9):
        positions = {}
        for shard in range(2):
            with locks[shard]:
                if shard in (ends := recorder.ends()):
                    positions[shard] = ends[shard]
                for n, state in waiting[shard].items():
                    drained[n] = drained.get(n, 0) + state
                waiting[shard].clear()
        items = [Pending(VIEW, suffix(n), state) for n, state in drained.items()]
        if turn % 2:
            spool.commit(sealed(items, outbox), [], positions)
            drained.clear()
        else:
            spool.commit([], items, positions)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
