"""The drive: brokers, workers, a query server, the load and everything that watches; checks that all answers are exact."""

from __future__ import annotations

import random
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import pipeline.metrics as m
from pipeline import Reader, Token
from tests.broker.chaos.audit import audit, letters
from tests.broker.chaos.fleet import GUARD, SHIFTED, Fleet
from tests.broker.chaos.load import LABELS, VIEW, Again, Load
from tests.broker.chaos.others import EXTRA, LIMIT, READ_MS, Opinions, Orders
from tests.broker.chaos.stranger import Place, Stranger
from tests.broker.chaos.watch import Board, Commits, Problems, Reads
from tests.broker.chaos.windows import VIEWS, Windows
from tests.broker.drive import Role, server
from tests.broker.kafka import App, Broker, Cluster, admin_client, create_topics
from tests.broker.shifted import SHIFTED_MS
from tests.process.load import metric
from tests.support import PROGRAM, wait_until

PARTITIONS = 8
MOVED_S = 90.0
"""Time for which partitions may stand still before it is called a hang."""
SLACK = 3.0
"""Factor by which a pause may exceed its target, if pauses are judged."""


class Pause(NamedTuple):
    """Time for which folding stood still around an event, and the target, if there is one."""

    what: str
    took_s: float
    pause_s: float
    affected_s: float
    target_s: float | None


class Event:
    """One event in the life of the workers, from its start until all have settled."""

    def __init__(self, drive: Drive, what: str) -> None:
        self.drive = drive
        self.what = what
        self.began_s = self.since_s = time.monotonic()

    def restart(self, what: str) -> None:
        """Measure the pause from now on."""
        self.what += f"; {what}"
        self.since_s = time.monotonic()
        self.drive.say(f"  {what}")


class Drive:
    """Everything that runs. To be entered once. `rate` is deltas a second; `judge_pauses` makes long pauses faults, too.

    `workers` are settings of the workers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        seed: int,
        brokers: int,
        rate: float,
        judge_pauses: bool = False,
        workers: Mapping[str, object] | None = None,
        show: bool = True,
    ) -> None:
        self._judge_pauses = judge_pauses
        self._workers = {"commit_interval_ms": 100, **(workers or {})}
        self.rng = random.Random(seed)
        self.pauses: list[Pause] = []
        self.checks = 0
        self.expired_count = 0
        """Number of batches with deltas that came too late for their window."""
        self.refused: set[Place] = set()
        """Places of records that must be dead letters, whole or in part."""
        self.others = Token()
        """Token of everything recorded beside the load."""
        self.folder, self._seed, self._count, self._rate = folder, seed, brokers, rate
        self._began_s = time.monotonic()
        self._show = show
        self._stack = ExitStack()
        self.problems = Problems(self.say)

    def say(self, text: str) -> None:
        """Print a line of the timeline."""
        if self._show:
            print(f"{time.monotonic() - self._began_s:7.1f}  {text}", flush=True)

    def __enter__(self) -> Self:
        try:
            self._enter()
        except BaseException:
            self._stack.close()
            raise
        return self

    def _enter(self) -> None:
        enter = self._stack.enter_context
        if self._count == 1:
            self.brokers: Sequence[Broker] = [enter(Broker(self.folder / "kafka"))]
        else:
            self.brokers = enter(Cluster(self.folder / "kafka", self._count)).brokers
        self.app = App(",".join(it.bootstrap for it in self.brokers), "chaos")
        create_topics(self.app.bootstrap, self.app.app, PARTITIONS)
        self.say(f"{len(self.brokers)} brokers at {self.app.bootstrap}, {PARTITIONS} partitions")
        self.fleet = enter(Fleet(self.app, self.folder, PARTITIONS, self.problems, self.say, self._workers))
        self.reads: Role = enter(self.server("server"))
        self.load = enter(Load(self.app, per_s=self._rate, seed=self._seed, windows=True))
        self.again = Again(self.app, PARTITIONS, self.rng, but=self.refused)
        self._stack.callback(self.again.close)
        self.stranger = Stranger(self.app)
        self._stack.callback(self.stranger.close)
        self.opinions = Opinions(self.app, self.load.history, self.rng)
        self.orders = Orders(self.app, self.stranger, PARTITIONS, self.rng)
        self.commits = enter(Commits(self.app, PARTITIONS, self.load.history, self.problems))
        self.reader = enter(Reads(self.reads.url, self.load.history, self.problems, self._seed))
        enter(Board(self.fleet.urls, self.problems, self.say, self._now))

    def begin(self) -> None:
        """Start a first worker, and the load."""
        self.fleet.start("w1")
        self.fleet.settled()
        self.load.resume()

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _now(self) -> str:
        total = self.load.delta_count
        return f"lag {self.commits.lag()}  staleness {self.reader.staleness_ms} ms  {total} deltas"

    @property
    def broker(self) -> Broker:
        """The only broker."""
        (one,) = self.brokers
        return one

    @property
    def windows(self) -> Windows:
        """The views with windows."""
        assert self.load.windows is not None
        return self.load.windows

    # For scenarios

    @contextmanager
    def event(self, what: str, target_s: float | None = None, numbers: Collection[int] = ()) -> Iterator[Event]:
        """Measure how long folding pauses, of all partitions or of `numbers`."""
        self.say(f"- {what}")
        event = Event(self, what)
        yield event
        now_s = time.monotonic()
        pauses = self.commits.pauses(event.since_s, now_s)
        affected = max((pauses[number] for number in numbers), default=max(pauses.values()))
        pause = Pause(event.what, now_s - event.began_s, max(pauses.values()), affected, target_s)
        self.pauses.append(pause)
        self.say(f"  done in {pause.took_s:.1f} s; folding paused for {pause.affected_s:.2f} s")
        if self._judge_pauses and target_s is not None and pause.affected_s > SLACK * target_s:
            self.problems.add(f"{event.what}: folding paused for {pause.affected_s:.1f} s; the target is {target_s:g} s")

    @contextmanager
    def broker_trouble(self) -> Iterator[None]:
        """Excuse the workers of an only broker that end with 3, or, while they start, with 1."""
        self.fleet.excused = frozenset({1, 3})
        try:
            yield
        finally:
            self.fleet.excused = frozenset()

    def server(self, name: str, *, ahead_ms: int = 0) -> Role:
        """Return a query server that is not started yet, with a clock that is ahead by so much."""
        program, env = (SHIFTED, {SHIFTED_MS: str(ahead_ms)}) if ahead_ms else (PROGRAM, None)
        return server(self.app, self.folder / name, program=(*GUARD, *program), stdin=subprocess.PIPE, env=env)

    def wait_moved(self, positions: Mapping[int, int], timeout_s: float = MOVED_S) -> None:
        """Wait until these partitions are committed beyond these positions."""

        def done() -> bool:
            now = self.commits.positions()
            return all(now[number] > position for number, position in positions.items())

        wait_until(done, f"{dict(positions)} to move; they are at {self.commits.positions()}", timeout_s)

    def wait_all_moved(self) -> None:
        """Wait until each partition is committed beyond what is committed and acknowledged now."""
        ends = self.commits.positions()
        acked = self.load.history.acked[-1].token.next_offsets
        self.wait_moved({number: max(at, acked.get(number, 0)) for number, at in ends.items()})

    def wait_folded(self, ends: Mapping[int, int], timeout_s: float = MOVED_S) -> None:
        """Wait until there is no lag below these ends."""

        def done() -> bool:
            now = self.commits.positions()
            return all(now[number] >= end for number, end in ends.items())

        try:
            wait_until(done, "", timeout_s)
        except AssertionError:
            now = self.commits.positions()
            raise AssertionError(f"lag after {timeout_s:g} s: {dict(ends)} are wanted, committed are {now}") from None

    def wait_in_sync(self) -> None:
        """Wait until every replica of every partition is in sync."""
        admin = admin_client(self.app.bootstrap)

        def done() -> bool:
            topics = admin.list_topics(timeout=10).topics.values()
            return all(len(part.isrs) == len(part.replicas) for topic in topics for part in topic.partitions.values())

        wait_until(done, "replicas in sync", 60)

    def quiet(self) -> Token:
        """Pause the load, wait until everything is folded, and return the token of everything."""
        token = self.load.pause() | self.others
        self.wait_folded(token.next_offsets)
        return token

    def counted_duplicates(self) -> float:
        """Return the number of duplicates that the running workers have counted since they started."""
        return sum(metric(url, m.BATCHES_DUPLICATE) for url in self.fleet.urls().values())

    # Exactness

    def check(self) -> None:
        """Check that everything recorded is in the answer once, and nothing is a dead letter; then resume the load."""
        began_s = time.monotonic()
        token = self.quiet()
        self.compare(self.reads, token)
        self._check_letters()
        self.checks += 1
        took_s = time.monotonic() - began_s
        self.say(f"  exact: {len(self.load.expected())} series, {self.load.history.total} in all ({took_s:.1f} s)")
        ends = self.again.send(self.rng.randrange(1, 20)) if self.rng.random() < 0.5 else {}
        self.load.resume()
        self.wait_folded(ends)  # so that no scenario takes the duplicates of another for its own

    def compare(self, role: Role, token: Token) -> None:
        """Compare an answer with the load, series by series."""
        with Reader(role.url, timeout_s=READ_MS / 1000 + 10) as reader:
            answer = reader.get(VIEW, after=token, limit=LIMIT, timeout_ms=READ_MS)
        names = (*LABELS, EXTRA)
        found: dict[tuple[str, ...], int] = {
            tuple(it.labels.get(name, "") for name in names): it.value for it in answer.series
        }
        expected = Counter({(*labels, ""): value for labels, value in self.load.expected().items()})
        expected.update(self.opinions.sums)
        wrong = {
            it: (found.get(it), expected.get(it))
            for it in expected.keys() | found.keys()
            if found.get(it) != expected.get(it)
        }
        lost = sum((want or 0) - (have or 0) for have, want in wrong.values())
        some = dict([*wrong.items()][:3])
        assert not wrong, f"{role.data.name}: {len(wrong)} series are wrong, {lost} missing in all (found, right): {some}"
        others = self.opinions.compare_kinds(role.url, token) + self.orders.compare(role.url, token)
        others += self.windows.compare(role.url, token)
        assert not others, f"{role.data.name}: {'; '.join(others)}"

    def _check_letters(self) -> None:
        """Check that exactly the records that had to be refused are dead letters."""
        late, found, reasons = set(), set(), Counter[str]()
        for letter in letters(self.app):
            place = Place(letter.partition, letter.offset)
            is_late = letter.view in VIEWS and letter.reason.startswith("expired")
            (late if is_late else found).add(place)
            reasons[letter.reason] += not is_late and place not in self.refused
        self.expired_count = len(late)
        unasked, missing = found - self.refused, self.refused - found
        assert not unasked, f"{len(unasked)} dead letters of what is right: {sorted(unasked)[:3]}, {reasons.most_common(2)}"
        assert not missing, f"{len(missing)} records are no dead letters, such as {sorted(missing)[:3]}"

    def finish(self, delta_count_min: int) -> None:
        """Finish the load, check a last time, also a server that is restored from nothing, and audit the logs."""
        self.load.pause()
        if (rest := delta_count_min - self.load.delta_count) > 0:
            self.say(f"- the rest of the load: {rest} deltas at once")
            self.load.burst(rest)
        token = self.quiet()
        self.compare(self.reads, token)
        self.say("- a server is restored from nothing")
        with self.server("fresh") as fresh:
            self.compare(fresh, token)
        self._check_letters()
        found = audit(self.app)
        assert not found.wrong, f"{len(found.wrong)} producers are folded wrongly: {found.wrong[:3]}"
        assert found.copy_count >= self.again.count, f"{found.copy_count} copies in the log, {self.again.count} were sent"
        self.say(f"  {self.windows.shown(self.reads.url)}; {self.expired_count} batches had deltas that came too late")
        self.say(
            f"  exact; {found.record_count} batches, {found.copy_count} of them copies, {self.again.count} sent on purpose"
        )

    def tails(self) -> str:
        """Return the last output of each process."""
        return "\n\n".join([self.fleet.tails(), self.reads.tail()])
