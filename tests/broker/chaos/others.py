"""Publishers beside the load: some define its view otherwise, some record a view that is dropped and reset meanwhile."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from pipeline import NotFound, Publisher, Reader, Token
from pipeline.core.codec import encode_batch
from pipeline.core.record import Batch, Control
from pipeline.topics import DELTAS
from tests.broker.chaos.ledger import Kept, Labels, ledger
from tests.broker.chaos.load import GROUPS, LABELS, SERIES, SETTINGS, VIEW, History, series_of
from tests.broker.chaos.stranger import Raw, Stranger
from tests.broker.kafka import App

EXTRA = "extra"
ORDERS = "orders"
READ_MS = 60_000
LIMIT = 1_000_000
PAUSE_S = 0.05
A_ROUND = 20
"""Number of deltas between two pauses."""
FLUSH_S = 60.0


class Opinion(NamedTuple):
    """Another publisher's definition of a view."""

    kind: str
    labels: tuple[str, ...]
    monotone: bool = False


class _Recording(threading.Thread):
    """Records with a publisher of its own until it is stopped."""

    def __init__(self, app: App, view: str, opinion: Opinion, record: Callable[[Any], None]) -> None:
        super().__init__(name=f"records {view} {opinion}", daemon=True)
        self._publisher = Publisher(app.url, close_timeout_ms=5_000, **SETTINGS)
        self._view = self._publisher.view(opinion.kind, view, labels=opinion.labels, monotone=opinion.monotone)
        self._record = record
        self._stopping = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._stopping.wait(PAUSE_S):
                for _ in range(A_ROUND):
                    self._record(self._view)
        except BaseException as error:
            self._error = error
            raise

    def finish(self) -> Token:
        """Stop, wait until everything is acknowledged, close the publisher in order, and return the token of it."""
        self._stopping.set()
        self.join(30)
        if self._error is not None:
            raise self._error
        token = self._publisher.flush(timeout_s=FLUSH_S)
        self._publisher.close(timeout_s=FLUSH_S)
        return token


class _Recordings:
    """Several recordings at once, while the context is entered."""

    def __init__(self, threads: list[_Recording]) -> None:
        self._threads = threads
        self.token = Token()
        """Token of everything recorded, once the context ends."""

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, error_type: object, *_: object) -> None:
        for thread in self._threads:
            if error_type is None:
                self.token |= thread.finish()
            else:
                thread._stopping.set()


class Opinions:
    """Publishers that record the load's view with other labels or as another kind, and the values that must result."""

    ALL = (
        Opinion("sum", ("group",)),
        Opinion("sum", LABELS),
        Opinion("sum", (EXTRA, *LABELS), monotone=True),
        Opinion("max", ("group",)),
    )

    def __init__(self, app: App, history: History, rng: random.Random) -> None:
        self._app, self._history, self._rng = app, history, rng
        self._lock = threading.Lock()
        self.sums: Counter[tuple[str, ...]] = Counter()
        """Sums that these publishers have added, by group, series and extra."""
        self.largest: dict[str, int] = {}
        """Largest observation of each group."""

    def recording(self) -> _Recordings:
        """Run all these recordings while the context is entered."""
        return _Recordings([_Recording(self._app, VIEW, it, self._recorder(it)) for it in self.ALL])

    def _recorder(self, opinion: Opinion) -> Callable[[Any], None]:
        rng = random.Random(self._rng.random())

        def record(view: Any) -> None:
            amount = rng.randrange(1, 10)
            group, series = series_of(rng.randrange(SERIES // 20))
            labels = {"group": group, "series": series, EXTRA: f"x{rng.randrange(5)}"}
            mine = {name: labels[name] for name in opinion.labels}
            if opinion.kind == "max":
                with self._lock:
                    self.largest[group] = max(self.largest.get(group, 0), amount)
                view.observe(amount, **mine)
                return
            self.note(amount, mine)
            view.add(amount, **mine)

        return record

    def note(self, amount: int, labels: dict[str, str]) -> None:
        """Note that a publisher is about to add to a series of the load's view."""
        with self._lock:
            self.sums[labels.get("group", ""), labels.get("series", ""), labels.get(EXTRA, "")] += amount
            self._history.others += amount

    def compare_kinds(self, url: str, token: Token) -> list[str]:
        """Return the faults of the kind that is not the view's first, which its answers name."""
        if not self.largest:
            return []
        with Reader(url, timeout_s=READ_MS / 1000 + 10) as reader:
            first = reader.get(VIEW, by=(), after=token, timeout_ms=READ_MS)
            if first.kind != "sum" or [(it.kind, it.window_s) for it in first.also] != [("max", 0)]:
                return [f"the view answers with {first.kind}, and names {first.also}"]
            second = reader.get(VIEW, kind="max", after=token, limit=LIMIT, timeout_ms=READ_MS)
        found = {it.labels["group"]: it.value for it in second.series}
        return [] if found == self.largest else [f"the largest of {VIEW} are {found}, not {self.largest}"]


class Orders:
    """A view that several publishers define differently, and that orders in the log drop and reset meanwhile."""

    ALL = (Opinion("sum", ("n",), monotone=True), Opinion("sum", ("n", "region")), Opinion("max", ("n",)))

    def __init__(self, app: App, stranger: Stranger, partition_count: int, rng: random.Random) -> None:
        self._app, self._stranger, self._partition_count, self._rng = app, stranger, partition_count, rng
        self._producer_id = uuid.uuid4().hex
        self.sent: list[list[Raw]] = []
        """All orders, as sent to each partition."""
        self.began = False

    def recording(self) -> _Recordings:
        """Run all recordings of this view while the context is entered."""
        self.began = True
        return _Recordings([_Recording(self._app, ORDERS, it, self._recorder(it)) for it in self.ALL])

    def _recorder(self, opinion: Opinion) -> Callable[[Any], None]:
        rng = random.Random(self._rng.random())

        def record(view: Any) -> None:
            labels = {"n": str(rng.randrange(GROUPS)), "region": rng.choice(("eu", "us"))}
            mine = {name: labels[name] for name in opinion.labels}
            (view.observe if opinion.kind == "max" else view.add)(rng.randrange(1, 1_000), **mine)

        return record

    def order(self) -> str:
        """Send a random order to every partition, as one batch of this producer in each, and return its text."""
        action = self._rng.choice(("drop", "reset"))
        opinion = self._rng.choice((None, *self.ALL))
        control = Control(action, ORDERS)
        if opinion is not None:
            labels = self._rng.choice((None, opinion.labels))
            control = Control(action, ORDERS, opinion.kind, labels)
        sequence, now_ms = len(self.sent), int(time.time() * 1000)
        batches = [
            Batch(self._producer_id, 0, number, sequence, sequence, now_ms, [], controls=[control])
            for number in range(self._partition_count)
        ]
        self.sent.append([Raw(it.partition, encode_batch(it)) for it in batches])
        self._stranger.send(DELTAS, self.sent[-1])
        return f"{action} {control.kind or 'all'} {control.labels or ''}"

    def again(self) -> None:
        """Send an order again that was carried out before, and must not be carried out again."""
        if self.sent:
            self._stranger.send(DELTAS, self._rng.choice(self.sent))

    def compare(self, url: str, token: Token) -> list[str]:
        """Return the faults of the view, compared with the logs."""
        if not self.began:
            return []
        right = ledger(self._app, {ORDERS}).values
        wrong = []
        with Reader(url, timeout_s=READ_MS / 1000 + 10) as reader:
            for kind in ("sum", "max"):
                found: dict[Labels, Any] = {}
                try:
                    answer = reader.get(ORDERS, kind=kind, after=token, limit=LIMIT, timeout_ms=READ_MS)
                except NotFound:  # all of that kind are dropped
                    pass
                else:
                    found = {
                        tuple((name, value) for name, value in sorted(it.labels.items()) if value): it.value
                        for it in answer.series
                    }
                wanted = right.get(Kept(ORDERS, kind), {})
                differing = [it for it in found.keys() | wanted.keys() if found.get(it) != wanted.get(it)]
                some = {it: (found.get(it), wanted.get(it)) for it in differing[:3]}
                if differing:
                    wrong.append(f"{ORDERS} {kind}: {len(differing)} of {len(wanted)} are wrong (found, right): {some}")
        return wrong
