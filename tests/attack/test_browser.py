"""Pages of other sites, in a real browser, that try to write to or read from the server of the person who looks at them."""

from __future__ import annotations

import json
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from pipeline import Publisher, Reader
from pipeline.core.frames import encode_frames
from pipeline.core.record import Definition
from pipeline.settings import QuerySettings
from tests.chromium import WAIT_MS, chromium
from tests.query.support import World, serving
from tests.support import Program, UpProcess

DELTAS = json.dumps([{"view": "evil", "kind": "sum", "value": 1}])
PUSHED = "# TYPE evil_total counter\nevil_total 1\n"
WRITES = {
    "/v1/deltas": DELTAS,
    "/v1/batches": encode_frames([World(1).batch(0, Definition("evil", "sum"), {(): 1})]).decode("latin-1"),
    "/v1/openmetrics": PUSHED,
    "/v1/views/good/drop": "{}",
    "/v1/views/good/reset": "{}",
    "/v1/dead-letters/replay": "{}",
    "/metrics/job/evil": PUSHED,
    "/v1/query": json.dumps({"queries": [{"view": "good"}]}),
    "/v1/states": "states",
}
"""By path of a POST, a body that the server would take from its own clients, with a character for each byte."""
TYPES = ("", "text/plain", "text/plain; version=0.0.4", "application/x-www-form-urlencoded", "multipart/form-data")
"""Media types that a page can send without asking."""

ATTACK = """async ([url, writes, types]) => {
  const done = [];
  const note = async (request) => done.push(await request.then((it) => `${it.type} ${it.status}`, () => "failed"));
  for (const [path, text] of Object.entries(writes)) {
    const bytes = Uint8Array.from(text, (it) => it.charCodeAt(0));
    for (const type of types) {
      const headers = type ? { "Content-Type": type } : {};
      await note(fetch(url + path, { method: "POST", mode: "no-cors", body: bytes, headers }));
      await note(fetch(url + path, { method: "POST", body: bytes, headers, credentials: "include" }));
      navigator.sendBeacon(url + path, new Blob([bytes], { type }));
    }
    await note(fetch(url + path, { method: "PUT", body: bytes }));
    for (const type of ["application/json", "application/octet-stream"]) {
      await note(fetch(url + path, { method: "POST", body: bytes, headers: { "Content-Type": type } }));
    }
    for (const enctype of ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]) {
      const frame = document.createElement("iframe");
      frame.name = `${path}${enctype}`;
      document.body.append(frame);
      const form = document.createElement("form");
      Object.assign(form, { method: "POST", action: url + path, enctype, target: frame.name });
      const field = document.createElement("textarea");
      [field.name, field.value] = [text.slice(0, 1), text.slice(1)];  // text/plain sends NAME=VALUE
      form.append(field);
      document.body.append(form);
      const loaded = new Promise((resolve) => { frame.onload = resolve; setTimeout(resolve, 1000); });
      form.submit();
      await loaded;
    }
  }
  for (const path of ["/v1/views", "/v1/views/good", "/metrics", "/v1/status"]) {
    await note(fetch(url + path));
    await note(fetch(url + path, { mode: "no-cors" }));
  }
  return done;
}"""
RECORD = """async (url) => fetch(url, { method: "POST", mode: "no-cors", body: "evil_statsd:1|c\\n".repeat(3),
  signal: AbortSignal.timeout(2000) }).catch(() => null).then(() => null)"""
ASK = """async ([method, path, body]) => {
  const reply = await fetch(path, { method, body, headers: body ? { "Content-Type": "application/json" } : {} });
  return [reply.status, await reply.text()];
}"""


class _Empty(BaseHTTPRequestHandler):
    """Answers every path with a page that has a link."""

    def do_GET(self) -> None:
        """Answer."""
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        if self.path == "/sandboxed":
            self.send_header("Content-Security-Policy", "sandbox allow-scripts allow-forms")  # its origin is `null`
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>another site</title><body><a id=link>a link</a>")

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def another_site() -> Iterator[int]:
    """Serve pages of another site; yield the port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Empty) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def site() -> Iterator[int]:
    with another_site() as port:
        yield port


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser for which the names below `test` are this machine, as after DNS rebinding."""
    with chromium("--host-resolver-rules=MAP *.test 127.0.0.1") as started:
        yield started


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    made = context.new_page()
    made.set_default_timeout(WAIT_MS)
    yield made
    context.close()


@pytest.fixture(scope="module")
def victim(up: UpProcess) -> UpProcess:
    """The server, with a view whose value is 7."""
    with Publisher(up.url) as publisher:
        publisher.sum("good").add(7)
        token = publisher.flush()
    with Reader(up.url) as reader:
        reader.get("good", after=token)
    return up


def log_ends(up: UpProcess) -> list[tuple[int, int]]:
    with Reader(up.url) as reader:
        return [(it["partition"], it["end_offset"]) for it in reader.status()["partitions"]]


@pytest.mark.parametrize(
    "address",
    [
        "http://evil.test:{}/",
        pytest.param("http://localhost:{}/", marks=pytest.mark.long),
        pytest.param("http://127.0.0.1:{}/sandboxed", marks=pytest.mark.long),
    ],
)
def test_pages_of_other_origins_store_nothing(victim: UpProcess, page: Page, site: int, address: str) -> None:
    """Nothing is stored or read, whatever another site, another server of this machine, or a sandboxed frame sends."""
    before = log_ends(victim)
    page.goto(address.format(site))
    done = page.evaluate(ATTACK, [victim.url, WRITES, TYPES])
    assert len(done) == len(WRITES) * (2 * len(TYPES) + 3) + 8
    assert {*done} <= {"opaque 0", "failed"}, done
    assert log_ends(victim) == before
    with Reader(victim.url) as reader:
        assert not [view.name for view in reader.views() if "evil" in view.name]
        assert [it.value for it in reader.get("good")] == [7]


def test_pages_record_nothing_through_statsd(up: UpProcess, page: Page, site: int, tmp_path: Path) -> None:
    """A request to the TCP port of StatsD, with lines of StatsD as its body, is cut off at its first line."""
    long = "x" * 20_000
    with Program("ingest", "statsd", "--port", "0", "--to", up.url, "--json", stderr=tmp_path / "statsd") as gateway:
        port = json.loads(gateway.read_line())["port"]
        with socket.create_connection(("127.0.0.1", port), 10) as own:
            own.sendall(b"GET /cart:1|c\nhonest:1|c\n")  # names may have spaces, and become those of views
        page.goto(f"http://evil.test:{site}/")
        for path in ("/", f"/{long}"):
            page.evaluate(RECORD, f"http://127.0.0.1:{port}{path}")
        gateway.signal(signal.SIGTERM)
        assert gateway.wait() == 0
        report = json.loads(gateway.read_line())
    assert report["left_out"].get("http", 0) >= 2, report
    assert report["deltas"] == 2
    with Reader(up.url) as reader:
        assert "honest" in [view.name for view in reader.views()]
        assert "evil_statsd" not in [view.name for view in reader.views()]


def test_a_rebound_name_reads_and_writes_nothing(victim: UpProcess, page: Page) -> None:
    """A page whose name has become this machine's address is of the server's own origin, and is refused all the same."""
    before = log_ends(victim)
    reply = page.goto(f"http://evil.test:{victim.port}/v1/views")
    assert reply is not None
    assert reply.status == 421
    for path in (
        "/",
        "/v1/views",
        "/v1/views/good",
        "/v1/status",
        "/metrics",
        "/healthz",
        "/openapi.json",
        "/v1/openmetrics",
    ):
        status, text = page.evaluate(ASK, ["GET", path, None])
        assert status == 421
        assert "good" not in text
    for path in WRITES:
        assert page.evaluate(ASK, ["POST", path, DELTAS])[0] == 421
    assert log_ends(victim) == before


def test_links_of_other_sites_lead_to_the_page(victim: UpProcess, page: Page, site: int) -> None:
    """A person who follows a link from another site sees the page with its views."""
    page.goto(f"http://evil.test:{site}/")
    page.evaluate("(url) => { document.getElementById('link').href = url; }", victim.url)
    page.click("#link")
    expect(page.locator("tr", has_text="good")).to_contain_text("7")


@pytest.mark.long
def test_pages_of_allowed_origins_write_and_read(page: Page, site: int) -> None:
    """A page whose origin is in `cors_origins` writes with a key, and reads answers and headers; another is refused."""
    world = World(settings=QuerySettings(cors_origins=f"http://friend.test:{site}"))
    with serving(world) as server, world.folding():
        write = f"""async () => {{
          const headers = {{ "Content-Type": "application/json", "Idempotency-Key": "once" }};
          const posted = await fetch("{server.url}/v1/deltas", {{ method: "POST", headers, body: '{DELTAS}' }});
          const {{ token }} = await posted.json();
          const read = await fetch("{server.url}/v1/views/evil?after=" + token, {{ headers: {{ Accept: "text/csv" }} }});
          return [await read.text(), read.headers.get("pipeline-staleness-ms") !== null];
        }}"""
        page.goto(f"http://friend.test:{site}/")
        assert page.evaluate(write) == ["value\r\n1\r\n", True]
        page.goto(f"http://evil.test:{site}/")
        with pytest.raises(Exception, match="Failed to fetch"):
            page.evaluate(write)
