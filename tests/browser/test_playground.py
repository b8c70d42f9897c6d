"""The Playground in a browser: the base and a mix side by side, weights that act at once, several turns, and Stop."""

import re

import pytest
from playwright.sync_api import expect

from tests.browser import made
from tests.browser.conftest import unfold
from tests.browser.test_pages import HOSTILE

pytestmark = pytest.mark.browser
ASK = "What color is the fox?"


@pytest.fixture(scope="module")
def shelf(server):
    """Adapters in the server's library: their ids by name."""
    found = {"pirate": made.adapter(server.home, "pirate", seed=1, size=0.5), "capitals": made.adapter(server.home, "capitals", seed=2, size=0.5)}
    found["loud"] = made.adapter(server.home, "loud", seed=5, size=1.0)
    return {**found, "hostile": made.adapter(server.home, HOSTILE[:80], seed=4, size=0.3)}


def playground(open_page, *names, path="/?tab=playground"):
    page = open_page(path)
    expect(page.locator("#send")).to_be_visible()
    box = page.locator("#mix-playground input").first
    for name in names:
        box.click()
        page.get_by_role("option", name=name).first.click()
        expect(page.locator("#mix-playground").get_by_role("slider", name=f"range slider for {name}")).to_be_visible()
    page.keyboard.press("Escape")
    if names:
        expect(page.locator("#playground-sides")).to_contain_text("All together")
    return page


def ask(page, text=ASK, turns=1):
    page.locator("#prompt textarea").fill(text)
    page.locator("#prompt textarea").press("Enter")
    settled(page, turns)


def settled(page, turns=1):
    expect(page.locator("#answers article")).to_have_count(turns, timeout=90_000)
    expect(page.locator("#answers .talk")).to_have_attribute("aria-busy", "false", timeout=90_000)


def said(page, side, turn=-1):
    return page.locator("#answers article").nth(turn).locator(f"section[data-side='{side}'] .text").inner_text()


def foot(page, side, turn=-1):
    return page.locator("#answers article").nth(turn).locator(f"section[data-side='{side}'] footer")


def loads(server) -> int:
    with made.at(server.home) as bench:
        return bench.status()["loads"]


def sides(page):
    """Where the base's and the mix's answer lie, both at one moment: the page may be scrolling."""
    return page.evaluate("""() => ['base', 'all'].map(side => {
        const {x, y, width, height} = document.querySelector(`section[data-side='${side}']`).getBoundingClientRect()
        return {x, y, width, height} })""")


def test_base_and_mix_side_by_side_and_weights_act_without_loading_again(shelf, server, open_page):
    page = playground(open_page, "pirate", "capitals")
    expect(page.locator("#bench-state")).to_contain_text(re.compile("The bench (is off; the first answer starts it|holds)"))
    ask(page)
    expect(foot(page, "base")).to_contain_text("all adapters off")
    expect(foot(page, "all")).to_contain_text("pirate × 1, capitals × 1")
    bare, mixed = said(page, "base"), said(page, "all")
    assert bare and mixed != bare
    boxes = sides(page)
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] + boxes[0]["width"] <= boxes[1]["x"]
    before = loads(server)

    # Both weights to 0, one by keys and one by its number box: the mix is the base, and the page says what the bench reports.
    slide = page.locator("#mix-playground").get_by_role("slider", name="range slider for pirate")
    slide.focus()
    for _ in range(100):
        page.keyboard.press("ArrowLeft")
    page.locator("#mix-playground").get_by_role("spinbutton", name="number input for capitals").fill("0")
    expect(page.locator("#mix-playground").get_by_role("spinbutton", name="number input for pirate")).to_have_value("0")
    page.locator("#clear").click()
    expect(page.locator("#answers article")).to_have_count(0)
    ask(page)
    assert said(page, "all") == said(page, "base") == bare
    expect(foot(page, "all")).to_contain_text("all adapters off")
    assert loads(server) == before == 1
    print("\n" + page.locator("#bench-state").inner_text().replace("\n", " "))
    expect(page.locator("#bench-state")).to_contain_text(re.compile(r"The bench holds demo-text on cpu, with \d adapters? at hand."))
    assert re.search(r"Weights applied in [\d.]+ ms, first word after \d+ ms\.", page.locator("#bench-state").inner_text())


def test_a_conversation_of_two_turns_stands_and_goes_on(shelf, open_page):
    page = playground(open_page, "pirate")
    ask(page)
    first = said(page, "base")
    expect(page.locator("#prompt textarea")).to_have_value("")
    ask(page, "Where is the bear?", turns=2)
    assert said(page, "base", 0) == first and said(page, "base", 1) and page.locator("#answers .prompt").all_inner_texts() == [ASK, "Where is the bear?"]
    box = page.locator("#prompt textarea")
    box.fill("one")
    box.press("Shift+Enter")
    box.press_sequentially("two")
    expect(box).to_have_value("one\ntwo")
    page.get_by_role("button", name="Save this mix as a blend").click()
    expect(page.get_by_role("tab", name="Blend")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#mix-blend")).to_contain_text("pirate")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 4.", timeout=90_000)


def test_stop_ends_a_long_answer_and_keeps_what_was_said(shelf, open_page):
    page = playground(open_page, "loud", "pirate", "capitals")
    page.locator("#mix-playground").get_by_role("spinbutton", name="number input for loud").fill("2")
    unfold(page.get_by_text("How answers are drawn"))
    page.get_by_label("Longest answer").fill("480")
    page.get_by_label("Longest answer").press("Tab")
    sides = page.locator("#playground-sides input").first
    for name in ("loud alone", "pirate alone"):
        sides.click()
        page.get_by_role("option", name=name).click()
    page.keyboard.press("Escape")
    page.locator("#prompt textarea").fill("Hello?")
    page.locator("#send").click()
    expect(page.locator("section[data-side=all] .text")).to_have_text(re.compile("."), timeout=90_000)
    page.locator("#stop-answer").click(force=True)
    settled(page)
    ended = foot(page, "all").inner_text()
    assert said(page, "all")
    assert page.locator("#answers section").count() == 4
    assert ended == "stopped" or "tokens" in ended  # a machine fast enough may have said all of it
    print(f"\nafter Stop: {len(said(page, 'all'))} letters, {ended}")
    ask(page, ASK, turns=2)
    expect(foot(page, "base")).to_contain_text("all adapters off")


def test_a_tuned_prompt_stands_beside_the_base_and_half_of_it_is_a_sentence(shelf, server, open_page):
    made.tuned_prompt(server.home, "whisper", seed=9)
    page = playground(open_page, "whisper")
    ask(page)
    assert said(page, "base") != said(page, "all") and said(page, "all")
    page.get_by_role("slider", name="range slider for whisper").fill("0.5")
    page.locator("#prompt textarea").fill(ASK)
    page.locator("#prompt textarea").press("Enter")
    expect(page.locator("#playground-sentences")).to_contain_text("whisper is a tuned prompt, which stands before the input or does not: 0.5 is no weight for it. Give it 1, or 0.", timeout=60_000)
    expect(page.locator("#prompt textarea")).to_have_value(ASK)


def test_what_cannot_be_answered_is_a_sentence_and_nothing_is_lost(shelf, open_page):
    page = playground(open_page, "pirate")
    ask(page)
    base = page.locator("#playground-base input").first
    base.fill("nowhere")
    base.press("Enter")
    page.locator("#prompt textarea").fill("And now?")
    page.locator("#prompt textarea").press("Enter")
    expect(page.locator("#playground-sentences")).to_contain_text("nowhere", timeout=60_000)
    expect(page.locator("#prompt textarea")).to_have_value("And now?")
    expect(page.locator("#answers article")).to_have_count(1)
    base.fill("demo-text")
    base.press("Enter")
    page.locator("#send").click()
    settled(page, 2)
    expect(page.locator("#playground-sentences")).not_to_contain_text("nowhere")


def test_no_script_of_a_stranger_runs(shelf, open_page):
    page = playground(open_page)
    box = page.locator("#mix-playground input").first
    box.fill(shelf["hostile"])
    box.press("Enter")
    expect(page.locator("#playground-sides")).to_contain_text("All together")
    ask(page, HOSTILE)
    expect(page.locator("#answers .prompt")).to_contain_text("<img src=x")
    expect(foot(page, "all")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None and not page.evaluate("document.body.classList.contains('http:')")
    assert page.locator("#answers img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out_and_a_phone_stacks_the_sides(shelf, open_page, scheme):
    page = playground(open_page, "pirate", path=f"/?tab=playground&__theme={scheme}")
    page.set_viewport_size({"width": 390, "height": 844})
    ask(page, "x" * 300)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    boxes = sides(page)
    assert boxes[0]["x"] == boxes[1]["x"] and boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]
