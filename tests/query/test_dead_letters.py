"""The service of dead letters: read with bounded memory, replayed exactly once, over HTTP too."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest

from pipeline.core.codec import DeadLetter, encode_batch, encode_letter
from pipeline.core.record import Batch, Definition, Group, series_suffix
from pipeline.ports import Message
from pipeline.query.dead_letters import DeadLetters, LetterCursor, LetterFilter
from pipeline.settings import WorkerSettings
from pipeline.topics import DEAD_LETTERS, DELTAS
from tests.query.support import Server, World, serving

FEW, MANY = WorkerSettings(views_max=1), WorkerSettings()
GOOD, WRONG, OTHER = (Definition(view, "sum", ("n",)) for view in ("good", "wrong", "other"))


def group(definition: Definition, value: int) -> Group:
    """Return a group of one series."""
    return Group(definition, [series_suffix(("x",))], [value])


def batch(sequence: int, *groups: Group, partition: int = 0, epoch: int = 0) -> bytes:
    """Return a sealed batch."""
    return encode_batch(Batch("p", epoch, partition, sequence, 0, 0, [*groups]))


def put(world: World, *values: bytes, partition: int = 0) -> None:
    """Append batches to the log."""
    results = world.log.append([Message(DELTAS, partition, None, value) for value in values], timeout_s=1)
    assert all(isinstance(it, int) for it in results)


def refused(world: World, count: int, partition: int = 0) -> None:
    """Fold batches whose one group, of the values 1, 2..., is refused each time."""
    put(world, batch(0, group(GOOD, 1), partition=partition), partition=partition)
    put(world, *(batch(n, group(WRONG, n), partition=partition) for n in range(1, count + 1)), partition=partition)
    world.fold(partition)


@pytest.fixture
def world() -> World:
    """A world with room for one definition a partition."""
    return World(2, worker=FEW)


@pytest.fixture
def server(world: World) -> Iterator[Server]:
    """Serve the world, and fold it all the time."""
    with serving(world) as running:
        yield running


def total(world: World, view: str) -> Any:
    """Return the sum of a view, with everything folded."""
    world.fold()
    world.reader = world.new_reader()
    with serving(world) as running:
        return running.view(view, ("by", ""))["series"][0]["value"]


def order(server: Server, **fields: Any) -> Any:
    """Return the answer to a request to replay."""
    reply = server.request("POST", "/v1/dead-letters/replay", json.dumps(fields).encode())
    assert reply.status == 200, reply.body
    return reply.json()


def test_requests_go_through_all_letters(world: World, server: Server) -> None:
    """A request takes up to `limit` letters and says where the next goes on; a letter refused again is not tried twice."""
    refused(world, 25, 0)
    refused(world, 5, 1)
    for settings, result in ((FEW, "refused again"), (MANY, "counted")):
        world.work(settings)
        found: list[Any] = []
        sizes, after = [], ""
        with world.folding():
            while after is not None:
                done = order(server, limit=10, after=after)
                found += done["outcomes"]
                sizes.append(len(done["outcomes"]))
                after = done["after"]
        assert sizes == [10, 10, 5 + 5]
        assert {it["result"] for it in found} == {result}
        assert len({it["key"] for it in found}) == 30
    assert total(world, "wrong") == 25 * 26 // 2 + 5 * 6 // 2
    assert server.get("/v1/dead-letters").json()["letter_count"] == 0


def test_memory_holds_no_values() -> None:
    """A hundred MB of letters are listed in a tenth of that memory, and a listing that keeps few counts them all."""
    world = World(1)
    values = [
        (b"0-%d-0" % n, encode_letter(DeadLetter(0, n, 5, "why", "v", bytes(100_000)))) for n in range(1_000)
    ]  # fmt: skip
    world.log.append([Message(DEAD_LETTERS, 0, key, value) for key, value in values], timeout_s=5)
    tracemalloc.start()
    try:
        found = world.letters.listing(LetterFilter(), 1_000)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (len(found.letters), found.letter_count, found.bytes_total) == (1_000, 1_000, 100_000_000)
    assert peak < 10_000_000, peak
    few = DeadLetters(world.log, world.clock, kept_max=10)
    world.log.append([Message(DEAD_LETTERS, 0, key, None) for key, _ in values[5:15]], timeout_s=5)
    found = few.listing(LetterFilter(), 1_000)
    assert (len(found.letters), found.letter_count, found.bytes_total) == (5, 990, 99_000_000)


def test_a_replay_goes_on_behind_what_a_listing_keeps() -> None:
    """More letters than a listing keeps at once are replayed all the same, in several calls."""
    world = World(1, worker=FEW)
    refused(world, 30)
    world.work(MANY)
    letters = DeadLetters(world.log, world.clock, kept_max=7)
    after, count = None, 0
    with world.folding():
        while True:
            done = letters.replay(LetterFilter(after=after), limit=100, timeout_s=20)
            count += len(done.outcomes)
            assert {it.result for it in done.outcomes} == {"counted"}
            after = done.after
            if after is None:
                break
    assert count == 30
    assert total(world, "wrong") == 30 * 31 // 2


def test_nobody_folds(world: World) -> None:
    """A replay without a worker ends in time and says so; its batches count once when a worker comes."""
    refused(world, 3)
    done = world.letters.replay(LetterFilter(), limit=10, timeout_s=0.05)
    assert [it.result for it in done.outcomes] == ["unknown"] * 3
    assert "counts once when it is folded" in done.outcomes[0].reason
    world.work(MANY)
    world.fold()
    assert world.letters.listing(LetterFilter(), 10).letters == []
    assert total(world, "wrong") == 6


def test_a_whole_record_of_which_a_group_is_refused_counts_in_part(world: World) -> None:
    """The good groups of a record count; each other group becomes a letter of its own, which counts once there is room."""
    put(world, batch(0, group(GOOD, 1), epoch=3), batch(1, group(GOOD, 10), group(WRONG, 20), group(OTHER, 30), epoch=2))
    world.fold()
    with world.folding():
        done = world.letters.replay(LetterFilter(), limit=10, timeout_s=20)
    assert [it.result for it in done.outcomes] == ["counted in part"]
    assert "2 groups are letters of their own" in done.outcomes[0].reason
    assert total(world, "good") == 11
    left = world.letters.listing(LetterFilter(), 10).letters
    assert [it.view for it in left] == ["wrong", "other"]
    assert all(it.key.startswith(f"{done.outcomes[0].key}-") for it in left)
    world.work(MANY)
    with world.folding():
        done = world.letters.replay(LetterFilter(), limit=10, timeout_s=20)
    assert [it.result for it in done.outcomes] == ["counted"] * 2
    assert (total(world, "wrong"), total(world, "other")) == (20, 30)


def test_a_stale_listing_doubles_nothing(world: World) -> None:
    """A replay of letters that others have replayed since they were read says that they were counted before."""
    refused(world, 2)
    stale = [row.key or b"" for row in world.log.partition(DEAD_LETTERS, 0).rows]
    world.work(MANY)
    with world.folding():
        world.letters.replay(LetterFilter(), limit=10, timeout_s=20)
        done = world.letters.replay(LetterFilter(frozenset(key.decode() for key in stale)), limit=10, timeout_s=20)
    assert [it.result for it in done.outcomes] == ["counted before"] * 2
    assert total(world, "wrong") == 3


def test_letters_of_partitions_that_are_gone_stay() -> None:
    """A letter of a partition that the topic no longer has is reported, and stays."""
    world = World(1)
    world.log = type(world.log)({DELTAS: 1, DEAD_LETTERS: 2}, world.clock.now_ms)
    letters = DeadLetters(world.log, world.clock)
    letter = encode_letter(DeadLetter(1, 0, 0, "why", "wrong", batch(0, group(WRONG, 1), partition=1)))
    world.log.append([Message(DEAD_LETTERS, 1, b"1-0-0", letter)], timeout_s=1)
    done = letters.replay(LetterFilter(), limit=10, timeout_s=1)
    assert [(it.key, it.result) for it in done.outcomes] == [("1-0-0", "not replayed")]
    assert done.outcomes[0].reason == "the topic of deltas has 1 partitions, and no partition 1"
    assert letters.listing(LetterFilter(), 10).letter_count == 1


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"limit": 0}, "limit: a whole number from 1 to 10000"),
        ({"limit": 10_001}, "limit"),
        ({"limit": "7"}, "'limit' must be an int"),
        ({"keys": "x"}, "'keys' must be an array of texts"),
        ({"keys": ["0-1"] * 10_001}, "10001 keys; at most 10000"),
        ({"key": "x"}, "there is no field 'key'"),
        ({"partition": -1}, "whole numbers from 0"),
        ({"partition": 7}, "no partition 7"),
        ({"timeout_ms": 10**9}, "timeout_ms"),
        ({"after": "x"}, "not a place"),
        ([], "a JSON object is needed"),
    ],
)
def test_wrong_orders_are_refused(server: Server, body: Any, says: str) -> None:
    """A wrong order is answered with 400 and what is wrong, and nothing is replayed."""
    assert says in server.problem(400, server.request("POST", "/v1/dead-letters/replay", json.dumps(body).encode()))


def test_wrong_reads_are_refused(server: Server) -> None:
    """A wrong read is answered with 400 or 404 and what is wrong."""
    for query in (
        "limit=0",
        "limit=10001",
        "limit=x",
        "partition=-1",
        "partition=9",
        "since_ms=x",
        "what=1",
        "limit=1&limit=2",
    ):
        server.problem(400, server.get(f"/v1/dead-letters?{query}"))
    server.problem(400, server.get("/v1/dead-letters/nonsense"))
    server.problem(404, server.get("/v1/dead-letters/0-1"))
    server.problem(400, server.get("/v1/dead-letters/0-1?series=0"))


def test_servers_that_only_read_have_no_letters() -> None:
    """A server without ingest neither shows nor replays dead letters."""
    world = World(1)
    world.ingest = None
    with serving(world) as running:
        running.problem(404, running.get("/v1/dead-letters"))
        running.problem(404, running.request("POST", "/v1/dead-letters/replay", b"{}"))


def test_places_come_back() -> None:
    """A place in the topic is a text between two calls, and is read back the same."""
    assert LetterCursor.parse(str(LetterCursor(3, 0, 42))) == LetterCursor(3, 0, 42)


def test_what_has_expired_is_refused_again(world: World) -> None:
    """A replay of series whose windows have expired changes nothing, and says why; the listing finds them by the reason."""
    world.work(MANY)
    minutes = Definition("minutes", "sum", ("n",), window_s=60, retention_s=60)
    now_ms = world.clock.now_ms()
    suffixes = [series_suffix(("x",), start_ms // 60_000 * 60_000) for start_ms in (now_ms - 600_000, now_ms)]
    put(world, encode_batch(Batch("p", 0, 0, 0, 0, now_ms, [Group(minutes, suffixes, [1, 2])])))
    world.fold()
    for _ in range(2):
        (letter,) = world.letters.listing(LetterFilter(reason="expired"), 10).letters
        assert letter.view == "minutes"
        with world.folding():
            done = world.letters.replay(LetterFilter(reason="expired"), limit=10, timeout_s=20)
        assert [(it.result, it.reason[:7]) for it in done.outcomes] == [("refused again", "expired")]
    assert world.partitions[0].task.counts.entries_folded == 1
