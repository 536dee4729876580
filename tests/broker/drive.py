"""Runs the pipeline on a broker as processes, ends them in every way, and compares all answers with naive counts."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, TopicPartition

from pipeline import Publisher, Reader, Token
from pipeline.core.codec import decode_position
from pipeline.core.record import POSITION_KEY
from pipeline.topics import CHANGELOG, DEAD_LETTERS
from tests.broker.kafka import App, Port
from tests.broker.sender import ONCE, ONCE_COUNT, ROUNDS_MAX, SERIES, VIEW, touched
from tests.process.load import Load, answers, merged, stop
from tests.support import PROGRAM, ROOT, UpProcess, environment, wait_until

PUBLISHER = {"flush_interval_ms": 30, "retry_backoff_max_ms": 100, "request_timeout_ms": 2_000, "metadata_refresh_ms": 100}
"""Settings of publishers that share a test with faults: quick to try again."""
_TAIL = 3_000
_LIMIT = 1_000_000

Answers = dict[str, dict[tuple[str, str], Any]]


class Role(UpProcess):
    """`pipeline worker` or `pipeline serve` as a process, on a port reserved for as long as this object lives."""

    def __init__(
        self,
        role: str,
        app: App,
        data: Path,
        *arguments: str,
        program: Sequence[str] = PROGRAM,
        stdin: int = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        **settings: object,
    ) -> None:
        quick = {"metadata_refresh_ms": 100, "mirror_interval_ms": 0, "commit_interval_ms": 60, **settings}
        given = [f"--set={name}={value}" for name, value in quick.items()]
        self._kept = Port()
        command = (role, "--from", app.url)
        port = self._kept.number
        super().__init__(data, *arguments, *given, command=command, port=port, program=program, stdin=stdin, env=env)

    @property
    def exit_code(self) -> int | None:
        """Exit code of the process that was started last; None while it runs."""
        return self.program.process.poll()

    def tail(self) -> str:
        """Return the end of the process' output."""
        return f"{self.data.name}: {self.program.stderr()[-_TAIL:]}"

    def condition(self) -> str:
        """Return, for a failure's message, whether the process runs, what its status says, and the end of its log."""
        code = self.exit_code
        return (
            f"{self.data.name} "
            + (f"ended with {code}" if code is not None else f"runs; status: {self._status()}")
            + f"; log:\n{self.program.stderr()[-_TAIL:]}"
        )

    def _status(self) -> str:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/status", timeout=5) as answer:
                return str(answer.read().decode())
        except OSError as error:
            return f"none: {error}"

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._kept.close()


def worker(app: App, data: Path, *arguments: str, **settings: Any) -> Role:
    """Return a worker of all partitions."""
    return Role("worker", app, data, *arguments, **settings)


def server(app: App, data: Path, *arguments: str, **settings: Any) -> Role:
    """Return a query server."""
    return Role("serve", app, data, *arguments, **settings)


def conditions(*roles: Role) -> Callable[[], str]:
    """Return a function that tells the conditions of all these roles, for `wait_until`."""
    return lambda: "\n".join(role.condition() for role in roles)


class Supervised:
    """Starts a role again when it ends, as a restart policy does, and notes how it ended."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.codes: list[int] = []
        """Exit codes, in order; -9 is kill -9."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(0.02):
            code = self.role.exit_code
            if code is not None:
                self.codes.append(code)
                self.role.kill()
                self.role.start(wait_ready=False)

    def kill(self) -> None:
        """Kill the process with kill -9, from which it comes back by itself."""
        self.role.program.process.kill()

    def ready(self) -> bool:
        """Return whether the role says that it is ready."""
        with suppress(OSError), urllib.request.urlopen(f"{self.role.url}/readyz", timeout=5) as answer:
            return answer.status == 200
        return False

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)


class Sender:
    """A process of `tests.broker.sender`; it ends when this object or its process does."""

    def __init__(self, app: App, name: str, errors: Path) -> None:
        self.name = name
        self._errors = errors / f"{name}.stderr"
        with self._errors.open("wb") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.broker.sender", app.url, name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment(),
                cwd=ROOT,
                start_new_session=True,
            )
        self._rounds = 0
        self._token = Token({})

    @property
    def acknowledged(self) -> int:
        """Number of acknowledged rounds in the reports read so far: all of them once the process was killed."""
        return self._rounds

    @property
    def token(self) -> Token:
        """Token of the rounds that were read."""
        return self._token

    def wait_round(self) -> None:
        """Wait for the next report."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line.endswith("\n"), f"{self.name} ended: {self._errors.read_text()[-_TAIL:]}"
        self._note(line)

    def _note(self, line: str) -> None:
        number, _, token = line.strip().partition(" ")
        assert int(number) == self._rounds
        self._rounds, self._token = self._rounds + 1, Token.parse(token)

    def kill(self) -> Token:
        """Kill the process with kill -9, and return the token of what was acknowledged. May be called twice."""
        self._process.kill()
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        if not self._process.stdout.closed:
            for line in self._process.stdout.read().decode().splitlines(keepends=True):
                self._note(line)
            self._process.stdout.close()
        self._process.wait(30)
        self._process.stdin.close()
        return self._token

    def wrong(self, counted: Answers) -> list[str]:
        """Return the miscounted rounds: acknowledged ones must count once, others once or not at all."""
        rounds = touched(self.name)
        wrong = []

        def look(number: int, sent: bool, times: float, where: str) -> None:
            if times != sent and (times != 0 or number < self._rounds):
                wrong.append(f"{self.name}: round {number} of {self._rounds} is {times} times in {where}")

        for n in range(SERIES):
            digits = counted[VIEW].get((self.name, str(n)), 0)
            for number in range(ROUNDS_MAX):
                digits, times = divmod(digits, 4)
                look(number, number <= self._rounds and n in rounds[number], times, f"series {n}")
        for number in range(ROUNDS_MAX):
            for n in range(ONCE_COUNT):
                value = counted[ONCE].get((self.name, f"{number}-{n}"), 0)
                look(number, number <= self._rounds, value / (number + 1), f"its own series {n}")
        return wrong

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


@contextmanager
def loaded(app: App, count: int = 2, **settings: Any) -> Iterator[tuple[Publisher, list[Load]]]:
    """Yield a publisher in this process that `count` threads record to. They are stopped at the end, if not before."""
    with Publisher(app.url, close_timeout_ms=1_000, **{**PUBLISHER, **settings}) as publisher:
        loads = [Load(publisher, number, pause_s=0.03) for number in range(count)]
        for load in loads:
            load.start()
        wait_until(lambda: all(load.delta_count for load in loads), "load")
        try:
            yield publisher, loads
        finally:
            stop(loads)


def finish(publisher: Publisher, loads: Sequence[Load]) -> tuple[Token, Answers]:
    """End the load; return the token of everything, and the value that each series must have."""
    stop(loads)
    return publisher.flush(timeout_s=60), merged(loads)


def read_rounds(url: str, after: Token) -> Answers:
    """Return the series of the senders."""
    with Reader(url) as reader:
        return {
            view: {
                (it.labels["sender"], it.labels["n"]): it.value for it in reader.get(view, after=after, limit=_LIMIT).series
            }
            for view in (VIEW, ONCE)
        }


def check(
    app: App,
    running: Sequence[Role],
    scratch: Path,
    *,
    load: tuple[Token, Answers] | None = None,
    senders: Sequence[Sender] = (),
) -> None:
    """Check that every running server, and a fresh one restored from the changelog, answer what the naive counts say.

    `load` is what `finish` returned; `senders` are killed. Dead letters must be empty, and positions never fall.
    """
    with server(app, scratch / "fresh") as fresh:
        for role in (*running, fresh):
            if load is not None:
                assert_same(answers(role.url, load[0]), load[1], role)
            if senders:
                token = Token({})
                for sender in senders:
                    token |= sender.kill()
                counted = read_rounds(role.url, token)
                wrong = [line for sender in senders for line in sender.wrong(counted)]
                assert not wrong, f"{len(wrong)} wrong, such as {wrong[:5]}; {role.tail()}"
    assert not records(app, DEAD_LETTERS), "there are dead letters"
    assert_positions_rise(app)


def assert_same(found: Answers, expected: Answers, role: Role) -> None:
    """Compare series by series."""
    for view, series in expected.items():
        assert found[view].keys() == series.keys(), f"{view}: {found[view].keys() ^ series.keys()}; {role.tail()}"
        wrong = {labels: (found[view][labels], value) for labels, value in series.items() if found[view][labels] != value}
        some = dict([*wrong.items()][:3])
        assert not wrong, f"{role.data.name}: {view}: {len(wrong)} of {len(series)} wrong, such as {some}; {role.tail()}"


def assert_positions_rise(app: App) -> None:
    """Check that no commit of a partition begins before the end of the one before it: two owners never wrote by turns."""
    last: dict[int, int] = {}
    for record in records(app, CHANGELOG):
        if record.key() == POSITION_KEY:
            value = record.value()
            assert value is not None
            next_offset = decode_position(value).next_offset
            partition = record.partition()
            assert next_offset > last.get(partition, -1), f"changelog-{partition}: from {last[partition]} to {next_offset}"
            last[partition] = next_offset


def records(app: App, topic: str) -> list[Message]:
    """Return all committed records of a topic."""
    consumer = _consumer(app, "read_committed")
    try:
        count = len(consumer.list_topics(app.topic(topic), 10).topics[app.topic(topic)].partitions)
        left = set(range(count))
        consumer.assign([TopicPartition(app.topic(topic), number, OFFSET_BEGINNING) for number in left])
        found: list[Message] = []
        deadline_s = time.monotonic() + 60
        while left:
            assert time.monotonic() < deadline_s, f"{topic}: no end of partitions {left} in 60 s"
            for message in consumer.consume(5_000, 0.1):
                error = message.error()
                if error is None:
                    found.append(message)
                else:
                    assert error.code() == KafkaError._PARTITION_EOF, error
                    left.discard(message.partition())
        return found
    finally:
        consumer.close()


def torn_commits(app: App, partitions: int) -> set[int]:
    """Return the changelog partitions in which a transaction is open that has written some of a commit, but not its end."""
    torn = set()
    consumer, stable = _consumer(app, "read_uncommitted"), _consumer(app, "read_committed")
    try:
        for number in range(partitions):
            place = TopicPartition(app.topic(CHANGELOG), number)
            end = consumer.get_watermark_offsets(place, 10)[1]
            if stable.get_watermark_offsets(place, 10)[1] < end:
                consumer.assign([TopicPartition(app.topic(CHANGELOG), number, end - 1)])
                (last,) = consumer.consume(1, 10) or [None]
                if last is not None and last.error() is None and last.key() != POSITION_KEY:
                    torn.add(number)
        return torn
    finally:
        consumer.close()
        stable.close()


def _consumer(app: App, isolation: str) -> Consumer:
    return Consumer(
        {
            "bootstrap.servers": app.bootstrap,
            "group.id": "look",
            "isolation.level": isolation,
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )


def wait_exit(role: Role, timeout_s: float) -> int:
    """Wait for the end of a process, and return its exit code."""
    wait_until(lambda: role.exit_code is not None, f"the end of {role.tail()}", timeout_s)
    code = role.exit_code
    assert code is not None
    return code
