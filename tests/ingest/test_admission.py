"""Refusals of a gateway, and its own batches: orders to all partitions, and replayed dead letters."""

from collections.abc import Collection
from typing import Any

import pytest

import pipeline.core.codec as codec
import pipeline.core.parts as parts
from pipeline.core.limits import TaskLimits
from pipeline.core.record import Batch, Control, Definition, Group, Origin, definition_key, producer_id_of, series_suffix
from pipeline.core.sequence import Folded
from pipeline.errors import BadRecord, GroupsRefused, Invalid, Unavailable
from pipeline.ingest.gateway import Gateway
from pipeline.ports import KnownDefinitions, RawDelta, RequestKey
from pipeline.settings import PublisherSettings
from tests.publisher.support import CLOCK, FaultyLog, fold, publisher

SECRET = "of another"
OTHER = producer_id_of(SECRET)
V, W = Definition("v", "sum", ("a",)), Definition("w", "last")


class Facts:
    """Facts given by a test, as of `next_offset` of every partition."""

    def __init__(self, known: Collection[Definition] = (), producers: dict[str, Folded] | None = None) -> None:
        self.known = {definition_key(it) for it in known}
        self.next_offset = 0
        self.producers = producers or {}
        self.away = False

    def definitions(self, partition: int) -> KnownDefinitions | None:
        return None if self.away else KnownDefinitions(self.next_offset, frozenset(self.known))

    def producer(self, partition: int, producer_id: str) -> Folded | None:
        return self.producers.get(producer_id)


def gateway(log: FaultyLog, facts: Facts | None = None, **limits: Any) -> Gateway:
    return Gateway(log, CLOCK, PublisherSettings(), {}.get, limits=TaskLimits(**limits), facts=facts)


def group(definition: Definition = V, state: Any = 1, *labels: str) -> Group:
    return Group(definition, [series_suffix(labels or ("x",) * len(definition.labels))], [state])


def batch(
    *groups: Group, sequence: int = 0, partition: int = 0, producer_id: str = OTHER, epoch: int = 0, **more: Any
) -> bytes:
    return codec.encode_batch(Batch(producer_id, epoch, partition, sequence, 0, 5, [*groups], **more))


def delta(view: str = "v", value: Any = 1, kind: str = "sum", **labels: str) -> RawDelta:
    return RawDelta(view, kind, labels, value)


# Whose a producer is


@pytest.mark.parametrize("secret", ["", "guessed", OTHER, SECRET.upper()])
def test_a_producer_id_is_of_no_use_without_its_secret(secret: str) -> None:
    """A sender that only knows the id of a live publisher can't send in its name: no epoch, no floor, no delta."""
    log = FaultyLog()
    gate = gateway(log)
    assert gate.batches([batch(group())], SECRET)[0] == [1]
    with pytest.raises(BadRecord, match="batch 1: its producer id is not that of the secret"):
        gate.batches([batch(group(), producer_id=producer_id_of(secret)), batch(group(), sequence=1, epoch=2**62)], secret)
    assert len(log.attempts) == 1
    assert OTHER not in str(log.closings)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (batch(group(), producer_id="letter:0-1-2"), "only the server itself"),
        (batch(group(), producer_id="key:abc"), "only the server itself"),
        (batch(controls=[Control("drop", "v")]), "control records"),
        (batch(group(), origin=Origin("x", 1)), "dead letter"),
        (batch(group(), epoch=4), "stale epoch 4"),
        (batch(group(), epoch=2_000_000), "epoch 2000000 jumps"),
    ],
)
def test_what_only_the_server_may_send(bad: bytes, says: str) -> None:
    """Controls, replays, reserved ids and impossible epochs are refused, with a message that does not show the id."""
    log = FaultyLog()
    gate = gateway(log, Facts(producers={OTHER: Folded(epoch=5)}))
    with pytest.raises(BadRecord, match=f"batch 0: .*{says}") as caught:
        gate.batches([bad], SECRET)
    assert OTHER not in str(caught.value)
    assert not log.attempts


def test_a_late_copy_of_a_folded_batch_is_no_offence() -> None:
    """A late copy of an older epoch succeeds, as the task drops it and the publisher must know that its batch is in."""
    log = FaultyLog()
    facts = Facts(producers={OTHER: Folded(epoch=5, next_sequence=3)})
    assert gateway(log, facts).batches([batch(group(), sequence=2, epoch=4)], SECRET)[0] == [1]


# Groups


def test_wrong_groups_are_named_and_can_be_left_out() -> None:
    """All wrong groups of a batch are named with view and reason; nothing of the request is taken."""
    log = FaultyLog()
    gate = gateway(log)
    far = CLOCK.now_ms() + 4_000_000
    nobody = Group(Definition("empty", "sum"), [], [])
    groups = [group(), nobody, group(V, 1, "x", "y"), group(W, (far, 1, "x")), group(V, float("inf"))]
    with pytest.raises(GroupsRefused, match=r"batch 1: group 1 \(view empty\): ") as caught:
        gate.batches([batch(group()), batch(*groups, sequence=1)], SECRET)
    assert caught.value.batch == 1
    assert [(index, view) for index, view, _ in caught.value.groups] == [(1, "empty"), (2, "v"), (3, "w"), (4, "v")]
    assert not log.attempts
    rest = parts.without_groups(batch(*groups, sequence=1), {1, 2, 3, 4})
    assert codec.decode_batch(rest) == codec.decode_batch(batch(groups[0], sequence=1))
    gate.batches([rest], SECRET)
    assert fold(log.log).answers == {("v", ("x",)): 1}


def test_a_publisher_leaves_out_what_a_gateway_refuses() -> None:
    """An error in one view costs no other: the batch goes without it, and `flush` reports the loss."""
    log = FaultyLog()
    gate = gateway(log, Facts([V]), views_max=2)

    class Wire(FaultyLog):
        secret = ""

        def introduce(self, secret: str) -> None:
            self.secret = secret

        def dismiss(self, secret: str) -> None:
            raise AssertionError("it is the only one")

        def append(self, messages: Any, *, timeout_s: float) -> Any:
            try:
                return gate.batches([message.value or b"" for message in messages], self.secret)[0]
            except (BadRecord, Unavailable) as error:
                return [error] * len(messages)

    pub = publisher(Wire(partitions=1), flush_interval_ms=3_600_000)
    pub.sum("v", labels=("a",)).add(800, a="x")
    for name in ("one", "two", "three"):
        pub.sum(name).add(1)
    with pytest.raises(Invalid, match=r"2 groups of batch 0 .*view t.*views_max"):
        pub.flush()
    pub.close()
    views = fold(log.log)
    assert views.of("v") == {("x",): 800}
    assert len(views.answers) == 2
    assert not views.dead


# Room for definitions


def test_a_view_beyond_views_max_is_refused_at_the_door() -> None:
    """A partition that is full of definitions, some perhaps on their way, refuses others with 400."""
    log, facts = FaultyLog(partitions=1), Facts([V])
    gate = gateway(log, facts, views_max=3)
    gate.deltas([delta(a="x"), delta("one"), delta("two")])
    with pytest.raises(Invalid, match="delta 1: view three: partition 0 has 3 definitions"):
        gate.deltas([delta("one"), delta("three")])
    _, refused = gate.fitting([delta("one"), delta("three"), delta("three")])
    assert [(it.line, it.reason) for it in refused] == [(1, "view"), (2, "view")]
    with pytest.raises(GroupsRefused, match="views_max"):
        gate.batches([batch(group(Definition("three", "sum")))], SECRET)
    facts.next_offset = log.log.watermarks("deltas", 0).end_offset  # all of it is folded, and two were dropped since
    gate.deltas([delta("three"), delta("four")])
    with pytest.raises(Invalid, match="views_max"):
        gate.deltas([delta("five")])
    facts.away = True
    gate.deltas([delta("five")])


def test_room_that_was_not_used_is_given_back() -> None:
    """Room of requests that were refused, or whose append failed, is given back."""
    log = FaultyLog(partitions=1)
    gate = gateway(log, Facts(), views_max=2)
    log.fate = lambda n, batch: Unavailable("away")
    with pytest.raises(Unavailable):
        gate.deltas([delta("one"), delta("two")])
    with pytest.raises(Invalid):
        gate.deltas([delta("three"), delta("four"), delta("five")])
    log.fate = lambda n, batch: "kept"
    gate.deltas([delta("six"), delta("seven")])


# What the server has to say


def test_orders_reach_every_partition() -> None:
    """Each partition has an order once, in the order of the log; a repeat with a key adds new partitions only."""
    log = FaultyLog(partitions=4)
    log.partition_total = log.there_total = 2
    gate = gateway(log)
    gate.deltas([delta(a=str(i)) for i in range(50)])
    token = gate.controls([Control("drop", "v", labels=("a",))])
    assert [*token.next_offsets] == [0, 1]
    gate.deltas([delta(value=7, a="new")])
    assert fold(log.log).answers == {("v", ("new",)): 7}
    key = RequestKey("/v1/views/v/reset", "k", b"")
    gate.controls([Control("reset", "v", kind="sum")], key)
    gate.deltas([delta(value=8, a="new")])
    log.partition_total = log.there_total = 4
    gateway(log).controls([Control("reset", "v", kind="sum")], key)
    views = fold(log.log)
    assert views.of("v")["new",] == 8
    assert views.duplicates == 2
    assert gate.controls([]).next_offsets == {}


def test_an_order_reaches_partitions_that_were_not_heard_of() -> None:
    """A server whose partition count is outdated gives the order to new partitions, too."""
    log = FaultyLog(partitions=4)
    gate = gateway(log)
    gate.deltas([delta(a=str(i)) for i in range(50)])
    log.partition_total = 2
    assert [*gate.controls([Control("drop", "v")]).next_offsets] == [0, 1, 2, 3]
    assert fold(log.log).answers == {}


@pytest.mark.parametrize(
    ("control", "says"),
    [
        (Control("delete", "v"), "no order"),
        (Control("drop", "a b"), "name of a view"),
        (Control("drop", "v", "median"), "kind"),
    ],
)
def test_an_order_that_is_none(control: Control, says: str) -> None:
    """A wrong order is refused, and nothing is appended."""
    log = FaultyLog()
    with pytest.raises(Invalid, match=says):
        gateway(log).controls([control])
    assert not log.attempts


def test_orders_that_may_not_be_everywhere() -> None:
    """An order that some partitions may lack is `Unavailable`, so that it is repeated."""
    log = FaultyLog(lambda n, batch: Unavailable("away") if batch.partition else "kept")
    with pytest.raises(Unavailable, match="3 of 4"):
        gateway(log).controls([Control("drop", "v")])
