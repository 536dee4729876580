"""Windows and silent series that expire: refusals, deletions, and their times."""

from typing import Any

import pytest

from pipeline.core import letters
from pipeline.core.codec import alive, check_group, decode_letter, decode_states, encode_batch, receive_batch
from pipeline.core.kinds import KINDS
from pipeline.core.limits import TaskLimits
from pipeline.core.record import (
    OVERFLOW,
    Batch,
    Control,
    Definition,
    Group,
    parse_suffix,
    series_prefix,
    series_suffix,
)
from pipeline.errors import BadRecord, StoreCorrupt
from tests.core.driver import Shell

V = Definition("v", "sum", ("a",), window_s=10, retention_s=60)
KEPT = Definition("kept", "sum", ("a",), window_s=10)
QUIET = Definition("quiet", "sum", ("a",), retention_s=60)
START_MS = 1_700_000_000_000
HOUR_MS = 3_600_000

Rows = dict[tuple[str, int], Any]
"""Deltas by label value and seconds after the start; for a definition without windows the seconds are 0."""


def start_ms(definition: Definition, after_s: int) -> int:
    """Return the start of the window of this time, or 0 without windows."""
    return START_MS + after_s * 1_000 if definition.window_s else 0


def group(definition: Definition, rows: Rows) -> Group:
    suffixes = [series_suffix((label,), start_ms(definition, after_s)) for label, after_s in rows]
    return Group(definition, suffixes, [*rows.values()])


class Timed(Shell):
    """A shell whose records come at given seconds after the start, by all clocks."""

    def __init__(self, limits: TaskLimits | None = None) -> None:
        super().__init__(limits)
        self.count = 0

    def at(self, after_s: float, *groups: Group, **more: Any) -> None:
        """Fold one batch at this time."""
        self.now_ms = START_MS + int(after_s * 1_000)
        self.count += 1
        fields = {"producer_id": f"p{self.count}", "origin": None, "controls": [], **more}
        batch = Batch(
            fields["producer_id"],
            0,
            0,
            0,
            0,
            self.now_ms,
            [*groups],
            origin=fields["origin"],
            controls=fields["controls"],
        )
        self.hand_over_at(self.now_ms, encode_batch(batch))

    def stored(self, definition: Definition) -> Rows:
        """Return the committed series of a definition, whether they have expired or not."""
        prefix = series_prefix(definition)
        found = {key: value for key, value in self.store.items() if key.startswith(prefix)}
        states = decode_states(KINDS[definition.kind], [*found.values()])
        rows = {}
        for key, state in zip(found, states, strict=True):
            window_start_ms, (label,) = parse_suffix(key.removeprefix(prefix))
            rows[label, (window_start_ms - START_MS) // 1_000 if definition.window_s else 0] = state
        return rows

    def settle(self) -> int:
        """Commit until nothing is left to be done; return how many commits that took."""
        count = 0
        while self.task.dirty:
            self.commit()
            count += 1
            assert count < 100
        return count


# Windows


def test_a_window_far_ahead_is_refused() -> None:
    """A group with a window too far ahead is refused as a whole, by the task and at the gateway's door."""
    shell = Timed()
    near, far = group(V, {("x", 3_600): 1}), group(V, {("x", 0): 1, ("y", 3_610): 1})
    shell.at(0, near)
    shell.at(0, far)
    shell.settle()
    assert shell.stored(V) == {("x", 3_600): 1}
    (reason,) = shell.reasons()
    assert "ts_ahead_max_ms" in reason
    check_group(near, START_MS, ts_ahead_max_ms=HOUR_MS)
    with pytest.raises(BadRecord, match="ts_ahead_max_ms"):
        check_group(far, START_MS, ts_ahead_max_ms=HOUR_MS)


def test_a_late_delta_merges_until_its_window_has_expired() -> None:
    """A window takes late deltas until its end plus the retention, to the millisecond."""
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1}))
    shell.at(69.9, group(V, {("x", 0): 2}))
    shell.settle()
    assert shell.stored(V) == {("x", 0): 3}
    shell.at(70, group(V, {("x", 0): 4, ("x", 10): 5}))
    shell.settle()
    assert shell.stored(V) == {("x", 10): 5}
    assert shell.task.counts.entries_expired == 1


def test_only_what_has_expired_of_a_group_is_refused() -> None:
    """The expired series of a group become a letter; its other series, and other groups, are folded."""
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1}))
    shell.at(100, group(V, {("x", 0): 2, ("x", 90): 3, ("y", 10): 4}), group(KEPT, {("x", 0): 5}))
    shell.settle()
    assert shell.stored(V) == {("x", 90): 3}
    assert shell.stored(KEPT) == {("x", 0): 5}
    (letter,) = shell.letters()
    assert letter.reason.startswith("expired: 2 of 3 series")
    assert letter.view == "v"
    (found,) = receive_batch(letter.value or b"").batch.groups
    assert found == group(V, {("x", 0): 2, ("y", 10): 4})
    assert (shell.task.counts.entries_expired, shell.task.counts.groups_refused) == (2, 0)


@pytest.mark.parametrize("restarts", [True, False])
def test_a_refused_letter_is_refused_again(*, restarts: bool) -> None:
    """A refused replay is a letter under its own key, with all its series in order, and can be replayed again."""
    shell = Timed()
    shell.at(100, group(V, {("x", 0): 2, ("x", 90): 3, ("y", 10): 4}))
    shell.settle()
    (key,) = shell.dead_letters
    for _ in range(3):
        if restarts:
            shell.restart()
        before = decode_letter(shell.dead_letters[key])
        replayed = receive_batch(letters.replaying(key, before)).batch
        shell.at(0, *replayed.groups, producer_id=replayed.producer_id, origin=replayed.origin)
        shell.settle()
        assert [*shell.dead_letters] == [key]
        after = decode_letter(shell.dead_letters[key])
        assert receive_batch(after.value or b"").batch.groups == [group(V, {("x", 0): 2, ("y", 10): 4})]
    assert shell.stored(V) == {("x", 90): 3}


@pytest.mark.parametrize("key", [b"0-7", b"0-7-0", b"0-7-0-0"])
def test_a_replay_that_has_expired_in_part_counts_once(key: bytes) -> None:
    """The series of a replay that have not expired count once, however often it comes; the others become a letter.

    A replay of a letter that cannot be split further is refused as a whole.
    """
    shell = Timed()
    shell.at(100, group(V, {("x", 90): 1}))
    for _ in range(3):
        shell.at(101, group(V, {("x", 0): 2, ("x", 90): 3}), producer_id=letters.letter_producer(key))
        shell.settle()
    whole = key == b"0-7-0-0"
    assert shell.stored(V) == {("x", 90): 1 if whole else 4}
    (kept,) = shell.dead_letters
    assert kept == key if whole else kept == key + b"-0"
    (letter,) = shell.letters()
    assert len(receive_batch(letter.value or b"").batch.groups[0].suffixes) == (2 if whole else 1)


def test_what_was_refused_is_refused_by_the_next_owner() -> None:
    """The watermark is in the commit that first relies on it, even if the definition is new and has no series."""
    shell = Timed()
    shell.at(100, group(V, {("x", 0): 2}))
    shell.settle()
    assert [it.expired_before_ms for it in shell.entries("v")] == [START_MS + 40_000]
    shell.restart()
    shell.at(0, group(V, {("x", 0): 2}))
    shell.settle()
    assert shell.stored(V) == {}
    assert len(shell.letters()) == 2


def test_a_window_that_is_gone_never_begins_anew() -> None:
    """A late delta is still refused after a crash, though only another view's records moved the watermark."""
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1, ("x", 60): 1}))
    shell.settle()
    shell.at(100, group(KEPT, {("x", 0): 1}))
    shell.settle()
    assert shell.stored(V) == {("x", 60): 1}
    shell.restart()
    shell.at(0, group(V, {("x", 0): 1}))
    shell.settle()
    assert shell.stored(V) == {("x", 60): 1}
    assert shell.reasons()[0].startswith("expired")


def test_no_single_clock_expires_anything() -> None:
    """Only a time that the log, the publisher and the worker have all reached moves the watermark."""
    for ahead in ("log", "publisher", "worker"):
        shell = Timed()
        shell.at(0, group(V, {("x", 0): 1}))
        year_ms = 365 * 86_400_000
        shell.now_ms = START_MS + year_ms * (ahead == "worker")
        batch = Batch("q", 0, 0, 0, 0, START_MS + year_ms * (ahead == "publisher"), [group(V, {("x", 0): 2})])
        shell.hand_over_at(START_MS + year_ms * (ahead == "log"), encode_batch(batch))
        shell.settle()
        assert shell.stored(V) == {("x", 0): 3}, ahead


def test_windows_that_expire_while_they_are_folded() -> None:
    """States in the overlay, also in the frozen one, go with the commit that moves the watermark over their window."""
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1, ("x", 10): 1}))
    shell.at(70, group(V, {("x", 60): 1}))
    shell.freeze()
    shell.at(80, group(V, {("x", 70): 1}))
    shell.prepare()
    shell.committed()
    assert shell.stored(V) == {("x", 10): 1, ("x", 60): 1}
    assert shell.series_count("v") == 2
    shell.settle()
    assert shell.stored(V) == {("x", 60): 1, ("x", 70): 1}
    assert shell.series_count("v") == 2
    assert shell.letters() == []


def test_expiry_is_bounded_work_a_commit_and_goes_on_after_a_crash() -> None:
    """A commit deletes up to its limit; an idle partition goes on until all is gone, and counts what is left."""
    shell = Timed(TaskLimits(expired_entries_max=10))
    shell.at(0, group(V, {(f"{i:03}", 0): 1 for i in range(95)}), group(V, {("x", 60): 1}))
    shell.settle()
    shell.at(1, group(KEPT, {("x", 0): 1}))
    shell.settle()
    shell.at(100, group(KEPT, {("x", 0): 1}))
    shell.commit()
    assert shell.series_count("v") == len(shell.stored(V)) == 86
    shell.commit()
    shell.freeze()
    shell.prepare()
    shell.restart()
    assert shell.series_count("v") == len(shell.stored(V)) == 76
    assert shell.settle() == 8
    assert shell.stored(V) == {("x", 60): 1}
    assert shell.series_count("v") == 1
    assert shell.task.counts.series_expired == 75
    assert not shell.task.dirty


def test_expiry_keeps_up_with_new_series() -> None:
    """A commit deletes as many entries as the previous one has added, whatever its limit."""
    shell = Timed(TaskLimits(expired_entries_max=1))
    for minute in range(5):
        shell.at(60 * minute, group(V, {(f"{i}", 60 * minute): 1 for i in range(20)}))
        shell.commit()
    assert len(shell.stored(V)) == shell.series_count("v") == 40


def test_each_sweep_begins_where_the_last_one_ended() -> None:
    """A sweep begins behind the last one, as the store would else go over everything deleted before."""
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1, ("x", 100): 1}))
    shell.settle()
    shell.at(100, group(V, {("x", 100): 1}))
    shell.settle()
    shell.at(111, group(V, {("x", 100): 1}))
    shell.freeze()
    (sweep,) = shell.lookup.sweeps
    assert sweep.start == series_prefix(V) + (START_MS + 40_000).to_bytes(8, "big")
    assert sweep.end == series_prefix(V) + (START_MS + 50_000).to_bytes(8, "big")


def test_definitions_expire_by_themselves() -> None:
    """Two definitions of a view have a watermark each."""
    longer = Definition("v", "sum", ("a",), window_s=10, retention_s=600)
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1}), group(longer, {("x", 0): 2}))
    shell.at(100, group(V, {("x", 0): 1}), group(longer, {("x", 0): 2}))
    shell.settle()
    assert (shell.stored(V), shell.stored(longer)) == ({}, {("x", 0): 4})
    assert [it.expired_before_ms for it in shell.entries("v") if it.definition == V] == [START_MS + 40_000]


@pytest.mark.parametrize("action", ["drop", "reset"])
@pytest.mark.parametrize("frozen", [True, False])
def test_an_order_to_a_view_that_expires(action: str, *, frozen: bool) -> None:
    """After an order before, while or after a commit sweeps the view, deltas count from nothing, and counts are right."""
    shell = Timed(TaskLimits(expired_entries_max=2))
    shell.at(0, group(V, {(f"{i}", 0): 1 for i in range(5)}))
    shell.settle()
    shell.at(100, group(V, {("x", 90): 1}))
    if frozen:
        shell.freeze()
    shell.at(100, group(V, {("y", 90): 1}), controls=[Control(action, "v")])
    if frozen:
        shell.prepare()
        shell.committed()
    shell.at(101, group(V, {("z", 90): 1, ("z", 0): 1}))
    shell.settle()
    assert shell.stored(V) == {("y", 90): 1, ("z", 90): 1}
    assert shell.series_count("v") == 2
    assert [it.reason[:7] for it in shell.letters()] == ["expired"]


def test_expiry_makes_room_below_series_max() -> None:
    """New series overflow while old ones fill the view, and do not once those are gone."""
    shell = Timed(TaskLimits(series_max=3))
    shell.at(0, group(V, {(f"{i}", 0): 1 for i in range(3)}))
    shell.settle()
    shell.at(50, group(V, {("a", 50): 1, ("b", 50): 2}))
    shell.settle()
    assert shell.stored(V) == {("0", 0): 1, ("1", 0): 1, ("2", 0): 1, (OVERFLOW, 50): 3}
    assert shell.series_count("v") == 4
    shell.at(100, group(V, {("a", 50): 1, ("b", 100): 2}))
    shell.settle()
    assert shell.stored(V) == {(OVERFLOW, 50): 3, ("a", 50): 1, ("b", 100): 2}
    assert shell.series_count("v") == 3


# Silent series


def visible(shell: Timed, definition: Definition = QUIET) -> Rows:
    """Return the committed series that answers show."""
    (entry,) = shell.entries(definition.view)
    kept = {**shell.store}
    prefix = series_prefix(definition)
    shown = dict(alive(((k, v) for k, v in kept.items() if k.startswith(prefix)), entry.expired_before_ms))
    shell.store = {k: v for k, v in kept.items() if not k.startswith(prefix) or k in shown}
    rows, shell.store = shell.stored(definition), kept
    return rows


def test_a_silent_series_expires_and_begins_anew() -> None:
    """A touched series lives on; a silent one is hidden, deleted, and counts from nothing later."""
    shell = Timed()
    shell.at(0, group(QUIET, {("x", 0): 1, ("y", 0): 1}))
    shell.settle()
    shell.at(50, group(QUIET, {("x", 0): 1}))
    shell.settle()
    shell.at(100, group(KEPT, {("x", 0): 1}))
    shell.settle()
    assert shell.stored(QUIET) == visible(shell) == {("x", 0): 2}
    assert shell.series_count("quiet") == 1
    shell.at(101, group(QUIET, {("y", 0): 5}))
    shell.settle()
    assert shell.stored(QUIET) == {("x", 0): 2, ("y", 0): 5}
    assert shell.series_count("quiet") == 2


@pytest.mark.parametrize("restarts", [True, False])
def test_an_expired_series_is_hidden_before_it_is_deleted(*, restarts: bool) -> None:
    """A delta that comes before the deletion begins the series anew, too, and it is counted once."""
    shell = Timed(TaskLimits(expired_entries_max=1))
    shell.at(0, group(QUIET, {(f"{i}", 0): 1 for i in range(5)}))
    shell.settle()
    shell.at(1, group(KEPT, {("x", 0): 1}))
    shell.settle()
    shell.at(100, group(KEPT, {("x", 0): 1}))
    shell.commit()
    assert len(shell.stored(QUIET)) == 4
    assert visible(shell) == {}
    if restarts:
        shell.restart()
    shell.at(101, group(QUIET, {("4", 0): 7}))
    shell.commit()
    assert visible(shell) == {("4", 0): 7}
    assert shell.series_count("quiet") == len(shell.stored(QUIET))
    shell.settle()
    assert shell.stored(QUIET) == {("4", 0): 7}
    assert shell.series_count("quiet") == 1


def test_a_series_that_was_not_silent_goes_on() -> None:
    """A delta that came in time is merged, even if the commit that has it moves the time past the expiry."""
    shell = Timed()
    shell.at(0, group(QUIET, {("x", 0): 1}))
    shell.settle()
    shell.at(59, group(QUIET, {("x", 0): 1}))
    shell.at(90, group(KEPT, {("x", 0): 1}))
    shell.settle()
    assert visible(shell) == {("x", 0): 2}


def test_an_overflow_series_that_was_silent() -> None:
    """The overflow series expires as other series do, and later overflow begins anew."""
    shell = Timed(TaskLimits(series_max=1))
    shell.at(0, group(QUIET, {("x", 0): 1}))
    shell.settle()
    shell.at(1, group(QUIET, {("y", 0): 2}))
    shell.settle()
    assert shell.stored(QUIET) == {("x", 0): 1, (OVERFLOW, 0): 2}
    shell.at(58, group(QUIET, {("x", 0): 1}))
    shell.settle()
    shell.at(99, group(KEPT, {("x", 0): 1}))
    shell.settle()
    shell.at(100, group(QUIET, {("y", 0): 4}))
    shell.settle()
    shell.at(101, group(QUIET, {("y", 0): 8}))
    shell.settle()
    assert visible(shell) == {("x", 0): 2, (OVERFLOW, 0): 12}
    assert shell.series_count("quiet") == 2


def test_a_damaged_entry_is_not_deleted() -> None:
    """An entry that can't be decoded is damage of the store, whatever it seems to say of its expiry."""
    shell = Timed()
    shell.at(0, group(QUIET, {("x", 0): 1}))
    shell.settle()
    (key,) = (key for key in shell.store if key.startswith(series_prefix(QUIET)))
    shell.store[key] = shell.store[key][:-1]
    shell.at(100, group(KEPT, {("x", 0): 1}))
    shell.freeze()
    with pytest.raises(StoreCorrupt, match="view quiet"):
        shell.prepare()


def test_entries_expire_in_a_view_with_a_retention_only() -> None:
    """Entries of views without a retention have the bytes that they always had."""
    shell = Timed()
    shell.at(0, group(V, {("x", 0): 1}), group(KEPT, {("x", 0): 1}), group(QUIET, {("x", 0): 1}))
    shell.settle()
    values = [value for key, value in sorted(shell.store.items()) if key[:1] == b"\x02"]
    assert values[0] == values[2] == b"\x02\x93\xa3sum\x00\x01"
    assert values[1] == b"\x02\x93\xa3sum\xcf" + (START_MS + 60_000).to_bytes(8, "big") + b"\x01"
