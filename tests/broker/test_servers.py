"""Query servers on a real broker that are killed, emptied, or whose topics are replaced answer exactly or not at all."""

from __future__ import annotations

import random
import shutil
import socket
import time
from collections import Counter
from pathlib import Path

import pytest

import pipeline.metrics as m
from pipeline import Publisher, Reader, Token
from pipeline.core.record import FENCE_KEY
from pipeline.errors import NotFound, NotReady
from pipeline.topics import CHANGELOG
from tests.broker.drive import PUBLISHER, Role, Supervised, assert_same, check, finish, loaded, records, server, worker
from tests.broker.kafka import App, create_topics, delete_topics
from tests.process.load import answers, metric
from tests.support import wait_until

SEED = 4
KILLS = 2
PARTITIONS = 2
WAIT_S = 60.0


@pytest.mark.timeout(120)
def test_killed_under_load(app: App, tmp_path: Path) -> None:
    """A killed server goes on where its store ends, an emptied one restores; at any time all servers answer alike."""
    rng = random.Random(SEED)
    create_topics(app.bootstrap, app.app)
    with (
        worker(app, tmp_path / "worker"),
        server(app, tmp_path / "killed") as killed,
        server(app, tmp_path / "spared") as spared,
    ):
        with loaded(app) as (publisher, loads):
            for kill in range(KILLS):
                time.sleep(rng.uniform(0.05, 0.3))
                if kill == 0:  # a store has no log of its own: what it was not asked to flush, a kill takes away
                    _series_count(killed, publisher.flush())
                    stored = metric(killed.url, m.RESTORE_ENTRIES)
                    killed.terminate()
                else:
                    killed.kill()
                killed.start()
                token = publisher.flush()
                assert len({_series_count(role, token) for role in (killed, spared)}) == 1
            load = finish(publisher, loads)
        both = [answers(role.url, load[0]) for role in (killed, spared)]
        assert_same(both[0], load[1], killed)
        assert both[0] == both[1]
        with Reader(spared.url) as reader:
            owners = {it["owner"] for it in reader.status()["partitions"]}
        assert owners == {socket.gethostname()}, "commits of a worker without a name carry its host's"

        def entry_count() -> int:
            return sum(record.key() != FENCE_KEY for record in records(app, CHANGELOG))

        # The publisher's last batches, which say that it closes, may be under way still.
        wait_until(lambda: metric(spared.url, m.RESTORE_ENTRIES) == entry_count(), "all entries")
        entries = entry_count()
        assert stored > 100
        assert metric(killed.url, m.RESTORE_ENTRIES) < entries - stored / 2, "it read what it had"
        killed.terminate()
        killed.start()
        assert_same(answers(killed.url, load[0]), load[1], killed)
        assert metric(killed.url, m.RESTORE_ENTRIES) == 0, "it read what it had"
        assert metric(killed.url, m.STORES_REBUILT) == 0, killed.tail()
        assert "rebuilding the store" not in killed.program.stderr()

        killed.kill()
        shutil.rmtree(killed.data)
        killed.start()
        assert_same(answers(killed.url, load[0]), load[1], killed)
        assert metric(killed.url, m.RESTORE_ENTRIES) == entries
        check(app, [killed, spared], tmp_path, load=load)


@pytest.mark.long
@pytest.mark.timeout(150)
def test_topics_made_anew(app: App, tmp_path: Path) -> None:
    """After `--accept-loss` no answer has anything of the topics that are gone, whether its server was away or not."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    role = worker(app, tmp_path / "worker", "--accept-loss")
    awake, away = (server(app, tmp_path / name, "--accept-loss") for name in ("awake", "away"))
    with role, away, awake, Reader(awake.url) as reader:
        with Publisher(app.url, **PUBLISHER) as publisher:
            publisher.sum("seen").add(7)
            publisher.sum("old").add(1)
            token = publisher.flush()
        for it in (awake, away):
            assert _value(it, token) == 7
        before = _ends(app)
        away.terminate()  # which keeps what it has
        with Supervised(role) as supervised:
            delete_topics(app.bootstrap, app.app)
            for _ in range(20):
                assert reader.get("seen").value() == 7
                time.sleep(0.02)
            create_topics(app.bootstrap, app.app, PARTITIONS)
            wait_until(lambda: metric(awake.url, m.STORES_SET_ASIDE) == PARTITIONS, f"it to notice; {awake.tail()}", WAIT_S)
            assert _seen(awake) is None, f"{_seen(awake)}: of the topics that are gone"
            with Publisher(app.url, **PUBLISHER) as publisher:
                publisher.sum("seen").add(5)
                wide = publisher.sum("wide", labels=("n",))
                for n in range(20):  # in every partition: the end of none shall tell that it is another log
                    wide.add(1, n=str(n))
                token = publisher.flush(timeout_s=WAIT_S)
            wait_until(lambda: _seen(awake) is not None, f"a new answer; {awake.tail()} {role.tail()}", WAIT_S)
            assert _value(awake, token) == 5
            assert all(end > before[number] for number, end in _ends(app).items())
            away.start()
            assert metric(away.url, m.STORES_SET_ASIDE) == PARTITIONS, away.tail()
            for it in (awake, away):
                assert _value(it, token) == 5
                with Reader(it.url) as other, pytest.raises(NotFound):
                    other.get("old")
        assert set(supervised.codes) <= {3, 4}, f"{supervised.codes}; {role.tail()}"


@pytest.mark.timeout(150)
def test_a_changelog_made_anew(app: App, tmp_path: Path) -> None:
    """If only the changelog is lost, and that is accepted, all deltas in the log count again, and servers follow."""
    create_topics(app.bootstrap, app.app, PARTITIONS)
    accepting = worker(app, tmp_path / "worker", "--accept-loss"), server(app, tmp_path / "server", "--accept-loss")
    with accepting[0] as role, accepting[1] as reads:
        with Supervised(role) as supervised, Publisher(app.url, **PUBLISHER) as publisher:
            publisher.sum("old").add(3)
            wide = publisher.sum("wide", labels=("n",))
            view = publisher.sum("seen")
            for number in range(5):
                view.add(1)
                assert _value(reads, publisher.flush()) == number + 1
            delete_topics(app.bootstrap, app.app, only=(CHANGELOG,))
            create_topics(app.bootstrap, app.app, PARTITIONS, only=(CHANGELOG,))
            for n in range(300):
                wide.add(1, n=str(n))  # more entries than the changelog held: its end alone tells nothing
            view.add(1)
            token = publisher.flush(timeout_s=WAIT_S)
            wait_until(lambda: metric(reads.url, m.STORES_SET_ASIDE) == PARTITIONS, f"it to notice; {reads.tail()}", WAIT_S)
            assert _value(reads, token) == 6
            with Reader(reads.url) as reader:
                assert reader.get("old").value() == 3
        assert supervised.codes in ([3], [4]), f"{supervised.codes}; {role.tail()}"


def _ends(app: App) -> Counter[int]:
    """Return the number of records in each partition of the changelog."""
    return Counter(record.partition() for record in records(app, CHANGELOG))


def _series_count(role: Role, token: Token) -> int:
    with Reader(role.url) as reader:
        return len(reader.get("sum", after=token, timeout_ms=20_000).series)


def _value(role: Role, token: Token) -> object:
    """Return the value of `seen` once everything up to the token is in."""
    with Reader(role.url) as reader:
        return wait_until(lambda: _ready_value(reader, token), f"an answer; {role.tail()}", WAIT_S)


def _ready_value(reader: Reader, token: Token | None) -> object:
    try:
        return reader.get("seen", after=token, timeout_ms=5_000).value()
    except (NotReady, NotFound):
        return None


def _seen(role: Role) -> object:
    """Return the present value of `seen`; None if the view is unknown, or the server is not ready."""
    with Reader(role.url) as reader:
        return _ready_value(reader, None)
