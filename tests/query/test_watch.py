"""`Reader.watch` and `AsyncReader.watch`: whole answers as they change, over whatever connections it takes."""

import asyncio
import gc
import os
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any
from unittest.mock import Mock

import pytest

from pipeline import AsyncReader, Reader
from pipeline.adapters.watch import Watch
from pipeline.core.answer import Answer
from pipeline.core.record import Definition
from pipeline.errors import Invalid, NotFound, NotReady, PipelineError, Unavailable
from pipeline.settings import QuerySettings
from tests.query.support import Server, World, serving, wait_until

HITS = Definition("hits", "sum", ("region", "path"), monotone=True)
SETTINGS = QuerySettings(stream_interval_ms=10, stream_heartbeat_ms=100)


def new_world() -> World:
    world = World(settings=SETTINGS)
    world.publish(HITS, {("eu", "/"): 1, ("us", "/"): 2})
    return world


@pytest.fixture
def hits() -> Iterator[Server]:
    with serving(new_world()) as server:
        yield server


@pytest.fixture(scope="module")
def unchanged() -> Iterator[Server]:
    """A server for tests that change nothing."""
    with serving(new_world()) as server:
        yield server


def values(answer: Answer) -> dict[str, Any]:
    return {next(iter(it.labels.values()), ""): it.value for it in answer.series}


def until(watch: Iterator[Answer], wanted: Callable[[Answer], bool]) -> Answer:
    """Return the first answer that is as wanted."""
    deadline = time.monotonic() + 20
    for answer in watch:
        if wanted(answer):
            return answer
        assert time.monotonic() < deadline, answer
    raise AssertionError("the watch has ended")


def open_streams(server: Server) -> float:
    lines = server.request("GET", "/metrics").body.decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("pipeline_streams_open "))


def test_whole_answers_as_they_change(hits: Server) -> None:
    """The first answer is that of `get`; later ones are whole, too, and a heartbeat is one with the same series."""
    with Reader(hits.url) as reader:
        options: dict[str, Any] = {"where": {"path": "/"}, "by": ["region"], "top": 1}
        watch = reader.watch("hits", **options)
        first = next(watch)
        assert first.series == reader.get("hits", **options).series
        again = next(watch)
        assert (again.series, watch.problem) == (first.series, None)
        hits.world.publish(HITS, {("eu", "/"): 10, ("us", "/"): 1})  # type: ignore[union-attr]
        assert until(watch, lambda it: values(it) == {"eu": 11}).series == reader.get("hits", **options).series


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"view": "nothing"}, NotFound),
        ({"view": "hits", "by": ["nothing"]}, Invalid),
        ({"view": "hits", "where": ["region"]}, Invalid),
        ({"view": "hits", "top": "x"}, Invalid),
        ({"view": "hits", "start": 0}, Invalid),
        ({"view": "hits", "end": "yesterday"}, Invalid),
        ({"view": "hits", "after": "rubbish"}, Invalid),
        ({"view": "hits", "max_staleness_ms": -1}, Invalid),
        ({"view": "hits", "compare": "1d"}, TypeError),
        ({"view": "hits", "cursor": ""}, TypeError),
        ({"view": "hits", "nothing": 1}, TypeError),
    ],
)
def test_a_wrong_watch_raises_as_get_does(unchanged: Server, arguments: dict[str, Any], error: type[Exception]) -> None:
    """Before the first answer every error of `get` is raised, and then the watch is over."""

    async def ask() -> None:
        async with AsyncReader(unchanged.url) as reader, reader.watch(**arguments) as watch:
            await anext(watch)

    with Reader(unchanged.url) as reader:
        with pytest.raises(error) as raised:
            next(reader.watch(**arguments))
        with pytest.raises(error):
            asyncio.run(ask())
        if error is not TypeError:
            with pytest.raises(type(raised.value)):
                reader.get(**arguments)
            if "end" not in arguments:  # that one is refused before there is a watch
                assert [*_without_error(reader.watch(**arguments))] == []
    assert open_streams(unchanged) == 0


def _without_error(watch: Iterator[Answer]) -> Iterator[Answer]:
    try:
        yield from watch
    except PipelineError:
        yield from watch


def test_a_server_that_is_not_there_at_first() -> None:
    """Without a first answer nothing is waited for: `Unavailable`, or `NotReady` while the server restores."""
    world = new_world()
    with serving(world) as server:
        world.ready = False
        with Reader(server.url) as reader, pytest.raises(NotReady):
            next(reader.watch("hits"))
    with Reader(server.url) as reader, pytest.raises(Unavailable):
        next(reader.watch("hits"))


def test_a_restart_of_the_server() -> None:
    """The watch comes back by itself; meanwhile the last answer comes again, with a staleness that grows and the reason."""
    world = new_world()
    with serving(world) as server:
        reader = Reader(server.url)
        watch = reader.watch("hits", by=["region"])
        assert values(next(watch)) == {"eu": 1, "us": 2}
    lost = until(watch, lambda _: watch.problem is not None)
    assert isinstance(watch.problem, Unavailable)
    later = until(watch, lambda it: (it.as_of.staleness_ms or 0) > (lost.as_of.staleness_ms or 0) + 100)
    assert (values(later), watch.problem is None) == ({"eu": 1, "us": 2}, False)
    world.publish(HITS, {("eu", "/"): 4})
    world.reader = world.new_reader()
    with serving(world, server.port):
        assert values(until(watch, lambda _: watch.problem is None)) == {"eu": 5, "us": 2}
        world.publish(HITS, {("eu", "/"): 5})
        until(watch, lambda it: values(it) == {"eu": 10, "us": 2})
        reader.close()


def test_a_server_that_restores_and_a_view_that_is_dropped(hits: Server) -> None:
    """A server that restores is waited for; a view that is dropped ends the watch, as `get` would end."""
    world = hits.world
    assert isinstance(world, World)
    with Reader(hits.url) as reader:
        watch = reader.watch("hits", by=[])
        next(watch)
        world.ready = False
        assert until(watch, lambda _: watch.problem is not None).value() == 3
        assert isinstance(watch.problem, NotReady)
        world.ready = True
        assert until(watch, lambda _: watch.problem is None).value() == 3
        assert hits.request("POST", "/v1/views/hits/drop", b"{}", {"Content-Type": "application/json"}).status == 200
        world.fold()
        with pytest.raises(NotFound):
            until(watch, lambda _: False)
        assert next(watch, None) is None


def test_each_way_to_end_a_watch_closes_its_connection(hits: Server) -> None:
    """`close`, also of another thread while the next answer is waited for, `break`, `with`, and the reader's `close`."""
    reader = Reader(hits.url)
    for _ in reader.watch("hits"):
        break
    with reader.watch("hits") as watch:
        next(watch)
    assert next(watch, None) is None
    waiting, closed = reader.watch("hits"), reader.watch("hits")
    taken: list[Answer] = []
    thread = threading.Thread(target=lambda: taken.extend(waiting))
    thread.start()
    next(closed)
    wait_until(lambda: taken and open_streams(hits) == 2)
    waiting.close()
    waiting.close()
    thread.join(10)
    assert not thread.is_alive()
    del closed
    gc.collect()
    wait_until(lambda: open_streams(hits) == 0)
    both = [reader.watch("hits"), reader.watch("hits", by=[])]
    for it in both:
        next(it)
    reader.close()
    assert [next(it, None) for it in both] == [None, None]
    wait_until(lambda: open_streams(hits) == 0)
    assert reader._links == set()
    never = reader.watch("hits")
    never.close()
    assert next(never, None) is None


def test_a_slow_caller_gets_the_newest_answer(hits: Server) -> None:
    """Events that came while the caller did something else are one answer, which is no less stale than it is."""
    world = hits.world
    assert isinstance(world, World)
    with Reader(hits.url) as reader:
        watch = reader.watch("hits", by=["region"])
        next(watch)
        quick = reader.watch("hits", by=["region"])
        for number in range(20):
            world.publish(HITS, {("eu", "/"): 1})
            until(quick, lambda it, wanted=number + 2: values(it)["eu"] == wanted)  # type: ignore[misc]
        time.sleep(0.05)  # what is on its way comes
        assert values(next(watch))["eu"] == 21
        hits.world.ready = False
        until(watch, lambda _: watch.problem is not None)
        time.sleep(0.3)
        before = next(watch).as_of.staleness_ms or 0
        time.sleep(0.2)
        assert (next(watch).as_of.staleness_ms or 0) >= before + 190


def test_a_watch_from_before_a_fork(hits: Server) -> None:
    """A child is told to make its own, and can't disturb its parent's."""
    with Reader(hits.url) as reader:
        watch = reader.watch("hits")
        next(watch)
        pid, watch._link._pid = watch._link._pid, -1
        with pytest.raises(Invalid, match="fork"):
            next(watch)
        watch.close()
        watch._link._pid = pid
        watch = reader.watch("hits")
        assert next(watch) is not None


def test_a_close_after_a_fork_takes_no_lock() -> None:
    """A child that closes its parent's watch does not wait for a lock that a thread of the parent held at the fork."""
    with Reader("http://127.0.0.1:1") as reader:
        watch = reader.watch("hits")
        held, release = threading.Event(), threading.Event()

        def hold() -> None:
            with ExitStack() as stack:
                for it in vars(watch._link).values():
                    if isinstance(it, threading.Event | threading.Condition):
                        stack.enter_context(getattr(it, "_cond", it))
                held.set()
                release.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(2)
            watch.close()
            os._exit(0)
        release.set()
        thread.join()
        assert os.waitpid(pid, 0)[1] == 0


def test_a_thread_that_can_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """A watch whose thread could not be started raises that, and starts it at the next call."""
    with Reader("http://127.0.0.1:1") as reader:
        watch = reader.watch("hits")
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", Mock(side_effect=RuntimeError("can't start new thread")))
            with pytest.raises(RuntimeError, match="can't start"):
                next(watch)
        watch._link.start()
        wait_until(watch._link.ready)
        with pytest.raises(Unavailable):
            next(watch)


def test_async_watches(hits: Server) -> None:
    """Many run at once beside other calls; a time-out loses nothing; leaving a loop closes its connection."""
    world = hits.world
    assert isinstance(world, World)

    async def one(watch: AsyncIterator[Answer]) -> Any:
        async for answer in watch:
            if values(answer)["eu"] > 1:
                return values(answer)

    async def run() -> None:
        async with AsyncReader(hits.url) as reader:
            tasks = [asyncio.create_task(one(reader.watch("hits", by=["region"]))) for _ in range(50)]
            watch = reader.watch("hits", by=["region"])
            first = await anext(watch)
            answers = 0
            for _ in range(100):
                try:
                    await asyncio.wait_for(anext(watch), 0.005)
                    answers += 1
                except TimeoutError:
                    continue
            assert answers >= 2, "heartbeats"
            assert values(await reader.get("hits", by=["region"])) == values(first)
            world.publish(HITS, {("eu", "/"): 6})
            assert await asyncio.wait_for(asyncio.gather(*tasks), 20) == [{"eu": 7, "us": 2}] * 50
            two = [asyncio.create_task(anext(watch)) for _ in range(2)]  # type: ignore[arg-type]
            assert all(values(it) == {"eu": 7, "us": 2} for it in await asyncio.gather(*two))
            hits.world.ready = False
            while watch.problem is None:
                await anext(watch)
            await watch.aclose()
            assert await anext(watch, None) is None
            world.ready = True
            both = [reader.watch("hits") for _ in range(2)]
            for it in both:
                await anext(it)
        assert [await anext(it, None) for it in both] == [None, None]

    asyncio.run(run())
    gc.collect()
    wait_until(lambda: open_streams(hits) == 0)


ANSWER = (
    b'{"view":"hits","kind":"sum","by":[],"series":[{"labels":{},"value":1}],"as_of":{"staleness_ms":5,"next_offsets":{}}}'
)
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nPipeline-Heartbeat-Ms: %d\r\nTransfer-Encoding: chunked\r\n\r\n"
)
UPDATE = ANSWER.replace(b'{"labels":{},"value":1}', b"")


def event(name: bytes, data: bytes, id: bytes = b"a-1") -> bytes:
    return b"id: %s\nevent: %s\ndata: %s\n\n" % (id, name, data)


def update(value: int) -> bytes:
    return b'{"answer":%s,"changed":[{"labels":{},"value":%d}]}' % (UPDATE, value)


@contextmanager
def scripted(*responses: list[bytes]) -> Iterator[tuple[str, list[bytes]]]:
    """Answer each connection with the parts of a response, and keep it open after the last, empty part is missing.

    Yield the URL and a list of the requests.
    """
    requests: list[bytes] = []
    kept = []
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        for parts in responses:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            requests.append(connection.recv(65_536))
            for part in parts:
                connection.sendall(part)
                time.sleep(0.002)
            if parts and parts[-1].endswith(b"0\r\n\r\n"):
                connection.close()
            kept.append(connection)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", requests
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(10)
        for connection in kept:
            connection.close()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


END = b"0\r\n\r\n"


def test_a_silent_connection_is_given_up() -> None:
    """After three heartbeats and a second without a byte the watch opens another, with the id of its last event."""
    first = [HEAD % 10, chunk(event(b"answer", ANSWER))]
    second = [HEAD % 10_000, chunk(event(b"update", update(2), b"a-2"))]
    with scripted(first, second) as (url, requests), Reader(url) as reader:
        watch = reader.watch("hits", by=())
        assert next(watch).value() == 1
        begun = time.monotonic()
        lost = until(watch, lambda _: watch.problem is not None)
        assert 0.9 < time.monotonic() - begun < 5
        assert (lost.value(), "no event for 1.03 s" in str(watch.problem)) == (1, True)
        assert (lost.as_of.staleness_ms or 0) >= 905
        assert until(watch, lambda _: watch.problem is None).value() == 2
    assert [b"Last-Event-ID: " + it in requests[i] for i, it in enumerate((b"\r\n", b"a-1\r\n"))] == [True, True]


def test_staleness_counts_from_the_first_byte() -> None:
    """An event that comes in slow pieces, cut also between its lines, is as stale as if it had come with its first byte."""
    data = event(b"answer", ANSWER)
    for cut in (8, 60):
        parts = [HEAD % 10_000, chunk(data[:cut]), *[b""] * 150, chunk(data[cut:])]
        with scripted(parts) as (url, _), Reader(url) as reader:
            assert (next(reader.watch("hits")).as_of.staleness_ms or 0) >= 100


def test_events_in_any_pieces() -> None:
    """Events may be cut anywhere, also within chunks and characters; unknown ones are passed over."""
    named = [it.replace(b"hits", "hüts".encode()) for it in (ANSWER, update(9))]
    data = event(b"answer", named[0]) + event(b"later", b"1") + event(b"update", named[1])
    wire = HEAD % 10_000 + b"".join(chunk(data[a:b]) for a, b in pairwise([*range(0, len(data), 7), len(data)]))
    with scripted([wire[i : i + 50] for i in range(0, len(wire), 50)]) as (url, _), Reader(url) as reader:
        assert until(reader.watch("hits"), lambda it: it.value() == 9).view == "hüts"


@pytest.mark.parametrize(
    "bad",
    [
        event(b"answer", b"{}"),
        event(b"update", b"[1"),
        event(b"update", b"\xff"),
        event(b"update", b'{"answer":%s,"order":[{"x":"y"}]}' % UPDATE),
        event(b"problem", b"rubbish"),
    ],
)
def test_events_that_are_none(bad: bytes) -> None:
    """An event that can't be understood counts as a lost connection; the next one begins with a whole answer."""
    first = [HEAD % 10_000, chunk(event(b"answer", ANSWER) + bad), END]
    second = [HEAD % 10_000, chunk(event(b"answer", ANSWER.replace(b'"value":1', b'"value":2')))]
    with scripted(first, second) as (url, requests), Reader(url) as reader:
        watch = reader.watch("hits")
        lost = until(watch, lambda _: watch.problem is not None)
        assert (lost.value(), type(watch.problem)) == (1, Unavailable)
        assert until(watch, lambda _: watch.problem is None).value() == 2
    assert (b"Last-Event-ID: \r\n" in requests[1]) == (b"problem" not in bad)


@pytest.mark.parametrize(
    "response",
    [
        [],
        [b"rubbish\r\n\r\n", END],
        [b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 2\r\n\r\nok"],
        [b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno"],
        [HEAD % 1, END],
        [HEAD % 1, b"zz\r\n", END],
        [HEAD % 1, chunk(event(b"answer", b"no")), END],
        [HEAD.replace(b"%d", b"-1"), chunk(event(b"problem", b'{"status":503}')), END],
    ],
)
def test_no_stream_at_all(response: list[bytes]) -> None:
    """Before the first answer, whatever is no stream is `Unavailable`, and does not last longer than it may."""
    with scripted(response) as (url, _), Reader(url, timeout_s=0.3) as reader, pytest.raises(Unavailable):
        next(reader.watch("hits"))


def test_a_watch_that_is_never_asked_opens_nothing() -> None:
    """The connection is made for the first answer."""
    with Reader("http://127.0.0.1:1") as reader:
        assert isinstance(reader.watch("hits"), Watch)
