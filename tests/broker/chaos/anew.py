"""Topics made anew under a running app, another app each time: never a wrong number, and exact from then on."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Collection, Mapping
from typing import Self

import pytest

from pipeline import NotReady, Reader, Token
from pipeline.errors import OtherTopic
from pipeline.topics import CHANGELOG, DELTAS
from tests.broker.chaos.drive import Drive
from tests.broker.chaos.fleet import GUARD, Fleet
from tests.broker.chaos.load import LABELS, SERIES, VIEW, Labels, Load
from tests.broker.chaos.watch import status
from tests.broker.drive import Role, server
from tests.broker.kafka import App, create_topics, delete_topics
from tests.support import PROGRAM, wait_until

PARTITIONS = 4
DELTA_COUNT = 4_000
ENDS_S = 90.0
READ_MS = 60_000
AT_ONCE_MS = 5_000
ACCEPT_LOSS = "--accept-loss"


class SideApp:
    """An app of its own on the drive's broker: topics, two workers, a server, a load."""

    def __init__(self, d: Drive, name: str) -> None:
        self.d = d
        self.app = App(d.app.bootstrap, f"{name}-{d.checks}")
        self.folder = d.folder / self.app.app
        create_topics(self.app.bootstrap, self.app.app, PARTITIONS)
        self.fleet = Fleet(self.app, self.folder, PARTITIONS, d.problems, d.say)
        self.load = Load(self.app, per_s=100.0, seed=d.rng.randrange(1_000))

    def server(self, name: str, *arguments: str) -> Role:
        """Return a server; servers of one name have one disk."""
        return server(self.app, self.folder / name, *arguments, program=(*GUARD, *PROGRAM), stdin=subprocess.PIPE)

    def workers(self, *arguments: str, excused: Collection[int] = ()) -> None:
        """Start two workers, which may end with these codes; earlier ones of their names are ended first."""
        for name in ("s1", "s2"):
            old = self.fleet.workers.pop(name, None)
            if old is not None:
                old.role.__exit__()
            worker = self.fleet.make(name, *arguments)
            worker.excused = frozenset(excused)
            self.fleet.add(worker)

    def record(self) -> Token:
        """Record some deltas, wait until all are acknowledged, and return the token of the last flush."""
        self.load.burst(DELTA_COUNT)
        return self.load.pause()

    def make_anew(self, topic: str) -> None:
        """Delete a topic and create it."""
        delete_topics(self.app.bootstrap, self.app.app, only=(topic,))
        create_topics(self.app.bootstrap, self.app.app, PARTITIONS, only=(topic,))
        self.d.say(f"  {topic} of {self.app.app} is made anew")

    def wait_decide(self) -> None:
        """Wait until each worker has ended with 4, and keep it down; those that end otherwise are restarted before."""

        def down() -> bool:
            last = dict(self.fleet.exits)
            for name, worker in self.fleet.workers.items():
                if last.get(name) == 4:
                    worker.again = worker.wanted = False
            return all(last.get(name) == 4 for name in self.fleet.workers)

        wait_until(down, "workers to end with 4", ENDS_S, seen=self.fleet.tails)

    def read(self, role: Role, token: Token | None = None) -> dict[Labels, int]:
        """Return all series."""
        with Reader(role.url, timeout_s=READ_MS / 1000 + 10) as reader:
            answer = reader.get(VIEW, after=token, limit=SERIES, timeout_ms=READ_MS)
        return {(it.labels[LABELS[0]], it.labels[LABELS[1]]): it.value for it in answer.series}

    def __enter__(self) -> Self:
        self.load.start()
        self.fleet.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.fleet.__exit__(*error)
        self.load.__exit__(*error)
        self.d.fleet.codes.update(self.fleet.codes)
        self.d.fleet.exits += [(f"{self.app.app} {name}", code) for name, code in self.fleet.exits]


def _refused(role: Role, token: Token) -> None:
    """Check that a token of a topic that is gone is refused at once, whatever its offsets are."""
    with Reader(role.url) as reader:
        wait_until(lambda: reader.status()["topic_id"] not in ("", token.topic_id), "the server to hear of it")
        with pytest.raises(OtherTopic):
            reader.get(VIEW, after=token, timeout_ms=AT_ONCE_MS)


def anew_deltas(d: Drive) -> None:
    """Deltas are made anew under a running app: workers end with 4; with --accept-loss they go on, and all is exact."""
    with d.event("deltas made anew"), SideApp(d, "anew-deltas") as side, side.server("server") as reads:
        side.workers(excused={3, 4})
        before = side.record()
        assert side.read(reads, before) == side.load.expected()
        folded = side.load.expected()
        side.make_anew(DELTAS)
        after = side.record()
        acked_s = time.monotonic()
        side.wait_decide()
        _refused(reads, before)
        _is_honest(side, reads, folded, acked_s)
        side.workers(ACCEPT_LOSS, excused={3})
        assert side.read(reads, after) == side.load.expected()
        d.say("  exact with --accept-loss; once more, while they run with it")
        side.fleet.settled()
        side.make_anew(DELTAS)
        last = side.record()
        assert side.read(reads, last) == side.load.expected()
        _refused(reads, after)
        with side.server("fresh") as fresh:
            assert side.read(fresh, last) == side.load.expected()


def _is_honest(side: SideApp, role: Role, folded: Mapping[Labels, int], acked_s: float) -> None:
    """Check that an answer holds what was folded, nothing twice, and that its staleness covers everything it lacks.

    Until a worker, which asks each second, learns that the topic is another, it may fold records of the new topic beyond its
    position. An answer may include these; it claims nothing of the new topic.
    """
    recorded, asked_s = side.load.expected(), time.monotonic()
    with Reader(role.url) as reader:
        answer = reader.get(VIEW, limit=SERIES)
    found = {(it.labels[LABELS[0]], it.labels[LABELS[1]]): it.value for it in answer.series}
    wrong = {it for it in found.keys() | folded.keys() if not folded.get(it, 0) <= found.get(it, 0) <= recorded.get(it, 0)}
    assert not wrong, f"{len(wrong)} series of {len(found)} are neither what was folded nor what was recorded"
    stale_ms = answer.as_of.staleness_ms
    if found != recorded:
        side.d.say(f"  {sum(found.values()) - sum(folded.values())} of the new topic is served; staleness {stale_ms} ms")
        assert stale_ms is None or stale_ms >= (asked_s - acked_s) * 1000, f"staleness {stale_ms} ms is too little"
    assert set(answer.as_of.next_offsets.values()) == {0}, f"something of the new topic is claimed: {answer.as_of}"


def anew_changelog(d: Drive) -> None:
    """The changelog is made anew under a running app: nothing is served until somebody decides; then all is exact."""
    with d.event("changelog made anew"), SideApp(d, "anew-changelog") as side:
        with side.server("server") as reads:
            side.workers(excused={3, 4})
            before = side.record()
            assert side.read(reads, before) == side.load.expected()
            side.make_anew(CHANGELOG)
            token = side.record()
            side.wait_decide()
            _waits_for_decision(side, reads)
        side.workers(ACCEPT_LOSS, excused={3})
        undecided = side.server("server")
        undecided.start(wait_ready=False)
        try:
            wait_until(lambda: status(undecided.url), "a server that has started", ENDS_S, seen=undecided.tail)
            _waits_for_decision(side, undecided)
        finally:
            undecided.__exit__()
        with side.server("server", ACCEPT_LOSS) as decided:  # all of deltas is there still, and is folded again
            assert side.read(decided, token) == side.load.expected()
        d.say("  exact with --accept-loss; once more, while they run with it")
        side.fleet.settled()
        side.make_anew(CHANGELOG)
        last = side.record()
        with side.server("server", ACCEPT_LOSS) as fresh:
            assert side.read(fresh, last) == side.load.expected()


def _waits_for_decision(side: SideApp, role: Role) -> None:
    """Check that every read is refused, and soon with the reason."""
    with Reader(role.url, timeout_s=10) as reader:

        def why() -> str:
            try:
                answer = reader.get(VIEW, limit=SERIES, timeout_ms=1_000)
            except NotReady as error:
                return str(error) if "another changelog" in str(error) else ""
            raise AssertionError(f"{len(answer.series)} series are served, though their changelog is gone")

        said = wait_until(why, "the server to say why it serves nothing", ENDS_S, seen=role.tail)
    side.d.say(f"  the server says: {said[:120]}")
