"""Times and lengths as callers write them."""

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.times import TIME_MS_MAX, length_ms, length_text, time_ms, time_text
from pipeline.errors import Invalid

zones = st.integers(-1_439, 1_439).map(lambda minutes: timezone(timedelta(minutes=minutes)))


@given(st.integers(0, TIME_MS_MAX - 1), zones)
def test_a_time_is_one_however_it_is_written(ms: int, zone: timezone) -> None:
    """Ms, digits, a datetime in any zone and RFC 3339 in any zone are the same time."""
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=ms)
    assert time_ms("t", ms) == time_ms("t", str(ms)) == time_ms("t", moment) == time_ms("t", time_text(ms)) == ms
    try:
        local = moment.astimezone(zone)
    except OverflowError:
        return
    assert time_ms("t", local) == ms
    assert time_ms("t", local.isoformat(timespec="milliseconds")) == ms


@pytest.mark.parametrize(
    ("time", "said"),
    [
        (-1, "from 1970 to the year 9999"),
        (TIME_MS_MAX + 1, "from 1970 to the year 9999"),
        (884_541_340_800_000, "from 1970 to the year 9999"),
        (datetime(1969, 12, 31, tzinfo=UTC), "from 1970 to the year 9999"),
        (datetime(2030, 1, 1, tzinfo=UTC).replace(tzinfo=None), "without a time zone"),
        (True, "is needed, got True"),
        (1.5, "is needed, got 1.5"),
        (None, "is needed, got None"),
        ("", "RFC 3339"),
        ("-1", "RFC 3339"),
        ("1.5", "RFC 3339"),
        ("٣", "RFC 3339"),
        ("9" * 17, "RFC 3339"),
        ("9" * 16, "from 1970 to the year 9999"),
        ("2030-01-01", "RFC 3339"),
        ("2030-01-01T00:00:00", "RFC 3339"),
        ("2030-02-30T00:00:00Z", "RFC 3339"),
        ("2030-01-01T00:00:00+99:00", "RFC 3339"),
        ("30000-01-01T00:00:00Z", "RFC 3339"),
        ("0001-01-01T00:00:00+23:00", "from 1970"),
        ("yesterday", "RFC 3339"),
    ],
)
def test_what_is_no_time_is_refused(time: Any, said: str) -> None:
    """The error names the parameter and the accepted forms."""
    with pytest.raises(Invalid, match=f"^start: .*{said}"):
        time_ms("start", time)


def test_fractions_of_a_millisecond_are_dropped() -> None:
    """A time is rounded down, as windows are."""
    assert time_ms("t", "1970-01-01T00:00:00.0019Z") == 1
    assert time_ms("t", datetime(1970, 1, 1, 0, 0, 0, 1_999, UTC)) == 1


@given(st.integers(1, TIME_MS_MAX // 1_000))
def test_a_length_is_one_however_it_is_written(seconds: int) -> None:
    """Seconds, digits, a unit and a timedelta are the same length."""
    ms = seconds * 1_000
    assert length_ms("step", seconds) == length_ms("step", str(seconds)) == length_ms("step", f"{seconds}s") == ms
    assert length_ms("step", length_text(ms)) == length_ms("step", timedelta(seconds=seconds)) == ms


@pytest.mark.parametrize(
    ("text", "ms"), [("90s", 90_000), ("1m", 60_000), ("1h", 3_600_000), ("1d", 86_400_000), ("2w", 1_209_600_000)]
)
def test_units_of_a_length(text: str, ms: int) -> None:
    """A length may be in seconds, minutes, hours, days and weeks."""
    assert length_ms("step", text) == ms
    assert length_text(ms) == text


@pytest.mark.parametrize(
    "length",
    [0, -1, "0", "0s", "-1", "", "1.5", "1M", "1 m", "m", "9" * 13, "999999999999w", 2**60, 1.5, None, True, timedelta(0)],
)
def test_what_is_no_length_is_refused(length: Any) -> None:
    """A length of zero or less, or one that is too long, is refused."""
    with pytest.raises(Invalid, match=r"^over: a length above 0"):
        length_ms("over", length)
    with pytest.raises(Invalid, match="whole seconds"):
        length_ms("over", timedelta(microseconds=1_500))
