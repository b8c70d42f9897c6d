"""The parts of the Blend page in a browser: weights by block, the conflict map, the search for weights, and merges baked in full rank."""

import json
import re

import pytest
from playwright.sync_api import expect

from lora_studio import adapters, blend, durable, library
from lora_studio.workspace import Workspace
from tests.browser import made
from tests.browser.conftest import LAYOUTS, unfold
from tests.browser.test_blend_page import blend_page, choose
from tests.browser.test_tryout import ask, box, foot, said, settled

pytestmark = pytest.mark.browser
BLOCKS = [f"model.layers.{number}" for number in range(4)]


@pytest.fixture(scope="module")
def shelf(server):
    """Adapters in the server's library: their ids by name."""
    found = {
        "pirate": made.adapter(server.home, "pirate", seed=1, rank=3, size=0.5),
        "capitals": made.adapter(server.home, "capitals", seed=2, rank=5, size=0.5),
    }
    return {**found, "double": made.adapter(server.home, "double", seed=1, rank=3, size=0.3)}


def both(open_page):
    page = blend_page(open_page, "pirate", "capitals")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 8.", timeout=90_000)
    return page


def block(page, name):
    return page.get_by_role("spinbutton", name=f"weight of {name}", exact=True)


def lines(page):
    return page.locator("#layers-lines textarea")


def weight_of(page, row):
    return page.locator("#blend-figures .parts tbody tr").nth(row).locator(".n").nth(1)


def test_what_is_weighed_by_block_is_what_is_tried_saved_and_talked_to(shelf, server, open_page):
    page = both(open_page)
    unfold(page.locator("#layers-box > button").first)
    expect(block(page, "model.layers.0")).to_have_attribute("placeholder", "1")
    block(page, "model.layers.0").focus()
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    expect(lines(page)).to_have_value("model.layers.0 = 0.85")
    expect(weight_of(page, 0)).to_have_text("1.00 by block")
    expect(page.get_by_role("slider", name="range slider for pirate · by block")).to_be_visible()
    size = page.locator("#blend-figures .size").first
    expect(size).not_to_have_text("301")  # that of the plain weight
    before = size.inner_text()
    block(page, "model.layers.0").fill("0.25")
    expect(lines(page)).to_have_value("model.layers.0 = 0.25")
    expect(size).not_to_have_text(before)

    # A pattern of no layer is a sentence at once, and nothing else changes: 1 is never 10.
    sizes = page.locator("#blend-figures .size").all_inner_texts()
    lines(page).fill("model.layers.0 = 0.25\nmodel.layers.10 = 0.5")
    expect(page.locator("#layers-sentences .error")).to_contain_text("model.layers.10 means no layer of pirate")
    assert page.locator("#blend-figures .size").all_inner_texts() == sizes
    lines(page).fill("model.layers.0 = 0.25\nmodel.layers.2-3 = 0")
    expect(page.locator("#layers-sentences .error")).to_have_count(0)
    expect(block(page, "model.layers.3")).to_have_attribute("placeholder", "0")
    expect(page.locator("#blend-figures")).to_contain_text("cosine as weighted")

    # What is tried goes by it, and what is saved is that, number for number.
    ask(page)
    expect(foot(page, "mix")).to_contain_text("pirate × 1, model.layers.0 0.25, model.layers.2-3 0, capitals × 1")
    tried = said(page, "mix")
    box(page, "blend-name").fill("by block")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-sentences")).to_contain_text("by block is in the library: rank 8, exact", timeout=60_000)
    workspace = Workspace(server.home)
    weight = {"": 1.0, "model.layers.0": 0.25, "model.layers.2-3": 0.0}
    assert [parent["weight"] for parent in library.card(workspace, "by block")["parents"]] == [weight, 1.0]
    parts = [adapters.read(library.adapter_folder(workspace, shelf[name])).modules for name in ("pirate", "capitals")]
    meant = blend.stack(parts, [weight, 1.0])
    written = adapters.read(library.adapter_folder(workspace, "by block")).modules
    assert written.keys() == meant.keys() and blend.difference(written, meant).overall < 1e-6

    page.locator("#blend-talk").click()
    expect(page.get_by_role("tab", name="Playground")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#mix-playground")).to_contain_text("by block")
    page.get_by_role("tab", name="Blend").click()
    # Without the saved one, the Playground takes the mix with its blocks, and gives it back.
    lines(page).fill("model.layers.0 = 0.5")
    expect(block(page, "model.layers.0")).to_have_value("0.5")
    page.locator("#blend-talk").click()
    expect(page.get_by_role("slider", name="range slider for pirate · by block")).to_be_visible()
    page.locator("#to-blend").click()
    expect(lines(page)).to_have_value("model.layers.0 = 0.5")
    page.locator("#layers-reset").click()
    expect(block(page, "model.layers.0")).to_have_value("")
    expect(weight_of(page, 0)).to_have_text("1.00")

    # The saved blend, alone, answers what the mix by block answered before it was saved.
    choose(page, "pirate", "capitals", "by block")  # a second click takes one out
    expect(page.locator("#blend-figures .parts tbody tr")).to_have_count(2)
    page.locator("#tryout-start").click()
    expect(foot(page, "mix")).to_contain_text("by block × 1")
    settled(page, "This was the exact mix")
    assert said(page, "mix") == tried


def test_the_conflict_map_is_read_with_keys_and_leads_to_a_blocks_weights(shelf, open_page):
    page = blend_page(open_page, "pirate", "double")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 6.", timeout=90_000)
    unfold(page.locator("#judge-box > button").first)
    page.locator("#judge-start").click()
    cells = page.locator("#judge-map tbody tr")
    expect(cells).to_have_count(5, timeout=90_000)
    expect(page.locator("#judge-sentences")).to_contain_text(
        "pirate and double do much the same (cosine 1.00), so their plain sum overshoots"
    )
    assert cells.locator("th").all_inner_texts() == ["all together", *BLOCKS]
    cosine = page.locator("#judge-map td[data-at='1 5']")
    expect(cosine).to_have_text("1.00")
    blue, red, green, *_ = [
        float(number) * (255 if float(number) <= 1 else 1)
        for number in re.findall(r"[\d.]+", cosine.evaluate("cell => getComputedStyle(cell).backgroundColor"))
    ][::-1][:3]
    assert blue > green, "the same way is blue"
    page.locator("#judge-map th[data-at='1 0']").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#judge-map output")).to_contain_text("model.layers.0: pirate has size")
    page.get_by_role("button", name="Layers", exact=True).click()
    expect(cells).to_have_count(13)
    page.locator("#judge-map td[data-at='4 2']").focus()
    expect(page.locator("#judge-map output")).to_contain_text("double has size")
    expect(page.locator("#judge-map output")).to_contain_text("its 3 singular values fall from")
    expect(page.locator("#judge-map .spectrum rect")).to_have_count(3)
    page.keyboard.press("Enter")
    expect(block(page, "model.layers.1")).to_be_focused()
    expect(page.locator("#layers-which input")).to_have_value("double")
    page.keyboard.type("0.5")
    expect(page.locator("#judge-sentences")).to_contain_text("The mix has changed since")
    expect(weight_of(page, 1)).to_have_text("1.00 by block")


def test_a_search_goes_on_without_the_page_and_its_weights_go_onto_the_sliders(shelf, server, open_page):
    page = both(open_page)
    unfold(page.locator("#search-box > button").first)
    page.locator("#search-start").click()
    expect(page.locator("#search-sentences .error")).to_contain_text("Give both")
    pairs = ["What color is the fox? => THE FOX IS RED.", "Which pet has Nils? => NILS HAS A HEN."]
    box(page, "search-pairs").fill("\n".join(pairs * 100))  # so many that it is not at its end before the page is there again
    box(page, "search-tries").fill("400")
    page.keyboard.press("Tab")
    page.locator("#search-start").click()
    expect(page.locator("#search-said")).to_contain_text("pirate and capitals")
    page.reload()
    expect(page.locator("#search-curve")).to_contain_text("tries, running", timeout=120_000)
    expect(page.locator("#search-said")).to_contain_text("You may close the page; it goes on.")
    expect(page.locator("#search-use")).to_be_enabled(timeout=120_000)
    page.locator("#search-stop").click()
    expect(page.locator("#search-said")).to_contain_text("Stopped on request. The best weights of", timeout=60_000)
    expect(page.locator("#search-stop")).to_be_disabled()
    found = re.search(r"pirate ([\d.]+), capitals ([\d.]+); loss", page.locator("#search-said").inner_text())
    page.locator("#search-use").click()
    for name, weight in zip(("pirate", "capitals"), found.groups()):
        number = page.get_by_role("spinbutton", name=f"number input for {name}")
        expect(number).to_be_visible()
        assert float(number.input_value()) == pytest.approx(float(weight), abs=0.006)
    folder = Workspace(server.home).run_folders()[0]
    assert durable.read_json(folder / "card.json", {})["method"] == "search"


def test_a_merge_is_baked_in_full_rank_and_says_how_that_differs(shelf, server, open_page):
    page = both(open_page)
    unfold(page.get_by_text("Bake into the base"))
    page.locator("#bake-merged input").check()
    box(page, "bake-name").fill("by ties")
    page.locator("#bake-start").click()
    told = page.locator("#bake-sentences")
    expect(told).to_contain_text("tensors were changed", timeout=90_000)
    expect(told).to_contain_text("Put together by ties in full rank, with nothing cut. Saved as an adapter the same merge is cut to a rank")
    recipe = json.loads((server.home / "models" / "by-ties" / "lora_studio.json").read_text())
    assert recipe["merge"] == {"how": "ties"} and [part["weight"] for part in recipe["sum"]] == [1.0, 1.0]


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_nothing_sticks_out_with_every_part_open(shelf, open_page, scheme, width):
    page = open_page(f"/?tab=blend&__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 844})
    expect(page.locator("#blend-save")).to_be_visible()
    choose(page, "pirate", "capitals", "double")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 11.", timeout=90_000)
    for name in ("layers-box", "judge-box"):
        unfold(page.locator(f"#{name} > button").first)
    page.locator("#judge-start").click()
    expect(page.locator("#judge-map tbody tr")).to_have_count(5, timeout=90_000)
    expect(block(page, "model.layers.3")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_the_rank_is_a_slider_under_its_curve_for_the_keyboard_too(shelf, open_page):
    page = both(open_page)
    slider = page.get_by_role("slider", name="rank of the blend")
    expect(slider).to_have_value("8")
    slider.focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#blend-rank input, #blend-rank textarea").first).to_have_value("7")
    expect(page.locator("#blend-curve output")).to_contain_text("rank 7: error")
