"""Chromium without a window, driven as a user does it: by the DevTools protocol, through pipes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = (
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio",
    "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """The other end of Chromium's pipes: JSON with a zero byte behind it."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._sent = 0
        self._received = b""

    def call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._sent:
            pass  # an event
        assert "result" in answer, answer
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._received:
            some = os.read(self._answers, 65536)
            assert some, "Chromium has ended"
            self._received += some
        text, _, self._received = self._received.partition(b"\0")
        return json.loads(text)

    def open(self, file: Path, width: int = 900, height: int = 1400, dark: bool = False) -> Page:
        """A page of this file, once it is loaded."""
        assert file.is_file()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        page = Page(self, self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"])
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.call("Page.navigate", url=file.resolve().as_uri())
        page.wait("location.protocol === 'file:' && document.readyState === 'complete'")
        return page


class Page:
    """A page that is open."""

    def __init__(self, browser: Browser, session: str):
        self._browser, self._session = browser, session

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **params)

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript is in this page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until this expression is true."""
        while not self.value(condition):
            time.sleep(0.02)  # the page needs the processor

    def click(self, selector: str) -> None:
        """Press and release the mouse in the middle of what this selects."""
        x, y = self.value(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({ block: 'center' });"
            "const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Click there and type this in place of what is there."""
        self.click(selector)
        self.value(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({json.dumps(selector)}).innerText")

    def texts(self, selector: str) -> list[str]:
        """The text of each element that this selects."""
        return self.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")

    def picture(self, file: Path) -> None:
        """Save what the whole page looks like."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A new Chromium, with a profile in this empty folder."""
    their_commands, commands = os.pipe()
    answers, their_answers = os.pipe()
    # Chromium reads from file descriptor 3 and writes to 4.
    command = " ".join([*CHROMIUM, '--user-data-dir="$0"', f"3<&{their_commands} 4>&{their_answers}"])
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}", str(profile)],
        pass_fds=(their_commands, their_answers),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(their_commands)
    os.close(their_answers)
    browser = Browser(commands, answers)
    try:
        yield browser
        browser.call("Browser.close")
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(commands)
        os.close(answers)
