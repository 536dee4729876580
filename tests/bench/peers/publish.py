"""The publisher's side of a measurement, in a process of its own.

python -m tests.bench.peers.publish WAY URL TOPIC VALUES SERIES DELTAS ONCE FLUSH_MS

WAY is `ours`, a Publisher that is given labels and value for each delta; `producer`, a confluent-kafka Producer that is
given a message for each delta; or `merging`, the same producer behind a dictionary that adds up deltas for FLUSH_MS. Keys
and messages are encoded before the measurement begins, so a producer's figures do not hold the cost of that. Reads commands,
one a line, and answers each with a line: `warm`, `go` and `one`, which is one more delta of series 0.
"""

from __future__ import annotations

import struct
import sys
import time
from collections.abc import Callable, Iterable, Sequence

from tests.bench.peers.work import VIEW, Work, key, labels, value

Delta = tuple[tuple[str, str], int]
PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    "compression.type": "lz4",
    "batch.size": 1_000_000,
    "batch.num.messages": 100_000,
    "queue.buffering.max.messages": 1_000_000,
    "queue.buffering.max.kbytes": 1_048_576,
    "partitioner": "consistent",
    "log_level": 3,
}
"""Settings for throughput; without a delivery report for each message: totals are compared at the end."""


def encode(kind: str, number: int) -> bytes:
    """Return a message's value: 8 bytes for `long`, or decimal digits."""
    return struct.pack(">q", number) if kind == "long" else str(number).encode()


def ours(url: str, flush_ms: int) -> Callable[[Sequence[Delta]], None]:
    """Return a function that records deltas by label and returns when all are acknowledged."""
    from pipeline import Publisher

    publisher = Publisher(url, flush_interval_ms=flush_ms)
    view = publisher.sum(VIEW, labels=("region", "product"))

    def publish(deltas: Sequence[Delta]) -> None:
        for (region, product), number in deltas:
            view.add(number, region=region, product=product)
        publisher.flush(600)

    return publish


def producer(bootstrap: str, topic: str, flush_ms: int, merging: str) -> Callable[[Iterable[tuple[bytes, bytes]]], None]:
    """Return a function that produces messages and returns when all are acknowledged.

    With `merging`, which names the encoding of values, it adds up for `flush_ms` first.
    """
    from confluent_kafka import Producer

    made = Producer({"bootstrap.servers": bootstrap, "linger.ms": 5 if merging else flush_ms, **PRODUCER})
    produce = made.produce

    def send(messages: Iterable[tuple[bytes, bytes]]) -> None:
        for number, (name, content) in enumerate(messages):
            while True:
                try:
                    produce(topic, content, name)
                    break
                except BufferError:
                    made.poll(0.1)
            if not number & 4095:
                made.poll(0)

    def publish(messages: Iterable[tuple[bytes, bytes]]) -> None:
        send(messages)
        if made.flush(600):
            raise RuntimeError("the producer could not deliver everything")

    def publish_merged(deltas: Iterable[tuple[bytes, int]]) -> None:
        totals: dict[bytes, int] = {}
        due_s = time.monotonic() + flush_ms / 1000
        for number, (name, amount) in enumerate(deltas):
            totals[name] = totals.get(name, 0) + amount
            if not number & 255 and time.monotonic() >= due_s:
                send((it, encode(merging, total)) for it, total in totals.items())
                totals = {}
                due_s = time.monotonic() + flush_ms / 1000
        publish((it, encode(merging, total)) for it, total in totals.items())

    return publish_merged if merging else publish  # type: ignore[return-value]


def main() -> None:
    """Run with this process' arguments."""
    way, url, topic, kind, *numbers, flush_ms = sys.argv[1:]
    series_count, delta_count, once = map(int, numbers)
    work = Work(series_count, delta_count, bool(once))
    publish = ours(url, int(flush_ms)) if way == "ours" else producer(url, topic, int(flush_ms), kind * (way == "merging"))
    prepare: Callable[[Delta], object] = {
        "ours": lambda it: it,
        "merging": lambda it: (key(it[0]).encode(), it[1]),
        "producer": lambda it: (key(it[0]).encode(), encode(kind, it[1])),
    }[way]
    parts = {"one": [prepare((labels(0), value(0)))]}
    for name, part in (("warm", work.warm_up()), ("go", work)):
        made = [prepare((labels(i, warm=name == "warm"), value(i))) for i in range(part.series_count)]
        parts[name] = [made[i] for i in part.chosen()]
    print("ready", flush=True)
    for line in sys.stdin:
        publish(parts[line.strip()])  # type: ignore[arg-type]
        print("done", flush=True)


if __name__ == "__main__":
    main()
