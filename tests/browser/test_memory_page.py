"""Memory in a browser: the Train page tells it part by part and makes a run fit, and the Runs page tries a run again that memory ran out on."""

import pytest
from playwright.sync_api import expect

from lora_studio import runs, studio
from lora_studio.spec import parse
from lora_studio.workspace import Workspace
from tests.browser.conftest import unfold
from tests.browser.made import at

pytestmark = pytest.mark.browser


def field(page, path):
    return page.locator(f"#field-{path.replace('.', '-')}").locator("input, textarea").first


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_parts_are_shown_and_a_press_makes_the_run_fit(open_page, tmp_path, width, scheme):
    page = open_page(f"/?__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 900})
    expect(field(page, "name")).to_have_value("pirate")
    panel = page.locator("#memory")
    expect(panel.locator(".badge")).to_have_text("fits")
    expect(panel.locator("dt")).to_contain_text(["libraries", "base", "adapter", "gradients", "optimizer", "activations", "logits"])
    expect(page.locator("#make-it-fit")).to_be_hidden()
    unfold(page.get_by_text("Advanced: every other setting"))
    unfold(page.get_by_text("Schedule", exact=True))
    field(page, "schedule.batch_size").fill("100000000")
    expect(panel.locator(".badge")).to_have_text("too big")
    expect(page.locator("#problems")).to_contain_text("The run needs about")
    page.locator("#make-it-fit").click()
    expect(panel.locator(".badge")).to_have_text("fits")
    size, accumulate = (int(field(page, f"schedule.{name}").input_value()) for name in ("batch_size", "accumulate"))
    assert 1 <= size < 100_000_000 and size * accumulate >= 100_000_000 / 2
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    panel.scroll_into_view_if_needed()
    page.screenshot(path=tmp_path / "memory.png")


def test_a_run_that_ran_out_of_memory_is_tried_again_from_its_page(server, open_page):
    space = Workspace(server.home)
    with at(server.home):
        folder = runs.create(space, parse({"name": "large", "data": [{"path": "demo/pirate"}], "task": {"max_length": 64}, "schedule": {"batch_size": 8, "steps": 2, "warmup": 0}, "validation": {"size": 0}}))
        with runs.Events(folder) as events:
            events.emit("failed", reason="cpu ran out of memory at step 1. Set schedule.batch_size to 4.", key="machine.memory")
    page = open_page(f"/?tab=runs&run={folder.name}")
    page.get_by_role("button", name="Try again with schedule.batch_size 4, schedule.accumulate 2").click()
    expect(page.get_by_text("It was started again with less memory.").first).to_be_visible()
    expect(page.locator("#runs [aria-selected=true]")).not_to_have_attribute("data-id", folder.name)
    new = page.locator("#runs [aria-selected=true]").get_attribute("data-id")
    with at(server.home):
        assert studio.spec_of(space, new).schedule.batch_size == 4 and studio.spec_of(space, new).schedule.accumulate == 2
    expect(page.locator("#run-tiles")).to_contain_text("done", timeout=90_000)
    expect(page.locator("#retry")).to_be_hidden()
