"""The live page of a server that needs access tokens: it asks for one, says what is wrong with it, and keeps it."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from pipeline import Publisher
from tests.support import UpProcess, pipeline


class Locked(UpProcess):
    """A server with tokens, by name."""

    tokens: dict[str, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    """A server with a view, and tokens with the scopes of their names."""
    folder = tmp_path_factory.mktemp("access")
    made = {}
    for scope in ("read", "publish", "admin"):
        done = pipeline("tokens", "add", scope, "--scope", scope, "--file", str(folder / "tokens"))
        assert done.returncode == 0, done.stderr
        made[scope] = done.stdout.split()[-1]
    with Locked(folder / "data", "--set", f"tokens_file={folder / 'tokens'}") as up:
        up.tokens = made
        with Publisher(up.url, token=made["publish"]) as publisher:
            publisher.sum("orders", labels=("region",), monotone=True).add(7, region="eu")
            publisher.histogram("latency").observe(3)
        yield up


def give(page: Page, token: str) -> None:
    page.get_by_label("Access token").fill(token)
    page.get_by_role("button", name="Use").click()


def test_it_asks_for_a_token(page: Page, server: Locked, said: list[str]) -> None:
    """Without a token the page asks for one, and asks the server nothing meanwhile; with it, it shows and streams."""
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(server.url)
    expect(page.get_by_role("alert").first).to_contain_text("needs an access token (401)")
    expect(page.locator("#staleness")).to_contain_text("needs an access token")
    page.wait_for_timeout(300)
    asked.clear()
    page.wait_for_timeout(2_500)
    assert not asked
    assert not Axe().run(page).response["violations"]
    give(page, "no token!")
    expect(page.get_by_role("alert").first).to_contain_text("This is no access token")
    give(page, "x" * 43)
    expect(page.get_by_role("alert").first).to_contain_text("does not take this access token (401)")
    give(page, server.tokens["read"])
    expect(page.locator("tr", has_text="orders")).to_contain_text("7")
    expect(page.get_by_label("Access token")).to_have_count(0)
    page.goto(f"{server.url}/#/view/orders")
    expect(page.locator("tbody tr", has_text="eu").locator("td").nth(1)).to_have_text("7")
    with Publisher(server.url, token=server.tokens["publish"]) as publisher:
        publisher.sum("orders", labels=("region",), monotone=True).add(1, region="eu")
    expect(page.locator("tbody tr", has_text="eu").locator("td").nth(1)).to_have_text("8")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download as CSV").click()
    assert "eu" in Path(download.value.path()).read_text()
    page.goto(f"{server.url}/#/status")
    expect(page.locator("main")).to_contain_text("Ready: every partition can be read.")
    assert not [line for line in said if "401" not in line], said


def test_it_says_what_a_token_may_not(page: Page, server: Locked) -> None:
    """A token without the scope is told as such, and can be changed."""
    page.goto(server.url)
    give(page, server.tokens["publish"])
    expect(page.get_by_role("alert").first).to_contain_text(re.compile("403.*read"))
    page.get_by_role("button", name="Change token").click()
    give(page, server.tokens["read"])
    expect(page.locator("tr", has_text="orders")).to_be_visible()
    page.get_by_role("button", name="Change token").click()
    page.get_by_role("button", name="Forget").click()
    expect(page.get_by_role("alert").first).to_contain_text("needs an access token (401)")
    expect(page.locator("tr", has_text="orders")).to_have_count(0)


@pytest.mark.long
def test_a_token_stays_in_its_tab(page: Page, server: Locked) -> None:
    """The token outlives a reload, stands in no address, cookie or line to copy, and another tab has none."""
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    page.goto(server.url)
    token = server.tokens["read"]
    give(page, token)
    page.goto(f"{server.url}/#/view/latency")
    page.reload()
    expect(page.locator("pre", has_text="curl")).to_contain_text("Authorization: Bearer $PIPELINE_TOKEN")
    assert token not in page.content()
    assert not [address for address in addresses if token in address]
    assert page.context.cookies() == []
    assert page.evaluate("Object.keys(localStorage).length") == 0
    other = page.context.new_page()
    other.goto(server.url)
    expect(other.get_by_label("Access token")).to_be_visible()
