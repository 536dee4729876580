"""Stock Faust: adds up deltas by key in a table in memory with a changelog, at least once. For its own environment.

python faust_app.py BOOTSTRAP TOPIC GROUP DATA PARTITIONS

It commits offsets at its default interval, 2.8 s: at 0.1 s it spends most of its time on that. The changelog has totals
earlier.
"""

import sys

import faust

bootstrap, topic, group, data, partitions = sys.argv[1:]
app = faust.App(
    group,
    broker=f"kafka://{bootstrap}",
    store="memory://",
    datadir=data,
    topic_partitions=int(partitions),
    topic_replication_factor=1,
    web_enabled=False,
)
deltas = app.topic(topic, key_type=str, key_serializer="raw", value_type=int, value_serializer="json")
totals = app.Table("totals", default=int, partitions=int(partitions))


@app.agent(deltas)
async def add(stream: faust.StreamT) -> None:
    """Add each delta to the total of its key."""
    async for name, value in stream.items():
        totals[name] += value


if __name__ == "__main__":
    sys.argv[1:] = ["worker", "-l", "warn", "--without-web"]
    app.main()
