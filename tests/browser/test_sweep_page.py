"""A sweep in the browser: four variants asked for on the Train page, one chart with a line for each, and the best of them in the Library."""

import re

import pytest
from playwright.sync_api import expect

from lora_studio import library, studio, sweeps
from lora_studio.workspace import Workspace
from tests.browser import made
from tests.browser.conftest import unfold

pytestmark = pytest.mark.browser


def field(page, id):
    return page.locator(f"#{id}").locator("input, textarea").first


def put(page, id, text) -> None:
    """Type a value and leave its field."""
    field(page, id).fill(text)
    field(page, id).press("Tab")


def ask_for_four(page) -> None:
    """A short run of the demo whose rate and rank vary, with the accordion open."""
    expect(field(page, "field-name")).to_have_value("pirate")
    put(page, "field-schedule-steps", "40")
    unfold(page.get_by_text("Several at once: compare settings in one run"))
    put(page, "sweep-values-0", "1e-5, 2e-3")
    put(page, "sweep-values-1", "2, 4")


def test_a_sweep_of_four_its_chart_and_the_best_kept(server, open_page):
    page = open_page()
    ask_for_four(page)
    expect(page.locator("#sweep-tiles")).to_contain_text("adapters to train")
    expect(page.locator("#sweep-tiles .tiles div", has_text="adapters to train").locator("b")).to_have_text("4")
    expect(page.locator("#sweep-memory .badge")).to_have_text("fits")

    # What cannot be is a sentence, nothing starts, and what was typed stays.
    put(page, "sweep-values-1", "2, 4000")
    expect(page.locator("#sweep-problems")).to_contain_text("rank 4000: method.rank is 4000, but no layer has a rank above")
    page.locator("#sweep-start").click()
    expect(page.get_by_text("The sweep cannot start yet")).to_be_visible()
    expect(field(page, "sweep-values-1")).to_have_value("2, 4000")
    workspace = Workspace(server.home)
    assert not workspace.run_folders()

    put(page, "sweep-values-1", "2, 4")
    expect(page.locator("#sweep-problems")).to_contain_text("Ready to start.")
    page.locator("#sweep-start").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true", timeout=90_000)
    expect(page.locator("[data-lines='4']")).to_be_attached(timeout=90_000)
    folder = workspace.run_folders()[0]

    # A reload while it runs changes nothing.
    page.reload()
    expect(page.locator("[data-lines='4']")).to_be_attached(timeout=90_000)
    expect(page.locator("#variants tbody tr").first).to_contain_text("kept", timeout=180_000)
    found = sweeps.result(workspace, folder.name)
    assert found["state"] == "done" and len(found["variants"]) == 4
    kept = found["variants"][found["kept"]]
    assert kept["validation"] == min(one["validation"] for one in found["variants"]) and kept["changes"]["optim.lr"] == 2e-3

    # The table: the lowest validation loss first, and one way into the Library.
    rows = page.locator("#variants tbody tr")
    expect(rows).to_have_count(4)
    shown = [float(text) for text in rows.locator("td:nth-child(2)").all_inner_texts()]
    assert shown == sorted(shown) and shown[0] == pytest.approx(kept["validation"], abs=1e-4)
    expect(page.locator("#variants button")).to_have_count(1)

    # The chart: each line by its words, and what it says at a step, by the mouse and by the keyboard.
    legend = page.locator("#chart .legend button")
    expect(legend).to_have_count(4)
    assert legend.locator("span").all_inner_texts() == [one["words"] for one in found["variants"]]
    assert len(set(legend.locator("line").evaluate_all("lines => lines.map(line => line.getAttribute('stroke-dasharray'))"))) == 4
    slider = page.locator("#chart input[type=range]")
    slider.focus()
    slider.press("Home")
    expect(page.locator("#chart output")).to_contain_text("step 0")
    at_start = f"{found['variants'][0]['judged'][0][1]:.2f}"
    assert at_start in slider.get_attribute("aria-valuetext") and kept["words"] in slider.get_attribute("aria-valuetext")
    expect(legend.first).to_contain_text(at_start)
    page.locator("#chart canvas").hover(position={"x": 300, "y": 100})
    expect(page.locator("#chart output")).to_contain_text(re.compile(r"step \d+"))

    # The best is in the Library, and only it.
    page.locator("#variants button").click()
    expect(page.get_by_role("tab", name="Library")).to_have_attribute("aria-selected", "true")
    expect(page.get_by_text(kept["library"], exact=True).filter(visible=True).first).to_be_visible()
    assert [item.id for item in library.find(workspace)] == [kept["library"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_its_settings_come_back(server, open_page, scheme):
    workspace = Workspace(server.home)
    done = [folder.name for folder in workspace.run_folders() if sweeps.result(workspace, folder.name)["state"] == "done"]
    if not done:
        spec = studio.compose("demo/pirate", overrides=["schedule.steps=6", "schedule.warmup=0", "output.sample_prompts=[]"])
        with made.at(server.home):
            done = [sweeps.start(workspace, sweeps.compose(spec, ["optim.lr=1e-5,2e-3", "method.rank=2,4"]))]
            studio.wait_until_ended(workspace, done[0], seconds=120)
    page = open_page(f"/?tab=runs&run={done[0]}&__theme={scheme}")
    page.set_viewport_size({"width": 390, "height": 900})
    expect(page.locator("#variants tbody tr")).to_have_count(4)
    expect(page.locator("[data-lines='4']")).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    assert page.locator("#chart .legend").is_visible()
    page.get_by_role("button", name="Reuse settings").click()
    expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
    unfold(page.get_by_text("Several at once: compare settings in one run"))
    expect(field(page, "sweep-values-1")).to_have_value("2, 4")
    expect(page.locator("#sweep-problems")).to_contain_text("Ready to start.")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
