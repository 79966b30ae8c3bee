"""Headless Chromium, driven through chromedriver: open a page, and see what a reader would see.

This speaks the WebDriver protocol (https://www.w3.org/TR/webdriver2/), which is JSON over HTTP.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.launching import free_port
from tests.support.waiting import wait_until

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


class Browser:
    """A session of Chromium."""

    def __init__(self, url: str, profile: Path) -> None:
        self._url = url
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._post("session", {"capabilities": {"alwaysMatch": capabilities}})
        self._url = f"{url}/session/{session['sessionId']}"

    def open(self, page: Path, *, width: int, dark: bool = False, media: str = "screen") -> None:
        """Open a file in a window of `width` CSS pixels."""
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.command("Emulation.setEmulatedMedia", media=media, features=[feature])
        self._post("url", {"url": page.resolve().as_uri()})

    def command(self, name: str, **parameters: Any) -> Any:
        """Send a command of the Chrome DevTools protocol."""
        return self._post("goog/cdp/execute", {"cmd": name, "params": parameters})

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        return self._post("execute/sync", {"script": f"return {script}", "args": []})

    def messages(self) -> list[str]:
        """Return the messages of the page's console since the last call, which include blocked and failed requests."""
        return [entry["message"] for entry in self._post("se/log", {"type": "browser"})]

    def screenshot(self, file: Path) -> None:
        """Write an image of the whole page."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        urllib.request.urlopen(urllib.request.Request(self._url, method="DELETE"), timeout=30).close()

    def _post(self, path: str, content: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self._url}/{path}", json.dumps(content).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]


@contextmanager
def open_browser(folder: Path) -> Iterator[Browser]:
    """Start Chromium with a new profile in `folder`; skip the test if it is not installed, or fail if CI=true."""
    driver = shutil.which("chromedriver")
    if driver is None:
        message = "chromedriver is missing: apt-get install chromium-driver"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(message)
    port = free_port()
    with (folder / "chromedriver.log").open("w") as log:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: _ready(url), "chromedriver")
        browser = Browser(url, folder / "profile")
        try:
            yield browser
        finally:
            browser.close()
    finally:
        process.terminate()
        process.wait()


def _ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/status", timeout=5) as answer:
            return bool(json.loads(answer.read())["value"]["ready"])
    except OSError:
        return False
