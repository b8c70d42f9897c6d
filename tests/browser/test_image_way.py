"""The way of an image adapter in a browser, nothing faked but the Hub's address: a zip of pictures dropped, two styles trained, samples
watched, blended, drawn beside the base, published, and the same picture from a fresh stock pipeline, bit for bit."""

import io
import json
import zipfile

import pytest
from PIL import Image
from playwright.sync_api import expect

from lora_studio import library, workspace
from lora_studio.adapters.pipeline_files import NAME
from lora_studio.home import demo_base, presets_folder
from tests.browser.conftest import Server, hub_environment, pages, unfold
from tests.browser.test_whole_way import box, choose, sign_in, train, watch

pytestmark = [pytest.mark.browser, pytest.mark.slow]
PROMPT = "a red star on a blue background"


@pytest.fixture
def archive(tmp_path):
    """The pictures of a demo as one .zip, as a person would drop them."""
    folder = presets_folder() / "demo" / "stripes"
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as packed:
        for file in sorted(folder.iterdir()):
            packed.write(file, f"mine/{file.name}")
    return tmp_path / "mine.zip"


def draw(page, prompt: str, count: int = 2) -> list[str]:
    box(page, "prompt").fill(prompt)
    box(page, "prompt").press("Enter")
    expect(page.locator("#answers article img")).to_have_count(count, timeout=120_000)
    expect(page.locator("#answers .talk")).to_have_attribute("aria-busy", "false", timeout=120_000)
    return [image.get_attribute("src") for image in page.locator("#answers article img").all()]


def test_from_dropped_pictures_to_a_published_blend(chromium, hub, tmp_path, archive):
    import diffusers
    import torch

    server = Server(tmp_path / "studio" / "home", **hub_environment(hub, tmp_path / "studio" / "home"))
    server.home.parent.mkdir()
    server.start()
    try:
        with pages(chromium) as opened:
            page = opened(server)
            # A preset fills the form. A zip of its pictures is dropped, captions are edited and an edit undone, and the run is to use them.
            page.get_by_label("Preset").click()
            page.get_by_role("option", name="demo/stripes").click()
            expect(box(page, "field-name")).to_have_value("stripes")
            expect(page.locator("#field-task-resolution")).to_be_hidden()  # within a closed accordion
            expect(page.locator("#field-task-max_length")).to_have_count(0)
            page.get_by_role("tab", name="Pictures").click()
            page.locator("#drop input[type=file]").set_input_files(str(archive))
            expect(page.locator("#gallery figure")).to_have_count(24)
            expect(page.get_by_label("Caption of 00.png", exact=True)).to_have_value("a green circle on a red background")
            box(page, "find").fill(" background")
            page.get_by_role("button", name="Replace", exact=True).click()
            expect(page.locator("#album-told")).to_contain_text("24 captions were changed.")
            page.locator("#undo-edit").click()
            expect(page.get_by_label("Caption of 00.png", exact=True)).to_have_value("a green circle on a red background")
            box(page, "find").fill("orange square on a green")
            box(page, "put").fill("orange square upon a green")
            page.get_by_role("button", name="Replace", exact=True).click()
            expect(page.locator("#album-told")).to_contain_text("1 caption was changed.")
            page.get_by_role("button", name="Train with these").click()
            expect(page.locator("#preview")).to_contain_text("an orange square upon a green background")
            expect(page.locator("#problems")).to_contain_text("Ready to start.")
            expect(box(page, "field-name")).to_have_value("stripes")

            # Train both styles; sample pictures appear.
            watch(page, "stripes")
            expect(page.locator("#samples tbody tr").first).to_contain_text("base")
            assert page.locator("#samples img").count() >= 4
            train(page, "demo/outline", "outline")
            page.get_by_role("button", name="Show in library").click()
            expect(page.locator("#cards .card b")).to_have_text(["outline", "stripes"])

            # Blend them, and draw with the blend beside the base.
            for name in ("stripes", "outline"):
                page.get_by_role("tab", name="Library").click()
                choose(page, name)
                page.get_by_role("button", name="Use in Blend").click()
                expect(page.get_by_role("slider", name=f"range slider for {name}").first).to_be_visible()
            box(page, "blend-name").fill("both")
            page.locator("#blend-save").click()
            expect(page.locator("#blend-sentences")).to_contain_text("both is in the library", timeout=90_000)
            page.get_by_role("button", name="Talk to it").locator("visible=true").click()
            expect(page.locator("#brush")).to_be_visible()
            base, blend = draw(page, PROMPT)
            expect(page.locator("#answers footer").first).to_contain_text("all adapters off")
            assert base != blend
            drawn = Image.open(io.BytesIO(page.request.get(server.url + blend).body()))
            told = json.loads(drawn.text["lora-studio"])

            # A grid of strengths and prompts, saved as one picture with its settings inside.
            unfold(page.get_by_text("Grid: adapters"))
            expect(page.locator("#grid-rows")).to_contain_text("both")
            page.locator("#grid-strengths").locator("input, textarea").first.fill("0, 1")
            page.locator("#grid-prompts textarea").fill(f"{PROMPT}\na green heart on a pink background")
            page.locator("#grid-start").click()
            expect(page.locator("#grid .saved a")).to_be_visible(timeout=180_000)
            expect(page.locator("#grid td img")).to_have_count(4)
            whole = Image.open(io.BytesIO(page.request.get(server.url + page.locator("#grid .saved a").get_attribute("href")).body()))
            assert json.loads(whole.text["lora-studio"])["strengths"] == [0.0, 1.0]
            first = page.request.get(server.url + page.locator("#grid td img").first.get_attribute("src")).body()
            assert Image.open(io.BytesIO(first)).tobytes() == Image.open(io.BytesIO(page.request.get(server.url + base).body())).tobytes()

            # Publish it; a fresh stock pipeline draws the playground's picture, bit for bit.
            page.get_by_role("tab", name="Library").click()
            choose(page, "both")
            page.get_by_role("button", name="Publish", exact=True).locator("visible=true").click()
            sign_in(page)
            expect(box(page, "repo")).to_have_value("me/both")
            expect(page.locator("#files")).to_contain_text(NAME)
            page.locator("button#publish").click()
            expect(page.locator("#published")).to_contain_text("read back and found whole", timeout=60_000)
    finally:
        server.end()
    files = hub.files("me/both")
    (tmp_path / NAME).write_bytes(files[NAME])
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(demo_base("demo-image"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name=NAME, adapter_name="it")
    assert pipeline.get_list_adapters() == {"unet": ["it"]}
    again = pipeline(
        PROMPT, num_inference_steps=told["steps"], guidance_scale=told["guidance"], width=told["width"], height=told["height"],
        generator=torch.Generator().manual_seed(told["seed"]),
    ).images[0]  # fmt: skip
    assert again.tobytes() == drawn.tobytes()
    assert b"text-to-image" in files["README.md"]
    assert library.find(workspace.Workspace(server.home), name="both")
