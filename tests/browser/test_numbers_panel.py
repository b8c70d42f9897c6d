"""The numbers of an adapter in a browser: those of the verb, and the latency measured on request."""

import re

import pytest
from playwright.sync_api import expect

from lora_studio import numbers
from lora_studio.workspace import Workspace
from tests.browser import made

pytestmark = pytest.mark.browser


def test_the_library_tells_the_numbers_and_measures_the_latency(server, open_page, tmp_path):
    ids = [made.adapter(server.home, name, seed=seed, rank=rank) for seed, (name, rank) in enumerate((("small", 2), ("large", 12)))]
    page = open_page(f"/?tab=library&adapter={ids[0]}")
    page.locator("#adapter-numbers").get_by_text("Numbers").click()
    shown = page.locator("#numbers dd")
    for id in ids:
        page.locator(f"#cards [data-id='{id}']").click()
        with made.at(server.home):
            wanted = numbers.of(Workspace(server.home), id)
        assert wanted.work and wanted.full
        expect(shown).to_have_text([words for _, words in wanted.rows()])
    page.get_by_role("button", name="Measure latency").click()
    told = page.locator("#numbers-told")
    expect(told).to_contain_text(
        re.compile(r"Merged it takes \d+ % of the base's time, unmerged \d+ %: .*medians of 15 rounds in turns; 64 tokens on cpu"),
        timeout=90_000,
    )
    page.set_viewport_size({"width": 390, "height": 844})
    page.evaluate("document.body.classList.add('dark')")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    page.screenshot(path=tmp_path / "numbers.png", full_page=True)
