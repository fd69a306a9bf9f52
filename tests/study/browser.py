"""A page in headless Chromium, looked at over its debugging pipe: how wide it is, what it says, what it asks for."""

import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_MEASURE = """JSON.stringify({
  page: document.documentElement.scrollWidth,
  window: window.innerWidth,
  outside: [...document.querySelectorAll("main *")].filter(
    e => !e.closest(".scroll") && !e.closest("svg") && e.getBoundingClientRect().right > window.innerWidth + 0.5
  ).map(e => e.outerHTML.slice(0, 80)),
  boxes: [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
})"""


@dataclass
class Look:
    """What a page is like at one width."""

    page: int
    window: int
    outside: list
    boxes: int
    complaints: list
    requests: list


class Browser:
    """A browser's end of the pipe."""

    def __init__(self, to_browser, from_browser):
        self._to, self._from = to_browser, from_browser
        self._buffer, self._number, self.events = b"", 0, []

    def call(self, method, session=None, **params):
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, method):
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._next())

    def _next(self):
        while b"\0" not in self._buffer:
            more = os.read(self._from, 1 << 16)
            assert more, "the browser has ended"
            self._buffer += more
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def look(self, url, width, *, opens_details=False):
        """Open a page at a width, and measure it."""
        self.events.clear()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.call("Page.navigate", session, url=url)
        self.wait_for("Page.loadEventFired")
        if opens_details:
            opened = "document.querySelectorAll('details').forEach(e => e.open = true)"
            self.call("Runtime.evaluate", session, expression=opened)
        found = self.call("Runtime.evaluate", session, expression=_MEASURE)["result"]["value"]
        wrong = {"Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled"}
        complaints = [event for event in self.events if event.get("method") in wrong]
        asked = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        self.call("Target.closeTarget", targetId=target)
        requests = [event["params"]["request"]["url"] for event in asked]
        return Look(**json.loads(found), complaints=complaints, requests=[each for each in requests if each != url])


@contextmanager
def browser(folder):
    """Start a browser, with everything that it writes in a folder."""
    (its_in, to_browser), (from_browser, its_out) = os.pipe(), os.pipe()
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--no-first-run", "--disable-background-networking", f"--user-data-dir={folder}"]
    command += ["--remote-debugging-pipe", "about:blank"]
    started = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{its_in} 4>&{its_out}', "bash", *command],
        pass_fds=(its_in, its_out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in), os.close(its_out)
    opened = Browser(to_browser, from_browser)
    try:
        yield opened
        opened.call("Browser.close")
    finally:
        os.close(to_browser), os.close(from_browser)
        try:
            started.wait(timeout=10)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
