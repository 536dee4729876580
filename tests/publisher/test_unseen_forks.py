"""Forks in C, which Python does not see: the child begins anew all the same, and the parent keeps its deltas."""

from pathlib import Path

import pytest

from pipeline import native
from pipeline.publisher.view import QUEUE_MAX
from tests.publisher.modes import MODES, settings_of
from tests.publisher.support import FileLog, batches, fold, run_script

LOST = "what it has recorded until now, to series that its parent had, is lost"
FORK = """
import ctypes
fork_in_c = ctypes.PyDLL(None).fork  # with the interpreter's lock; a thread that waits for it then would stop the child
pub = publisher(log, flush_interval_ms=3_600_000, **SETTINGS)
view = pub.sum("v", labels=("who",))
cell = view.labels("main")
if FLUSHED:
    cell.add(0.0)
    pub.flush(20)
    assert pub._runtime.rest()
pub._runtime.start_threads = lambda: None
cell.add(1.0)
cell.add(10.0)
child = fork_in_c()
if child == 0:
    signal.alarm(20)
    CHILD
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
del pub._runtime.start_threads
cell.add(100.0)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


def run(path: Path, child: str, mode: str = "memory", *, flushed: bool = False) -> str:
    """Run a script in whose child the given lines run; return what it prints."""
    script = FORK.replace("SETTINGS", repr(settings_of(mode, path.parent))).replace("FLUSHED", repr(flushed))
    return run_script(path, script.replace("CHILD", child)).stderr


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "begin",
    [
        "view.add(1000.0, who='new')",
        "pub.sum('w')",
        "pub.flush()",
        "pub.stats()",
        "pub.record_batch(view, {'who': ['new'], 'value': [1000]})",
        "in_threads(8, lambda i: view.add(1000, who=f'new {i % 4}'))",  # which notice at once: one has it begin anew
    ],
)
def test_whatever_the_child_calls_first(path: Path, mode: str, begin: str) -> None:
    """A child counts its own deltas, to series of its parent too, as a producer of its own; the parent goes on."""
    run(
        path,
        f"{begin}; cell.add(10_000.0); view.add(1000.0, who='new'); pub.flush(20); cell.add(100_000.0); pub.close()",
        mode,
        flushed=True,
    )
    found = fold(FileLog(path).read())
    new = {(f"new {i}",): 2000 for i in range(4)} if "threads" in begin else {}
    assert found.of("v") == {("main",): 110_111, ("new",): 2000 if "'new'" in begin else 1000, **new}
    assert (found.duplicates, found.dead) == (0, [])
    assert len({batch.producer_id for batch in batches(FileLog(path).read())}) == 2


@pytest.mark.parametrize("flushed", [True, False])
def test_a_child_that_begins_with_a_series_of_its_parents(path: Path, *, flushed: bool) -> None:
    """The native table loses no delta. The plain one loses those in its queue, says so, and counts from then on."""
    said = run(path, "[cell.add(1_000) for _ in range(5_000)]; pub.flush(20)", flushed=flushed)
    found = fold(FileLog(path).read())
    counted, rest = divmod(found.of("v")["main",], 1_000)
    assert rest == 111
    assert said.count(LOST) == (not native.in_use())
    assert counted == 5_000 if native.in_use() else 5_000 - QUEUE_MAX <= counted < 5_000
    assert (found.duplicates, found.dead) == (0, [])


def test_a_child_of_the_child(path: Path) -> None:
    """A grandchild begins anew too, whether its parent has recorded or not."""
    once = "child = fork_in_c(); child or (cell.add(1000.0), pub.flush(20), os._exit(0)); os.waitpid(child, 0); "
    resting = "pub.flush(20); assert pub._runtime.rest(); "  # a thread that waits for the interpreter would stop the child
    run(path, f"{once}view.add(10_000, who='new'); {resting}{once}pub.close()")
    assert fold(FileLog(path).read()).of("v") == {("main",): 2111 if native.in_use() else 1111, ("new",): 10_000}
