"""A headless Chromium that tests drive over the DevTools protocol, through two pipes: no package is needed.

https://chromedevtools.github.io/devtools-protocol/; messages are JSON, each ended by a zero byte.
"""

import base64
import io
import json
import os
import re
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60    # until a browser that says nothing counts as dead
# the descriptors that the protocol wants: 3 to listen to and 4 to speak to
START = """import fcntl, os, sys
for fd, wanted in zip([fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]], (3, 4)):
    os.dup2(fd, wanted)
os.execv(sys.argv[3], sys.argv[3:])"""
KEYS = {"Enter": ("Enter", 13, "\r"), "Escape": ("Escape", 27, ""), "Tab": ("Tab", 9, ""), "ArrowRight": ("ArrowRight", 39, ""),
        "ArrowLeft": ("ArrowLeft", 37, ""), "/": ("Slash", 191, "/")}


class Browser:
    """One page. `events`: what the browser reported since the page was opened."""

    def __init__(self):
        self._home, self._number, self._session, self._rest, self.events = tempfile.mkdtemp(), 0, None, b"", []
        theirs, self._out = os.pipe()
        self._in, answers = os.pipe()
        command = [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
                   f"--user-data-dir={self._home}", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars"]
        self._process = subprocess.Popen([sys.executable, "-c", START, str(theirs), str(answers), *command],
                                         pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs)
        os.close(answers)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        os.write(self._out, json.dumps(message | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str) -> None:
        """Load a page and wait until it is there."""
        for each in ("about:blank", url):    # a new fragment alone would not load it anew
            self.events.clear()
            self.call("Page.navigate", url=each)
            while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
                self.events.append(self._read())

    def run(self, expression: str):
        """The value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str, wanted=True) -> None:
        """Wait for an expression to have a value."""
        deadline = time.monotonic() + SECONDS
        while (value := self.run(expression)) != wanted:
            assert time.monotonic() < deadline, f"{expression} is {value!r}, not {wanted!r}"
            time.sleep(0.02)

    def press(self, key: str) -> None:
        code, number, text = KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=code, windowsVirtualKeyCode=number,
                      **({"text": text} if text and kind == "keyDown" else {}))

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))).convert("RGB")

    def close(self) -> None:
        os.close(self._out)    # without its pipe the browser ends by itself
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        shutil.rmtree(self._home, ignore_errors=True)

    def _read(self) -> dict:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "the browser has ended, or says nothing"
            self._rest += part
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)


def columns_of(path: Path) -> dict:
    """What the script of a data set's report reads."""
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.S)[1])
