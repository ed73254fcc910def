"""Talks with a server through its page, in a real browser without a window.

    chat_page.py CHROMIUM URL [PICTURES]

Sizes of a phone and of a desktop, light and dark, both languages. The model must read some 2,000 tokens. Prints what it
answered. Pictures go to the directory PICTURES.
"""

import json
import pathlib
import sys

from browser import DESKTOP, PHONE, Browser


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
    browser.receive(4000)  # or the answer might be there to its end before anything is pressed
    browser.key("Enter", text="\r")
    # Pressed in the page, in the moment in which there is something to stop.
    escape = "document.dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }))"
    browser.until(f"document.querySelectorAll('.assistant .text')[1]?.textContent && {escape}")
    browser.until("document.querySelectorAll('.assistant')[1].dataset.state !== 'streaming'")
    assert browser.evaluate("document.querySelectorAll('.assistant')[1].dataset.state") == "stopped"
    assert browser.evaluate("messages.length") == 4
    browser.receive(None)

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
