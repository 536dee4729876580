"""`pipeline dead-letters` on an embedded log: listed, shown, replayed; each letter counts once, whatever happens."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import pipeline.topics as topics
from pipeline import Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.datadir import DataDir
from pipeline.adapters.embedded.log import EmbeddedLog
from pipeline.cli.letters import parse_since
from pipeline.core.codec import DeadLetter, encode_batch, encode_letter
from pipeline.core.record import Batch, Definition, Group, series_suffix
from pipeline.errors import Invalid
from pipeline.ports import Message
from pipeline.settings import LogSettings
from pipeline.topics import DEAD_LETTERS, DELTAS
from tests.cli.conftest import Here
from tests.support import UpProcess, everything, pipeline

GOOD, WRONG = Definition("good", "sum", ("n",)), Definition("wrong", "sum", ("n",))


def group(definition: Definition, *values: int) -> Group:
    """Return a group of series `0`, `1`... with these sums."""
    return Group(definition, [series_suffix((str(n),)) for n in range(len(values))], [*values])


def batch(sequence: int, *groups: Group, partition: int = 0, producer_id: str = "p", epoch: int = 0) -> bytes:
    """Return a sealed batch."""
    return encode_batch(Batch(producer_id, epoch, partition, sequence, 0, 1_000, [*groups]))


@contextmanager
def opened(data: Path) -> Iterator[EmbeddedLog]:
    """Open the log of a folder that no process has."""
    with DataDir(data) as folder:
        log = EmbeddedLog(folder.log, topics.load(), LogSettings(data=str(data), partitions=2), SystemClock())
        try:
            yield log
        finally:
            log.close()


def write(data: Path, *values: bytes, topic: str = DELTAS, partition: int = 0, key: bytes | None = None) -> None:
    """Append records to the log of a folder that no process has."""
    with opened(data) as log:
        results = log.append([Message(topic, partition, key, value) for value in values], timeout_s=1)
        assert all(isinstance(it, int) for it in results), results


@contextmanager
def up(data: Path, **settings: object) -> Iterator[UpProcess]:
    """Run a server that has folded everything."""
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    with UpProcess(data, "--set", "commit_interval_ms=5", *options) as process:
        settle(process)
        yield process


def settle(process: UpProcess) -> None:
    """Wait until everything in the log is folded."""
    with Reader(process.url) as reader:
        reader.get("good", by=(), after=everything(reader))


def total(process: UpProcess, view: str) -> Any:
    """Return the sum of a view."""
    settle(process)
    with Reader(process.url) as reader:
        return reader.get(view, by=()).value()


def said(here: Here, *arguments: str, code: int = 0) -> Any:
    """Return the JSON that a command prints."""
    done = here("dead-letters", *arguments, "--json")
    assert done.returncode == code, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def results(answer: Any) -> list[str]:
    """Return the result of each letter."""
    return [outcome["result"] for outcome in answer["outcomes"]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A log with four good deltas, two groups that are one definition too many, and bytes that are no batch."""
    data = tmp_path / "data"
    write(
        data,
        batch(0, group(GOOD, 1, 2)),
        batch(1, group(GOOD, 3), group(WRONG, 10, 20)),
        b"no batch",
        batch(2, group(WRONG, 30), group(GOOD, 4)),
    )
    return data


def test_the_whole_story(data: Path, here: Here) -> None:
    """A wrong group becomes a letter next to good ones that count; it is replayed once it is mended, and counts once."""
    with up(data, views_max=1) as process:
        assert total(process, "good") == 10
        listed = said(here, "ls", "--from", process.url)
        assert [(it["offset"], it["view"], it["series_count"]) for it in listed["letters"]] == [
            (1, "wrong", 2), (2, "", 0), (3, "wrong", 1),
        ]  # fmt: skip
        assert listed["letter_count"] == 3
        again = said(here, "replay", "--from", process.url, "--view", "wrong", code=1)
        assert results(again) == ["refused again", "refused again"]
        assert "views_max" in again["outcomes"][0]["reason"]
        assert [it["key"] for it in said(here, "ls", "--from", process.url)["letters"]] == [
            listed["letters"][i]["key"] for i in (1, 0, 2)
        ], "what fails again stays, as the newest"
        assert total(process, "good") == 10
    with up(data) as process:
        try_run = said(here, "replay", "--from", process.url, "--dry-run", code=1)
        assert try_run["counts"] == {"replayable": 2, "not replayed": 1}
        done = said(here, "replay", "--from", process.url, code=1)
        assert done["counts"] == {"counted": 2, "not replayed": 1}
        assert "version byte" in next(it["reason"] for it in done["outcomes"] if it["result"] == "not replayed")
        assert (total(process, "wrong"), total(process, "good")) == (60, 10)
        keys = [it["key"] for it in done["outcomes"] if it["result"] == "counted"]
        assert results(said(here, "replay", "--from", process.url, *keys)) == ["counted before"] * 2
        assert results(said(here, "replay", "--from", process.url, code=1)) == ["not replayed"]
        process.kill()
        process.start()
        assert results(said(here, "replay", "--from", process.url, *keys)) == ["counted before"] * 2
        assert (total(process, "wrong"), total(process, "good")) == (60, 10)
        (left,) = said(here, "ls", "--from", process.url)["letters"]
        assert left["view"] == ""
        assert process.terminate() == 0
    assert said(here, "ls", "--data", str(data))["letters"] == [left]


def test_two_at_once_count_once(tmp_path: Path) -> None:
    """Several people replay the same letters at the same time: each answer says counted, and each letter counts once."""
    data = tmp_path / "data"
    write(data, batch(0, group(GOOD, 1)), *(batch(n, group(WRONG, n)) for n in range(1, 301)))
    with up(data, views_max=1) as process:
        assert process.terminate() == 0
    answers: list[Any] = []
    with up(data) as process:

        def replay() -> None:
            done = pipeline("dead-letters", "replay", "--from", process.url, "--json")
            assert done.returncode == 0, (done.stdout[-2_000:], done.stderr)
            answers.append(json.loads(done.stdout)["counts"])

        threads = [threading.Thread(target=replay) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(answers) == 3
        assert all({*counts} <= {"counted", "counted before"} for counts in answers), answers
        assert max(sum(counts.values()) for counts in answers) == 300
        assert total(process, "wrong") == 300 * 301 // 2


def test_a_killed_server_counts_once(tmp_path: Path, here: Here) -> None:
    """After kill -9 in the middle of a replay, letters that are replayed again count once, and nothing is missing."""
    data = tmp_path / "data"
    write(data, batch(0, group(GOOD, 1)), *(batch(n, group(WRONG, n)) for n in range(1, 3_001)))
    with up(data, views_max=1) as process:
        assert process.terminate() == 0
    with up(data) as process:
        for kill_after_s in (0.3, 0.6):
            killer = threading.Timer(kill_after_s, process.kill)
            killer.start()
            here("dead-letters", "replay", "--from", process.url)
            killer.join()
            process.start()
        settle(process)
        said(here, "replay", "--from", process.url)
        assert total(process, "wrong") == 3_000 * 3_001 // 2
        assert said(here, "ls", "--from", process.url)["letters"] == []


def test_a_stale_letter_whose_batch_was_counted_is_not_counted_again(tmp_path: Path, here: Here) -> None:
    """A letter whose batch the newer process has sent itself is settled by its replay, and not counted again."""
    data = tmp_path / "data"
    write(
        data,
        batch(0, group(GOOD, 1), epoch=3),
        batch(1, group(GOOD, 10), epoch=2),
        batch(2, group(GOOD, 100), epoch=2),
        batch(1, group(GOOD, 10), epoch=3),
    )
    with up(data) as process:
        assert total(process, "good") == 11
        assert said(here, "replay", "--from", process.url)["counts"] == {"counted": 2}
        assert total(process, "good") == 111
        assert said(here, "ls", "--from", process.url)["letters"] == []


def test_filters_and_limits(data: Path, here: Here) -> None:
    """Each filter narrows the list and the replay; totals are of all matching letters."""
    with up(data, views_max=1) as process:
        at = ("--from", process.url)

        def count(*options: str) -> tuple[int, int]:
            found = said(here, "ls", *at, *options)
            return len(found["letters"]), found["letter_count"]

        assert count() == (3, 3)
        assert count("--limit", "1") == (1, 3)
        assert count("--view", "wrong") == (2, 2)
        assert count("--view", "good") == (0, 0)
        assert count("--reason", "views_max") == (2, 2)
        assert count("--reason", "version") == (1, 1)
        assert count("--partition", "0") == (3, 3)
        assert count("--partition", "1") == (0, 0)
        assert count("--since", "1h") == (3, 3)
        assert count("--since", "2100-01-01T00:00:00Z") == (0, 0)
        assert results(said(here, "replay", *at, "--reason", "version", code=1)) == ["not replayed"]
        assert results(said(here, "replay", *at, "--partition", "1")) == []
        for options, status in ((("--partition", "2"), 2), (("--since", "soon"), 2), (("--data", str(data)), 2)):
            assert here("dead-letters", "ls", *at, *options).returncode == status


def test_what_is_printed(data: Path, here: Here) -> None:
    """A person sees a table with totals, a letter with its series, the outcome of each; nothing steers the terminal."""
    with up(data, views_max=1) as process:
        at = ("--from", process.url)
        listed = here("dead-letters", "ls", *at)
        assert listed.returncode == 0
        head, *rows, totals = listed.stdout.splitlines()
        assert head.split() == ["key", "view", "producer", "time", "reason", "series", "bytes"]
        assert totals.startswith("3 dead letters, ")
        key = rows[0].split()[0]
        shown = here("dead-letters", "show", key, *at)
        assert "group 0: sum wrong(n), 2 series" in shown.stdout
        assert "n=1" in shown.stdout
        assert "20" in shown.stdout
        cut = here("dead-letters", "show", key, *at, "--series", "1")
        assert "and 1 more (--series)" in cut.stdout
        assert said(here, "show", key, *at)["batch"]["groups"][0]["series_count"] == 2
        assert "it begins with 6e6f206261746368" in here("dead-letters", "show", rows[1].split()[0], *at).stdout
        done = here("dead-letters", "replay", *at, key)
        assert done.returncode == 1
        assert done.stdout.splitlines() == [
            f"{key}  refused again: over 1 definitions of views in partition 0 (views_max)", "1 refused again",
        ]  # fmt: skip
        for wrong in ("nonsense", "0-999"):
            assert here("dead-letters", "show", wrong, *at).returncode == 2
            assert "there is no such letter" in here("dead-letters", "replay", *at, wrong).stdout


def test_empty_and_stopped_logs(tmp_path: Path, here: Here) -> None:
    """An empty log is no error; a folder that a process has, or that is no log, is one."""
    data = tmp_path / "data"
    with up_empty(data) as process:
        assert said(here, "ls", "--from", process.url)["letters"] == []
        assert here("dead-letters", "replay", "--from", process.url).stdout == "no dead letters\n"
        assert here("dead-letters", "ls", "--data", str(data)).returncode == 1
        assert process.terminate() == 0
    assert here("dead-letters", "ls", "--data", str(data)).stdout == "0 dead letters, 0 bytes\n"
    assert here("dead-letters", "ls", "--data", str(tmp_path)).returncode == 2
    gone = here("dead-letters", "ls", "--from", process.url)
    assert gone.returncode == 1
    assert "Connection refused" in gone.stderr


@contextmanager
def up_empty(data: Path) -> Iterator[UpProcess]:
    """Run a server that nothing was published to."""
    with UpProcess(data) as process:
        yield process


def strangers(letter: bytes) -> Sequence[tuple[bytes | None, bytes]]:
    """Return records that no task wrote."""
    return [
        (None, b"x"), (b"", b""), (b"\xff\xfe", b"x"), (b"0-7-1", b"garbage"), (b"0-7-2", b"\x03" + letter[1:]),
        (b"1-7", letter), (b"0-8\n", letter), (b"0-9", encode_letter(DeadLetter(1, 9, 0, "", "", None))),
    ]  # fmt: skip


def test_records_of_strangers_are_counted_and_left_alone(data: Path, here: Here) -> None:
    """Garbage in the topic of dead letters hides nothing, is never replayed, and stops nothing."""
    with up(data, views_max=1) as process:
        before = said(here, "ls", "--from", process.url)
        assert process.terminate() == 0
    letter = encode_letter(DeadLetter(0, 7, 0, "why", "", batch(50, group(GOOD, 1_000))))
    for key, value in strangers(letter):
        write(data, value, topic=DEAD_LETTERS, key=key)
    for it in before["letters"]:
        write(data, b"garbage", topic=DEAD_LETTERS, key=it["key"].encode())
    with up(data) as process:
        found = said(here, "ls", "--from", process.url)
        assert found["letters"] == before["letters"]
        assert found["foreign_count"] == len(strangers(letter)) + 3
        assert "no worker wrote them" in here("dead-letters", "ls", "--from", process.url).stdout
        assert said(here, "replay", "--from", process.url, code=1)["counts"] == {"counted": 2, "not replayed": 1}
        assert total(process, "good") == 10


@pytest.mark.long
def test_large_letters(tmp_path: Path, here: Here) -> None:
    """Letters of many MB are listed, shown in part, and replayed."""
    data = tmp_path / "data"
    wide = Definition("wide", "sum", ("n",))
    large = Group(wide, [series_suffix((f"{n:06}" + "x" * 240,)) for n in range(40_000)], [1] * 40_000)
    write(data, batch(0, group(GOOD, 1)), *(batch(n, large) for n in range(1, 4)))
    with up(data, views_max=1) as process:
        found = said(here, "ls", "--from", process.url)
        assert [it["series_count"] for it in found["letters"]] == [40_000] * 3
        assert found["bytes_total"] > 3 * 10_000_000
        shown = said(here, "show", found["letters"][0]["key"], "--from", process.url, "--series", "3")
        assert [len(it["series"]) for it in shown["batch"]["groups"]] == [3]
        assert process.terminate() == 0
    with up(data) as process:
        assert said(here, "replay", "--from", process.url, "--timeout", "60")["counts"] == {"counted": 3}
        assert total(process, "wide") == 120_000


def test_since_is_a_time_or_a_time_ago() -> None:
    """`--since` is an age, milliseconds, or RFC 3339; the error for anything else says what is needed."""
    now_ms = SystemClock().now_ms()
    assert abs(parse_since("2h") - (now_ms - 7_200_000)) < 5_000
    assert parse_since("1700000000000") == 1_700_000_000_000
    assert parse_since("1970-01-01T00:00:01Z") == 1_000
    assert parse_since("9999999d") == 0
    for wrong in ("", "h", "-1h", "1.5h", "yesterday"):
        with pytest.raises(Invalid, match="--since"):
            parse_since(wrong)
