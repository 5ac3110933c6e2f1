"""A real browser for tests: Debian's Chromium under Playwright, and axe-core, which finds what is hard to read."""

import functools
import json
import os
import shutil
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from laconic.cli.play import Quiet

TOP = Path(__file__).parents[1]
AXE = TOP / "playground" / "node_modules" / "axe-core" / "axe.min.js"
SHOTS = TOP / ".screenshots"  # kept, to be looked at
WIDTHS = {"wide": 1200, "phone": 375}


@contextmanager
def browser():
    """Chromium, or skip."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("Chromium is not installed (make browser)")
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


@contextmanager
def served(folder):
    """The address of a folder, as any server of static files shows it."""
    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()
        thread.join()


class Visit:
    """A page with everything it asked for and said."""

    def __init__(self, opened, width=1200, **options):
        self.page = opened.new_context(viewport={"width": width, "height": 900}, **options).new_page()
        self.requests, self.said = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))

    def outside(self, own):
        """Requests to other places than that of the page."""
        return [url for url in self.requests if not url.startswith((own, "data:", "blob:"))]

    def violations(self):
        """The rules of axe-core that the page breaks, or skip."""
        if not AXE.is_file():
            pytest.skip("axe-core is not installed (make playground/node_modules)")
        self.page.evaluate(AXE.read_text())
        found = self.page.evaluate("axe.run()")["violations"]
        return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]

    def shoot(self, name):
        SHOTS.mkdir(exist_ok=True)
        self.page.screenshot(path=SHOTS / f"{name}.png", full_page=True)

    def data(self, selector):
        return json.loads(self.page.text_content(selector))
