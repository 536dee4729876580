"""The whole way of a publisher on a real broker: keyed adds to many series, drained, encoded, sent and acknowledged.

The measure is the CPU time of the publisher's process, all its threads and librdkafka's among them, for one delta.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time

import msgspec

from pipeline import Publisher
from tests.bench.kafka import broker
from tests.bench.measure import ROOT, Figure, Row, at_most_times
from tests.bench.recording import LABELS

_DELTAS = 2_000_000
_LARGE = 2**30
"""A `buffer_bytes_max` in which all series fit."""
REACH = {100: 0.3, 10_000: 0.5, 100_000: 1.0}
"""Limit to the microseconds a delta, by number of series."""


def publish(url: str, series_count: int, delta_count: int, buffer_bytes_max: int) -> tuple[float, float]:
    """Return the CPU seconds of this process for so many keyed adds up to their acknowledgement, and for a dictionary's.

    Each delta is of a series chosen at random. For a process of its own.
    """
    keys = [(f"region-{i % 16}", f"product-{i:07d}") for i in range(series_count)]
    rng = random.Random(1)
    chosen = [keys[rng.randrange(series_count)] for _ in range(delta_count)]
    totals = dict.fromkeys(keys, 0.0)
    with Publisher(url, buffer_bytes_max=buffer_bytes_max) as publisher:
        view = publisher.sum("sales", labels=LABELS)
        view.add(1.0, region="", product="")
        publisher.flush(60)  # the connections are there, and the threads run
        before_s = time.process_time()
        for region, product in chosen:
            view.add(12.5, region=region, product=product)
        publisher.flush(120)
        took_s = time.process_time() - before_s
    before_s = time.process_time()
    for key in chosen:
        totals[key] += 12.5
    return took_s, time.process_time() - before_s


def _measure(url: str, series_count: int, delta_count: int, buffer_bytes_max: int) -> tuple[Figure, Figure]:
    arguments = [url, str(series_count), str(delta_count), str(buffer_bytes_max)]
    command = [sys.executable, "-m", "tests.bench.keyed", *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    took_s, update_s = msgspec.json.decode(done.stdout, type=tuple[float, float])
    unit = "us CPU a delta"
    baseline = Figure(update_s / delta_count * 1e6, unit, "d[k] += v with the same keys")
    return Figure(took_s / delta_count * 1e6, unit), baseline


def publish_keyed(quick: bool) -> list[Row]:
    """Measure 2 M keyed deltas on few and on many series, and on ten times as many as fit into `buffer_bytes_max`."""
    delta_count = 20_000 if quick else _DELTAS
    rows = []
    with broker() as url:
        for series_count, most_us in REACH.items():
            measured, baseline = _measure(url, min(series_count, delta_count), delta_count, 2**26)
            name = f"Kafka: publisher, keyed adds on {series_count:,} series"
            target = f"at most {most_us} us"
            rows.append(Row(name, measured, baseline, target, measured.value <= most_us))
        many = delta_count // 2
        fits, _ = _measure(url, many, delta_count, _LARGE)
        crowded, _ = _measure(url, many, delta_count, many * 40)
        what = f"{many:,} series, all of which fit into memory"
        fits = Figure(fits.value, fits.unit, what)
        rows.append(at_most_times("Kafka: the same, ten times the series that fit into memory", crowded, fits, 2))
    return rows


if __name__ == "__main__":
    _, _url, *_numbers = sys.argv
    print(msgspec.json.encode(publish(_url, *map(int, _numbers))).decode())
