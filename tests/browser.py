"""A real browser."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest
from PIL import Image

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
TIMEOUT_S = 120


def chromium() -> str:
    """Debian's browser; `make test` leaves this test out, and says so, where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is not installed (apt-get install chromium): the report cannot be looked at")
    return path


def screenshot(html: str, folder: Path) -> np.ndarray:
    """uint8 [3000, 1200, 3]: what the browser paints."""
    (folder / "page.html").write_text(html, encoding="utf-8")
    command = [chromium(), *FLAGS, f"--user-data-dir={folder / 'profile'}"]
    command += ["--window-size=1200,3000", f"--screenshot={folder / 'page.png'}"]
    subprocess.run([*command, (folder / "page.html").as_uri()], check=True, capture_output=True, timeout=TIMEOUT_S)
    return np.asarray(Image.open(folder / "page.png").convert("RGB"))


class Browser:
    """A browser with one page (a file, or an address), driven by the DevTools protocol over a pipe: JSON messages that end with a zero byte.

    Attributes:
        problems: Errors and warnings in the page's console, uncaught exceptions, and refusals by its policy.
        requests: Addresses that the page has asked for, its own included.
    """

    def __init__(
        self, page: Path | str, profile: Path, width: int = 1200, height: int = 1000, dark: bool = False
    ) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._last_id = 0
        self._buffer = b""
        self._session: dict[str, str] = {}
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        command = [chromium(), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"]
        shell = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'  # the browser reads from 3 and writes to 4
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", *command, "--remote-debugging-pipe", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(info["targetId"] for info in targets if info["type"] == "page")
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": found["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.as_uri() if isinstance(page, Path) else page)
        self.wait_for("document.readyState === 'complete'")

    def __enter__(self) -> Browser:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(TIMEOUT_S)
        os.close(self._in)
        os.close(self._out)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Sends a command and returns its result; events that come before it are noted."""
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": params, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer.get("method"), answer.get("params", {}))

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser has ended"
            self._buffer += part
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)

    def _note(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(str(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(params["entry"]["text"])

    def value(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Waits until an expression in the page is true."""
        end = time.monotonic() + TIMEOUT_S
        while not self.value(script):
            assert time.monotonic() < end, f"never came true: {script}"
            time.sleep(0.05)

    def show(self, selector: str) -> None:
        """Scrolls an element to the middle of the window, and waits until its chart, if it is one, is drawn."""
        element = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        self.wait_for(
            f"!{element}.matches('.chart-area') || ({element}.dataset.drawn && {element}.querySelector('.main-svg'))"
        )

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element in the window."""
        box = self.value(f"JSON.stringify(document.querySelector({json.dumps(selector)}).getBoundingClientRect())")
        return tuple(json.loads(box)[key] for key in ("x", "y", "width", "height"))  # type: ignore[return-value]

    def move(self, x: float, y: float) -> None:
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Clicks on the middle of an element, as a hand would."""
        self.show(selector)
        x, y, width, height = self.box(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call(
                "Input.dispatchMouseEvent", type=kind, x=x + width / 2, y=y + height / 2, button="left", clickCount=1
            )

    def picture(self) -> Image.Image:
        """What the window shows."""
        return Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot")["data"])))
