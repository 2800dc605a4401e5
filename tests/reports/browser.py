"""A headless Chromium, driven over the DevTools protocol by choreographer, as kaleido does."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import choreographer
from choreographer.browsers import Chromium

HEIGHT = 844
"""CSS pixels of the window."""

_READY = """new Promise(done => {
  const drawn = () => document.readyState === "complete"
    && [...document.querySelectorAll(".plotly-graph-div")].every(p => p.querySelector(".main-svg"));
  const look = () => drawn() || performance.now() > 20000
    ? requestAnimationFrame(() => done(drawn())) : setTimeout(look, 20);
  look();
})"""
"""Resolves when every plot has its drawing, or with false after twenty seconds."""


def installed() -> bool:
    """Whether there is a Chrome or Chromium."""
    return Chromium.find_browser(skip_local=False) is not None


class Browser:
    """One tab; whatever a page says or asks for is written down.

    Attributes:
        complaints: console errors and warnings, exceptions, failed loads.
        requests: addresses asked for, the page itself included.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, tab: Any) -> None:
        self._loop, self._tab = loop, tab
        self.complaints: list[str] = []
        self.requests: list[str] = []
        for event, kept in (
            ("Runtime.consoleAPICalled", self._console),
            ("Runtime.exceptionThrown", self._exception),
            ("Log.entryAdded", self._log),
            ("Network.requestWillBeSent", self._request),
            ("Network.webSocketCreated", self._socket),
        ):
            tab.get_session().subscribe(event, kept)
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.command(f"{domain}.enable")

    def command(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one DevTools command and wait for its result."""
        answer = self._wait(self._tab.send_command(method, parameters or None))
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def show(self, page: Path, *, scheme: str = "light", width: int = 1280) -> None:
        """Load a page in a colour scheme and a width (pixels), until its plots are drawn."""
        self.complaints.clear()
        self.requests.clear()
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.command("Emulation.setEmulatedMedia", media="", features=[feature])
        self.command(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=HEIGHT,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        self._wait(self._load(page.as_uri()))
        assert self.evaluate(_READY), "a plot was not drawn"

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        answer = self.command(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def screenshot(self, path: Path, *, whole: bool = True) -> None:
        """The page as PNG: all of it, or what the window shows."""
        shot = self.command("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def pdf(self, path: Path) -> None:
        """The page on paper (A4)."""
        printed = self.command("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        path.write_bytes(base64.b64decode(printed["data"]))

    async def _load(self, address: str) -> None:
        loaded = self._tab.get_session().subscribe_once("Page.loadEventFired")
        await self._tab.send_command("Page.navigate", {"url": address})
        await asyncio.wait_for(loaded, 30)

    def _wait(self, task: Coroutine[Any, Any, Any]) -> Any:
        return self._loop.run_until_complete(task)

    async def _console(self, event: Any) -> None:
        if event["params"]["type"] in ("error", "warning", "assert"):
            said = [str(a.get("value", a.get("description"))) for a in event["params"]["args"]]
            self.complaints.append(" ".join(said))

    async def _exception(self, event: Any) -> None:
        self.complaints.append(str(event["params"]["exceptionDetails"]))

    async def _log(self, event: Any) -> None:
        entry = event["params"]["entry"]
        slow_drawing = entry["level"] == "warning" and "GPU stall" in entry["text"]
        if entry["level"] in ("error", "warning") and not slow_drawing:
            self.complaints.append(f"{entry['text']} {entry.get('url', '')}")

    async def _request(self, event: Any) -> None:
        self.requests.append(event["params"]["request"]["url"])

    async def _socket(self, event: Any) -> None:
        self.requests.append(event["params"]["url"])


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start Chromium, and close it again."""
    loop = asyncio.new_event_loop()
    chrome = choreographer.Browser(headless=True, enable_sandbox=False)
    loop.run_until_complete(chrome.open())
    try:
        tab = loop.run_until_complete(chrome.create_tab("about:blank"))
        yield Browser(loop, tab)
    finally:
        loop.run_until_complete(chrome.close())
        loop.close()
