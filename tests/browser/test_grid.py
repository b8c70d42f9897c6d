"""The Playground's grid in a browser: strengths beside each other for two prompts, and one picture to save with its settings inside."""

import io
import json

import pytest
from PIL import Image
from playwright.sync_api import expect

from lora_studio import library
from lora_studio.home import demo_base
from lora_studio.workspace import Workspace
from tests import tiny_image
from tests.browser.conftest import unfold

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def style(server):
    base = demo_base("demo-image")
    files = tiny_image.adapter_files(base, tiny_image.random_adapter(base, seed=1), name="demo-image")
    return library.add(Workspace(server.home), files, {"name": "style", "base": "demo-image"})


@pytest.mark.parametrize("scheme", ["light", pytest.param("dark", marks=pytest.mark.slow)])
def test_a_grid_is_drawn_and_saved_as_one_picture(server, style, open_page, scheme):
    page = open_page(f"/?tab=playground&__theme={scheme}")
    box = page.locator("#mix-playground input").first
    box.fill(style)
    box.press("Enter")
    unfold(page.get_by_text("Grid: adapters"))
    expect(page.locator("#grid-rows")).to_contain_text("style")
    page.get_by_label("Steps", exact=True).fill("2")
    page.locator("#grid-strengths").locator("input, textarea").first.fill("0 much")
    page.locator("#grid-prompts textarea").fill("a red star\na green heart")
    page.locator("#grid-start").click()
    expect(page.locator("#grid-sentences")).to_contain_text("are not all numbers. Write for example")
    page.locator("#grid-strengths").locator("input, textarea").first.fill("0, 0.5, 1")
    page.locator("#grid-start").click()
    expect(page.locator("#grid .saved a")).to_be_visible(timeout=90_000)
    expect(page.locator("#grid td img")).to_have_count(6)
    expect(page.locator("#grid-sentences")).to_contain_text("6 pictures were drawn. The base was drawn with every adapter off.")
    expect(page.locator("#grid section").first.locator("thead th")).to_have_text(["", "base", "× 0.5", "× 1"])
    saved = page.request.get(server.url + page.locator("#grid .saved a").get_attribute("href")).body()
    with Image.open(io.BytesIO(saved)) as found:
        told = json.loads(found.text["lora-studio"])
    assert told["prompts"] == ["a red star", "a green heart"] and told["steps"] == 2 and told["rows"][0]["adapters"] == [{"name": "style", "weight": 1.0}]
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
