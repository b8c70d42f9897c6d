"""The whole way in a browser with nothing faked: start the demo, watch it, reload, kill the server, stop, resume, read the result."""

import json
import re
import time
import zipfile

import pytest
from playwright.sync_api import expect

from lora_studio import durable, runs, workspace
from lora_studio.jobs import local

pytestmark = pytest.mark.browser


def tile(page, label):
    return page.locator("#run-tiles .tiles div", has=page.get_by_text(label, exact=True)).locator("b")


def step_of(page) -> int:
    return int(tile(page, "step").inner_text().split("/")[0])


def wait_for_step(page, least: int, seconds: float = 90) -> int:
    until = time.monotonic() + seconds
    while True:
        if tile(page, "step").count() and (step := step_of(page)) >= least:
            return step
        assert time.monotonic() < until, page.locator("#log textarea").input_value()
        time.sleep(0.2)


def test_a_demo_from_start_to_result_through_every_accident(server, open_page):
    page = open_page()
    expect(page.locator("#field-name input, #field-name textarea").first).to_have_value("pirate")
    page.locator("#field-schedule-steps input, #field-schedule-steps textarea").first.fill("400")
    expect(page.locator("#problems")).to_contain_text("Ready to start.")
    page.get_by_role("button", name="Start training").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true", timeout=90_000)
    folder = workspace.Workspace(server.home).run_folders()[0]

    # It trains, and the chart grows.
    seen = wait_for_step(page, 5)
    expect(page.locator("[data-points]").first).to_be_attached()
    expect(page.locator("#samples")).to_contain_text("What color is the fox?")

    # A reload changes nothing.
    page.reload()
    assert wait_for_step(page, seen + 1) > seen
    assert page.url.endswith(folder.name) or "tab=runs" in page.url

    # Killing the server changes nothing either: the run goes on, and a new server finds it.
    server.kill()
    before = runs.status(folder).step
    time.sleep(1.5)
    assert runs.is_live(folder) and runs.status(folder).step > before
    server.start()
    page = open_page(f"/?tab=runs&run={folder.name}")
    wait_for_step(page, before + 1)
    assert len(workspace.Workspace(server.home).run_folders()) == 1

    # Stop asks; keep going keeps going; stop and save stops and saves.
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_role("button", name="Keep going").click()
    expect(page.locator("#stop-box")).to_be_hidden()
    wait_for_step(page, step_of(page) + 1)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#stop-box")).to_contain_text("The run goes on until you choose.")
    page.get_by_role("button", name="Stop and save").click()
    expect(tile(page, "state")).to_have_text("stopped", timeout=30_000)
    stopped = runs.status(folder).step
    assert durable.damage(folder / "adapter") is None
    until = time.monotonic() + 20
    while local.processes(folder):
        assert time.monotonic() < until
        time.sleep(0.1)

    # Resume says what it restored, and the run ends.
    page.get_by_role("button", name="Resume").click()
    expect(page.locator("#notes")).to_contain_text(f"Restored step {stopped} of 400", timeout=60_000)
    expect(tile(page, "state")).to_have_text("done", timeout=180_000)
    steps = [event["step"] for event in runs.read_all(folder) if event["kind"] == "step"]
    assert steps == list(range(1, 401))

    # The result: read on the page, and downloaded.
    expect(page.locator("#samples")).to_contain_text(re.compile(r"(arr|ahoy|aye)", re.IGNORECASE))
    with page.expect_download() as download:
        page.get_by_role("button", name="Download adapter").or_(page.get_by_role("link", name="Download adapter")).first.click()
    archive = zipfile.ZipFile(download.value.path())
    assert sorted(archive.namelist()) == ["pirate/adapter_config.json", "pirate/adapter_model.safetensors"]
    assert json.loads(archive.read("pirate/adapter_config.json"))["base_model_name_or_path"] == "demo-text"
