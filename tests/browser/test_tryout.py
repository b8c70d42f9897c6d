"""The try-out in a browser: the mix answers before it is saved, follows the sliders, stands beside its parents, and is what is saved."""

import re

import pytest
from playwright.sync_api import expect

from lora_studio import library
from lora_studio.home import demo_base
from lora_studio.workspace import Workspace
from tests import tiny_image
from tests.browser import made
from tests.browser.test_blend_page import blend_page, choose, slider

pytestmark = pytest.mark.browser
ASK = "What color is the fox?"


@pytest.fixture(scope="module")
def shelf(server):
    """Adapters in the server's library: their ids by name."""
    return {"pirate": made.adapter(server.home, "pirate", seed=1, rank=3, size=0.5), "capitals": made.adapter(server.home, "capitals", seed=2, rank=5, size=0.5)}


def box(page, name):
    return page.locator(f"#{name}").locator("input, textarea").first


def ask(page, sentence="This was the exact mix"):
    box(page, "tryout-prompt").fill(ASK)
    expect(page.locator("#tryout-prompt textarea")).to_have_value(ASK)
    box(page, "tryout-prompt").press("Enter")
    settled(page, sentence)


def settled(page, sentence):
    expect(page.locator("#tryout-sentences")).to_contain_text(sentence, timeout=90_000)
    expect(page.locator("#tryout-answers .talk")).to_have_attribute("aria-busy", "false", timeout=90_000)


def said(page, side, place="#tryout-answers"):
    return page.locator(f"{place} section[data-side='{side}'] .text").last.inner_text()


def foot(page, side):
    return page.locator(f"#tryout-answers section[data-side='{side}'] footer")


def choose_against(page, name):
    box(page, "tryout-against").click()
    page.get_by_role("option", name=name, exact=True).click()


def test_a_slider_changes_the_answer_a_parent_stands_beside_it_and_what_is_saved_answers_the_same(shelf, server, open_page):
    page = blend_page(open_page, "pirate", "capitals")
    expect(page.locator("#blend-figures")).to_contain_text("Saved like this it has rank 8, exact, and about 0.16 MB.", timeout=90_000)
    ask(page)
    expect(foot(page, "mix")).to_contain_text("pirate × 1, capitals × 1")
    expect(foot(page, "base")).to_contain_text("all adapters off")
    first, bare = said(page, "mix"), said(page, "base")
    assert first and first != bare

    # A move of a slider makes the answer stale, and says so; with the wish to follow it is answered anew.
    slider(page, "pirate").focus()
    for _ in range(50):
        page.keyboard.press("ArrowLeft")
    expect(page.locator("#tryout-sentences")).to_contain_text("has changed since")
    assert said(page, "mix") == first
    page.locator("#tryout-live input").check()
    expect(foot(page, "mix")).to_contain_text("pirate × 0.5, capitals × 1")
    settled(page, "This was the exact mix")
    half = said(page, "mix")
    assert half != first and said(page, "base") == bare
    number = page.get_by_role("spinbutton", name="number input for capitals")
    number.fill("-0.5")
    expect(foot(page, "mix")).to_contain_text("pirate × 0.5, capitals × -0.5")
    settled(page, "This was the exact mix")
    exact = said(page, "mix")

    # Beside a parent, which answers alone and by its own.
    choose_against(page, "pirate alone")
    expect(foot(page, shelf["pirate"])).to_contain_text("pirate × 1")
    settled(page, "This was the exact mix")
    own, again = said(page, shelf["pirate"]), said(page, "mix")
    assert again == exact and own not in (exact, bare)

    # Compressed: the numbers that are saved, at that rank.
    box(page, "blend-rank").fill("2")
    settled(page, "This was the mix at rank 2, true error")
    expect(foot(page, "mix")).to_contain_text("the mix at rank 2 × 1")
    small = said(page, "mix")
    told = re.search(r"true error ([\d.]+) %", page.locator("#tryout-sentences").inner_text()).group(1)
    box(page, "blend-name").fill("small")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-sentences")).to_contain_text(f"small is in the library: rank 2, compressed to rank 2, true error {told} %")
    box(page, "blend-rank").fill("")
    expect(foot(page, "mix")).to_contain_text("pirate × 0.5, capitals × -0.5")
    settled(page, "This was the exact mix")
    assert said(page, "mix") == exact
    box(page, "blend-name").fill("both")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-sentences")).to_contain_text("both is in the library: rank 8, exact")

    # What was saved answers in the Playground as the try-out did; so do the parent and the base.
    page.locator("#blend-talk").click()
    for name, answer in (("both", exact), ("small", small), ("pirate", own)):
        page.goto(f"{server.url}/?tab=library&adapter={library.card(Workspace(server.home), name)['id']}")
        page.locator("#adapter").get_by_role("button", name="Talk to it").click()
        expect(page.locator("#playground-sides")).to_contain_text("All together")
        expect(page.locator("#mix-playground")).to_contain_text(name)
        box(page, "prompt").fill(ASK)
        box(page, "prompt").press("Enter")
        expect(page.locator("#answers article")).to_have_count(1, timeout=90_000)
        expect(page.locator("#answers .talk")).to_have_attribute("aria-busy", "false", timeout=90_000)
        assert said(page, "all", "#answers") == answer and said(page, "base", "#answers") == bare, name


def test_pictures_stand_side_by_side_and_follow_the_sliders(shelf, server, open_page):
    for seed, name in ((1, "stripes"), (2, "outline")):
        files = tiny_image.adapter_files(demo_base("demo-image"), tiny_image.random_adapter(demo_base("demo-image"), seed=seed, size=0.3), name="demo-image")
        library.add(Workspace(server.home), files, {"name": name, "base": "demo-image"})
    page = blend_page(open_page, "stripes", "outline")
    expect(page.locator("#tryout-longest")).to_be_hidden()
    box(page, "tryout-steps").fill("3")
    page.keyboard.press("Tab")
    ask(page)
    images = page.locator("#tryout-answers img")
    expect(images).to_have_count(2)
    mixed, bare = (image.get_attribute("src") for image in images.all())
    assert mixed != bare
    page.locator("#tryout-live input").check()
    page.get_by_role("spinbutton", name="number input for outline").fill("0")
    expect(foot(page, "mix")).to_have_text("stripes × 1", timeout=60_000)
    settled(page, "This was the exact mix")
    expect(page.locator("#tryout-answers img.old")).to_have_count(0)
    changed, base = (image.get_attribute("src") for image in images.all())
    assert changed not in (mixed, bare) and base == bare, "the same prompt and seed give the base's same picture"
    choose_against(page, "stripes alone")
    expect(page.locator("#tryout-answers h4")).to_have_text(["The mix", "stripes alone"])
    expect(page.locator("#tryout-answers section footer")).to_have_text(["stripes × 1", "stripes × 1"], timeout=60_000)
    pictures = [page.request.get(server.url + image.get_attribute("src")).body() for image in images.all()]
    assert pictures[0] == pictures[1], "a mix in which nothing else acts is that part"


@pytest.mark.slow
def test_many_moves_end_in_the_answer_of_the_last(shelf, open_page):
    page = blend_page(open_page, "pirate", "capitals")
    page.locator("#tryout-live input").check()
    box(page, "tryout-longest").fill("480")
    page.keyboard.press("Tab")
    ask(page)
    slider(page, "pirate").focus()
    for _ in range(3):
        for _ in range(30):
            page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(600)  # long enough for an answer to begin, too short for it to end
    expect(page.get_by_role("spinbutton", name="number input for pirate")).to_have_value("0.1")
    expect(foot(page, "mix")).to_contain_text("pirate × 0.1, capitals × 1", timeout=60_000)
    settled(page, "This was the exact mix")
    page.wait_for_timeout(1500)
    expect(foot(page, "mix")).to_contain_text("pirate × 0.1, capitals × 1")


def test_without_a_mix_or_a_prompt_it_says_what_is_missing(shelf, open_page):
    page = blend_page(open_page)
    page.locator("#tryout-start").click()
    expect(page.locator("#tryout-sentences")).to_contain_text("There is nothing to answer")
    box(page, "tryout-prompt").fill(ASK)
    page.keyboard.press("Tab")
    expect(page.locator("#tryout-prompt textarea")).to_have_value(ASK)
    page.locator("#tryout-start").click()
    expect(page.locator("#tryout-sentences")).to_contain_text("There is no mix to try yet")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_nothing_sticks_out(shelf, open_page, width, scheme):
    page = open_page(f"/?tab=blend&__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 844})
    choose(page, "pirate")
    box(page, "tryout-longest").fill("24")
    page.keyboard.press("Tab")
    ask(page)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
