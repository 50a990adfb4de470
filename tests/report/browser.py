"""Headless Chromium for tests, driven over a pipe by its DevTools protocol: no port, no package.

Everything a page says is kept: requests, console messages, uncaught errors.
https://chromedevtools.github.io/devtools-protocol/
"""

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PROGRAM = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), "chromium")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--force-device-scale-factor=1", "--window-size=1280,2400", "--remote-debugging-pipe",
)  # fmt: skip


class Page:
    """One page. `requests`: addresses it asked for. `errors`: what its console called an error."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads from 3 and writes to 4: high numbers, so that one is not closed for the
        # other.
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (to_browser, from_browser)]
        line = f'exec "$0" "$@" 3<&{ends[0]} 4>&{ends[1]}'
        flags = [*FLAGS, f"--user-data-dir={profile}", "about:blank"]
        with open(profile.with_suffix(".log"), "wb") as log:
            self._browser = subprocess.Popen(
                ["bash", "-c", line, PROGRAM, *flags], pass_fds=ends, stdout=log, stderr=log
            )
        for fd in (to_browser, from_browser, *ends):
            os.close(fd)
        self._numbers, self._buffer = itertools.count(1), b""
        self._session: str | None = None
        self.requests: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> "Page":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)  # the browser ends when its pipe does
        try:
            self._browser.wait(10)
        except subprocess.TimeoutExpired:
            self._browser.kill()
            self._browser.wait()
        os.close(self._read)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A method of the protocol; returns its result, RuntimeError where it has none."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def _next(self, seconds: float = 60) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], seconds)[0]:
                raise TimeoutError(f"chromium said nothing for {seconds} s")
            read = os.read(self._read, 2**20)
            if not read:
                raise RuntimeError(f"chromium ended with {self._browser.wait()}")
            self._buffer += read
        line, self._buffer = self._buffer.split(b"\0", 1)
        message = json.loads(line)
        self._keep(message.get("method"), message.get("params", {}))
        return message

    def _keep(self, event: str | None, params: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(params["exceptionDetails"]))
        elif event == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning"):
            self.errors.append(json.dumps(params["args"]))
        elif event == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(json.dumps(params["entry"]))

    def js(self, expression: str) -> Any:
        """The value of an expression; a promise is waited for. RuntimeError where it throws."""
        done = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in done:
            raise RuntimeError(f"{expression}: {done['exceptionDetails']}")
        return done["result"].get("value")

    def open(self, path: Path, *, ready: str, seconds: float = 60) -> None:
        """Load a file and wait until the expression `ready` is true."""
        self.call("Page.navigate", url=path.absolute().as_uri())
        self.wait(ready, seconds)

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Until the expression is true; TimeoutError with what the console said."""
        end = time.monotonic() + seconds
        while not self.js(f"!!({condition})"):  # an element itself would come back as {}
            if time.monotonic() > end:
                raise TimeoutError(f"{condition} is not true after {seconds} s; {self.errors}")
            time.sleep(0.05)

    def hover(self, x: float, y: float) -> None:
        """Move the mouse, as a hand does: not from nowhere, but from a pixel beside."""
        for at in (x - 1, x):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=at, y=y)
