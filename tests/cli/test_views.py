"""`pipeline views`: lists, drops and resets, under publishing load and through kill -9."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from pipeline import Publisher, Reader
from pipeline.adapters.clock import SystemClock
from pipeline.adapters.http import HttpViews
from pipeline.core.answer import Changed
from pipeline.core.query import order
from pipeline.core.record import Control
from pipeline.errors import NotFound, Unavailable
from pipeline.roles.view_admin import change
from tests.cli.conftest import Here
from tests.support import UpProcess, pipeline, wait_until


def publish(server: UpProcess, view: str, count: int = 3) -> None:
    with Publisher(server.url) as publisher:
        it = publisher.sum(view, labels=("a",))
        for number in range(count):
            it.add(1, a=str(number))
        token = publisher.flush(30)
    with Reader(server.url) as reader:
        reader.get(view, after=token, timeout_ms=20_000)


def listed(here: Here, server: UpProcess, view: str) -> list[dict[str, Any]]:
    done = here("views", "ls", "--from", server.url, "--json")
    return [it for it in json.loads(done.stdout)["views"] if it["name"] == view]


def test_what_is_listed(server: UpProcess, here: Here) -> None:
    """Each definition is listed with kind, labels, series, time of its first batch, and whether it answers."""
    publish(server, "listed")
    with Publisher(server.url) as publisher:
        publisher.max("listed", labels=("a", "b")).observe(5, a="1", b="2")
        token = publisher.flush(30)
    with Reader(server.url) as reader:
        reader.get("listed", kind="max", after=token, timeout_ms=20_000)
    first, second = listed(here, server, "listed")
    assert (first["kind"], first["labels"], first["series_count"], first["answers"]) == ("sum", ["a"], 3, True)
    assert (second["kind"], second["labels"], second["series_count"], second["answers"]) == ("max", ["a", "b"], 1, False)
    assert 0 < first["defined_at_ms"] <= second["defined_at_ms"] < SystemClock().now_ms() + 1_000
    text = here("views", "ls", "--from", server.url).stdout
    (line,) = [it for it in text.splitlines() if it.startswith("listed") and "max" in it]
    assert "a, b" in line
    assert " no " in line


def test_drop_and_reset(server: UpProcess, here: Here) -> None:
    """The command prints the result once the order is carried out."""
    publish(server, "gone", 4)
    done = here("views", "reset", "gone", "--to", server.url)
    assert (done.returncode, done.stderr) == (0, "")
    assert "reset gone: 1 definition with 4 series" in done.stdout
    assert "token " in done.stdout
    assert listed(here, server, "gone")[0]["series_count"] == 0
    with Reader(server.url) as reader:
        assert reader.get("gone").series == []
    publish(server, "gone", 2)
    said = json.loads(here("views", "drop", "gone", "--to", server.url, "--json").stdout)
    assert (said["folded"], said["definitions"][0]["series_count"]) == (True, 2)
    assert listed(here, server, "gone") == []
    with Reader(server.url) as reader, pytest.raises(NotFound):
        reader.get("gone", after=said["token"])


def test_definitions_are_chosen(server: UpProcess, here: Here) -> None:
    """Definitions are chosen by labels in any order, and by kind; '' is the definition without labels."""
    with Publisher(server.url) as one, Publisher(server.url) as other, Reader(server.url) as reader:
        one.sum("chosen", labels=("a", "b")).add(1, a="1", b="2")
        first = one.flush(30)  # so it was defined first
        other.max("chosen").observe(5)
        reader.get("chosen", after=first | other.flush(30), timeout_ms=20_000)
    done = here("views", "drop", "chosen", "--to", server.url, "--labels", "b, a", "--kind", "max")
    assert done.returncode == 2
    assert "it has sum(a, b), max()" in done.stderr
    assert here("views", "drop", "chosen", "--to", server.url, "--labels", "b, a").returncode == 0
    assert [it["kind"] for it in listed(here, server, "chosen")] == ["max"]
    assert here("views", "reset", "chosen", "--to", server.url, "--labels", "", "--kind", "max").returncode == 0
    assert [(it["kind"], it["series_count"]) for it in listed(here, server, "chosen")] == [("max", 0)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["drop", "nobody"], "no view nobody"),
        (["reset", "a b"], "not the name of a view"),
        (["drop", "nobody", "--kind", "median"], "unknown kind"),
        (["drop", "nobody", "--to", "embedded:x"], "not where views are"),
    ],
)
def test_what_is_refused(server: UpProcess, here: Here, arguments: list[str], says: str) -> None:
    """A wrong call is refused with the reason, and nothing is done."""
    to = [] if "--to" in arguments else ["--to", server.url]
    done = here("views", *arguments, *to)
    assert done.returncode == 2
    assert says in done.stderr


class Adding(threading.Thread):
    """Adds 1 and flushes, again and again, and counts the begun and the acknowledged additions."""

    def __init__(self, server: UpProcess, view: str) -> None:
        super().__init__(daemon=True)
        self.acknowledged = self.begun = 0
        self.stopping = threading.Event()
        self._publisher = Publisher(server.url)
        self._cell = self._publisher.sum(view, labels=("a",)).labels("x")

    def run(self) -> None:
        while not self.stopping.is_set():
            self.begun += 1
            self._cell.add(1)
            self.token = self._publisher.flush(90)
            self.acknowledged += 1
        self._publisher.close()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("action", ["drop", "reset"])
def test_under_publishing_load(server: UpProcess, here: Here, action: str) -> None:
    """Deltas that are acknowledged before the order do not count, those after its token all do; three orders in a row."""
    view = f"load_{action}"
    threads = [Adding(server, view) for _ in range(2)]
    try:
        for it in threads:
            it.start()
        wait_until(lambda: all(it.acknowledged > 5 for it in threads), "some additions", 60)
        with Reader(server.url) as reader:
            reader.get(view, after=threads[0].token, timeout_ms=20_000)  # the server has folded some, so it knows the view
        for _ in range(3):
            before = sum(it.acknowledged for it in threads)
            done = here("views", action, view, "--to", server.url, "--json")
            assert done.returncode == 0, done.stderr
            begun = sum(it.begun for it in threads)
            wait_until(lambda least=begun: sum(it.acknowledged for it in threads) > least + 5, "more additions", 60)
    finally:
        for it in threads:
            it.stopping.set()
            it.join(60)
    total = sum(it.acknowledged for it in threads)
    with Reader(server.url) as reader:
        for it in threads:
            answer = reader.get(view, after=it.token, timeout_ms=20_000)
    assert total - begun <= answer.value() <= total - before, (before, begun, total)


@pytest.mark.timeout(180)
def test_killed_in_the_middle(tmp_path: Path) -> None:
    """After kill -9 once the log has the order, and again, it is carried out once, and later deltas count."""
    with (
        UpProcess(tmp_path / "data", "--partitions", "2", "--set", "commit_interval_ms=300") as up,
        Publisher(up.url) as publisher,
    ):
        view = publisher.sum("killed", labels=("a",))
        for _ in range(2):
            for number in range(20_000):
                view.add(1, a=str(number))
            token = publisher.flush(60)
            with HttpViews(up.url) as views:
                wait_until(lambda token=token: views.folded(token), "all folded", 60)
                order_token = views.change(order("drop", "killed", None, None), "key-" + str(token)).token
            up.kill()
            up.start()
            for number in range(0, 20_000, 7):
                view.add(1, a=str(number))
            token = publisher.flush(60)
            with Reader(up.url) as reader:
                answer = reader.get("killed", by=[], after=token, timeout_ms=60_000)
                assert answer.value() == len(range(0, 20_000, 7)), order_token
        up.terminate()
        assert pipeline("verify", "--data", str(up.data)).returncode == 0


class Failing:
    """Views of a server that loses its answers now and then."""

    def __init__(self, views: HttpViews, lost: int) -> None:
        self.views = views.views
        self.folded = views.folded
        self.close = views.close
        self._views = views
        self._lost = lost

    def change(self, control: Control, key: str) -> Changed:
        changed = self._views.change(control, key)
        if self._lost:
            self._lost -= 1
            raise Unavailable("the answer was lost")
        return changed


def test_an_answer_that_is_lost(server: UpProcess) -> None:
    """The order is repeated under the same key, and counts once: deltas published between the tries stay."""
    publish(server, "unheard")
    with HttpViews(server.url) as views:
        control = order("drop", "unheard", None, None)
        outcome = change(Failing(views, 2), control, timeout_s=30, clock=SystemClock(), key="heard")
        assert (outcome.folded, outcome.definitions[0].series_count) == (True, 3)
        publish(server, "unheard", 1)
        change(Failing(views, 1), control, timeout_s=30, clock=SystemClock(), key="heard")
    with Reader(server.url) as reader:
        assert len(reader.get("unheard").series) == 1


def test_a_view_that_a_lost_try_has_dropped(server: UpProcess) -> None:
    """A view that is gone, at a server that does not remember the first try, means that the order was carried out."""
    publish(server, "elsewhere")

    class Forgetful(Failing):
        def change(self, control: Control, key: str) -> Changed:
            changed = self._views.change(control, key)
            if not self._lost:
                raise NotFound("no view elsewhere")
            self._lost -= 1
            raise Unavailable(f"the answer was lost: {changed.token}")

    with HttpViews(server.url) as views:
        control = order("drop", "elsewhere", None, None)
        outcome = change(Forgetful(views, 1), control, timeout_s=30, clock=SystemClock())
        assert (outcome.token, len(outcome.definitions)) == ("", 1)
        wait_until(lambda: not [it for it in views.views() if it.name == "elsewhere"], "it is gone")
        with pytest.raises(NotFound):
            change(Forgetful(views, 1), control, timeout_s=30, clock=SystemClock())
