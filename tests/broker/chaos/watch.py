"""Checks made all the time: no answer goes back or is older than it says, no partition has two owners; pauses are noted."""

from __future__ import annotations

import json
import random
import threading
import time
import urllib.request
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaException, TopicPartition

from pipeline import NotFound, PipelineError, Reader
from pipeline.core.answer import Answer
from pipeline.core.codec import decode_position
from pipeline.core.record import POSITION_KEY
from pipeline.topics import CHANGELOG
from tests.broker.chaos.load import GROUPS, SAMPLE, VIEW, Came, History, Labels
from tests.broker.kafka import App

READ_S = 1.0
PROBLEMS_MAX = 50
FIRST_S = 30.0
"""Time after its first delta for which a view may be unknown."""


class Problems:
    """The faults that were found, as sentences with times; beyond the first few they are dropped."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.found: list[str] = []
        self._say = say

    def add(self, text: str) -> None:
        if len(self.found) < PROBLEMS_MAX:
            self.found.append(text)
            self._say(f"WRONG: {text}")


class _Watch(threading.Thread):
    def __init__(self, name: str, problems: Problems) -> None:
        super().__init__(name=name, daemon=True)
        self.stopping = threading.Event()
        self.problems = problems

    def run(self) -> None:
        try:
            self.watch()
        except BaseException as error:
            self.problems.add(f"the {self.name} itself failed: {error!r}")
            raise

    def watch(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.join(30)


class Reads(_Watch):
    """Reads the grand total, the sample and a random group every second.

    An answer must never be less than one before it, never more than was recorded, and must hold everything that was
    acknowledged `staleness_ms` before it was asked for.
    """

    def __init__(self, url: str, history: History, problems: Problems, seed: int) -> None:
        super().__init__("reads", problems)
        self.count = self.failed_count = 0
        self.staleness_ms = self.staleness_most_ms = 0
        """Staleness of the last answer; the largest one since it was set to 0."""
        self._reader = Reader(url)
        self._history = history
        self._rng = random.Random(seed)
        self._last: dict[Labels, int] = {}
        self._last_total = 0

    def watch(self) -> None:
        while not self.stopping.wait(READ_S):
            for group in (None, SAMPLE, str(self._rng.randrange(GROUPS))):
                self._read(group)

    def _read(self, group: str | None) -> None:
        asked_s = time.monotonic()
        where = {} if group is None else {"group": group}
        try:
            answer = self._reader.get(VIEW, where=where, by=() if group is None else None)
        except NotFound:
            if self._last_total or self._history.acknowledged(asked_s - FIRST_S):
                self.problems.add("the view is not found")
        except PipelineError as error:
            self.failed_count += 1
            self.problems.add(f"a read failed: {error}")
        else:
            self.judge(group, answer, asked_s)

    def judge(self, group: str | None, answer: Answer, asked_s: float) -> None:
        """Check an answer to a read of the total, or of a group, that was asked for at that time."""
        self.count += 1
        stale_ms = answer.as_of.staleness_ms
        if stale_ms is None:
            self.problems.add("an answer without staleness")
            return
        self.staleness_ms, self.staleness_most_ms = stale_ms, max(stale_ms, self.staleness_most_ms)
        had = self._history.acknowledged(asked_s - stale_ms / 1000)
        how = f"staleness {stale_ms} ms, offsets {answer.as_of.next_offsets}"
        if had is not None:
            how += f"; acknowledged by then, {asked_s - had.at_s:.3f} s before it was asked for, were {had.token}"
        if group is None:
            self._judge_total(int(answer.value() or 0), 0 if had is None else had.total, how)
            return
        found = {(it.labels["group"], it.labels["series"]): it.value for it in answer.series if not it.labels.get("extra")}
        for labels, before in self._last.items():
            if labels[0] == group and found.get(labels, 0) < before:
                self.problems.add(f"series {labels} went back from {before} to {found.get(labels)}; {how}")
        for labels, value in (had.sample if had is not None and group == SAMPLE else {}).items():
            if found.get(labels, 0) < value:
                self.problems.add(f"series {labels} is {found.get(labels)}, but {value} was acknowledged by then; {how}")
        self._last |= found

    def _judge_total(self, total: int, least: int, how: str) -> None:
        most = self._history.total + self._history.others
        if total < self._last_total:
            self.problems.add(f"the total went back from {self._last_total} to {total}; {how}")
        if total < least:
            self.problems.add(f"the total is {total}, but {least} was acknowledged by then; {how}")
        if total > most:
            self.problems.add(f"the total is {total}, but only {most} was ever recorded; {how}")
        self._last_total = total


class Commits(_Watch):
    """Follows the changelog as every reader of committed records can, and notes the time of each position.

    A position that does not rise means two owners writing by turns.
    """

    def __init__(self, app: App, partition_count: int, history: History, problems: Problems) -> None:
        super().__init__("commits", problems)
        self._topic = app.topic(CHANGELOG)
        self._history = history
        self.forged: set[bytes] = set()
        """Values of position records that a stranger has written, or copied."""
        self._owners: dict[int, str] = {}
        self._came: dict[int, list[Came]] = {number: [] for number in range(partition_count)}
        self._consumer = Consumer(
            {
                "bootstrap.servers": app.bootstrap,
                "group.id": "look",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "reconnect.backoff.max.ms": 200,
                "topic.metadata.refresh.interval.ms": 5_000,
                "fetch.wait.max.ms": 100,
                "log_level": 0,
                "error_cb": lambda _: None,
            }
        )
        self._consumer.assign([TopicPartition(self._topic, number, OFFSET_BEGINNING) for number in range(partition_count)])

    def watch(self) -> None:
        while not self.stopping.is_set():
            try:
                messages = self._consumer.consume(2_000, 0.1)
            except KafkaException:
                continue  # the broker is away
            now_s = time.monotonic()
            for message in messages:
                value = message.value()
                if message.error() is None and message.key() == POSITION_KEY and value and value not in self.forged:
                    position = decode_position(value)
                    self.note(message.partition(), position.next_offset, now_s, position.owner_id.partition("@")[0])
        self._consumer.close()

    def note(self, partition: int, position: int, now_s: float, owner_id: str = "") -> None:
        """Note a commit. A new owner's first may fold nothing: it repairs entries that strangers have written."""
        came = self._came[partition]
        new_owner, self._owners[partition] = self._owners.get(partition) != owner_id, owner_id
        last = came[-1].position if came else -1
        if position < last or (position == last and not new_owner):
            self.problems.add(f"partition {partition} was committed at {position} behind {last}")
        elif position > last:
            came.append(Came(now_s, position))

    def positions(self) -> dict[int, int]:
        """Return the last position of each partition."""
        return {number: came[-1].position if came else 0 for number, came in self._came.items()}

    def lag(self) -> int:
        """Return the number of records that are acknowledged and not committed."""
        acked = self._history.acked
        ends = acked[-1].token.next_offsets if acked else {}
        now = self.positions()
        return sum(max(0, end - now[number]) for number, end in ends.items())

    def pauses(self, since_s: float, until_s: float) -> dict[int, float]:
        """See `History.pauses`."""
        return self._history.pauses(self._came, since_s, until_s)


class Board(_Watch):
    """Prints each second which process folds which partitions; `also` adds to the line."""

    def __init__(
        self, roles: Callable[[], Mapping[str, str]], problems: Problems, say: Callable[[str], None], also: Callable[[], str]
    ) -> None:
        super().__init__("board", problems)
        self._roles = roles
        self._say = say
        self._also = also

    def watch(self) -> None:
        while not self.stopping.wait(1.0):
            shown = []
            for name, url in self._roles().items():
                said = status(url, 0.5)
                shown.append(f"{name} {_folds(said)}" if said else f"{name} ?")
            self._say(f"{' | '.join(shown)}  {self._also()}")


def status(url: str, timeout_s: float = 5.0) -> dict[str, Any]:
    """Return a process' status; empty if it does not answer."""
    with suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/v1/status", timeout=timeout_s) as answer:
        found: dict[str, Any] = json.loads(answer.read())
        return found
    return {}


def folded(said: Mapping[str, Any]) -> dict[int, int]:
    """Return the positions of the partitions that a process folds."""
    return {it["partition"]: it["next_offset"] for it in said.get("partitions", []) if it["phase"] != "assigned"}


def _folds(said: Mapping[str, Any]) -> str:
    starting = [it["partition"] for it in said.get("partitions", []) if it["phase"] == "assigned"]
    warm = [it["partition"] for it in said.get("standbys", []) if it["phase"] == "following"]
    parts = [digits(folded(said)), f"starts {digits(starting)}" if starting else "", f"+{digits(warm)}" if warm else ""]
    return " ".join(filter(None, parts)) or "-"


def digits(numbers: Collection[int]) -> str:
    """Return partitions in a short form."""
    return ",".join(map(str, sorted(numbers))) or "-"
