"""The picture of the page in the README. `python -m tests.page.screenshot` makes it, from a server with a shop's numbers.

`python -m tests.page.screenshot FOLDER` writes pictures of all pages, light, dark and as wide as a phone, to be looked at.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from pipeline import Publisher
from tests.support import UpProcess

PNG = Path(__file__).parents[2] / "pipeline" / "docs" / "page.png"
SIZES = {"light": (1280, 810), "dark": (1280, 810), "phone": (360, 740)}
PAGES = {
    "views": "/",
    "orders": "/view/orders?by=region",
    "minutes": "/view/orders_by_minute?by=region&range=1+h&fn=rate",
    "latency": "/view/latency?by=-&range=1+h",
    "products": "/view/products?by=-",
    "visitors": "/view/visitors?by=region",
    "status": "/status",
    "absent": "/view/absent",
}
IN_README = "latency"
LIVE_S = 30.0
REGIONS = {"eu": 5, "us": 3, "asia": 2}
PRODUCTS = {"tea": 9, "coffee": 7, "cocoa": 3, "mate": 2, "chai": 1}
ROUTES = {"/": 6, "/cart": 3, "/pay": 1}


class Shop:
    """A shop that publishes what happens in it."""

    def __init__(self, publisher: Publisher) -> None:
        self._random = random.Random(4)
        self.orders = publisher.sum("orders", labels=("region", "product"), monotone=True)
        self.minutes = publisher.sum("orders_by_minute", labels=("region",), window_s=60, monotone=True)
        self.latency = publisher.histogram("latency", labels=("route",), window_s=60)
        self.products = publisher.topk("products")
        self.visitors = publisher.distinct("visitors", labels=("region",))
        self.largest = publisher.max("largest_order", labels=("region",))
        self.basket = publisher.mean("basket")
        self.release = publisher.last("release", labels=("service",))

    def _one_of(self, weights: dict[str, int]) -> str:
        return self._random.choices([*weights], [*weights.values()])[0]

    def sell(self, ts_ms: int) -> None:
        """Publish one order, and the request that it came with."""
        region, product, route = map(self._one_of, (REGIONS, PRODUCTS, ROUTES))
        price = round(self._random.lognormvariate(3, 0.6), 2)
        wave = 1.4 if ts_ms // 600_000 % 3 == 0 else 1.0
        self.orders.add(1, region=region, product=product)
        self.minutes.labels(region).add(1, ts_ms=ts_ms)
        self.latency.labels(route).observe(wave * self._random.lognormvariate(3 + 0.3 * len(route) / 4, 0.5), ts_ms=ts_ms)
        self.products.labels().add(product)
        self.visitors.observe(self._random.randrange(20_000), region=region)
        self.largest.observe(price, region=region)
        self.basket.observe(price)

    def open(self) -> None:
        """Publish an hour that has passed."""
        now_ms = int(time.time() * 1_000)
        for ts_ms in range(now_ms - 3_600_000, now_ms, 100):
            self.sell(ts_ms)
        for service, version in (("web", "2026.3"), ("payment", "1.9.0")):
            self.release.set(version, service=service)

    def trade(self, seconds: float) -> None:
        """Publish for a while what happens meanwhile."""
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            for _ in range(self._random.randrange(3)):
                self.sell(int(time.time() * 1_000))
            time.sleep(0.1)


def shoot(browser: Browser, url: str, shop: Shop, pictures: dict[Path, tuple[str, str]]) -> None:
    """Open all pictures' pages, let the shop trade, and write them. A picture is a name of `PAGES`, and one of `SIZES`."""
    pages = {}
    for path, (name, kind) in pictures.items():
        width, height = SIZES[kind]
        scheme = "dark" if kind == "dark" else "light"
        pages[path] = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        pages[path].goto(f"{url}/#{PAGES[name]}")
    shop.trade(LIVE_S)
    for path, page in pages.items():
        page.screenshot(path=path, full_page=path != PNG)


def main() -> None:
    """Write the pictures."""
    pictures = {PNG: (IN_README, "light")}
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1])
        pictures = {folder / f"{name}-{kind}.png": (name, kind) for name in PAGES for kind in SIZES}
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with (
        tempfile.TemporaryDirectory() as scratch,
        UpProcess(Path(scratch) / "data") as server,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        with Publisher(server.url) as publisher:
            shop = Shop(publisher)
            shop.open()
            publisher.flush()
            shoot(browser, server.url, shop, pictures)
        browser.close()


if __name__ == "__main__":
    main()
