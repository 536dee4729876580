"""The live page in Chromium: right numbers, hostile labels, a server that is away, other readers than eyes and mice."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import HealthCheck, given, settings
from playwright.sync_api import Browser, Page, expect

from pipeline import Publisher
from pipeline.core.updates import update_of
from tests.core.test_updates import histories
from tests.preloaded import PROGRAM
from tests.support import UpProcess

EVIL = (
    "<img src=x onerror=alert(1)>",
    "'\"><script>alert(1)</script>",
    "\u202egnp.exe",
    "a\x00b\x1b[31m",
    "&amp;",
    "${x}",
    "w" * 2_000,
)
"""Label values that would do something if they were taken for markup, script, or text of a terminal."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UpProcess]:
    with UpProcess(tmp_path_factory.mktemp("page") / "data") as it:
        with Publisher(it.url) as publisher:
            orders = publisher.sum("orders", labels=("region", "product"), monotone=True)
            for region, count in (("eu", 3), ("us", 4)):
                orders.add(count, region=region, product="tea")
            publisher.sum("visits", labels=("region",), window_s=1, monotone=True).add(5, region="eu")
            latency = publisher.histogram("latency", labels=("route",), window_s=10)
            for value in range(1, 200):
                latency.observe(value / 7, route="/cart")
            for number in range(200):
                publisher.distinct("users").observe(f"user{number}")
                publisher.topk("products").observe(("tea", "coffee", "milk")[number % 3])
            publisher.last("note").set("all quiet")
            for region, value in (("eu", 2**70 + 1), ("us", 0)):
                publisher.sum("large", labels=("region",)).add(value, region=region)
            publisher.flush()
        yield it


@pytest.fixture
def page(page: Page, server: UpProcess) -> Page:
    """The page of the server's views."""
    page.goto(server.url)
    return page


def show(page: Page, server: UpProcess, address: str) -> None:
    page.goto(f"{server.url}/#/{address}")


def test_all_views_are_listed(page: Page, server: UpProcess, said: list[str]) -> None:
    """Each view has a row with kind, labels, number of series and its total; each leads to its own page."""
    row = page.locator("tr", has_text="orders")
    expect(row).to_contain_text("monotone sum")
    expect(row).to_contain_text("product, region")
    expect(row.locator("td").nth(2)).to_have_text("7")
    expect(page.locator("tr", has_text="large").locator("td").nth(2)).to_have_text("1,180,591,620,717,411,303,425")
    expect(page.locator("tr", has_text="note")).to_contain_text("all quiet")
    page.get_by_label("Name contains").fill("lat")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="latency").click()
    expect(page.locator("h1")).to_have_text("latency")
    assert said == []


def test_numbers_move_when_deltas_come(page: Page, server: UpProcess, said: list[str]) -> None:
    """A view shows what a read answers, and what is published while it is open."""
    show(page, server, "view/orders?by=region")
    cell = page.locator("tbody tr", has_text="eu").locator("td").nth(1)
    expect(cell).to_have_text("3")
    with Publisher(server.url) as publisher:
        publisher.sum("orders", labels=("region", "product"), monotone=True).add(10, region="eu", product="tea")
        publisher.flush()
        expect(cell).to_have_text("13")
    expect(page.locator("#staleness")).to_contain_text("stale")
    expect(page.locator("canvas")).to_be_visible()
    page.get_by_label("region").uncheck()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.locator("tbody tr td").nth(1)).to_have_text("17")
    assert said == []


@pytest.mark.parametrize(
    ("address", "shows"),
    [
        ("view/latency?by=-&range=24+h", ["count", "p99", "199", "Heatmap"]),
        ("view/users", ["estimate", "at least", "200", "at most"]),
        ("view/products", ["tea", "coffee", "milk", "66"]),
        ("view/visits?by=region&range=24+h&fn=value", ["eu", "5"]),
        ("view/note", ["all quiet"]),
        ("view/large?by=-", ["1,180,591,620,717,411,303,425"]),
        ("view/large?by=region", ["1,180,591,620,717,411,303,425", "us"]),
        ("status", ["partition", "staleness"]),
    ],
)
def test_every_kind_has_what_suits_it(
    page: Page, server: UpProcess, said: list[str], address: str, shows: list[str]
) -> None:
    """Percentiles and a heatmap for histograms, bounds for estimates, bars for topk, all digits for large ints."""
    show(page, server, address)
    for text in shows:
        content = page.locator("main .columns, main table").first
        expect(content.get_by_label("Heatmap") if text == "Heatmap" else content.get_by_text(text).first).to_be_visible()
    assert said == []


def test_labels_are_data(page: Page, server: UpProcess, said: list[str]) -> None:
    """Markup and script in labels, items and texts are shown as text, and run nothing."""
    with Publisher(server.url) as publisher:
        for value in EVIL:
            publisher.sum("evil", labels=("who",)).add(1, who=value)
            publisher.topk("evil_items").observe(value[:200])
            publisher.last("evil_text", labels=("who",)).set(value, who=value)
        publisher.flush()
    for view in ("evil", "evil_items", "evil_text"):
        show(page, server, f"view/{view}")
        expect(page.locator("main").get_by_text(EVIL[0]).first).to_be_visible()
        assert page.locator("main img, main script").count() == 0
    assert {it.text_content() for it in page.locator("tbody tr td:first-child").all()} == {*EVIL}
    show(page, server, "view/%3Cimg%20src=x%20onerror=alert(1)%3E")
    expect(page.get_by_role("alert")).to_contain_text("There is no view <img")
    assert said == []


def test_wrong_input_is_told(page: Page, server: UpProcess) -> None:
    """A condition that is wrong shows the server's words, saves no file, and the page goes on; a wrong time is told, too."""
    files: list[str] = []
    page.on("download", lambda file: files.append(file.suggested_filename))
    show(page, server, "view/visits?range=own&start=garbage")
    expect(page.get_by_role("alert")).to_contain_text("Invalid time value")
    show(page, server, "view/orders")
    page.get_by_label("Only series with").fill("region=~(")
    page.get_by_role("button", name="Show").click()
    expect(page.get_by_role("alert")).to_contain_text("region")
    page.get_by_role("link", name="Download as CSV").click()
    expect(page.get_by_role("alert").nth(1)).to_contain_text("Nothing was saved: ")
    assert files == []
    page.get_by_label("Only series with").fill("region=us")
    page.get_by_role("button", name="Show").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    assert "where=region%3Dus" in page.url


def test_lines_to_copy_read_what_is_shown(page: Page, server: UpProcess) -> None:
    """The lines for curl and the shell get the same points of a range that the reader of the page has chosen."""
    show(page, server, "view/visits?by=region&range=own&start=2026-01-01T10:00&end=2026-01-01T11:00&fn=value")
    curl, shell = (
        page.locator(f"pre:right-of(:text-is('{name}'))").first.text_content() or "" for name in ("curl", "Shell")
    )
    asked = page.request.get(shlex.split(curl)[-1]).json()
    assert asked["end_ms"] - asked["start_ms"] == 3_600_000
    said = subprocess.run([*PROGRAM, *shlex.split(shell)[1:], "--json"], capture_output=True, check=True, timeout=60).stdout
    answer = json.loads(said)
    for name in ("start_ms", "end_ms", "step_ms", "series"):
        assert answer[name] == asked[name]


def test_a_server_that_is_away_is_told(page: Page, tmp_path: Path) -> None:
    """The badge says that the server is away, and the numbers go on once it is back, without a reload."""
    with UpProcess(tmp_path / "data") as own, Publisher(own.url) as publisher:
        hits = publisher.sum("hits")
        hits.add(1)
        publisher.flush()
        page.goto(f"{own.url}/#/view/hits")
        cell = page.locator("tbody tr td").nth(1)
        expect(cell).to_have_text("1")
        own.kill()
        expect(page.locator("#staleness")).to_contain_text("connection lost")
        expect(page.locator("#staleness")).to_have_class("badge bad")
        own.start()
        hits.add(1)
        publisher.flush()
        expect(cell).to_have_text("2")
        expect(page.locator("#staleness")).not_to_contain_text("connection lost")


def test_a_view_that_comes_later(page: Page, server: UpProcess) -> None:
    """The page of a view that nobody has recorded yet says so, and shows the view once its first delta is folded."""
    page.goto(f"{server.url}/#/view/later")
    expect(page.get_by_role("alert")).to_contain_text("There is no view later, or not yet")
    with Publisher(server.url) as publisher:
        publisher.sum("later").add(7)
        publisher.flush()
    expect(page.locator("tbody tr td").nth(1)).to_have_text("7")


@pytest.mark.parametrize("scheme", [pytest.param("light", marks=pytest.mark.long), "dark"])
def test_it_is_accessible(browser: Browser, server: UpProcess, scheme: Any) -> None:
    """axe finds nothing on any page, in light and dark; everything fits the width of a phone; keys reach everything."""
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)
    page = context.new_page()
    for address in ("", "view/orders?by=region", "view/latency?by=-", "view/products", "status"):
        page.goto(f"{server.url}/#/{address}")
        expect(page.locator("table").first).to_be_visible()
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), address
    page.goto(f"{server.url}/#/view/orders?by=region")
    page.keyboard.press("Tab")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    assert {"Views", "Status", "API", "where", "Show", "Copy"} <= reached
    context.close()


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=histories())
def test_the_page_takes_updates_as_python_does(page: Page, history: Any) -> None:
    """Updates make of an answer in the browser what they make of it in `core.updates`."""

    def shown(series: Any) -> Any:
        return [it if it.get("points") else {name: it[name] for name in it if name != "points"} for it in json.loads(series)]

    updates = [(before, update_of(before, after), after) for before, after in pairwise(history)]
    for before, update, after in updates:
        if update is not None:
            made = page.evaluate(
                """async ([before, update]) => {
                    const { parse, updated } = await import("/page/api.js");
                    return JSON.stringify(updated(parse(before), parse(update)).series);
                }""",
                [msgspec.json.encode(before).decode(), msgspec.json.encode(update).decode()],
            )
            assert shown(made) == shown(msgspec.json.encode(after.series))


def test_only_its_own_files_run(server: UpProcess, page: Page) -> None:
    """The policy allows nothing from elsewhere and nothing inline; every file of the page has it, and its type."""
    for name in ("", "page/app.js", "page/style.css", "page/uplot/uPlot.iife.min.js", "page/icon.svg"):
        answer = page.request.get(f"{server.url}/{name}")
        assert answer.status == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert page.request.get(f"{server.url}/page/../settings.py").status == 404
    assert page.request.get(f"{server.url}/page/nothing.js").status == 404
