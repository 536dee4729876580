"""Sequences: a task's memory of what it folded, and a producer's of what it has sent."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pipeline.core.codec import decode_folded, encode_folded
from pipeline.core.sequence import GAP_COUNT_MAX, Folded, Outbox, Sealed
from pipeline.errors import BadRecord
from tests.support import examples


def check_shape(folded: Folded) -> None:
    """Check that ranges are sorted, not empty, and apart from each other and the prefix, and that their bytes come back."""
    edges = [folded.next_sequence, *(edge for pair in folded.beyond for edge in pair)]
    assert edges == sorted(set(edges))
    assert decode_folded(encode_folded(folded)) == folded


@settings(max_examples=examples(300))
@given(steps=st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), max_size=40))
def test_folded_is_a_set_with_a_floor(steps: list[tuple[int, int]]) -> None:
    """A sequence is known if it was folded, or is below a floor, in any order, with repeats and gaps."""
    folded, known, floor_seen = Folded(), set[int](), 0
    for sequence, below in steps:
        floor = max(0, sequence - below)
        assert folded.has(sequence) == (sequence in known or sequence < floor_seen)
        if not folded.has(sequence):
            before = decode_folded(encode_folded(folded))
            grown = folded.with_folded(sequence, floor, 0, 0)
            assert folded == before, "a memory is a value"
            folded = grown
            known.add(sequence)
            floor_seen = max(floor_seen, floor)
        check_shape(folded)
        for candidate in range(28):
            assert folded.has(candidate) == (candidate in known or candidate < floor_seen)


class TruthfulProducer(RuleBasedStateMachine):
    """A producer seals, sends each batch any number of times in any order, and forgets what was acknowledged.

    Law: a task folds every batch that reaches the log exactly once, whatever the order and the repeats.
    """

    def __init__(self) -> None:
        super().__init__()
        self.outbox = Outbox("p", 0)
        self.floors: list[int] = []
        self.sent: set[int] = set()
        self.folded = Folded()
        self.fold_count = 0

    @rule()
    def seal(self) -> None:
        sequence, floor = self.outbox.next_numbers(0)
        self.outbox.add(Sealed(0, sequence, b"x", 1))
        self.floors.append(floor)

    @precondition(lambda self: len(self.outbox))
    @rule(data=st.data())
    def reach_the_log(self, data: st.DataObject) -> None:
        """Send, or resend after a lost acknowledgement: only unacknowledged batches are ever sent."""
        sealed = data.draw(st.sampled_from([*self.outbox.pending()]))
        known = self.folded.has(sealed.sequence)
        assert known == (sealed.sequence in self.sent)
        if not known:
            self.folded = self.folded.with_folded(sealed.sequence, self.floors[sealed.sequence], 0, 0)
            self.fold_count += 1
        self.sent.add(sealed.sequence)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def acknowledge(self, data: st.DataObject) -> None:
        self.outbox.acknowledge(0, data.draw(st.sampled_from(sorted(self.sent))))

    @invariant()
    def exactly_once(self) -> None:
        assert self.fold_count == len(self.sent)
        assert [s for s in range(len(self.floors) + 2) if self.folded.has(s)] == sorted(self.sent)
        check_shape(self.folded)


TruthfulProducer.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40, deadline=None)
TestTruthfulProducer = TruthfulProducer.TestCase


@pytest.mark.parametrize(
    ("before", "sequence", "floor", "next_sequence", "beyond"),
    [
        (Folded(), 0, 0, 1, []),
        (Folded(), 3, 0, 0, [(3, 4)]),
        (Folded(), 3, 3, 4, []),
        (Folded(), 3, 2, 2, [(3, 4)]),
        (Folded(next_sequence=2, beyond=[(3, 4)]), 2, 0, 4, []),
        (Folded(next_sequence=2, beyond=[(4, 6)]), 3, 0, 2, [(3, 6)]),
        (Folded(next_sequence=2, beyond=[(4, 6)]), 6, 0, 2, [(4, 7)]),
        (Folded(next_sequence=2, beyond=[(4, 6), (7, 9)]), 6, 0, 2, [(4, 9)]),
        (Folded(next_sequence=2, beyond=[(4, 6), (8, 9)]), 10, 5, 6, [(8, 9), (10, 11)]),
        (Folded(next_sequence=2, beyond=[(4, 6), (8, 9)]), 10, 7, 7, [(8, 9), (10, 11)]),
        (Folded(next_sequence=2, beyond=[(4, 6), (8, 9)]), 9, 8, 10, []),
        (Folded(next_sequence=9), 12, 3, 9, [(12, 13)]),
        (Folded(), 2**63 - 2, 0, 0, [(2**63 - 2, 2**63 - 1)]),
        (Folded(), 2**63 - 2, 2**63 - 2, 2**63 - 1, []),
    ],
)
def test_ranges_join(before: Folded, sequence: int, floor: int, next_sequence: int, beyond: list[tuple[int, int]]) -> None:
    """A sequence joins the ranges that it touches; the prefix swallows what it reaches; a floor never moves back."""
    folded = before.with_folded(sequence, floor, 3, 9)
    assert folded == Folded(3, next_sequence, beyond, 9)
    check_shape(folded)


def test_epoch_and_time_never_go_back() -> None:
    """The newest epoch and time stay, whatever comes later."""
    folded = Folded(epoch=5, seen_at_ms=100).with_folded(0, 0, 3, 50)
    assert (folded.epoch, folded.seen_at_ms) == (5, 100)
    folded = folded.with_folded(1, 0, 7, 200)
    assert (folded.epoch, folded.seen_at_ms) == (7, 200)


def test_gaps_are_limited() -> None:
    """A producer that leaves over 1,000 gaps is refused; filling a gap, or a floor, makes room again."""
    folded = Folded()
    for i in range(GAP_COUNT_MAX):
        folded = folded.with_folded(2 * i + 1, 0, 0, 0)
    assert len(folded.beyond) == GAP_COUNT_MAX
    with pytest.raises(BadRecord, match="gaps"):
        folded.with_folded(2 * GAP_COUNT_MAX + 1, 0, 0, 0)
    assert len(folded.beyond) == GAP_COUNT_MAX
    assert len(folded.with_folded(2 * GAP_COUNT_MAX + 1, 5, 0, 0).beyond) == GAP_COUNT_MAX - 2
    assert len(folded.with_folded(10, 0, 0, 0).beyond) == GAP_COUNT_MAX - 1


def test_memories_share_nothing() -> None:
    """Each memory has a list of its own: one producer's gaps are not another's."""
    one, two = Folded(), Folded()
    one.beyond.append((5, 6))
    assert two.beyond == []


# The producer's side

steps = st.lists(
    st.tuples(st.just("seal"), st.integers(0, 2), st.integers(0, 50))
    | st.tuples(st.just("acknowledge"), st.integers(0, 2), st.integers(0, 12)),
    max_size=50,
)


@settings(max_examples=examples(200))
@given(steps=steps)
def test_outbox_is_a_list_of_unacknowledged_batches(steps: list[tuple[str, int, int]]) -> None:
    """Numbers, floors, the bytes account, the order of sending and a flush's condition equal those of a plain list."""
    outbox = Outbox("p", 4)
    model: list[Sealed] = []
    sealed_counts = [0, 0, 0]
    barriers: list[tuple[dict[int, int], list[Sealed]]] = []
    for step, partition, number in steps:
        mine = [sealed for sealed in model if sealed.partition == partition]
        if step == "seal":
            sequence, floor = outbox.next_numbers(partition)
            assert sequence == sealed_counts[partition]
            assert floor == (mine[0].sequence if mine else sequence)
            assert outbox.next_numbers(partition) == (sequence, floor), "asking takes nothing"
            sealed = Sealed(partition, sequence, b"x" * number, 1)
            outbox.add(sealed)
            model.append(sealed)
            sealed_counts[partition] += 1
            barriers.append((outbox.next_sequences(), [*model]))
        else:
            expected = next((sealed for sealed in mine if sealed.sequence == number), None)
            assert outbox.acknowledge(partition, number) is expected
            if expected is not None:
                model.remove(expected)
                assert outbox.acknowledge(partition, number) is None, "a second acknowledgement changes nothing"
        assert len(outbox) == len(model)
        assert outbox.bytes_total == sum(len(sealed.value) for sealed in model)
        pending = [*outbox.pending()]
        assert sorted(pending, key=id) == sorted(model, key=id)
        for p in range(3):
            assert [s for s in pending if s.partition == p] == [s for s in model if s.partition == p]
        for barrier, waited in barriers:
            assert outbox.settled(barrier) == (not any(sealed in model for sealed in waited))


def test_outbox_takes_numbers_in_order_only() -> None:
    """A batch that was sealed with another number than the next is a bug, reported before it is kept."""
    outbox = Outbox("p", 0)
    outbox.add(Sealed(0, 0, b"x", 1))
    for sequence in (0, 2):
        with pytest.raises(AssertionError):
            outbox.add(Sealed(0, sequence, b"x", 1))
    assert len(outbox) == outbox.bytes_total == 1
    assert outbox.next_numbers(0) == (1, 0)


def test_pending_may_be_acknowledged_while_it_is_walked() -> None:
    """Each batch may be acknowledged as it is sent."""
    outbox = Outbox("p", 0)
    for partition, sequence in ((0, 0), (1, 0), (0, 1)):
        outbox.add(Sealed(partition, sequence, b"x", 1))
    seen = []
    for sealed in outbox.pending():
        outbox.acknowledge(sealed.partition, sealed.sequence)
        seen.append((sealed.partition, sealed.sequence))
    assert sorted(seen) == [(0, 0), (0, 1), (1, 0)]
    assert (len(outbox), outbox.bytes_total) == (0, 0)
