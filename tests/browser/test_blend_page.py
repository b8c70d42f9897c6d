"""The Blend page in a browser: sliders and keys move the preview, blends are saved, and what does not fit is refused by name."""

import re
import time

import pytest
from playwright.sync_api import expect

from lora_studio import adapters, blend, library
from lora_studio.workspace import Workspace
from tests.browser import made
from tests.browser.conftest import LAYOUTS, comes_to_rest, unfold
from tests.browser.test_pages import HOSTILE

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shelf(server):
    """Adapters in the server's library: their ids by name."""
    found = {"pirate": made.adapter(server.home, "pirate", seed=1, rank=3), "capitals": made.adapter(server.home, "capitals", seed=2, rank=5)}
    found["elsewhere"] = made.adapter(server.home, "elsewhere", seed=3, base="someone/other-model")
    return {**found, "hostile": made.adapter(server.home, HOSTILE[:80], seed=4, rank=2)}


def choose(page, *names):
    """Pick adapters by the beginning of their labels."""
    box = page.locator("#mix-blend input[role=listbox], #mix-blend input").first
    for name in names:
        box.click()
        page.get_by_role("option", name=name).first.click()
    page.keyboard.press("Escape")


def blend_page(open_page, *names, path="/?tab=blend"):
    page = open_page(path)
    expect(page.locator("#blend-save")).to_be_visible()
    choose(page, *names)
    return page


def sizes(page) -> list[str]:
    return page.locator("#blend-figures .size").all_inner_texts()


def slider(page, name):
    return page.get_by_role("slider", name=f"range slider for {name}")


def test_keys_move_the_preview_and_two_picks_make_a_matrix(shelf, open_page):
    page = blend_page(open_page)
    expect(page.locator("#blend-curve")).to_be_hidden()
    choose(page, "pirate", "capitals")
    figures = page.locator("#blend-figures")
    expect(page.locator("#blend-sentences").get_by_text("Starting the bench…").or_(figures.get_by_text("Exact rank: 8."))).to_be_visible()
    expect(figures).to_contain_text("Exact rank: 8.", timeout=90_000)
    expect(page.locator("#blend-sentences")).not_to_contain_text("Starting")
    expect(figures).to_contain_text("pirate and capitals point in nearly unrelated directions")
    assert figures.locator(".matrix tbody tr").count() == 2
    before = sizes(page)
    slider(page, "pirate").focus()
    began = time.monotonic()
    for _ in range(50):
        page.keyboard.press("ArrowLeft")
    expect(figures.locator(".parts tbody tr").first.locator(".n").nth(1)).to_have_text("0.50")
    print(f"\n50 keys and the preview after them: {time.monotonic() - began:.2f} s")
    after = sizes(page)
    assert float(after[0]) == pytest.approx(float(before[0]) / 2, rel=0.02) and after[1] == before[1] and after[2] != before[2]

    comes_to_rest(page)

    # Taking one out and another in keeps the weights of those that stay.
    choose(page, "capitals")  # a second click takes it out
    expect(figures).to_contain_text("Exact rank: 3.")
    expect(page.get_by_role("spinbutton", name="number input for pirate")).to_have_value("0.5")
    box = page.locator("#mix-blend input").first
    box.fill("capitals")
    box.press("Enter")
    expect(figures).to_contain_text("Exact rank: 8.")
    box.fill("nobody")
    box.press("Enter")
    expect(page.locator("#mix-blend-told")).to_contain_text("There is no adapter nobody in the library.")
    expect(page.locator("#blend-sentences")).to_contain_text("There is no adapter nobody in the library.")


def test_save_exact_then_smaller_and_the_buttons_lead_on(shelf, server, open_page):
    page = blend_page(open_page, "pirate", "capitals")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 8.", timeout=90_000)
    number = page.get_by_role("spinbutton", name="number input for capitals")
    number.fill("-0.5")
    expect(page.locator("#blend-figures .parts tbody tr").nth(1)).to_contain_text("-0.50")
    told = page.locator("#blend-sentences")
    page.locator("#blend-save").click()
    expect(told).to_contain_text("The name of the blend is empty")
    expect(page.locator("#blend-to-publish")).to_be_disabled()
    expect(page.locator("#blend-to-library")).to_be_disabled()
    page.locator("#blend-name").locator("input, textarea").first.fill("both")
    page.locator("#blend-save").click()
    expect(told).to_contain_text(re.compile(r"both is in the library: rank 8, exact, true error \d\.\de-\d\d"))
    print("\n" + told.inner_text().replace("\n", " "))
    workspace = Workspace(server.home)
    both = library.card(workspace, "both")
    assert [(parent["id"], parent["weight"]) for parent in both["parents"]] == [(shelf["pirate"], 1.0), (shelf["capitals"], -0.5)]
    parts = [adapters.read(library.adapter_folder(workspace, shelf[name])).modules for name in ("pirate", "capitals")]
    written = adapters.read(library.adapter_folder(workspace, "both")).modules
    assert blend.difference(written, blend.stack(parts, [1.0, -0.5])).overall < 1e-6

    # A smaller rank: the curve marks it and says its error, the very one that is saved.
    page.locator("#blend-rank").locator("input, textarea").first.fill("4")
    curve = page.locator("#blend-curve")
    expect(curve).to_contain_text(re.compile(r"rank 4: error \d"))
    expect(page.locator("[data-chosen='4']").first).to_be_attached()
    shown = re.search(r"error ([\d.]+) %", curve.inner_text()).group(1)
    page.locator("#blend-name").locator("input, textarea").first.fill("small")
    page.locator("#blend-save").click()
    expect(told).to_contain_text(re.compile(r"small is in the library: rank 4, compressed to rank 4, true error"))
    assert float(re.search(r"true error ([\d.]+) %", told.inner_text()).group(1)) == pytest.approx(float(shown), rel=0.05)
    assert library.card(workspace, "small")["rank"] == 4

    for button, tab, proof in (("talk", "Playground", "#mix-playground"), ("to-library", "Library", None), ("to-publish", "Publish", None)):
        page.locator(f"#blend-{button}").click()
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        if proof:
            expect(page.locator(proof).first).to_contain_text("small")
        page.get_by_role("tab", name="Blend").click()
        expect(page.locator("#blend-save")).to_be_visible()
    page.get_by_role("tab", name="Library").click()
    expect(page.locator("#adapter-name").locator("input, textarea").first).to_have_value("small")


def test_adapters_of_differing_bases_are_refused_by_name_and_nothing_is_lost(shelf, server, open_page):
    page = blend_page(open_page, "pirate", "elsewhere")
    told = page.locator("#blend-sentences")
    expect(told).to_contain_text("pirate was made for demo-text, elsewhere for someone/other-model.", timeout=90_000)
    count = library.count(Workspace(server.home))
    page.locator("#blend-name").locator("input, textarea").first.fill("never")
    page.locator("#blend-save").click()
    expect(told).to_contain_text("Blend adapters of the same base only.")
    expect(page.locator("#blend-name").locator("input, textarea").first).to_have_value("never")
    assert library.count(Workspace(server.home)) == count
    expect(slider(page, "pirate")).to_be_visible()


def test_a_strangers_name_runs_no_script(shelf, open_page):
    page = blend_page(open_page, "pirate")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank", timeout=90_000)
    box = page.locator("#mix-blend input").first
    box.fill(shelf["hostile"])
    box.press("Enter")
    expect(page.locator("#blend-figures .parts")).to_contain_text("<img src=x")
    box.fill(HOSTILE)
    box.press("Enter")
    expect(page.locator("#mix-blend-told")).to_contain_text("<img src=x")
    assert page.evaluate("window.hacked") is None and not page.evaluate("document.body.classList.contains('http:')")
    assert page.locator("#blend-figures img").count() == 0


@pytest.mark.parametrize(("width", "scheme"), LAYOUTS)
def test_nothing_sticks_out(shelf, open_page, scheme, width):
    page = open_page(f"/?tab=blend&__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 844})
    expect(page.locator("#blend-save")).to_be_visible()
    choose(page, "pirate", "capitals", "<img")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank: 10.", timeout=90_000)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_mix_is_baked_into_a_model_that_says_before_what_it_loses(shelf, server, open_page):
    page = blend_page(open_page, "pirate")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank")
    unfold(page.get_by_text("Bake into the base"))
    page.locator("#bake-start").click()
    expect(page.locator("#bake-sentences")).to_contain_text("The model has no name")
    page.locator("#bake-look").click()
    expect(page.locator("#bake-sentences")).to_contain_text("tensors would change", timeout=60_000)
    assert not (server.home / "models").exists()
    page.locator("#bake-name").locator("input, textarea").first.fill("../my pirate")
    page.locator("#bake-start").click()
    expect(page.locator("#bake-sentences")).to_contain_text("tensors were changed", timeout=60_000)
    (folder,) = (server.home / "models").iterdir()
    assert folder.name == "my-pirate" and (folder / "README.md").is_file() and list(folder.glob("*.safetensors"))
    page.locator("#bake-start").click()
    expect(page.locator("#bake-sentences")).to_contain_text("exists already")


def test_a_mix_is_merged_in_another_way_and_what_does_not_go_is_said(shelf, server, open_page):
    page = blend_page(open_page, "pirate", "capitals")
    expect(page.locator("#blend-figures")).to_contain_text("Exact rank")
    unfold(page.get_by_text("Merge in another way"))
    for words, said in (("", "name"), ("merged", "rank")):
        page.locator("#merge-name").locator("input, textarea").first.fill(words)
        page.locator("#merge-start").click()
        expect(page.locator("#merge-sentences .error")).to_contain_text(said, timeout=60_000)
    page.locator("#merge-rank").locator("input, textarea").first.fill("6")
    page.locator("#merge-start").click()
    expect(page.locator("#merge-sentences .ok")).to_contain_text("merged is in the library: rank 6", timeout=60_000)
    (made,) = library.find(Workspace(server.home), name="merged")
    assert library.card(Workspace(server.home), made.id)["recipe"]["merge"]["how"] == "ties"
