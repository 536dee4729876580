"""Timing and counting exceptions, by `with` and by decorator: the code inside behaves as without."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from typing import Any

import pytest

from pipeline.errors import BufferFull, Invalid
from pipeline.publisher.client import BasePublisher
from tests.publisher.support import FaultyLog, fold, in_threads, memory_log, publisher


class Ticking:
    """A clock for views that moves by so many seconds with each look."""

    def __init__(self, step_s: int = 1) -> None:
        self.seconds, self.step_s = 0, step_s

    def monotonic_s(self) -> float:
        self.seconds += self.step_s
        return self.seconds


@pytest.fixture
def log() -> Any:
    return memory_log()


@pytest.fixture
def pub(log: Any) -> Iterator[BasePublisher]:
    with publisher(log) as pub:
        yield pub


def test_a_block_is_timed_on_every_kind(pub: BasePublisher, log: Any) -> None:
    """Sums add seconds, monotone or not; min, max and mean observe them; by view and by series; also when the block raises.

    One timer may be entered again, within itself and after.
    """
    ticking = Ticking()
    for kind, name, monotone in (("sum", "s", 0), ("sum", "m", 1), ("min", "lo", 0), ("max", "hi", 0), ("mean", "avg", 0)):
        view: Any = pub.view(kind, name, labels=("a",), monotone=bool(monotone))
        view.monotonic_s = ticking.monotonic_s
        with view.time(a="x"):
            pass
        with view.labels("x").time() as timer:
            ticking.seconds += 2
        assert timer is not None
        with pytest.raises(KeyError), view.time(a="x"):
            raise KeyError
    again: Any = pub.max("again")
    again.monotonic_s = Ticking().monotonic_s
    timer = again.time()
    with timer, timer:  # from 1 to 4 and from 2 to 3
        pass
    with timer:
        pass
    pub.close()
    found = fold(log).answers
    assert [found[name, ("x",)] for name in ("s", "m", "lo", "hi", "avg")] == [5, 5, 1, 3, 5 / 3]
    assert found["again", ()] == 3


def test_functions_are_timed_each_call(pub: BasePublisher, log: Any) -> None:
    """Sync, async, methods, recursive ones, in threads: name, signature, result and exceptions are the function's own."""
    mean, count = pub.max("took"), pub.sum("failed", labels=("job",))

    @mean.time()
    def plain(a: int, *, b: int = 2) -> int:
        """Add, recursively."""
        return a + b if a <= 1 else plain(a - 1, b=b) + 1

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

    assert (plain(1, b=5), plain(20), plain.__name__, plain.__doc__) == (6, 22, "plain", "Add, recursively.")
    assert str(inspect.signature(plain)) == "(a: 'int', *, b: 'int' = 2) -> 'int'"
    assert inspect.iscoroutinefunction(waiting)
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
    pub.close()
    assert fold(log).of("failed") == {("a",): 20, ("m",): 200}
    assert 0 < fold(log).of("took")[()] < 60


def test_calls_that_overlap_have_a_start_of_their_own(pub: BasePublisher, log: Any) -> None:
    """Two overlapping calls take two seconds each, although the first to begin is the first to end."""
    lo, hi, ticking = pub.min("lo"), pub.max("hi"), Ticking(0)
    lo.monotonic_s = hi.monotonic_s = ticking.monotonic_s

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
    pub.close()
    assert fold(log).answers == {("lo", ()): 2, ("hi", ()): 2}


@pytest.mark.parametrize(
    ("counted", "raised", "count"),
    [
        ([], ValueError, 1),
        ([], SystemExit, 0),
        ([ValueError], KeyError, 0),
        ([LookupError], KeyError, 1),
        ([(OSError, KeyError)], KeyError, 1),
        ([Exception], KeyboardInterrupt, 0),
        ([BaseException], KeyboardInterrupt, 1),
        ([Exception], None, 0),
    ],
)
def test_exceptions_are_counted_and_go_on(
    pub: BasePublisher, log: Any, counted: list[Any], raised: type[BaseException] | None, count: int
) -> None:
    """Exceptions of the given types and their subclasses count, and leave the block unchanged. By default exits do not."""
    view = pub.sum("n", labels=("exception",), monotone=True)
    view.add(0, exception="x")
    for counter in (view.labels("x").count_exceptions(*counted), view.labels(exception="x").count_exceptions(*counted)):
        error, left = raised and raised("x"), None
        try:
            with counter:
                if error:
                    raise error
        except BaseException as caught:
            left = caught
        assert left is error
    pub.close()
    assert fold(log).answers["n", ("x",)] == 2 * count


def test_the_code_inside_wins(caplog: pytest.LogCaptureFixture) -> None:
    """An exception of the code inside goes on unchanged if recording fails meanwhile, which is logged."""
    log = FaultyLog()
    log.away = True
    pub = publisher(log, on_full="raise", buffer_bytes_max=65_536, close_timeout_ms=10)
    view = pub.sum("s", labels=("n",))
    with suppress(BufferFull):
        for n in range(1_000):
            view.add(1, n=str(n))
    error = KeyError("mine")

    def fails_around(*around: Any) -> None:
        for each in around:
            with pytest.raises(KeyError) as caught, each:
                raise error
            assert caught.value is error
            assert caught.value.__context__ is None

    fails_around(view.time(n="new"), view.count_exceptions(n="new"))
    with pytest.raises(BufferFull), view.time(n="new"):
        pass
    log.away = False
    pub.close(20)
    fails_around(view.time(n="0"))
    assert caplog.text.count("not recorded, while KeyError was raised") == 3
    assert "not recorded, while KeyError was raised: this publisher is closed" in caplog.text
    with pytest.raises(Invalid, match="closed"), view.time(n="0"):
        pass


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


def test_wrong_uses_are_told_at_once(pub: BasePublisher) -> None:
    """Generators, objects that are no function or no exception, and unknown labels are refused at once."""
    view = pub.sum("s", labels=("a",))
    for wrong in (generator, async_generator, 7, None):
        for around in (view.time(a="x"), view.count_exceptions(a="x")):
            with pytest.raises(Invalid, match=r"generator|function is needed"):
                around(wrong)  # type: ignore[type-var]
    for exception in ("KeyError", 1, None, (), (KeyError, 1), KeyError("x"), int):
        with pytest.raises(Invalid, match="exception types are needed"):
            view.count_exceptions(exception, a="x")  # type: ignore[arg-type]
    for unlabelled in (lambda: view.time(b="x"), lambda: view.count_exceptions(KeyError)):
        with pytest.raises(Invalid, match="has labels"):
            unlabelled()
    assert not hasattr(pub.last("l"), "time")
    assert not hasattr(pub.mean("m").labels(), "count_exceptions")
    assert view.time(a="x")(functools.partial(int, "7"))() == 7
