"""A publisher that tells through a pipe what was acknowledged, until it is killed: `python -m tests.broker.sender`.

Round r adds 4**r to some series, then waits until it is acknowledged. So the digits of an answer in base 4 say how often
each round was counted: 0, 1, or too often. A round also adds to series of its own, which no later round touches: if such a
state is lost, or kept although it was not committed, nothing later makes up for it.
"""

from __future__ import annotations

import os
import random
import sys
import threading

from pipeline import Publisher

VIEW = "rounds"
SERIES = 24
ONCE = "once"
ONCE_COUNT = 4
"""Number of series that belong to one round."""
ROUNDS_MAX = 2_000
"""Limit to the rounds, which makes sums ints of 4,000 bits."""
_PAUSE_S = 0.02


def touched(name: str) -> list[list[int]]:
    """Return the series that each round of a sender adds to, the same in every process."""
    rng = random.Random(name)
    return [rng.sample(range(SERIES), rng.randrange(1, SERIES)) for _ in range(ROUNDS_MAX)]


def main(url: str, name: str) -> None:
    """Send until somebody kills this process or closes its standard input."""
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    pause = threading.Event()
    publisher = Publisher(url, flush_interval_ms=20, request_timeout_ms=2_000, metadata_refresh_ms=100)
    view = publisher.sum(VIEW, labels=("sender", "n"))
    once = publisher.sum(ONCE, labels=("sender", "n"))
    for number, series in enumerate(touched(name)):
        for n in series:
            view.add(4**number, sender=name, n=str(n))
        for n in range(ONCE_COUNT):
            once.add(number + 1, sender=name, n=f"{number}-{n}")
        token = publisher.flush(timeout_s=120)
        os.write(1, f"{number} {token}\n".encode())
        pause.wait(_PAUSE_S)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
