"""Dead letters that are replayed: each counts once, in any order, however often it is tried."""

import itertools

import pytest

from pipeline.core import letters
from pipeline.core.codec import DeadLetter, decode_letter, receive_batch
from pipeline.core.commit import Counts
from pipeline.core.limits import TaskLimits
from pipeline.core.record import POSITION_KEY, Control, Definition, Group, Origin, fingerprint
from pipeline.core.sequence import SEQUENCE_STEP_MAX
from pipeline.errors import BadRecord
from tests.core.driver import NOW_MS, Shell, batch, group, totals

V = Definition("v", "sum", ("a",))
W = Definition("w", "sum", ("a",))


def replay(key: bytes, *groups: Group, origin: Origin | None = None) -> bytes:
    """Return the batch that replays the letter of this key."""
    return batch(0, *groups, producer_id=letters.letter_producer(key), origin=origin)


def again(shell: Shell, key: bytes) -> bytes:
    """Return the batch that replays a letter of the shell, from the letter's own bytes."""
    received = receive_batch(decode_letter(shell.dead_letters[key]).value or b"")
    return replay(key, *received.batch.groups)


@pytest.mark.parametrize(
    "key", [b"0-0", b"0-5", b"01234abc.0-5", b"01234abc.0-5-1-0", b"0-5-1", b"0-9223372036854775807-9999", b"0-5-1-0"]
)
def test_a_letter_is_named_by_its_producer(key: bytes) -> None:
    """The key comes back from the id, in the letter's own partition."""
    assert letters.letter_key(letters.letter_producer(key), 0) == key
    assert letters.letter_key(letters.letter_producer(key), 1) is None


@pytest.mark.parametrize(
    "producer_id",
    [
        "", "p", "letter", "letter:", "letter:0", "letter:0-", "letter:00-5", "letter:0-05", "letter:0-5-1-2-3",
        "letter:01234abg.0-5", "letter:01234ab.0-5", "letter:.0-5", "letter:01234ABC.0-5",
        "letter:0-5\n",
        "Letter:0-5", "xletter:0-5", "letter:0-5-", "letter:-0-5", "letter:0-\u0665", "letter:letter:0-5", "letter:0-5 ",
    ],
)  # fmt: skip
def test_other_producers_replay_nothing(producer_id: str) -> None:
    """An id that only looks like a letter's is a producer's like any other, and writes no tombstone."""
    assert letters.letter_key(producer_id, 0) is None


def full_of(view: Definition) -> Shell:
    """Return a shell with a letter `0-1-1`: a group that was one definition too many."""
    shell = Shell(TaskLimits(views_max=1))
    shell.fold(batch(0, group(view, {("x",): 1})), batch(1, group(view, {("x",): 2}), group(W, {("y",): 5})))
    shell.commit()
    assert [*shell.dead_letters] == [b"0-1-1"]
    return shell


def test_a_letter_that_is_replayed_counts_once() -> None:
    """A letter replayed in one commit, later, or after a restart counts once, and its key gets a tombstone."""
    shell = full_of(V)
    shell.limits = TaskLimits()
    shell.restart()
    value = again(shell, b"0-1-1")
    shell.fold(value, value)
    commit = shell.commit()
    assert commit.dead_letters == [(b"0-1-1", None)]
    shell.fold(value)
    shell.commit()
    shell.restart()
    shell.fold(value)
    assert shell.commit().dead_letters == [(b"0-1-1", None)], "said again: whoever has replayed it waits to hear it"
    assert totals(shell, "w") == [5]
    assert shell.letters() == []


def test_a_letter_that_is_refused_again_comes_back_under_its_own_key() -> None:
    """The letter stays one, with the newer reason and offset, and the next replay can succeed: once."""
    shell = full_of(V)
    for _ in range(2):
        shell.fold(again(shell, b"0-1-1"))
        ((key, value),) = shell.commit().dead_letters
        assert key == b"0-1-1"
        assert value is not None
        assert decode_letter(value).offset == len(shell.log) - 1
        assert decode_letter(value).view == "w"
    assert shell.task.counts.groups_refused == 3
    assert totals(shell) == [3]
    shell.limits = TaskLimits()
    shell.restart()
    value = again(shell, b"0-1-1")
    shell.fold(value, value)
    shell.commit()
    assert totals(shell, "w") == [5]
    assert shell.dead_letters == {}


def test_what_is_refused_and_then_folded_in_one_commit_is_no_letter() -> None:
    """After a failed try, an order that makes room and a good try, all in one commit, there is a tombstone only."""
    shell = Shell(TaskLimits(views_max=0))
    shell.fold(batch(0, group(W, {("y",): 5})))
    shell.commit()
    value = again(shell, b"0-0-0")
    shell.fold(value)
    shell.task._limits = TaskLimits(views_max=1)
    shell.fold(value, value)
    assert shell.commit().dead_letters == [(b"0-0-0", None)]
    assert totals(shell, "w") == [5]


def test_each_group_of_a_letter_is_a_letter_when_it_is_refused_again() -> None:
    """Each group of a record that was refused whole gets a key of its own, so that none is lost and each counts once."""
    shell = Shell(TaskLimits(views_max=1))
    whole = [group(V, {("x",): 1}), group(W, {("y",): 5}), group(Definition("u", "sum"), {(): 7})]
    shell.fold(batch(0, producer_id="p", epoch=3), batch(1, *whole, producer_id="p", epoch=2))
    shell.commit()
    assert [*shell.dead_letters] == [b"0-1"]
    origin = Origin("p", 1)
    shell.fold(replay(b"0-1", *whole, origin=origin))
    shell.commit()
    assert [*shell.dead_letters] == [b"0-1-1", b"0-1-2"]
    assert totals(shell) == [1]
    shell.limits = TaskLimits()
    shell.restart()
    shell.fold(replay(b"0-1", *whole, origin=origin), *(again(shell, key) for key in [*shell.dead_letters] * 2))
    shell.commit()
    assert (totals(shell), totals(shell, "w"), totals(shell, "u")) == ([1], [5], [7])
    assert shell.dead_letters == {}


ORIGINAL = batch(7, group(V, {("x",): 1}))
COPIES = {
    "original": ORIGINAL,
    "one letter": replay(b"0-3", group(V, {("x",): 1}), origin=Origin("p", 7)),
    "another letter": replay(b"0-4", group(V, {("x",): 1}), origin=Origin("p", 7)),
}


@pytest.mark.parametrize("order", [*itertools.permutations(COPIES)], ids=">".join)
@pytest.mark.parametrize("commits", [0, 1, 2])
def test_a_batch_and_what_replays_it_count_once(order: tuple[str, ...], commits: int) -> None:
    """Two letters of a batch and the batch count once, in any order, in one commit or several, with a restart between."""
    shell = Shell()
    shell.fold(batch(0, group(W, {("y",): 1})), batch(6, group(W, {("y",): 1})))
    for name in order:
        shell.fold(COPIES[name])
        if commits:
            shell.commit()
        if commits == 2:
            shell.restart()
    shell.commit()
    assert totals(shell) == [1]
    shell.fold(batch(8, group(V, {("x",): 10})), batch(5, group(V, {("x",): 100})))
    shell.commit()
    assert totals(shell) == [111], "its neighbours are not settled"


def test_a_letter_of_what_was_folded_after_all_is_settled() -> None:
    """The letter of a batch that was folded after all goes, and nothing counts twice."""
    shell = Shell()
    shell.dead_letters[b"0-3"] = b"?"
    shell.fold(ORIGINAL, COPIES["one letter"])
    shell.commit()
    assert totals(shell) == [1]
    assert shell.dead_letters == {}
    assert shell.task.counts == Counts(batches_folded=1, entries_folded=1, batches_duplicate=1)


def test_an_origin_can_settle_nothing_that_is_far_ahead() -> None:
    """A replay moves its origin's sequences no further than a batch of that producer could; it is folded all the same."""
    shell = Shell()
    shell.fold(batch(0, group(V, {("x",): 1})))
    far = 10 + SEQUENCE_STEP_MAX
    shell.fold(replay(b"0-9", group(V, {("x",): 2}), origin=Origin("p", far)))
    shell.fold(batch(far, group(V, {("x",): 4})), batch(1, group(V, {("x",): 8})))
    shell.commit()
    assert totals(shell) == [11]
    (reason,) = shell.reasons()
    assert "jumps" in reason


def test_a_replay_leaves_a_closed_origin_closed() -> None:
    """The memory of a replay is that of a closed producer, which is not kept for a week."""
    shell = Shell(TaskLimits(closed_producer_ttl_ms=100))
    shell.fold(batch(0, group(V, {("x",): 1})), batch(2, closing=True))
    shell.fold(replay(b"0-9", group(V, {("x",): 2}), origin=Origin("p", 1)))
    shell.commit()
    shell.now_ms = 10_000
    shell.hand_over_at(10_000)
    shell.sweep()
    shell.commit()
    assert not shell.has_producer("p")


def test_a_gap_too_many_in_an_origin_refuses_the_replay_and_keeps_the_letter() -> None:
    """A replay that is refused as a whole changes nothing: its letter stays, with the reason."""
    shell = Shell()
    shell.fold(*(batch(2 * i + 1) for i in range(1_000)))
    value = replay(b"0-9", group(V, {("x",): 2}), origin=Origin("p", 5_000))
    shell.fold(value)
    shell.commit()
    ((key, letter),) = shell.dead_letters.items()
    assert key == b"0-9"
    assert "gaps" in decode_letter(letter).reason
    assert decode_letter(letter).value == value
    assert not shell.has_producer("letter:0-9")
    assert shell.entries("v") == []


def test_the_memory_of_a_letter_is_a_producers() -> None:
    """The memory of a replay is a producer entry in the store, so that a replay counts once across restarts."""
    shell = full_of(V)
    shell.fold(again(shell, b"0-1-1"))
    shell.commit()
    assert not shell.has_producer("letter:0-1-1"), "refused: as if it had never come"
    shell.limits = TaskLimits()
    shell.restart()
    shell.fold(again(shell, b"0-1-1"))
    shell.commit()
    assert shell.has_producer("letter:0-1-1")


def test_letters_of_a_topic_made_anew_are_others() -> None:
    """A letter of another topic, with the same partition and offset, counts, although the first was replayed."""
    shell = Shell()
    for topic_id in ("first", "second"):
        shell.log, shell.store = [], {key: it for key, it in shell.store.items() if key != POSITION_KEY}
        shell.limits = TaskLimits(views_max=0)
        shell.restart(topic_id)
        shell.fold(batch(0, group(Definition(topic_id, "sum", ("a",)), {("y",): 5}), producer_id=topic_id))
        shell.commit()
        (key,) = shell.dead_letters
        assert letters.partition_of_key(key.decode()) == 0
        shell.limits = TaskLimits()
        shell.restart(topic_id)
        shell.fold(letters.replaying(key, decode_letter(shell.dead_letters[key])))
        shell.commit()
        assert shell.dead_letters == {}
        assert totals(shell, topic_id) == [5]


def test_a_replayed_letter_is_remembered_longer_than_letters_are_kept() -> None:
    """A listing that is eight days old, when any other producer is forgotten, makes nothing count twice."""
    day_ms = 86_400_000
    shell = full_of(V)
    shell.limits = TaskLimits()
    shell.restart()
    stale = again(shell, b"0-1-1")
    shell.fold(stale)
    shell.commit()
    for day, remembered in ((8, True), (60, True), (91, False)):
        shell.now_ms = NOW_MS + day * day_ms
        shell.hand_over_at(shell.now_ms)
        shell.sweep()
        shell.commit()
        assert not shell.has_producer("p")
        assert shell.has_producer("letter:0-1-1") is remembered
        if remembered:
            shell.fold(stale)
            shell.commit()
            assert totals(shell, "w") == [5]


def stale_letter(shell: Shell) -> bytes:
    """Return a letter `0-1` of a batch that an older process of its producer had sent."""
    shell.fold(batch(0, producer_id="p", epoch=3), batch(1, group(V, {("x",): 5}), producer_id="p", epoch=2))
    shell.commit()
    assert [*shell.dead_letters] == [b"0-1"]
    return letters.replaying(b"0-1", decode_letter(shell.dead_letters[b"0-1"]))


@pytest.mark.parametrize("counted", [False, True])
def test_a_stale_letter_counts_unless_its_batch_did(counted: bool) -> None:
    """A letter is settled without a second count if the newer process has sent the batch itself, and counts otherwise."""
    shell = Shell()
    value = stale_letter(shell)
    if counted:
        shell.fold(batch(1, group(V, {("x",): 5}), producer_id="p", epoch=3))
    shell.fold(value)
    shell.commit()
    assert totals(shell) == [5]
    assert shell.dead_letters == {}


@pytest.mark.parametrize("counted", [False, True])
def test_a_letter_whose_sender_is_forgotten_is_refused(counted: bool) -> None:
    """A letter of a forgotten producer may have been counted: it stays until a person says that it was not."""
    shell = Shell()
    value = stale_letter(shell)
    if counted:
        shell.fold(batch(1, group(V, {("x",): 5}), producer_id="p", epoch=3))
    shell.now_ms += 8 * 86_400_000
    shell.hand_over_at(shell.now_ms)
    shell.commit()
    shell.sweep()
    shell.fold(value)
    shell.commit()
    letter = decode_letter(shell.dead_letters[b"0-1"])
    assert "forgotten" in letter.reason
    assert shell.entries("v") == [] or totals(shell) == [5]
    assert letters.replaying(b"0-1", letter) == value, "refused again, it is what it was"
    shell.fold(letters.replaying(b"0-1", letter, forgotten=True))
    shell.commit()
    assert totals(shell) == [5 + 5 * counted], "as somebody said"
    assert shell.dead_letters == {}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "too many for the dead-letter topic"),
        (b"garbage", "version byte"),
        (batch(0, group(V, {("x",): 1}))[:-1], "checksum"),
        (batch(0, controls=[Control("drop", "v")]), "order"),
        (batch(0, group(V, {("x",): 1}), partition=3), "sealed for partition 3"),
    ],
    ids=["no bytes", "garbage", "torn", "order", "elsewhere"],
)
def test_what_cant_be_replayed_says_why(value: bytes | None, reason: str) -> None:
    """A letter that can't be replayed raises `BadRecord`, and never becomes another batch."""
    with pytest.raises(BadRecord, match=reason):
        letters.replaying(b"0-1", DeadLetter(0, 1, 0, "why", "", value))


def test_what_a_letter_holds_is_told_without_decoding_it() -> None:
    """A letter shows its groups and series, and a sender that is the same through every replay."""
    held = letters.held(batch(0, group(V, {("x",): 1, ("y",): 2}), group(W, {(str(i),): 1 for i in range(70_000)})))
    assert held == letters.Held(fingerprint("p"), 2, 70_002)
    again = letters.replaying(
        b"0-1", DeadLetter(0, 1, 0, "why", "", batch(0, *(group(W, {(str(i),): 1}) for i in range(20))))
    )
    assert letters.held(again) == letters.Held(fingerprint("p"), 20, 20)
    for value in (None, b"", b"garbage", b"\x02" * 20):
        assert letters.held(value) is None


def test_a_whole_record_of_one_group_that_is_refused_again_counts_in_the_end() -> None:
    """A letter that was refused again still names its origin, and the two count once."""
    shell = Shell(TaskLimits(views_max=0))
    replayed = stale_letter(shell)
    shell.fold(replayed)
    shell.commit()
    letter = decode_letter(shell.dead_letters[b"0-1"])
    assert letter.view == "v"
    shell.limits = TaskLimits()
    shell.restart()
    again = letters.replaying(b"0-1", letter)
    shell.fold(again, again, batch(1, group(V, {("x",): 5}), producer_id="p", epoch=3))
    shell.commit()
    assert totals(shell) == [5]
    assert shell.dead_letters == {}


@pytest.mark.parametrize("commits", [False, True])
def test_a_copy_of_a_replay_that_was_refused_again_settles_nothing(commits: bool) -> None:
    """A copy of a refused replay settles nothing, so the letter stays, and counts when its reason is gone."""
    shell = Shell(TaskLimits(views_max=0))
    replayed = stale_letter(shell)
    shell.fold(replayed)
    if commits:
        shell.commit()
    shell.fold(replayed)
    shell.commit()
    letter = decode_letter(shell.dead_letters[b"0-1"])
    shell.limits = TaskLimits()
    shell.restart()
    shell.fold(batch(1, group(V, {("x",): 5}), producer_id="p", epoch=3), letters.replaying(b"0-1", letter), replayed)
    shell.commit()
    assert totals(shell) == [5]
    assert shell.dead_letters == {}
