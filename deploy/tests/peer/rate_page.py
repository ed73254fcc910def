"""Judges pairs of answers on the page of a server, in a real browser without a window.

    rate_page.py CHROMIUM URL begin|go-on|write [PICTURES]

begin     judges some of five prompts as the rater with the token "sesame", by mouse and keys, on a desktop, in English
go-on     judges the rest, on a phone, in Chinese
write     writes prompts, and judges what comes of them

Prints what was done, in its order: judgements as they were shown and chosen, and what was taken back; of `write` the
prompts. Pictures go to the directory PICTURES.
"""

import json
import pathlib
import sys

from browser import DESKTOP, PHONE, Browser

READY = "!busy && state"


def main():
    program, url, what, *rest = sys.argv[1:]
    pictures = pathlib.Path(rest[0]) if rest else None
    browser = Browser(program)
    try:
        print(json.dumps({"begin": begin, "go-on": go_on, "write": write}[what](browser, url, pictures)))
    finally:
        browser.close()
    # Refusals that were asked for are lines in the browser's log, too.
    complaints = [complaint for complaint in browser.complaints if complaint.get("source") != "network"]
    assert not complaints, complaints


class Rater:
    """Judges, and remembers what was shown."""

    def __init__(self, browser):
        self.browser, self.done = browser, []

    def shown(self):
        """The pair on the page, as a person sees it."""
        self.browser.until(f"{READY} && !pairShown.hidden")
        return self.browser.evaluate("""({
            id: state.pair.id,
            prompt: [...document.querySelectorAll('.turn')].map((turn) => ({ role: turn.classList[1], content: turn.lastChild.data })),
            answers: [...document.querySelectorAll('.answer .text')].map((text) => text.textContent),
        })""")

    def judge(self, choice, act):
        pair = self.shown()
        before = self.browser.evaluate("state.judged")
        act()
        self.browser.until(f"{READY} && state.judged === {before + 1}")
        assert self.browser.evaluate("element('said').textContent") != ""
        self.done.append({**pair, "choice": choice})

    def undo(self, act):
        last, before = self.browser.evaluate("state.last.id"), self.browser.evaluate("state.judged")
        act()
        self.browser.until(f"{READY} && state.judged === {before - 1}")
        self.done.append({"undo": last})


def pictures_of(browser, pictures, name, size):
    for scheme in ("light", "dark"):
        browser.show_as(size, scheme)
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), f"{name}: it is too wide"
        browser.picture(pictures, f"{name}-{scheme}")


def begin(browser, url, pictures):
    browser.show_as(DESKTOP, "light")
    # Without a token, or with a wrong one, the page says so.
    for link in ("", "/?token=sesam"):
        browser.open(url + link)
        browser.until("!notice.hidden")
        assert "not valid" in browser.evaluate("notice.textContent"), browser.evaluate("notice.textContent")
    browser.picture(pictures, "refused-desktop-light")
    browser.open(url + "/?token=sesame")
    rater = Rater(browser)
    first = rater.shown()
    assert browser.evaluate("element('rater').textContent") == "ann"
    assert browser.evaluate("element('count').textContent") == "0 of 5 judged"
    pictures_of(browser, pictures, "pair-desktop", DESKTOP)
    browser.show_as(DESKTOP, "light")
    # Beside each other.
    left, right = browser.evaluate("[...document.querySelectorAll('.answer')].map((answer) => answer.offsetTop)")
    assert left == right
    # Keys that mean something else do nothing.
    browser.key("1", modifiers=2)
    browser.key("x")
    assert browser.evaluate("state.judged") == 0 and rater.shown() == first

    # A double click judges one pair.
    rater.judge("second", lambda: browser.click("[data-choice=second]", times=2))
    rater.judge("first", lambda: browser.key("ArrowLeft"))
    rater.undo(lambda: browser.key("u", text="u"))
    again = rater.shown()
    assert again["answers"] == rater.done[1]["answers"] and again["id"] == rater.done[1]["id"] + "-2"
    rater.judge("both_bad", lambda: browser.key("b", text="b"))
    rater.undo(lambda: browser.click("#undo"))
    rater.judge("tie", lambda: browser.key("0", text="0"))
    # Nothing of a text becomes part of the page.
    assert browser.evaluate("document.querySelectorAll('#pair img, #pair b').length") == 0
    return rater.done


def go_on(browser, url, pictures):
    browser.speak("zh-CN")
    browser.show_as(PHONE, "light")
    browser.open(url + "/?token=sesame")
    rater = Rater(browser)
    rater.shown()
    assert browser.evaluate("document.documentElement.lang") == "zh-CN"
    assert browser.evaluate("element('count').textContent") == "已评判 2 / 5 组"
    pictures_of(browser, pictures, "pair-phone", PHONE)
    first, second = browser.evaluate("[...document.querySelectorAll('.answer')].map((answer) => answer.offsetTop)")
    assert first < second, "below each other"
    heights = browser.evaluate("[...buttons, element('undo')].map((button) => button.getBoundingClientRect().height)")
    assert min(heights) >= 44, heights
    rater.judge("first", lambda: browser.click("[data-choice=first]"))
    # An input method that keeps a key's name to itself.
    process = "new KeyboardEvent('keydown', { key: 'Process', code: 'KeyT', keyCode: 229, bubbles: true })"
    rater.judge("tie", lambda: browser.evaluate(f"document.body.dispatchEvent({process})"))
    # Another tab judges the pair that is here, another way.
    browser.evaluate("""fetch('api/judgements', { method: 'POST', body: JSON.stringify({ id: state.pair.id, choice: 'second' }),
        headers: { 'content-type': 'application/json', authorization: `Bearer ${token}` } })""")
    pair = rater.shown()
    rater.done.append({**pair, "choice": "second"})
    browser.click("[data-choice=both_bad]")
    browser.until(f"{READY} && !notice.hidden")
    assert "另一个标签页" in browser.evaluate("element('problem').textContent")
    assert browser.evaluate("state.judged") == 5
    browser.picture(pictures, "finished-phone-dark")
    assert not browser.evaluate("element('finished').hidden") and browser.evaluate("pairShown.hidden")
    browser.click("#language")
    assert browser.evaluate("element('count').textContent") == "5 of 5 judged"
    return rater.done


def write(browser, url, pictures):
    browser.speak("zh-CN")
    browser.show_as(DESKTOP, "dark")
    browser.open(url)
    rater = Rater(browser)
    browser.until(f"{READY} && !element('composer').hidden")
    browser.picture(pictures, "write-desktop-dark")
    # Digits and letters in what is written judge nothing, nor does Enter that chooses a word.
    browser.write("1是什么? tub")
    composing = "new KeyboardEvent('keydown', { key: 'Enter', keyCode: 229, isComposing: true, bubbles: true })"
    browser.evaluate(f"text.dispatchEvent({composing})")
    browser.key("b", text="b")
    assert browser.evaluate("[text.value, state.judged, busy]") == ["1是什么? tubb", 0, False]
    browser.key("Enter", text="\r")
    rater.judge("first", lambda: browser.key("1", text="1"))
    browser.until(f"{READY} && !element('composer').hidden")
    # What was asked is here to be asked again, or written over.
    assert browser.evaluate("[document.activeElement === text, text.value]") == [True, "1是什么? tubb"]
    browser.key("Enter", text="\r")
    rater.judge("second", lambda: browser.key("ArrowRight"))
    return [judgement["prompt"][0]["content"] for judgement in rater.done]


main()
