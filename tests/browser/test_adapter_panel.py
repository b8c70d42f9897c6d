"""The panel of an adapter in a browser: its family tree, by mouse and by keys, and its export for other programs with what the export says of itself."""

import re

import pytest
from playwright.sync_api import expect

from lora_studio import adapters, baking, exports, library, shelf
from lora_studio.home import demo_base
from lora_studio.workspace import Workspace
from tests import tiny_image
from tests.browser import made
from tests.browser.conftest import unfold
from tests.browser.test_blend_page import blend_page

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def family(server):
    """A blend of two, one of which is gone, with a child and a baked model: ids by name."""
    space = Workspace(server.home)
    ids = {name: made.adapter(server.home, name, seed=seed, rank=3) for seed, name in enumerate(("pirate", "capitals"))}
    with made.at(server.home):
        ids["both"], _ = shelf.blend(space, [(ids["pirate"], 1.0), (ids["capitals"], -0.5)], name="both")
        ids["small"], _ = shelf.blend(space, [(ids["both"], 0.7)], name="small", rank=2)
        assert [event["event"] for event in baking.bake(space, [(ids["both"], 1.0)], space.root / "models" / "Sailor")][-1] == "done"
    library.remove(space, ids["capitals"])
    picture = tiny_image.adapter_files(demo_base("demo-image"), tiny_image.random_adapter(demo_base("demo-image"), seed=1), name="demo-image")
    ids["style"] = library.add(space, picture, {"name": "style", "base": "demo-image"})
    return ids


def panel(open_page, id, scheme="light", width=1280):
    page = open_page(f"/?tab=library&adapter={id}&__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 844})
    expect(page.locator("#adapter-name")).to_be_visible()
    return page


def name_of(page):
    return page.locator("#adapter-name").locator("input, textarea").first


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_family_is_drawn_with_its_weights_and_nothing_sticks_out(family, open_page, width, scheme):
    page = panel(open_page, family["both"], scheme, width)
    tree = page.locator("#tree")
    expect(tree.locator(".of")).to_have_text(["Made of", "This adapter", "Went into"])
    expect(tree.locator(".row").nth(0).locator("button")).to_have_text([re.compile(r"pirate\s*× 1"), re.compile(r"capitals\s*removed\s*× -0\.5")])
    expect(tree.locator(".row").nth(2).locator("button")).to_have_text([re.compile(r"small\s*blend\s*× 0\.7"), re.compile(r"Sailor\s*baked\s*× 1")])
    expect(tree.locator("svg path")).to_have_count(4)
    expect(tree.get_by_role("button", name="capitals")).to_be_disabled()
    boxes = tree.locator("button").evaluate_all("all => all.map(one => [one.getBoundingClientRect().left, one.getBoundingClientRect().right])")
    assert all(0 <= left < right <= width for left, right in boxes)
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    # The lines end at their members: parents' at the bottom edge, the adapter's at the top.
    ends = tree.evaluate("""tree => { const box = tree.querySelector('.tree').getBoundingClientRect(), own = tree.querySelector('[aria-current]').getBoundingClientRect();
        return [...tree.querySelectorAll('path')].slice(0, 2).map(path => { const end = path.getPointAtLength(path.getTotalLength()); return [end.x + box.x - own.x - own.width / 2, end.y + box.y - own.y]; }) }""")
    assert all(abs(x) < 2 and abs(y) < 2 for x, y in ends)


def test_a_click_and_the_keyboard_open_a_member(family, open_page):
    page = panel(open_page, family["both"])
    page.locator("#tree").get_by_role("button", name="small").click()
    expect(name_of(page)).to_have_value("small")
    assert family["small"] in page.url
    above = page.locator("#tree").get_by_role("button", name="both blend")
    above.focus()
    page.keyboard.press("Enter")
    expect(name_of(page)).to_have_value("both")
    expect(page.locator("#tree [aria-current]")).to_contain_text("both")


def test_an_export_says_what_it_will_be_what_it_was_and_comes_down(family, server, open_page, tmp_path):
    page = panel(open_page, family["style"])
    box = page.locator("#adapter-export")
    unfold(box.get_by_text("Export for other programs"))
    expect(box).to_contain_text("gguf is left out: llama.cpp takes adapters of language models, and this one is for an image model.")
    expect(page.locator("#adapter-export-outlook")).to_contain_text(re.compile(r"It will have rank 3 in \d+ layers and about [\d.]+ MB; nothing is rounded\."))
    page.locator("#adapter-export-form input").first.click()
    expect(page.locator("ul [role=option]")).to_have_text([re.compile(name) for name in ("PEFT", "diffusers", "kohya")])
    page.get_by_role("option", name="kohya").click()
    expect(page.locator("#adapter-export-get")).to_be_hidden()
    page.locator("#adapter-export-start").click()
    told = page.locator("#adapter-export-told")
    expect(told).to_contain_text(re.compile(r"(\d+) of \1 layers matched, read again by diffusers' StableDiffusionPipeline; the worst is [\d.e-]+ off"), timeout=90_000)
    expect(told).to_contain_text("Not carried: the base's name and revision.")
    with page.expect_download() as download:
        page.locator("#adapter-export-get").click()
    assert download.value.suggested_filename == "style.safetensors"
    download.value.save_as(tmp_path / "style.safetensors")
    got, meant = adapters.read(tmp_path / "style.safetensors"), adapters.read(library.adapter_folder(Workspace(server.home), family["style"]))
    assert len(got.modules) == len(meant.modules) and exports.outlook(Workspace(server.home), family["style"], "float32")["layers"] == len(meant.modules)
    # Another choice takes the file of the first away; what cannot be is a sentence.
    page.goto(f"{server.url}/?tab=library&adapter={family['pirate']}")
    expect(name_of(page)).to_have_value("pirate")
    unfold(box.get_by_text("Export for other programs"))
    expect(box).to_contain_text("kohya is left out: it is the form of image models")
    page.locator("#adapter-export-dtype input").first.click()
    page.get_by_role("option", name="bfloat16").click()
    expect(box).to_contain_text("GGUF is written in float32 or float16. Choose one of these.")
    page.locator("#adapter-export-start").click()
    expect(told.locator(".error")).to_contain_text("bfloat16")


def test_a_saved_blend_is_exported_where_it_was_saved(family, open_page):
    page = blend_page(open_page, "pirate", "small")
    expect(page.locator("#blend-export")).to_be_hidden()
    page.locator("#blend-name").locator("input, textarea").first.fill("to go")
    page.locator("#blend-save").click()
    expect(page.locator("#blend-sentences")).to_contain_text("to go is in the library", timeout=90_000)
    unfold(page.locator("#blend-export").get_by_text("Export for other programs"))
    expect(page.locator("#blend-export-outlook")).to_contain_text("It will have rank 5")
    page.locator("#blend-export-start").click()
    expect(page.locator("#blend-export-told")).to_contain_text("12 of 12 layers matched, read again by gguf", timeout=90_000)
    with page.expect_download() as download:
        page.locator("#blend-export-get").click()
    assert download.value.suggested_filename == "to-go.gguf"


def test_nothing_that_was_not_exported_can_be_downloaded(family, server, open_page):
    page = open_page()
    for path in ("0" * 16 + "/x", "../library/x", "%2e%2e/library", "nope/config.json"):
        assert page.request.get(f"{server.url}/studio/export/{path}").status == 404
