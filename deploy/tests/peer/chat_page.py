"""Talks with a server through its page, in a real browser without a window.

    chat_page.py CHROMIUM URL [PICTURES]

Drives Chromium by the DevTools protocol over a pipe, with nothing but Python's own library: sizes of a phone and of a
desktop, light and dark, both languages. The model must read some 2,000 tokens. Prints what it answered. Pictures go to the
directory PICTURES.
"""

import base64
import json
import os
import pathlib
import subprocess
import sys
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
        self.pending, self.number, self.session = b"", 0, None
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

    def open(self, url):
        self.call("Page.navigate", url=url)
        while self.message().get("method") != "Page.loadEventFired":
            pass

    def key(self, name, modifiers=0, text=None):
        code = {"Enter": 13, "Escape": 27}[name]
        event = dict(key=name, code=name, windowsVirtualKeyCode=code, modifiers=modifiers)
        self.call("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text):
        self.evaluate("document.getElementById('text').focus()")
        self.call("Input.insertText", text=text)

    def show_as(self, size, scheme):
        width, height, mobile = size
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=mobile)
        self.call("Emulation.setTouchEmulationEnabled", enabled=mobile)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, directory, name):
        if directory:
            data = self.call("Page.captureScreenshot", format="png")["data"]
            (directory / f"{name}.png").write_bytes(base64.b64decode(data))

    def close(self):
        self.process.kill()
        self.process.wait()
        self.profile.cleanup()


def main():
    program, url, *rest = sys.argv[1:]
    pictures = pathlib.Path(rest[0]) if rest else None
    browser = Browser(program)
    try:
        print(json.dumps(talk(browser, url, pictures)))
    finally:
        browser.close()


def talk(browser, url, pictures):
    browser.show_as(DESKTOP, "light")
    browser.open(url)
    browser.until("document.getElementById('model').textContent !== 'Lockstep'")
    browser.picture(pictures, "welcome-desktop-light")

    # Shift+Enter begins a line; Enter sends.
    browser.write("Who is there?")
    browser.key("Enter", modifiers=8, text="\r")
    assert browser.evaluate("text.value") == "Who is there?\n", browser.evaluate("text.value")
    browser.evaluate("element('temperature').value = 1; element('max-tokens').value = 60")
    browser.key("Enter", text="\r")
    browser.until("document.querySelector('.assistant')?.dataset.state === 'done'")
    answer = browser.evaluate("document.querySelector('.assistant .text').textContent")
    assert browser.evaluate("document.querySelector('.user .text').textContent") == "Who is there?"

    # Escape stops an answer; what came of it stays, and the conversation goes on.
    browser.evaluate("element('max-tokens').value = 1500")
    browser.write("And then?")
    browser.key("Enter", text="\r")
    # Pressed in the page, in the moment in which there is something to stop.
    escape = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))"
    browser.until(f"document.querySelectorAll('.assistant .text')[1]?.textContent && {escape}")
    browser.until("document.querySelectorAll('.assistant')[1].dataset.state !== 'streaming'")
    assert browser.evaluate("document.querySelectorAll('.assistant')[1].dataset.state") == "stopped"
    assert browser.evaluate("messages.length") == 4

    # What is no request is said, and what was written is not lost.
    browser.evaluate("element('max-tokens').value = 1000000")
    browser.write("Too much?")
    browser.key("Enter", text="\r")
    browser.until("!notice.hidden")
    assert "1000000" in browser.evaluate("notice.textContent")
    assert browser.evaluate("text.value") == "Too much?" and browser.evaluate("messages.length") == 4
    browser.evaluate("complain(null); text.value = ''; fit(); element('max-tokens').value = 60")

    for size, shape in ((DESKTOP, "desktop"), (PHONE, "phone")):
        for scheme in ("light", "dark"):
            browser.show_as(size, scheme)
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{shape}: it is too wide"
            browser.picture(pictures, f"talk-{shape}-{scheme}")
    browser.evaluate("element('language').click()")
    assert browser.evaluate("document.documentElement.lang") == "zh-CN"
    browser.evaluate("element('open-settings').click()")
    browser.picture(pictures, "settings-phone-dark")
    browser.evaluate("settings.querySelector('.primary').click()")
    assert not browser.evaluate("settings.open"), "the button closes the settings"
    browser.evaluate("element('reset').click()")
    assert browser.evaluate("turns.children.length + messages.length") == 0
    browser.show_as(DESKTOP, "dark")
    browser.picture(pictures, "welcome-desktop-dark")

    # The request that was refused above is a line in the browser's log, too.
    complaints = [complaint for complaint in browser.complaints if complaint.get("source") != "network"]
    assert not complaints, complaints
    return answer


main()
