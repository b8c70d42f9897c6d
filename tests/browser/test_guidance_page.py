"""Guidance on the Train page: recommended settings with their reasons, taken back again; what makes no sense is greyed and not taken."""

import pytest
from playwright.sync_api import expect

from tests.browser.conftest import unfold

pytestmark = pytest.mark.browser


def field(page, path):
    return page.locator(f"#field-{path.replace('.', '-')}").locator("input, textarea").first


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_recommended_settings_are_filled_in_with_reasons_and_taken_back(open_page, width, scheme):
    page = open_page(f"/?__theme={scheme}")
    page.set_viewport_size({"width": width, "height": 900})
    expect(field(page, "name")).to_have_value("pirate")
    field(page, "method.rank").fill("3")
    field(page, "method.rank").press("Tab")
    page.locator("#recommend").click()
    expect(field(page, "method.rank")).to_have_value("8")
    page.get_by_text("Why these settings").click()
    expect(page.locator("#reasons dd").filter(has_text="Preset demo/pirate is made for demo-text.")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.locator("#recommend-undo").click()
    expect(field(page, "method.rank")).to_have_value("3")
    expect(page.locator("#recommend-undo")).to_be_hidden()


def test_a_method_that_does_not_go_with_the_base_is_greyed_and_not_taken(open_page):
    page = open_page()
    expect(field(page, "name")).to_have_value("pirate")
    unfold(page.get_by_text("Advanced: every other setting"))
    unfold(page.get_by_text("Compute", exact=True))
    field(page, "compute.quantize").click()
    page.get_by_role("option", name="4bit").click()
    expect(page.locator("#command")).to_contain_text("--compute.quantize 4bit")
    field(page, "method.kind").click()  # the marks come a moment after the choice that brings them, also into a list that is open
    refused = page.get_by_role("option", name="✗ loha: does not work on a base in 4 bits")
    assert refused.evaluate("option => getComputedStyle(option).opacity") < "1"
    refused.click()
    expect(page.get_by_text("method.kind loha does not work on a base in 4 bits. Set compute.quantize to 8bit or none").first).to_be_visible()
    expect(field(page, "method.kind")).to_have_value("lora")
    expect(field(page, "method.rank")).to_have_value("8")
    expect(page.locator("#problems")).to_contain_text("Ready to start.")
