"""StatsD lines as deltas of views, within limits, and without an exception."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pipeline.metrics as m
from pipeline.core.record import Definition, parse_suffix
from pipeline.ingest.statsd import StatsdSink
from pipeline.ingest.statsd_mapping import LINE_VIEWS, LineViews
from pipeline.settings import IngestSettings
from tests.publisher.support import CLOCK, FaultyLog, Meter, Views, batches, fold, publisher


class Stopped:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.ms = 1_000

    def now_ms(self) -> int:
        return self.ms

    def monotonic_s(self) -> float:
        return self.ms / 1_000

    def rising_ns(self) -> int:
        return CLOCK.rising_ns()

    def new_id(self) -> str:
        return CLOCK.new_id()


class World:
    """A sink, its publisher and its log."""

    def __init__(
        self, *, clock: Any = CLOCK, known: Any = None, labels: Any = None, on_full: str = "raise", **limits: Any
    ) -> None:
        publishing = {name: limits.pop(name) for name in [*limits] if not name.startswith("ingest_")}
        self.log = FaultyLog()
        self.meter = Meter()
        self.publisher = publisher(self.log, on_full=on_full, **publishing)
        self.sink = StatsdSink(
            self.publisher,
            clock,
            IngestSettings(**limits),
            self.meter,
            known=known,
            labels=labels,
        )

    def send(self, *lines: str | bytes, protocol: str = "statsd_udp", sender: str | None = None) -> World:
        self.sink.take([line.encode() if isinstance(line, str) else line for line in lines], protocol, sender)
        return self

    def views(self) -> Views:
        """Return the totals of everything that was sent."""
        assert self.sink.close()
        self.publisher.close()
        views = fold(self.log.log)
        assert not views.dead
        return views

    @property
    def refused(self) -> dict[str, int]:
        counted = {
            labels[1]: count
            for (name, *labels), count in self.meter.values.items()
            if name == m.INGEST_MALFORMED.name and count
        }
        assert counted == dict(self.sink.refused)
        return dict(self.sink.refused)


def test_each_type_makes_its_views() -> None:
    """Counters add up, timers and histograms have mean, largest and count, and members of sets are series."""
    world = World()
    world.send("hits:1|c", "hits:2|c|@0.5", "hits:-1|c")
    world.send("req.time:10:20|ms", "req.time:60|ms|@0.1", "size:7|h", "size:9|d", "load_ms:3|ms")
    world.send("users:ann|s", "users:bob|s", "users:ann|s|@0.1")
    answers = world.views().answers
    assert answers == {
        ("hits", ()): 4,
        ("req_time_ms", ()): (10 + 20 + 10 * 60) / 12,
        ("req_time_ms_max", ()): 60,
        ("req_time_ms_count", ()): 12,
        ("size", ()): 8.0,
        ("size_max", ()): 9,
        ("size_count", ()): 2,
        ("load_ms", ()): 3.0,
        ("load_ms_max", ()): 3,
        ("load_ms_count", ()): 1,
        ("users", ("ann",)): 2,
        ("users", ("bob",)): 1,
    }
    assert world.refused == {}
    assert world.meter.of(m.INGEST_LINES, "statsd_udp") == 11


@pytest.mark.parametrize("mapping", LINE_VIEWS, ids=lambda it: f"{it.type}-{it.setting}")
def test_each_mapping_of_the_docs(mapping: LineViews) -> None:
    """The example of each row of the docs' table makes the views of that row, of these kinds."""
    name, _, value = mapping.setting.partition("=")
    world = World(**({name: value} if name else {})).send(mapping.example)
    assert not world.refused
    world.views()
    found = {group.definition.view: group.definition.kind for batch in batches(world.log.log) for group in batch.groups}
    assert found == {f"name{suffix}": kind for suffix, kind in mapping.views.items()}


def test_sketches_of_timers_and_sets() -> None:
    """With the settings for it a timer has quantiles, and a set is counted without its members; a rate of 0.1 weighs ten."""
    world = World(ingest_timers="histogram", ingest_sets="distinct")
    world.send("t:5:7|ms", "t:100|ms|@0.1|#", "d:1|d", "d:3|h|@0.5", "u:ann|s", "u:bob|s", "u:ann|s|#member:x")
    assert world.refused == {"labels": 1}
    answers = world.views().answers
    assert {name: answers[name, ()]["count"] for name in ("t_ms", "d")} == {"t_ms": 12, "d": 3}
    assert answers["t_ms", ()]["sum"] == 1_012
    assert answers["d", ()]["mean"] == 7 / 3
    assert answers["u", ()]["estimate"] == 2
    assert len(answers) == 3


def test_views_of_the_server_keep_their_kinds() -> None:
    """Lines go to a view as the server has it, with any settings."""
    known = {
        "t_ms": Definition("t_ms", "histogram"), "u": Definition("u", "distinct"), "s": Definition("s", "sum", ("member",)),
        "h": Definition("h", "mean"),
    }  # fmt: skip
    for options in ({}, {"ingest_timers": "histogram", "ingest_sets": "distinct"}):
        answers = World(known=known, **options).send("t:5|ms", "u:ann|s", "s:ann|s", "h:2|h").views().answers
        assert answers["t_ms", ()]["count"] == answers["u", ()]["estimate"] == answers["s", ("ann",)] == 1
        assert (answers["h", ()], answers["h_count", ()]) == (2.0, 1)


def test_a_sample_rate_weighs_in_the_mean() -> None:
    """A value stands for as many observations as its rate says; parts of one add up, so that the mean is right."""
    world = World().send("t:5|ms|@0.1", "t:60|ms", "third:3|ms|@0.3", "third:6|ms|@0.3", "third:9|ms|@0.3")
    assert not world.refused
    answers = world.views().answers
    assert answers["t_ms", ()] == (10 * 5 + 60) / 11
    assert answers["third_ms", ()] == (3 * 3 + 3 * 6 + 4 * 9) / 10
    assert answers["third_ms_count", ()] == pytest.approx(10)


def test_a_line_stands_for_a_limited_number_of_observations() -> None:
    """A tiny sample rate can't make one line cost as much as millions: it is left out."""
    world = World(ingest_observations_max=100).send("t:1|ms|@0.01", "t:1:2|ms|@0.01", "t:1|ms|@0.001", "c:1|c|@0.001")
    assert world.refused == {"observations_max": 2}
    assert world.views().answers["t_ms_count", ()] == 100


@pytest.mark.parametrize("dialect", ["auto", "statsd", "dogstatsd"])
def test_joined_lines(dialect: str) -> None:
    """StatsD and Telegraf take several samples of one name in a line; DogStatsD refuses such a line."""
    world = World(ingest_dialect=dialect).send("a:1|c:10|c|@0.1:200|ms|#x:1", "g:5|g:+1|g:oops|g", "b:1|c:2|nope")
    if dialect == "dogstatsd":
        assert world.refused == {"type": 3}
        return
    assert world.refused == {"value": 1, "type": 1}
    answers = world.views().answers
    assert (answers["a", ("1",)], answers["a_ms", ("1",)], answers["g", ()], answers["b", ()]) == (101, 200, 6, 1)
    assert world.sink.line_count == 3 + 3 + 2


def test_a_late_gauge_is_no_base_of_steps() -> None:
    """A step changes the newest value, also if an older one has come after that; a step of an older time is refused."""
    world = World().send("g:5|g|T2000", "g:100|g|T1000", "g:+1|g|T3000", "g:+7|g|T2999", "g:+1|g|T3000")
    world.send("h:5|g", "h:9|g|T1000", "h:+1|g", "h:-2|g|T1000", "h:3:+1|g|T1000")
    world.send(f"i:4|g|T{CLOCK.now_ms() // 1_000 + 60}", "i:+1|g", "i:8|g")
    assert world.refused == {"late": 3}
    assert world.views().answers == {("g", ()): 7, ("h", ()): 6, ("i", ()): 4}


def test_a_gauge_of_now_is_not_recorded_after_a_later_one() -> None:
    """A value that waits to be recorded goes before a later one that says its time."""
    clock = Stopped()
    clock.ms = CLOCK.now_ms() // 1_000 * 1_000 - 5_000
    world = World(clock=clock).send("g:2|g", f"g:+1|g|T{clock.ms // 1_000}")
    assert world.views().answers == {("g", ()): 3}


@pytest.mark.parametrize(("dialect", "value"), [("auto", -7), ("statsd", -8), ("dogstatsd", -5)])
def test_the_dialect_decides_about_signs(dialect: str, value: int) -> None:
    """The setting of the dialect reaches the lines."""
    world = World(ingest_dialect=dialect).send("g:-1|g", "g:-2|g|c:ci-1", "g:-5|g")
    assert world.views().answers == {("g", ()): value}


def test_a_sender_gets_a_share() -> None:
    """One sender can't take all views and series for the life of the process: others get the rest, up to the limit."""
    world = World(ingest_views_max=4, ingest_series_max=6, ingest_sender_share=50)
    world.send("a:1|c", "b:1|c", "c:1|c", "a:1|c|#", "t:1|ms", sender="192.0.2.1")
    assert world.refused == {"sender_share": 2}
    world.send("c:1|c", "d:1|c", "b:1|c", sender="192.0.2.2")
    world.send("e:1|c", sender="192.0.2.3")
    assert world.refused == {"sender_share": 2, "views_max": 1}
    assert world.views().answers == {("a", ()): 2, ("b", ()): 2, ("c", ()): 1, ("d", ()): 1}
    world = World(ingest_series_max=6, ingest_sender_share=50)
    world.send(*[f"a:1|c|#x:{number}" for number in range(9)], "a:1|c|#x:0", sender="192.0.2.1")
    world.send(*[f"a:1|c|#x:{number}" for number in range(9)], sender="192.0.2.2")
    assert world.refused == {"sender_share": 6 + 3}
    assert world.views().total("a") == 4 + 6


@pytest.mark.parametrize("moves", [False, True])
def test_the_last_gauge_counts(moves: bool) -> None:
    """A later gauge counts, whatever its size and speed, and a step is relative to the present value of its series."""
    clock = Stopped()
    world = World(clock=clock)
    for line in ("g:9|g", "g:5|g", "g:+2:-4|g", "h:-3|g", "t:10|g|#a:1", "t:+1|g|#a:2", "big:1|g", "big:+0.5|g"):
        world.send(line)
        clock.ms += moves
    answers = world.views().answers
    assert answers == {("g", ()): 3, ("h", ()): -3, ("t", ("1",)): 10, ("t", ("2",)): 1, ("big", ()): 1.5}


def test_a_gauge_of_an_older_time_is_older() -> None:
    """DogStatsD's timestamp is the time of a gauge."""
    world = World().send("g:5|g", "g:9|g|T1000", "h:1|g|T2000", "h:2|g|T1000")
    assert world.views().answers == {("g", ()): 5, ("h", ()): 1}


def test_a_gauge_of_a_time_far_ahead_is_refused() -> None:
    """A time far ahead, which would silence its series, is refused and counted; later lines go on."""
    world = World().send("g:1|g", f"g:9|g|T{CLOCK.now_ms() // 1_000 + 7_200}", "g:2|g")
    assert world.refused == {"refused": 1}
    assert world.views().answers == {("g", ()): 2}


def test_a_clock_that_is_set_back_holds_no_gauge_up() -> None:
    """Lines are recorded at once, not when the clock has caught up."""
    clock = Stopped()
    clock.ms = 10_000_000
    world = World(clock=clock).send("g:1|g")
    clock.ms = 5_000_000
    world.send("g:2|g")
    world.publisher.flush()
    assert world.publisher.local()["g"][()] == 2
    assert world.views().answers == {("g", ()): 2}


def test_a_gauge_storm_is_recorded_once_a_millisecond() -> None:
    """While the clock stands still, one delta goes out at once, and one with the newest value at the end."""
    world = World(clock=Stopped())
    for value in range(1_000):
        world.send(f"g:{value}|g")
    views = world.views()
    assert views.answers == {("g", ()): 999}
    assert world.publisher.stats()["deltas"] == 2


def test_tags_are_labels_in_any_order() -> None:
    """The first line decides the labels: a missing label is empty, a line with a further one is left out."""
    world = World().send("a:1|c|#x:1,y:2", "a:2|c|#y:2,x:1", "a:4|c|#x:1", "a:8|c", "a:16|c|#x:1,z:1")
    assert world.views().of("a") == {("1", "2"): 3, ("1", ""): 4, ("", ""): 8}
    assert world.refused == {"labels": 1}


def test_labels_can_be_known_before() -> None:
    """Labels of a view are the server's, else the requested ones, else those of the first line."""
    known = {"a": Definition("a", "sum", ("z", "x"), monotone=True), "g": Definition("g", "max", ())}
    world = World(known=known, labels={"a": ["q"], "b": ["x", "y"], "s": ["x"]})
    world.send("a:1|c|#x:1", "a:2|c|#q:1", "a:-1|c", "b:1|c", "b:1|c|#z:1", "g:1|g", "s:m|s|#x:1")
    answers = world.views().answers
    assert answers == {("a", ("1", "")): 1, ("b", ("", "")): 1, ("s", ("m", "1")): 1}
    assert world.refused == {"labels": 2, "refused": 1, "kind": 1}


def test_names_that_become_the_same_are_told_apart() -> None:
    """The second of two equal names is left out, as is another type that needs a name in use."""
    world = World().send(
        "a.b:1|c", "a-b:1|c", "a_b:1|c", "a.b:1|g", "t:1|ms", "t_ms:1|c", "t.ms.max:1|c", "t:1|c", "a.b:1|c"
    )
    assert world.views().answers == {
        ("a_b", ()): 2, ("t_ms", ()): 1.0, ("t_ms_max", ()): 1, ("t_ms_count", ()): 1, ("t", ()): 1,
    }  # fmt: skip
    assert world.refused == {"collision": 4, "kind": 1}


def test_a_set_has_no_tag_named_member() -> None:
    """A tag named `member` collides with the label of the members of a set."""
    world = World().send("s:x|s|#member:y", "s:x|s|#a:y", "s:x|s|#a:y,member:z")
    assert world.views().answers == {("s", ("y", "x")): 1}
    assert world.refused == {"collision": 2}


def test_bad_lines_stop_nothing() -> None:
    """Each bad line is counted by reason and protocol, and the good lines between are recorded."""
    bad = [b"\xff", b"nope", b"a:x|c", b"a:1|q", b"_e{1,1}:a|b", b"x" * 9_000, b"a:1|c|@7", b"n" * 199 + b":1|ms"]
    lines = [line for one in bad for line in (one, b"good:1|c", b"")]
    world = World().send(*lines, protocol="statsd_tcp")
    assert world.meter.of(m.INGEST_LINES, "statsd_tcp") == 16
    assert world.refused == {
        "utf8": 1, "format": 1, "value": 1, "type": 1, "unsupported": 1, "line_long": 1, "rate": 1, "refused": 1,
    }  # fmt: skip
    assert world.views().of("good") == {(): 8}


def test_views_and_series_have_limits() -> None:
    """At a limit known views and series go on, and a new one is left out with its reason."""
    world = World(ingest_views_max=4, ingest_series_max=5)
    world.send("a:1|c|#x:1", "t:1|ms", "b:1|c", "a:1|c|#x:2", "s:1|s", *[f"a:1|c|#x:{n}" for n in range(1, 9)], "t:2|ms")
    assert world.views().total("a") == 2 + 4
    assert world.refused == {"views_max": 2, "series_max": 4}


def test_a_gauge_beyond_all_floats_is_an_int() -> None:
    """A gauge beyond all floats is an int: no step is refused or lost."""
    nines = "9" * 2_400
    world = World().send("g:1e308|g", "g:+1e308|g", f"i:{nines}|g", *[f"i:+{nines}|g"] * 3, "j:1.5|g", f"j:+{nines}|g")
    assert not world.refused
    views = world.views().answers
    assert views["g", ()] == 2 * int(1e308)
    assert views["i", ()] == 4 * int(nines)
    assert views["j", ()] == int(nines) + 1


def test_a_gauge_that_is_moved_by_fractions_is_exact() -> None:
    """Steps of a gauge keep what a float rounds away: ten tenths are one, and a small step beside a large value counts."""
    world = World().send("g:0.1|g", *["g:+0.1|g"] * 9, "big:1e16|g", "big:+1|g", "big:-1e16|g")
    assert not world.refused
    assert world.views().answers == {("g", ()): 1.0, ("big", ()): 1.0}


def test_a_log_that_is_away_costs_bounded_memory() -> None:
    """Lines that do not fit are left out as buffer_full; recorded ones arrive, and a gauge with its newest value."""
    world = World(buffer_bytes_max=65_536)
    world.log.away = True
    sent = 3_000
    for n in range(sent):
        world.send(f"a:1|c|#n:{n}", f"g:{n}|g")
    assert world.publisher.stats()["buffer_bytes"] <= 65_536
    dropped = world.refused["buffer_full"]
    assert 0 < dropped < sent
    world.log.away = False
    world.publisher.flush()
    views = world.views()
    assert views.total("a") == sent - dropped
    assert views.of("g") == {(): sent - 1}


def test_gauges_wait_for_room() -> None:
    """Gauges for which there is no room are recorded later, with their newest values."""
    world = World(buffer_bytes_max=65_536)
    world.log.away = True
    for value in (1, 2):
        world.send(*[f"g:{value}{n}|g|#n:{n}" for n in range(300)])
    assert not world.sink.close()
    assert world.refused == {}
    world.log.away = False
    deadline = CLOCK.monotonic_s() + 20
    while not world.sink.close():
        world.publisher.flush()
        assert CLOCK.monotonic_s() < deadline
    assert world.views().of("g") == {(str(n),): int(f"2{n}") for n in range(300)}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.binary(max_size=40) | st.from_regex(rb"[ab]:[+-]?[0-9]{1,3}\|(c|g|ms|s)(\|#[xy]:[0-9])?", fullmatch=True))
)
def test_any_lines_are_taken_or_counted(lines: list[bytes]) -> None:
    """Every line is taken without an exception, and is counted unless it is blank."""
    world = World().send(*lines)
    assert world.sink.line_count == len([line for line in lines if parses(line)])
    world.views()


def parses(line: bytes) -> bool:
    try:
        return bool(line.decode().strip())
    except UnicodeDecodeError:
        return True


def test_a_view_with_windows_takes_the_times_of_lines() -> None:
    """Lines go to a view with windows as the server has it, into the window of their own time."""
    known = {
        "hits": Definition("hits", "sum", ("a",), 60, retention_s=10**10),
        "took_ms": Definition("took_ms", "mean", (), 60),
        "took_ms_count": Definition("took_ms_count", "sum"),
        "level": Definition("level", "last", (), 60),
        "users": Definition("users", "sum", ("member",), 60),
        "guests": Definition("guests", "distinct", (), 60),
    }
    world = World(known=known).send("users:ann|s|T60", "guests:bob|s|T121")
    world.send("hits:1|c|#a:x|T60", "hits:2:3|c|#a:x|T119", "hits:5|c|#a:x|T120", "took:8|ms|T59", "level:4|g|T61")
    world.send("hits:7|c|#a:x", f"hits:7|c|#a:x|T{CLOCK.now_ms() // 1_000 + 7_200}")
    assert world.sink.refused == {"refused": 1}
    world.views()
    found = {}
    for batch in batches(world.log.log):
        for group in batch.groups:
            for suffix, state in zip(group.suffixes, group.states, strict=True):
                found[group.definition.view, parse_suffix(suffix)[0]] = state
                assert group.definition in (*known.values(), Definition("took_ms_max", "max"))
    assert [found["hits", start] for start in (60_000, 120_000)] == [6, 5]
    assert (found["took_ms", 0], found["took_ms_count", 0], found["took_ms_max", 0]) == ((8, 1), 1, 8)
    assert found["level", 60_000][2] == 4
    assert found["users", 60_000] == 1
    assert ("guests", 120_000) in found
    ((now_ms, value),) = [(start, state) for (view, start), state in found.items() if view == "hits" and start > 120_000]
    assert (now_ms % 60_000, value) == (0, 7)
