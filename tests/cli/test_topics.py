"""`pipeline topics` without a broker: the rules of a plan, the descriptions, and errors of the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from pipeline.adapters.kafka.plan import ORDER, Found, Plan, Step, Wish, describe, make_plan
from pipeline.core.codec import DeadLetter, encode_letter
from pipeline.errors import Invalid
from pipeline.settings import PublisherSettings
from pipeline.topics import CHANGELOG, DEAD_LETTERS, DELTAS, Topic, load
from tests.cli.conftest import Here
from tests.support import NO_LISTENER, pipeline

TOPICS = load()
WEEK_MS = 604_800_000


def found(name: str, partitions: int = 4, replication: tuple[int, ...] = (1,), **configs: str) -> Found:
    """Return a topic as described, with these changes; `_` in names is `.`."""
    given = {setting.replace("_", "."): value for setting, value in configs.items()}
    return Found(partitions, replication, {"min.insync.replicas": "1", **describe(TOPICS[name]), **given})


def all_found(**changed: Found) -> dict[str, Found]:
    """Return a broker's topics as described, with these changes."""
    return {name: found(name) for name in ORDER} | {name.replace("_", "-"): it for name, it in changed.items()}


def plan(has: Mapping[str, Found], topics: Mapping[str, Topic] = TOPICS, brokers: int = 3, **wish: Any) -> Plan:
    return make_plan(topics, has, Wish(**wish), broker_count=brokers)


def described(name: str, *, leave_out: str = "", kafka: Mapping[str, Any] | None = None, **changed: Any) -> dict[str, Topic]:
    """Return the three descriptions with a change in one."""
    table = {key: value for key, value in TOPICS[name].kafka.items() if key != leave_out} | dict(kafka or {})
    return {**TOPICS, name: msgspec.structs.replace(TOPICS[name], kafka=table, **changed)}


def brief(plan: Plan) -> list[tuple[str, str, str | None, str, str]]:
    return [(it.action, it.topic, it.found, it.wanted, it.setting) for it in plan.steps]


def only(plan: Plan) -> Step:
    (step,) = plan.steps
    return step


def test_a_broker_as_described_needs_nothing() -> None:
    """Equal settings need no change, in whatever spelling the broker has them."""
    assert plan(all_found()).steps == []
    assert plan(all_found(changelog=found(CHANGELOG, min_cleanable_dirty_ratio="0.50"))).steps == []


def test_an_empty_broker_gets_everything() -> None:
    """Every setting of each topic is created, changelog and dead-letters before deltas."""
    steps = plan({}).steps
    assert {step.action for step in steps} == {"create"}
    assert [*dict.fromkeys(step.topic for step in steps)] == [CHANGELOG, DEAD_LETTERS, DELTAS]
    for name in ORDER:
        assert {it.setting: it.wanted for it in steps if it.topic == name} == {
            "partitions": "4",
            "replication.factor": "the broker's default",
            **describe(TOPICS[name]),
        }


@pytest.mark.parametrize("name", ORDER)
def test_every_setting_is_compared(name: str) -> None:
    """Each setting of a description that the broker has otherwise is one step of the plan."""
    for setting in describe(TOPICS[name]):
        has = found(name)
        other = {"cleanup.policy": "compact,delete"}.get(setting, "1")
        steps = plan({**all_found(), name: Found(4, (1,), {**has.configs, setting: other})}).steps
        assert (name, setting) in {(step.topic, step.setting) for step in steps}


def test_more_partitions() -> None:
    """N partitions are for all three, deltas last; a broker with more is left alone, unless fewer are asked for."""
    assert brief(plan(all_found(), partitions=7)) == [("alter", name, "4", "7", "partitions") for name in ORDER]
    seven = {name: found(name, 7) for name in ORDER}
    assert plan(seven, partitions=7).steps == []
    assert brief(plan(seven)) == [("keep", name, "7", "4", "partitions") for name in ORDER]
    assert not plan(seven).changes
    grown = {name: msgspec.structs.replace(topic, partitions=9) for name, topic in TOPICS.items()}
    assert brief(plan(seven, grown)) == [("alter", name, "7", "9", "partitions") for name in ORDER]


def test_fewer_partitions_are_refused() -> None:
    """Fewer partitions would lose state; dead-letters may have more than the others."""
    seven = {name: found(name, 7) for name in ORDER}
    refused = plan(seven, partitions=5).refused
    assert [step.topic for step in refused] == [CHANGELOG, DELTAS]
    assert "the last 2 would be lost" in refused[0].note
    assert brief(plan(all_found(dead_letters=found(DEAD_LETTERS, 7)))) == [("keep", DEAD_LETTERS, "7", "4", "partitions")]


def test_dead_letters_have_as_many_as_deltas() -> None:
    """Dead-letters grow with the other topics."""
    has = {DELTAS: found(DELTAS, 7), CHANGELOG: found(CHANGELOG, 7), DEAD_LETTERS: found(DEAD_LETTERS)}
    assert [(it.topic, it.wanted) for it in plan(has).changes] == [(DEAD_LETTERS, "7")]


@pytest.mark.parametrize(("changelog", "deltas", "wrong"), [(7, 4, DELTAS), (4, 7, CHANGELOG)])
def test_changelog_and_deltas_that_differ(changelog: int, deltas: int, wrong: str) -> None:
    """Different counts are refused, unless a flag or the descriptions have a number."""
    has = all_found(changelog=found(CHANGELOG, changelog), deltas=found(DELTAS, deltas))
    (refused,) = plan(has).refused
    assert (refused.topic, refused.setting, refused.found, refused.wanted) == (wrong, "partitions", "4", "7")
    assert "--partitions 7" in refused.note
    evened = plan(has, partitions=7)
    assert not evened.refused
    assert {it.topic for it in evened.changes} == {wrong, DEAD_LETTERS}
    said = {name: msgspec.structs.replace(topic, partitions=7) for name, topic in TOPICS.items()}
    assert plan(has, said).changes == evened.changes


def test_one_of_the_pair_is_missing() -> None:
    """The missing topic gets as many partitions as the other, and the line says what that means."""
    (step,) = [
        it for it in plan({CHANGELOG: found(CHANGELOG, 7)}).changes if (it.topic, it.setting) == (DELTAS, "partitions")
    ]
    assert (step.action, step.wanted) == ("create", "7")
    assert "its positions are of the old one" in step.note
    has = {DELTAS: found(DELTAS), DEAD_LETTERS: found(DEAD_LETTERS)}
    assert "folded again" in plan(has).changes[0].note


@pytest.mark.parametrize(
    ("name", "has", "wanted", "action"),
    [
        (CHANGELOG, "delete", "compact", "alter"),
        (CHANGELOG, "compact,delete", "compact", "alter"),
        (CHANGELOG, "compact", "delete", "refuse"),
        (DELTAS, "delete", "compact", "refuse"),
        (DELTAS, "compact", "delete", "alter"),
        (DEAD_LETTERS, "delete", "compact", "refuse"),
    ],
)
def test_cleanup_policy(name: str, has: str, wanted: str, action: str) -> None:
    """Changelog is compacted and the others are not, whatever is asked for; a change back to that is always allowed."""
    topics = described(name, cleanup_policy=wanted)
    steps = plan(all_found(**{name.replace("-", "_"): found(name, cleanup_policy=has)}), topics).steps
    (step,) = [it for it in steps if it.setting == "cleanup.policy"]
    assert (step.action, step.found, step.wanted) == (action, has, wanted)
    if action == "refuse":
        assert step.note
        new = [it for it in plan({}, topics).refused if it.setting == "cleanup.policy"]
        assert [it.topic for it in new] == [name]


@pytest.mark.parametrize(
    ("name", "setting", "has", "wanted", "action"),
    [
        (DELTAS, "retention.ms", WEEK_MS + 1, WEEK_MS, "refuse"),
        (DELTAS, "retention.ms", -1, WEEK_MS, "refuse"),
        (DELTAS, "retention.ms", WEEK_MS - 1, WEEK_MS, "alter"),
        (DELTAS, "retention.ms", WEEK_MS, -1, "alter"),
        (DELTAS, "retention.bytes", -1, 1_000_000, "refuse"),
        (DELTAS, "retention.bytes", 1_000_000, -1, "alter"),
        (DEAD_LETTERS, "retention.ms", WEEK_MS + 1, WEEK_MS, "alter"),
        (DELTAS, "max.message.bytes", 3_000_000, 2_000_000, "alter"),
        (DELTAS, "max.message.bytes", 1_048_588, 2_000_000, "alter"),
        (CHANGELOG, "max.message.bytes", 30_000_000, 20_000_000, "keep"),
        (CHANGELOG, "max.message.bytes", 1_048_588, 20_000_000, "alter"),
        (DEAD_LETTERS, "max.message.bytes", 30_000_000, 20_000_000, "keep"),
        (CHANGELOG, "min.compaction.lag.ms", 0, 600_000, "alter"),
        (CHANGELOG, "segment.bytes", 1 << 30, 1 << 26, "alter"),
    ],
)
def test_a_setting(name: str, setting: str, has: int, wanted: int, action: str) -> None:
    """Changes that can lose unfolded deltas need accepted loss; larger message limits are kept; others are altered."""
    own = {setting.replace(".", "_"): wanted}
    topics = described(name, **own) if setting == "retention.ms" else described(name, kafka={setting: wanted})
    broker = all_found(**{name.replace("-", "_"): found(name, **{setting: str(has)})})
    step = only(plan(broker, topics))
    assert (step.action, step.topic, step.setting, step.found, step.wanted) == (action, name, setting, str(has), str(wanted))
    if action == "refuse":
        assert "not yet folded" in step.note
        assert only(plan(broker, topics, accept_loss=True)).action == "alter"


def test_every_line_of_the_kafka_table_counts() -> None:
    """Each setting is passed on in Kafka's spelling; a setting that the broker does not know is refused."""
    topics = described(DELTAS, kafka={"preallocate": True, "flush.ms": 5, "segmnt.ms": 1})
    has = all_found(deltas=found(DELTAS, preallocate="false", flush_ms="9"))
    assert brief(plan(has, topics)) == [
        ("alter", DELTAS, "false", "true", "preallocate"),
        ("alter", DELTAS, "9", "5", "flush.ms"),
        ("refuse", DELTAS, None, "1", "segmnt.ms"),
    ]


def test_a_setting_that_is_said_twice_or_is_no_value() -> None:
    """A setting given twice, or with an invalid value, makes the description invalid."""
    with pytest.raises(Invalid, match=r"topic deltas: retention\.ms is retention_ms above \[kafka\]"):
        plan({}, described(DELTAS, kafka={"retention.ms": 1}))
    with pytest.raises(Invalid, match=r"topic deltas: x: a text, a number, true or false is needed, got \[1\]"):
        plan({}, described(DELTAS, kafka={"x": [1]}))


def test_replication_factor() -> None:
    """The factor of new topics is at most the number of brokers; that of existing topics can't be changed here."""
    assert "the number" not in str(plan({}, replication_factor=3).refused)
    assert not plan({}, replication_factor=3).refused
    assert {it.setting for it in plan({}, replication_factor=4).refused} == {"replication.factor"}
    three = {name: found(name, replication=(3,), min_insync_replicas="2") for name in ORDER}
    assert plan(three, replication_factor=3).steps == []
    for broker in (three, {name: found(name, replication=(2, 3), min_insync_replicas="2") for name in ORDER}):
        refused = plan(broker, replication_factor=2).refused
        assert [it.topic for it in refused] == [*ORDER]
        assert "kafka-reassign-partitions" in refused[0].note


def test_min_insync_replicas() -> None:
    """The asked-for value is set, and refused beyond the replication factor; 1 of 3 gets a warning in any case."""
    three = {name: found(name, replication=(3,), min_insync_replicas="2") for name in ORDER}
    assert plan(three, min_insync_replicas=2).steps == []
    assert {(it.action, it.found, it.wanted) for it in plan(three, min_insync_replicas=3).steps} == {("alter", "2", "3")}
    assert [(it.action, it.wanted) for it in plan(three, min_insync_replicas=4).steps] == [("refuse", "4")] * 3
    one = {name: found(name, replication=(3,)) for name in ORDER}
    assert [(it.action, it.setting) for it in plan(one).steps] == [("warn", "min.insync.replicas")] * 3
    assert {it.action for it in plan({}, replication_factor=3, min_insync_replicas=2).steps} == {"create"}
    assert {it.setting for it in plan({}, replication_factor=1, min_insync_replicas=2).refused} == {"min.insync.replicas"}
    unknown = plan({}, min_insync_replicas=2).refused
    assert {it.setting for it in unknown} == {"min.insync.replicas"}
    assert "--replication-factor" in unknown[0].note
    assert not plan(all_found()).steps


@pytest.mark.parametrize("name", [CHANGELOG, DEAD_LETTERS])
def test_what_deltas_take_fits_elsewhere(name: str) -> None:
    """Neither topic's message limit may be close to that of deltas, given or default."""
    limit = 2_097_152
    assert [it.topic for it in plan({}, described(name, kafka={"max.message.bytes": limit + 65_535})).refused] == [name]
    assert not plan({}, described(name, kafka={"max.message.bytes": limit + 65_536})).refused
    unsaid = described(name, leave_out="max.message.bytes")
    refused = plan(all_found(**{name.replace("-", "_"): found(name, max_message_bytes="1048588")}), unsaid).refused
    assert [(it.topic, it.setting, it.found) for it in refused] == [(name, "max.message.bytes", "1048588")]


def test_the_descriptions_fit_the_publisher() -> None:
    """A default batch fits with room, a segment holds the largest message, a dead letter adds less than the margin."""
    limits = {name: int(describe(TOPICS[name])["max.message.bytes"]) for name in ORDER}
    assert limits[DELTAS] >= 2 * PublisherSettings().batch_bytes_max
    assert int(describe(TOPICS[CHANGELOG])["segment.bytes"]) >= limits[CHANGELOG]
    letter = DeadLetter(1_023, 2**62, 2**62, "x" * 10_000, "v" * 200, bytes(limits[DELTAS]))
    assert len(encode_letter(letter)) < limits[DELTAS] + 65_536 <= limits[DEAD_LETTERS]


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_help(here: Here, command: str) -> None:
    """Each command has a whole sentence in the list, an example, and an explanation of every option."""
    line = next(it for it in here("topics", "--help").stdout.splitlines() if it.startswith(f"  {command} "))
    assert line.endswith(".")
    assert not line.endswith("...")
    shown = here("topics", command, "--help").stdout
    assert f"\n      pipeline topics {command}" in shown
    assert "--to URL" in shown


@pytest.mark.parametrize("command", ["plan", "apply"])
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "http://127.0.0.1:8080"), "is not kafka://host:port"),
        (("--to", "kafka://127.0.0.1"), "is not kafka://host:port"),
        (("--to", "kafka://127.0.0.1:1/a b"), "the app's name may hold"),
        (("--to", "kafka://127.0.0.1:1", "--set", "kafka_timeout_ms=1"), "kafka_timeout_ms: 1 is outside"),
    ],
)
def test_a_wrong_call(here: Here, command: str, arguments: tuple[str, ...], said: str) -> None:
    """A wrong call is exit code 2, with what is wrong."""
    done = here("topics", command, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr


@pytest.mark.parametrize("command", ["plan", "apply"])
def test_nobody_listens(free_port: int, command: str) -> None:
    """An address without a broker is exit code 1 within the time limit, and one line with address, cause, and advice."""
    url = f"kafka://127.0.0.1:{free_port}/shop"
    done = pipeline("topics", command, "--to", url, "--set", "kafka_timeout_ms=300")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"pipeline: {url}: no broker answers in 300 ms (")
    assert NO_LISTENER in done.stderr
    assert "check the address" in done.stderr
    assert done.stderr.count("\n") == 1
