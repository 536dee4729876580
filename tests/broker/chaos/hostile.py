"""Harm that other clients can do to an app, by publishing to it or writing to its topics, and that wrong clocks can do."""

from __future__ import annotations

import random
import time
import uuid

import pipeline.metrics as m
from pipeline import Reader
from pipeline.core.codec import (
    DefinitionEntry,
    decode_batch,
    decode_position,
    encode_batch,
    encode_definition,
    encode_fence,
    encode_folded,
    encode_position,
    encode_states,
)
from pipeline.core.kinds import KINDS
from pipeline.core.record import (
    FENCE_KEY,
    POSITION_KEY,
    TAG_DEFINITION,
    TAG_PRODUCER,
    TAG_SERIES,
    Batch,
    Definition,
    Fence,
    Group,
    Position,
    definition_key,
    producer_key,
    series_prefix,
    series_suffix,
)
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord
from pipeline.topics import CHANGELOG, DELTAS
from tests.broker.chaos.drive import PARTITIONS, Drive
from tests.broker.chaos.load import LABELS, VIEW
from tests.broker.chaos.stranger import Hanging, Raw
from tests.broker.chaos.tail import tail
from tests.broker.chaos.watch import status
from tests.process.load import metric
from tests.support import wait_until

OTHERS_S = 6.0
ORDER_S = 0.5
ORDERS = 12
HELD_S = 6.0
WAITING_S = 60.0
MOVED_S = 60.0
TRANSACTION_MS = 600_000
BEYOND_STALL_S = 8.0
"""Time, beyond that after which a worker says why it waits, for which a partition of its own may stand still."""
SHORT_MS = 30_000
"""Time after which the broker aborts a transaction that nobody ends."""
DAY_MS = 86_400_000
WRONG_BY_MS = 8 * DAY_MS
"""Clock error longer than producers are remembered."""
AGAIN = 40
FRESH_MS = 10_000
FURTHER = 50_000
"""Number of sequences that a producer may have given up."""


def opinions(d: Drive) -> None:
    """Other publishers define the load's view with other labels or as another kind; a worker is killed meanwhile."""
    d.fleet.have(2)
    name = d.rng.choice(d.fleet.running)
    with d.event("others have their own opinion of the view"):
        with d.opinions.recording() as others:
            time.sleep(OTHERS_S / 2)
            d.fleet.kill(name)
            d.fleet.start(name)
            time.sleep(OTHERS_S / 2)
        d.others |= others.token
        d.wait_folded(others.token.next_offsets)
        d.fleet.settled()
    d.say(f"  {sum(d.opinions.sums.values())} more in {len(d.opinions.sums)} series")


def orders(d: Drive) -> None:
    """A view is dropped and reset while it is recorded, and orders are sent again; a worker is killed meanwhile."""
    d.fleet.have(2)
    name = d.rng.choice(d.fleet.running)
    with d.event("drop and reset under load"):
        with d.orders.recording() as others:
            time.sleep(4 * ORDER_S)
            for number in range(ORDERS):
                d.say(f"  {d.orders.order()}")
                if number == ORDERS // 2:
                    d.fleet.kill(name)
                    d.fleet.start(name)
                time.sleep(ORDER_S * d.rng.random())
                d.orders.again()
        d.others |= others.token
        d.wait_folded(others.token.next_offsets)
        d.fleet.settled()


# Transactions of others


def _lag(url: str, number: int) -> int:
    return int(next((it["lag"] or 0 for it in status(url).get("partitions", []) if it["partition"] == number), 0))


def _owner(d: Drive, number: int) -> str:
    return str(wait_until(lambda: next((it for it in d.fleet.running if number in d.fleet.owned(it)), ""), "an owner"))


def _takeover(d: Drive, owner: str, but: int) -> None:
    """Kill the owner, and wait until its standby goes on with all of its partitions but one."""
    positions = {number: at for number, at in d.fleet.owned(owner).items() if number != but}
    d.fleet.kill(owner)
    d.wait_moved(positions)


def open_on_deltas(d: Drive) -> None:
    """A foreign transaction hangs on deltas: staleness grows, lag shows, a takeover goes on; then all counts, once."""
    d.fleet.have(2)
    number = d.rng.randrange(PARTITIONS)
    owner, how = _owner(d, number), d.rng.choice(("abort", "commit", "leave"))
    with d.event(f"an open transaction on deltas-{number}, then {how}"):
        timeout_ms = SHORT_MS if how == "leave" else TRANSACTION_MS
        hanging = Hanging(d.app, DELTAS, [Raw(number, b"theirs")], timeout_ms=timeout_ms)
        began_s, end = time.monotonic(), hanging.places[0].offset + 1
        wait_until(lambda: d.load.history.acked[-1].token.next_offsets.get(number, 0) > end, "deltas behind it", MOVED_S)
        acked_s = time.monotonic()
        time.sleep(HELD_S)
        # What was acknowledged by then can't be in an answer; the reader checks the same of all its answers.
        wait_until(lambda: d.reader.staleness_ms >= HELD_S * 1000, "staleness to grow", MOVED_S)
        for url in (d.reads.url, d.fleet.urls()[owner]):
            wait_until(lambda url=url: _lag(url, number) > 0, "lag to show", MOVED_S)
        _takeover(d, owner, but=number)
        d.say(f"  held up for {time.monotonic() - acked_s:.1f} s; staleness {d.reader.staleness_ms} ms")
        if how == "leave":
            time.sleep(max(0.0, SHORT_MS / 1000 - (time.monotonic() - began_s)))
        hanging.end(how)
        if how == "commit":
            d.refused.update(hanging.places)
        d.wait_all_moved()
        d.fleet.start(owner)
        d.fleet.settled()


def open_on_changelog(d: Drive) -> None:
    """A foreign transaction hangs on the changelog: staleness grows, a takeover waits and says why; then all is right."""
    d.fleet.have(2)
    number = d.rng.randrange(PARTITIONS)
    owner, how = _owner(d, number), d.rng.choice(("abort", "commit", "leave"))
    forged = forgeries(d, number, random.Random(d.rng.random()))
    with d.event(f"an open transaction on changelog-{number}, then {how}"):
        timeout_ms = SHORT_MS if how == "leave" else TRANSACTION_MS
        hanging = Hanging(d.app, CHANGELOG, forged, timeout_ms=timeout_ms)
        began_s = time.monotonic()
        wait_until(lambda: d.reader.staleness_ms >= HELD_S * 1000, "staleness to grow", MOVED_S)
        _takeover(d, owner, but=number)
        (other,) = d.fleet.running

        def waiting() -> str:
            said = status(d.fleet.workers[other].role.url).get("partitions", [])
            return str(next((it.get("restore", {}).get("waiting", "") for it in said if it["partition"] == number), ""))

        if how != "leave":
            why = wait_until(waiting, f"{other} to say why it waits for partition {number}", WAITING_S)
            assert "a transaction of somebody else is open" in why, why
            d.say(f"  {other} says: {why[:90]}")
            time.sleep(BEYOND_STALL_S)
        else:
            time.sleep(max(0.0, SHORT_MS / 1000 - (time.monotonic() - began_s)))
        hanging.end(how)
        d.wait_all_moved()
        d.fleet.start(owner)
        d.fleet.settled()


# Garbage and forgeries


def noise(d: Drive) -> None:
    """Noise, forgeries and copies of batches on deltas and changelog: all is left out, or a dead letter."""
    with d.event("noise and forgeries on both topics"):
        rng = random.Random(d.rng.random())
        bad_deltas(d, rng)
        bad_changelog(d, rng)
        d.again.send(AGAIN // 2)
        d.wait_all_moved()


def garbage(d: Drive) -> None:
    """Noise and forgeries on deltas and changelog, before and after kill -9 and the loss of a disk; a worker restores."""
    d.fleet.have(2)
    rng = random.Random(d.rng.random())
    name = d.rng.choice(d.fleet.running)
    before = metric(d.reads.url, m.CHANGELOG_FOREIGN)
    with d.event("garbage and forgeries on both topics"):
        bad_deltas(d, rng)
        bad_changelog(d, rng)
        d.again.send(AGAIN // 2)
        d.wait_all_moved()
        d.fleet.kill(name)
        bad_changelog(d, rng)
        d.fleet.lose_disk(name)
        d.fleet.start(name)
        bad_deltas(d, rng)
        d.fleet.settled()
        d.again.send(AGAIN // 2)
        d.wait_all_moved()
    counted = metric(d.reads.url, m.CHANGELOG_FOREIGN) - before
    assert counted > 0, "the server counted no foreign records in the changelog"
    d.say(f"  {len(d.refused)} dead letters so far; the server left {counted:g} changelog records out")


def bad_deltas(d: Drive, rng: random.Random) -> None:
    """Send to deltas noise, damaged copies of real batches, impossible numbers of live producers, and a half good batch."""
    records: list[Raw] = []
    for number in range(PARTITIONS):
        found = tail(d.app, DELTAS, number, 30)
        values = [it.value for it in found if it.value]
        noise = [None, b"", rng.randbytes(rng.randrange(1, 400)), b"\x02" + rng.randbytes(60), b"\x01" + rng.randbytes(60)]
        records += [Raw(number, it) for it in rng.sample(noise, 3)]
        if values:
            records += [Raw(number, it) for it in _damaged(rng.choice(values), number, rng)]
    d.refused.update(d.stranger.send(DELTAS, rng.sample(records, len(records))))
    _half_good(d, rng)


def _damaged(value: bytes, number: int, rng: random.Random) -> list[bytes]:
    """Return a real batch cut, with a wrong bit, for another partition; and batches that its producer can't have sent."""
    bit = rng.randrange(8 * len(value))
    flipped = bytearray(value)
    flipped[bit // 8] ^= 1 << bit % 8
    out = [value[: rng.randrange(1, len(value))], value + b"\x00", bytes(flipped)]
    try:
        real = decode_batch(value)
    except BadRecord:  # garbage of before
        return out
    numbers = ((real.epoch, 2**40, 0), (real.epoch, 2**62, 2**62), (2**62, real.sequence + FURTHER, 0))
    out += [encode_batch(Batch(real.producer_id, it[0], number, it[1], it[2], 0, [])) for it in numbers]
    elsewhere = Batch(real.producer_id, real.epoch, (number + 1) % PARTITIONS, real.sequence + 1, 0, 0, real.groups)
    return [*out, encode_batch(elsewhere)]


def _half_good(d: Drive, rng: random.Random) -> None:
    """Send a batch of which one group counts; the others have too many labels, and a time far ahead."""
    number, series = rng.randrange(PARTITIONS), {"group": "stranger", "series": "0"}
    far_ms = int(time.time() * 1000) + 30 * DAY_MS
    groups = [
        Group(Definition("odd", "sum", ("a",)), [series_suffix(("a", "b"))], [1]),
        Group(Definition(VIEW, "sum", LABELS, monotone=True), [series_suffix(tuple(series.values()))], [7]),
        Group(Definition("late", "last"), [series_suffix(())], [(far_ms, 1, "x")]),
    ]
    d.opinions.note(7, series)
    value = encode_batch(Batch(uuid.UUID(int=rng.getrandbits(128)).hex, 0, number, 0, 0, 0, groups))
    d.refused.update(d.stranger.send(DELTAS, [Raw(number, value)]))


def bad_changelog(d: Drive, rng: random.Random) -> None:
    """Send `forgeries` to each partition of the changelog."""
    records = [it for number in range(PARTITIONS) for it in forgeries(d, number, rng)]
    d.stranger.send(CHANGELOG, records)


def forgeries(d: Drive, number: int, rng: random.Random) -> list[Raw]:
    """Return records that no owner of a partition writes: noise, other values of real entries, removals, old commits."""
    found = [it for it in tail(d.app, CHANGELOG, number, 400) if it.key]
    forged = [Raw(number, rng.randbytes(rng.randrange(60)), rng.randbytes(rng.randrange(1, 40))) for _ in range(3)]
    for tag in (TAG_SERIES, TAG_PRODUCER, TAG_DEFINITION):
        keys = sorted({it.key for it in found if it.key[:1] == tag})
        for key in rng.sample(keys, min(4, len(keys))):
            forged.append(Raw(number, rng.choice(_values(tag, rng)), key))
    forged += _made_up(number)
    positions = [it.value for it in found if it.key == POSITION_KEY and it.value]
    for value in rng.sample(positions, min(2, len(positions))):
        forged.append(Raw(number, value, POSITION_KEY))
        try:
            real = decode_position(value)
        except BadRecord:  # a forgery of before
            continue
        further = (real.next_offset + 10_000, real.committed_at_ms, real.source_at_ms, real.source_id)
        forged.append(Raw(number, encode_position(Position(*further, owner_id=real.owner_id)), POSITION_KEY))
    if len(found) > 20:
        start = rng.randrange(len(found) - 20)
        forged += [Raw(number, it.value, it.key) for it in found[start:]]  # whole commits among them, as they were
    d.commits.forged.update(it.value for it in forged if it.key == POSITION_KEY and it.value)
    return forged


def _values(tag: bytes, rng: random.Random) -> list[bytes | None]:
    if tag == TAG_SERIES:
        return [None, encode_states(KINDS["sum"], [10**12])[0], rng.randbytes(20)]
    if tag == TAG_PRODUCER:
        return [None, encode_folded(Folded()), encode_folded(Folded(next_sequence=10**9)), rng.randbytes(20)]
    return [None, encode_definition(DefinitionEntry(Definition("odd", "max"), 1, 1)), rng.randbytes(20)]


def _made_up(number: int) -> list[Raw]:
    """Return fence records and entries of views and producers that do not exist, under keys that look like ours."""
    definition = Definition(f"forged{number}", "sum", ("a",))
    series = series_prefix(definition) + series_suffix(("x",))
    fence = encode_fence(Fence(f"chaos-{number}:somebody", 1))
    return [
        Raw(number, encode_definition(DefinitionEntry(definition, 1, 1)), definition_key(definition)),
        Raw(number, encode_states(KINDS["sum"], [5])[0], series),
        Raw(number, encode_folded(Folded(next_sequence=3)), producer_key(f"nobody-{number}")),
        Raw(number, fence, FENCE_KEY),
        Raw(number, b"fence", FENCE_KEY),
        Raw(number, b"\x02position", POSITION_KEY),
        Raw(number, None, POSITION_KEY),
    ]


# Clocks


def clocks(d: Drive) -> None:
    """Workers and servers have clocks that are wrong by eight days, ahead and back, while batches come again."""
    d.fleet.have(1)
    for name, ahead_ms in (("w-ahead", WRONG_BY_MS), ("w-back", -WRONG_BY_MS)):
        with d.event(f"{name}, by eight days"):
            worker = d.fleet.add(d.fleet.make(name, ahead_ms=ahead_ms))
            d.fleet.settled()
            d.wait_moved(d.fleet.owned(worker.name))
            counted = d.counted_duplicates() + AGAIN
            d.wait_folded(d.again.send(AGAIN))
            wait_until(lambda counted=counted: d.counted_duplicates() >= counted, "duplicates to be counted", MOVED_S)
            with d.server(f"server-{name}", ahead_ms=ahead_ms) as shifted:
                token = d.quiet()
                d.compare(shifted, token)
                d.load.resume()
                _fresh(shifted.url)
            d.fleet.leave(name)
            d.fleet.discard(name)
            d.fleet.settled()


def _fresh(url: str) -> None:
    """Wait for an answer whose staleness is less than the error of the server's clock."""
    with Reader(url) as reader:

        def fresh() -> bool:
            stale_ms = reader.get(VIEW, by=()).as_of.staleness_ms
            return stale_ms is not None and stale_ms < FRESH_MS

        wait_until(fresh, "an answer that is not stale", MOVED_S)
