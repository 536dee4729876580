"""The page while a server or a view changes under it, and the page of the server's state."""

import re
import threading
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from pipeline.core.answer import PartitionStatus, RestoreStatus, Status
from pipeline.core.record import Definition
from pipeline.settings import QuerySettings, WorkerSettings
from tests.query.support import Server, World, serving

HITS = Definition("hits", "sum", ("region",))


class _Restoring(World):
    """A world whose server says that it follows a changelog, and how far the restore of a partition is."""

    def status(self) -> Status:
        restore = RestoreStatus(entries=300, remaining=100, entries_per_s=50.0, seconds_left=90.0)
        first = PartitionStatus(partition=0, phase="following" if self.ready else "restoring")
        if not self.ready:
            first.restore = restore
        others = [PartitionStatus(partition=it.number, phase="following") for it in self.partitions[1:]]
        return Status(
            ready=self.ready, role="server", series_max=10, partition_count=len(self.partitions), partitions=[first, *others]
        )


NOTE_BADGE = """() => {
    const badge = document.getElementById("staleness");
    window.noted = [];
    new MutationObserver(() => window.noted.push(badge.textContent)).observe(badge, { childList: true });
}"""
"""Keeps all texts of the badge from now on."""


def drop(server: Server, view: str) -> None:
    headers = {"Content-Type": "application/json"}
    reply = server.request("POST", f"/v1/views/{view}/drop", b'{"kind": null, "labels": null}', headers)
    assert reply.status == 200, reply.body


def test_a_server_that_restores_is_shown_as_such(page: Page, said: list[str]) -> None:
    """Pages that are opened while a server restores say so, and show numbers once it is ready, without a reload."""
    world = _Restoring()
    world.publish(HITS, {("eu",): 3})
    world.ready = False
    other = page.context.new_page()
    status = page.context.new_page()
    with serving(world) as server:
        page.goto(f"{server.url}/#/view/hits")
        other.goto(server.url)
        status.goto(f"{server.url}/#/status")
        for it in (page, other):
            expect(it.get_by_role("alert")).to_contain_text("restoring: about 7 changelog records to go")
            expect(it.locator("#staleness")).to_contain_text("the server is not ready")
        expect(status.locator("main")).to_contain_text("Not ready: 1 of 4 partitions being restored")
        expect(status.locator("tbody tr").first).to_contain_text("100 records to go, about 90.0 s")
        world.ready = True
        expect(page.locator("tbody tr", has_text="eu").locator("td").nth(1)).to_have_text("3")
        expect(other.locator("tbody tr", has_text="hits").locator("td").nth(2)).to_have_text("3")
        expect(status.locator("main")).to_contain_text("Ready: every partition can be read.")
        for it in (page, other):
            expect(it.get_by_role("alert")).to_have_count(0)
            expect(it.locator("#staleness")).not_to_contain_text("not ready")
    assert all("503" in it for it in said), said


def test_a_view_that_is_dropped_and_comes_back_otherwise(page: Page) -> None:
    """An open page says that its view is gone, and shows the new one, of another kind and other labels, without a reload."""
    world = World()
    world.publish(HITS, {("eu",): 3, ("us",): 4})
    with serving(world) as server, world.folding():
        page.goto(f"{server.url}/#/view/hits?by=region")
        expect(page.locator("tbody tr")).to_have_count(2)
        drop(server, "hits")
        expect(page.get_by_role("alert")).to_contain_text("no view 'hits'")
        world.append(0, Definition("hits", "max", ("zone",)), {("z",): 7})
        expect(page.locator("tbody tr", has_text="z").locator("td").nth(1)).to_have_text("7")
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.get_by_label("zone")).to_be_checked()
        expect(page.get_by_label("region")).to_have_count(0)


def test_a_stream_that_is_stuck(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    """The badge tells the staleness of the numbers that are shown, whatever else the server answers meanwhile."""
    world = World()
    world.publish(HITS, {("eu",): 3})
    read, computed = world.reader.read, threading.Event()
    with serving(world) as server, world.folding():
        page.goto(f"{server.url}/#/view/hits")
        cell = page.locator("tbody tr", has_text="eu").locator("td").nth(1)
        expect(cell).to_have_text("3")
        monkeypatch.setattr(world.reader, "read", lambda *asked, **how: computed.wait(60) and read(*asked, **how))
        world.append(0, HITS, {("eu",): 100})
        try:
            expect(page.locator("#staleness")).to_contain_text(re.compile("at most ([4-9]|1[0-9]) s stale"))
            page.evaluate(NOTE_BADGE)
            with page.expect_response("**/v1/views") as looked:
                pass
            looked.value.finished()
            page.wait_for_timeout(600)
            assert not [it for it in page.evaluate("window.noted") if re.search("at most [12] s", it)]
        finally:
            computed.set()
        expect(cell).to_have_text("103")


def test_a_stream_that_is_refused(page: Page) -> None:
    """A page whose stream is refused shows the server's words and a red badge until it gets one."""
    world = World(settings=QuerySettings(streams_max=1))
    world.publish(HITS, {("eu",): 3})
    other = page.context.new_page()
    with serving(world) as server, world.folding():
        other.goto(f"{server.url}/#/view/hits")
        expect(other.locator("tbody tr")).to_have_count(1)
        page.goto(f"{server.url}/#/view/hits")
        expect(page.get_by_role("alert")).to_contain_text("1 streams are open; no more are taken", timeout=8_000)
        expect(page.locator("#staleness")).to_contain_text("connection lost")
        expect(page.locator("#staleness")).to_have_class("badge bad")
        other.close()
        expect(page.locator("tbody tr")).to_have_count(1)
        expect(page.get_by_role("alert")).to_have_count(0)
        expect(page.locator("#staleness")).to_have_class("badge good")


def test_a_label_that_is_added(page: Page, said: list[str]) -> None:
    """A label that another app adds to a view can be chosen on a page that was open before; series of both are shown."""
    world = World()
    world.publish(HITS, {("eu",): 3})
    with serving(world) as server, world.folding():
        page.goto(f"{server.url}/#/view/hits?by=region")
        expect(page.locator("tbody tr", has_text="eu").locator("td").nth(1)).to_have_text("3")
        world.append(0, Definition("hits", "sum", ("region", "product")), {("eu", "tea"): 2, ("us", "tea"): 5})
        expect(page.locator("tbody tr", has_text="us").locator("td").nth(1)).to_have_text("5")
        expect(page.locator("tbody tr", has_text="eu").locator("td").nth(1)).to_have_text("5")
        page.get_by_label("product").check()
        expect(page.locator("tbody tr", has_text="tea")).to_have_count(2)
    assert said == []


@pytest.fixture
def troubled() -> Any:
    """A world of a worker with a name: a view near its limit, a view of two minds, a dead letter."""
    world = _Restoring(partition_count=1, worker=WorkerSettings(series_max=10), name="alpha")
    for definition, count in ((HITS, 9), (Definition("few", "sum", ("region",)), 2), (Definition("few", "max"), 1)):
        series = {(str(number),): 1 for number in range(count)} if definition.labels else {(): 1}
        world.publish(definition, series)
    world.append(0, Definition("far", "sum", ("region",), window_s=60), {("eu",): 1}, 4_000_000_000_000 * 60)
    world.fold()
    return world


def test_the_status_tells_what_is_wrong(page: Page, said: list[str], troubled: World) -> None:
    """Owners, dead letters with their reasons, definitions that differ and series near their limit are on one page."""
    with serving(troubled) as server:
        page.goto(f"{server.url}/#/status")
        expect(page.locator("tbody tr").first.locator("td").nth(4)).to_have_text("alpha")
        near = page.get_by_role("region", name="series_max")
        expect(near.locator("tbody tr")).to_have_text(["hitssumregion91090 %"])
        letters = page.get_by_role("region", name="could not be folded")
        expect(letters.locator("tbody tr")).to_have_count(1)
        expect(letters).to_contain_text("far")
        expect(letters).to_contain_text("a window that starts at 240000000000000")
        differing = page.get_by_role("region", name="Apps that do not agree")
        expect(differing.locator("tbody tr")).to_have_count(2)
        troubled.publish(HITS, {(f"new {number}",): 1 for number in range(4)})
        expect(near.locator("tbody tr")).to_contain_text("100 %")
    assert said == []
