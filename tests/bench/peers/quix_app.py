"""Quix Streams: adds up deltas by key, exactly once, in its RocksDB state with a changelog. For its own environment.

python quix_app.py BOOTSTRAP TOPIC GROUP DATA COMMIT_S
"""

import sys

from quixstreams import Application, State


def add(value: int, state: State) -> None:
    """Add a delta to the total of its key."""
    state.set("total", state.get("total", 0) + value)


def main() -> None:
    """Run until the process is ended."""
    bootstrap, topic, group, data, commit_s = sys.argv[1:]
    app = Application(
        bootstrap,
        consumer_group=group,
        auto_offset_reset="earliest",
        processing_guarantee="exactly-once",
        commit_interval=float(commit_s),
        consumer_poll_timeout=float(commit_s),  # by default 1 s: a commit would wait as long for the next message
        state_dir=data,
        loglevel="WARNING",
    )
    deltas = app.topic(topic, key_deserializer="bytes", value_deserializer="json")
    app.dataframe(deltas).update(add, stateful=True)
    app.run()


if __name__ == "__main__":
    main()
