"""Wrong addresses of brokers and options of librdkafka, however they are given: no connection is made."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher
from pipeline.adapters.kafka.errors import RateLimitFilter
from pipeline.adapters.kafka.options import parse_url
from pipeline.errors import Invalid
from tests.support import pipeline

URL = "kafka://127.0.0.1:1"


@pytest.mark.parametrize(
    "rest",
    ["", "h", "h:", "h:1:2", "h:0", "h:65536", "h:99999", "h:x", ":1", "h:1,", "h:1, g:2", "u:p@h:1", "h:1?x=1", "h:1/a/b",
     "h:1/..", "h:1/a b", "h:1/" + "a" * 101],
)  # fmt: skip
def test_a_wrong_address(rest: str) -> None:
    """A wrong address is refused as text: a port that is too large is not taken for another one."""
    with pytest.raises(Invalid, match=r"kafka://host:port|the app's name may hold"):
        parse_url(f"kafka://{rest}")


def test_the_name_of_an_app_without_one() -> None:
    """An address without the app's name is refused: the topics would be others, but group and transactional ids the same."""
    with pytest.raises(Invalid, match="pipeline is what an app without a name is called; leave it out, or choose another"):
        parse_url("kafka://h:1/pipeline")
    assert parse_url("kafka://h:1").app == "pipeline"
    assert parse_url("kafka://h:1/pipeline2").app == "pipeline2"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"acks": "1"}, "acks is fixed"),
        ({"request.required.acks": 1}, "request.required.acks is fixed"),
        ({"metadata.broker.list": "h:1"}, "metadata.broker.list is fixed"),
        ({"default.topic.config": {"acks": 1}}, "default.topic.config is fixed"),
        ({"delivery.report.only.error": True}, "delivery.report.only.error is fixed"),
        ({"auto.commit.enable": True}, "auto.commit.enable is fixed"),
        ({"acsk": 1}, "acsk"),
        ({"socket.timeout.ms": "soon"}, "socket.timeout.ms"),
        ({"socket.timeout.ms": -5}, "socket.timeout.ms"),
        ({"debug": None}, "debug"),
        ({"fetch.min.bytes": [1]}, "fetch.min.bytes"),
        ({"retries": 0}, "retries"),
        ({"max.in.flight": 10}, "max.in.flight"),
        ({"queuing.strategy": "lifo"}, "queuing.strategy"),
        ({"security.protocol": "SASL_PLAINTEXT", "sasl.mechanism": "PLAIN"}, "sasl.username"),
        ({"security.protocol": "SSL", "ssl.ca.location": "/nope"}, "ssl.ca.location"),
    ],
)
def test_a_wrong_option(options: dict[str, Any], said: str) -> None:
    """A wrong option is named as a setting before a connection is made; no alias changes one that carries a guarantee.

    librdkafka says what is wrong with other options; our text adds the setting and the option.
    """
    with pytest.raises(Invalid) as error:
        Publisher(URL, kafka=options)
    assert str(error.value).startswith("setting kafka: ")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("flag", "variable", "text", "said"),
    [
        ("kafka.acks=1", "", "", "setting kafka: acks is fixed"),
        ("kafka=oops", "", "", "setting kafka: a table of options is needed, got "),
        ("", "{", "", "setting kafka: PIPELINE_KAFKA must be a JSON object: "),
        ("", "[1]", "", "setting kafka: a table of options is needed, got "),
        ("", '{"acks": 1}', "", "setting kafka: acks is fixed"),
        ("", "", '[kafka]\nacks = "1"\n', "setting kafka: acks is fixed"),
        ("", "", "kafka = 1\n", "setting kafka: a table of options is needed, got "),
    ],
)
def test_wherever_it_is_said(tmp_path: Path, flag: str, variable: str, text: str, said: str) -> None:
    """A wrong option in flag, environment or file is exit code 2 and one line."""
    (tmp_path / "pipeline.toml").write_text(text)
    done = pipeline(
        *("topics", "plan", "--to", URL, *(["--set", flag] if flag else [])), env={"PIPELINE_KAFKA": variable}, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"pipeline: {said}")
    assert done.stderr.count("\n") == 1


def test_what_librdkafka_repeats_is_logged_seldom() -> None:
    """A line that differs only in times and numbers of clients is logged once a minute; another line at once."""

    def shown(text: str, at_s: float) -> bool:
        record = logging.LogRecord("x", logging.ERROR, "", 0, text, None, None)
        record.created = at_s
        return seldom.filter(record)

    seldom = RateLimitFilter()
    assert shown("FAIL [a#producer-1] h:1 refused (after 0ms)", 0)
    assert not shown("FAIL [a#producer-2] h:1 refused (after 7ms)", 59)
    assert not shown("FAIL [a#producer-1] h:1 refused (after 0ms, 3 identical error(s) suppressed)", 59)
    assert shown("FAIL [a#producer-1] h:2 refused (after 0ms)", 59)
    assert shown("FAIL [a#producer-1] h:1 refused (after 0ms)", 61)
    for n in range(5_000):
        shown(f"line {n}", 61)
    assert len(seldom._next_s) <= 1_000


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "a", "--partitions", "0"], "leave the list out"),
        (["--name", "a b"], "--name a b: 1 to 100 letters"),
        (["--name", "a" * 101], "1 to 100 letters"),
        (["--name", "a", "--set", "session_timeout_ms=1"], "session_timeout_ms"),
    ],
)
def test_a_wrong_name(tmp_path: Path, arguments: list[str], said: str) -> None:
    """A worker that can't be a member as asked is refused before it connects."""
    done = pipeline("worker", "--from", URL, "--data", str(tmp_path / "data"), *arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "data").exists()
