"""A real browser without a window: Chromium, driven by the DevTools protocol over a pipe, with nothing but Python's own
library."""

import base64
import json
import os
import subprocess
import tempfile

PHONE, DESKTOP = (390, 844, True), (1280, 800, False)


class Browser:
    """A browser with one page. Messages are JSON, each ended by a zero byte (--remote-debugging-pipe)."""

    def __init__(self, program):
        self.profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        browser_in, self.out = os.pipe()
        self.inn, browser_out = os.pipe()

        def descriptors():
            # Chromium reads from 3 and writes to 4. Copies first, so that neither is closed by the other.
            copies = os.dup(browser_in), os.dup(browser_out)
            os.dup2(copies[0], 3)
            os.dup2(copies[1], 4)

        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--lang=en-US",
                     "--no-first-run", f"--user-data-dir={self.profile.name}", "--remote-debugging-pipe", "about:blank"]
        self.process = subprocess.Popen([program, *arguments], preexec_fn=descriptors, close_fds=False,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(browser_in)
        os.close(browser_out)
        self.pending, self.number, self.session, self.mobile = b"", 0, None, False
        # What the page complained about.
        self.complaints = []
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def message(self):
        while b"\0" not in self.pending:
            read = os.read(self.inn, 1 << 16)
            if not read:
                raise SystemExit("the browser ended")
            self.pending += read
        message, self.pending = self.pending.split(b"\0", 1)
        return json.loads(message)

    def call(self, method, **parameters):
        self.number += 1
        request = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            request["sessionId"] = self.session
        os.write(self.out, json.dumps(request).encode() + b"\0")
        while True:
            message = self.message()
            if message.get("id") == self.number:
                if "error" in message:
                    raise SystemExit(f"{method}: {message['error']}")
                return message["result"]
            self.hear(message)

    def hear(self, message):
        if message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(message["params"]["exceptionDetails"])
        if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["level"] == "error":
            self.complaints.append(message["params"]["entry"])

    def evaluate(self, expression):
        """The value of an expression, awaited."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise SystemExit(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def until(self, condition):
        """Waits until a condition on the page holds, by watching the page change."""
        self.evaluate(f"""new Promise((done) => {{
            const look = () => ({condition}) && (observer.disconnect(), done(true));
            const observer = new MutationObserver(look);
            observer.observe(document, {{ subtree: true, childList: true, characterData: true, attributes: true }});
            look();
        }})""")

    def receive(self, bytes_per_sec):
        """Lets pages have no more than so many bytes a second of what servers send; None: as they come."""
        self.call("Network.enable")
        limits = dict(latency=0, downloadThroughput=bytes_per_sec or -1, uploadThroughput=-1)
        self.call("Network.emulateNetworkConditions", offline=False, **limits)

    def open(self, url):
        self.call("Page.navigate", url=url)
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def key(self, name, modifiers=0, text=None):
        """Presses a key: Enter, Escape, ArrowLeft, ArrowRight, a letter or a digit."""
        codes = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        place = name if name in codes else f"Digit{name}" if name.isdigit() else f"Key{name.upper()}"
        code = codes.get(name) or ord(name.upper())
        event = dict(key=name, code=place, windowsVirtualKeyCode=code, modifiers=modifiers)
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector, times=1):
        """Clicks on the middle of an element, with the mouse or, on a phone, a finger."""
        box = self.evaluate(f"""(() => {{
            const box = document.querySelector({json.dumps(selector)}).getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        if self.mobile:
            self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[dict(x=box[0], y=box[1])])
            self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        for count in range(1, times + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=count)

    def write(self, text):
        self.evaluate("document.getElementById('text').focus()")
        self.call("Input.insertText", text=text)

    def show_as(self, size, scheme):
        width, height, self.mobile = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=self.mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=self.mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def speak(self, language):
        """Has pages opened from now on find this language."""
        agent = self.evaluate("navigator.userAgent")
        self.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=language)

    def picture(self, directory, name):
        if directory:
            data = self.call("Page.captureScreenshot", format="png")["data"]
            (directory / f"{name}.png").write_bytes(base64.b64decode(data))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()
