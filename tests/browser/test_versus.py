"""The page LoRA+: a comparison is started, drawn with its bands, told in words beside the paper's claim, found again after a reload, and stopped."""

import json

import pytest
from playwright.sync_api import expect

from lora_studio import comparisons
from lora_studio.workspace import Workspace

pytestmark = pytest.mark.browser


def fill(page, **values):
    for name, value in values.items():
        field = page.locator(f"#versus-{name} input, #versus-{name} textarea").first
        field.fill(str(value))
        field.blur()


def colours(page):
    """How many colours besides the ground there are on the canvas."""
    return page.locator("#versus-chart canvas").evaluate(
        """canvas => { const all = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data, seen = new Set();
        for(let i = 0; i < all.length; i += 4) if(all[i + 3] > 200) seen.add([all[i], all[i + 1], all[i + 2]].map(one => one >> 5).join()); return seen.size; }"""
    )


@pytest.fixture(scope="module")
def shown(server):
    """The figures of the newest comparison of the server's home."""

    def newest():
        workspace = Workspace(server.home)
        return comparisons.result(workspace, max(folder.name for folder in workspace.run_folders()))

    return newest


def test_a_comparison_is_measured_drawn_told_and_found_again(open_page, shown):
    page = open_page("/?tab=versus")
    expect(page.get_by_role("tab", name="LoRA+")).to_have_attribute("aria-selected", "true")
    fill(page, steps=6, seeds=2, rates="2e-3, 4e-3", **{"plus-rates": "3e-4"})
    page.locator("#versus-start").click()
    chart = page.locator("#versus-chart [data-state]")
    expect(chart).to_have_attribute("data-state", "done", timeout=180_000)
    told = shown()
    assert told["methods"]["lora"]["tried"][0][0] == 2e-3 and told["methods"]["lora_plus"]["rate"] == 3e-4 and told["seeds"] == 2
    rows = page.locator("#versus-chart tbody tr")
    expect(rows).to_have_count(2)
    for row, one in zip(rows.all(), told["methods"].values()):
        cells = row.locator("td").all_text_contents()
        assert cells[0] == one["name"] and float(cells[1]) == pytest.approx(one["rate"], rel=0.05)
        assert float(cells[2]) == pytest.approx(one["final"], rel=0.01)
        assert [float(part) for part in cells[3].split(" to ")] == pytest.approx(one["spread"], rel=0.01)
        assert cells[4] == ("not reached" if one["reach"] is None else f"step {one['reach']:.0f} of 6")
    assert page.locator("#versus-chart .words li").all_text_contents() == told["words"]
    expect(page.locator("#versus-chart .claim")).to_contain_text("up to 2 times as fast")
    assert colours(page) >= 3
    page.reload()
    page.get_by_role("tab", name="LoRA+").wait_for()
    expect(page.locator("#versus-chart .words li").first).to_have_text(told["words"][0])


def test_what_cannot_be_compared_is_said_and_nothing_is_lost(open_page):
    page = open_page("/?tab=versus")
    for values, words in (
        ({"rates": "fast"}, "no list of rates"),
        ({"rates": "1e-3, 1e-3"}, "twice"),
        ({"rates": "", "steps": 0}, "schedule.steps"),
    ):
        fill(page, **values)
        page.locator("#versus-start").click()
        expect(page.locator("#versus-told")).to_contain_text(words)
    expect(page.locator("#versus-steps input").first).to_have_value("0")


def test_a_comparison_that_goes_on_can_be_stopped(open_page, shown):
    page = open_page("/?tab=versus")
    fill(page, steps=400, seeds=1, rates="2e-3", **{"plus-rates": "3e-4"})
    page.locator("#versus-start").click()
    expect(page.locator("#versus-stop")).to_be_enabled()
    expect(page.locator("#versus-chart output")).to_contain_text("step", timeout=120_000)
    page.locator("#versus-stop").click()
    expect(page.locator("#versus-chart [data-state]")).to_have_attribute("data-state", "stopped", timeout=120_000)
    assert shown()["state"] == "stopped" and json.dumps(shown())


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_fits_every_width(open_page, width):
    page = open_page("/?tab=versus")
    page.set_viewport_size({"width": width, "height": 800})
    expect(page.locator("#versus-start")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
