"""Timing and counting exceptions, by `with` and by decorator: what the code inside does stays as it is."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest

from pipeline.errors import BufferFull, Invalid
from pipeline.publisher.client import BasePublisher
from pipeline.settings import PublisherSettings
from tests.producer.support import CLOCK, FaultyLog, Views, fold, in_threads, memory_log, publisher


class Ticking:
    """A clock whose seconds are one further with each look."""

    def __init__(self) -> None:
        self.seconds = 0

    def now_ms(self) -> int:
        return CLOCK.now_ms()

    def monotonic_s(self) -> float:
        self.seconds += 1
        return self.seconds

    def rising_ns(self) -> int:
        return CLOCK.rising_ns()

    def new_id(self) -> str:
        return CLOCK.new_id()


class World:
    """A publisher on a log in memory, and what becomes of it."""

    def __init__(self, clock: Any = CLOCK) -> None:
        self.log = memory_log()
        self.pub = BasePublisher(self.log, clock, PublisherSettings(flush_interval_ms=5))

    def views(self) -> Views:
        self.pub.close()
        return fold(self.log)


def test_a_block_is_timed_on_every_kind() -> None:
    """Sums add seconds, monotone or not; min, max and mean observe them; by view and by cell; also when it raises."""
    world = World()
    kinds: list[Any] = [
        world.pub.sum("s", labels=("a",)),
        world.pub.sum("m", labels=("a",), monotone=True),
        world.pub.min("lo", labels=("a",)),
        world.pub.max("hi", labels=("a",)),
        world.pub.mean("avg", labels=("a",)),
    ]
    ticking = Ticking()
    for view in kinds:
        view.monotonic_s = ticking.monotonic_s
        with view.time(a="x"):
            pass
        with view.labels("x").time() as timer:
            ticking.seconds += 2
        assert timer is not None
        with pytest.raises(KeyError), view.time(a="x"):
            raise KeyError
    found = world.views().answers
    assert [found[name, ("x",)] for name in ("s", "m", "lo", "hi", "avg")] == [5, 5, 1, 3, 5 / 3]


def test_one_timer_may_be_entered_again() -> None:
    """Within itself, and after."""
    world = World()
    view = world.pub.sum("s")
    view.monotonic_s = Ticking().monotonic_s
    timer = view.time()
    with timer, timer:  # from 1 to 4 and from 2 to 3
        pass
    with timer:
        pass
    assert world.views().answers["s", ()] == 3 + 1 + 1


def test_functions_are_timed_each_call() -> None:
    """Sync, async, methods, recursive ones, in threads: name, signature, result and exceptions are the function's own."""
    world = World()
    mean, count = world.pub.max("took"), world.pub.sum("failed", labels=("job",))

    @mean.time()
    def plain(a: int, *, b: int = 2) -> int:
        """Its own words."""
        return a + b

    @mean.time()
    def factorial(n: int) -> int:
        return n * factorial(n - 1) if n else 1

    @count.count_exceptions((KeyError, IndexError), job="a")
    @mean.time()
    async def waiting(fail: bool) -> str:
        await asyncio.sleep(0)
        if fail:
            raise KeyError("mine")
        return "done"

    class Job:
        @count.labels("m").count_exceptions(ZeroDivisionError)
        def run(self, n: int) -> float:
            return 1 / n

    assert (plain(1, b=5), plain.__name__, plain.__doc__) == (6, "plain", "Its own words.")
    assert str(inspect.signature(plain)) == "(a: 'int', *, b: 'int' = 2) -> 'int'"
    assert inspect.iscoroutinefunction(waiting)
    assert factorial(20) == 2_432_902_008_176_640_000
    assert asyncio.run(waiting(False)) == "done"

    async def together() -> list[Any]:
        return await asyncio.gather(*[waiting(True) for _ in range(20)], return_exceptions=True)

    assert [str(error) for error in asyncio.run(together())] == ["'mine'"] * 20

    def fail(_: int) -> None:
        for _ in range(50):
            with pytest.raises(ZeroDivisionError):
                Job().run(0)

    in_threads(4, fail)
    assert Job().run(2) == 0.5
    views = world.views()
    assert views.of("failed") == {("a",): 20, ("m",): 200}
    assert 0 < views.of("took")[()] < 60


def test_calls_that_overlap_have_a_start_of_their_own() -> None:
    """The first to begin is the first to end: both take two seconds."""
    world = World()
    lo, hi = world.pub.min("lo"), world.pub.max("hi")
    ticking = Ticking()
    lo.monotonic_s = hi.monotonic_s = lambda: ticking.seconds

    @lo.time()
    @hi.time()
    async def held(gate: asyncio.Event) -> None:
        await gate.wait()

    async def run() -> None:
        gates = [asyncio.Event(), asyncio.Event()]
        tasks = []
        for gate in gates:
            tasks.append(asyncio.create_task(held(gate)))
            await asyncio.sleep(0)
            ticking.seconds += 1
        for gate, task in zip(gates, tasks, strict=True):
            gate.set()
            await task
            ticking.seconds += 1

    asyncio.run(run())
    assert world.views().answers == {("lo", ()): 2, ("hi", ()): 2}


@pytest.mark.parametrize(
    ("counted", "raised", "count"),
    [
        (Exception, ValueError, 1),
        (ValueError, KeyError, 0),
        (LookupError, KeyError, 1),
        ((OSError, KeyError), KeyError, 1),
        (Exception, KeyboardInterrupt, 0),
        (BaseException, KeyboardInterrupt, 1),
        (Exception, None, 0),
    ],
)
def test_exceptions_are_counted_and_go_on(counted: Any, raised: type[BaseException] | None, count: int) -> None:
    """Those of the given types, and their subclasses; the very same object leaves the block."""
    world = World()
    view = world.pub.sum("n", labels=("exception",))
    counter = view.labels("x").count_exceptions(counted)
    if raised is None:
        with counter:
            pass
    else:
        error = raised("x")
        with pytest.raises(raised) as caught, counter:
            raise error
        assert caught.value is error
    view.labels("x").add(0)
    assert world.views().answers["n", ("x",)] == count


def test_without_arguments_exceptions_are_all_but_exits() -> None:
    """`Exception` is the default, on views and cells."""
    world = World()
    view = world.pub.sum("n", monotone=True)
    for counter in (view.count_exceptions(), view.labels().count_exceptions()):
        with pytest.raises(ValueError, match="x"), counter:
            raise ValueError("x")
        with pytest.raises(SystemExit), counter:
            raise SystemExit
    assert world.views().answers["n", ()] == 2


def test_the_code_inside_wins() -> None:
    """When recording fails while its exception is on its way, that goes on unchanged, and the other is logged."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log, on_full="raise", buffer_bytes_max=65_536, close_timeout_ms=10)
    view = pub.sum("s", labels=("n",))
    with suppress(BufferFull):
        for n in range(1_000):
            view.add(1, n=str(n))
    error = KeyError("mine")
    for around in (view.time(n="new"), view.count_exceptions(n="new")):
        with pytest.raises(KeyError) as caught, around:
            raise error
        assert caught.value is error
        assert caught.value.__context__ is None
    with pytest.raises(BufferFull), view.time(n="new"):
        pass
    log.away = False
    pub.close(20)


def test_what_could_not_be_recorded_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Once for each time, at error."""
    world = World()
    view = world.pub.sum("s")
    world.pub.close()
    with caplog.at_level(logging.ERROR), pytest.raises(KeyError), view.time():
        raise KeyError
    assert "not recorded, while KeyError was raised: this publisher is closed" in caplog.text
    with pytest.raises(Invalid, match="closed"), view.time():
        pass


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


def test_wrong_uses_are_told_at_once() -> None:
    """Generators, what is no function, what is no exception, labels that the view does not have."""
    world = World()
    view = world.pub.sum("s", labels=("a",))
    for wrong in (generator, async_generator, 7, None):
        for around in (view.time(a="x"), view.count_exceptions(a="x")):
            with pytest.raises(Invalid, match=r"generator|function is needed"):
                around(wrong)  # type: ignore[type-var]
    for exception in ("KeyError", 1, None, (), (KeyError, 1), KeyError("x"), int):
        with pytest.raises(Invalid, match="exception types are needed"):
            view.count_exceptions(exception, a="x")  # type: ignore[arg-type]
    with pytest.raises(Invalid, match="has labels"):
        view.time(b="x")
    with pytest.raises(Invalid, match="has labels"):
        view.count_exceptions(KeyError)
    assert not hasattr(world.pub.last("l"), "time")
    assert not hasattr(world.pub.mean("m").labels(), "count_exceptions")
    assert view.time(a="x")(functools.partial(int, "7"))() == 7
    world.pub.close()
