"""The Library page: find, change, remove and bring back, import and download, and the ways to the other pages."""

import json
import re
import zipfile
from pathlib import Path

import pytest
from playwright.sync_api import expect

from lora_studio import library, workspace
from lora_studio.home import demo_base
from tests.browser.conftest import unfold
from tests.browser.test_pages import HOSTILE
from tests.tiny import adapter_files

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def shelf(server):
    """Three adapters in the server's library, the second with everything written on it."""
    space = workspace.Workspace(server.home)
    made = {}
    for number, name in enumerate(("pirate", "capitals", "haiku")):
        files = adapter_files(demo_base("demo-text"), seed=number, rank=2 + number, name="demo-text")
        more = {"tags": ["style", "terse"], "notes": "about weather", "trigger": "sks"} if name == "capitals" else {}
        made[name] = library.add(space, files, {"name": name, "base": "demo-text", "created": 1.7e9 + number, **more})
    return space, made


def cards(page):
    return page.locator("#cards .card b")


def choose(page, name):
    page.locator("#cards .card", has_text=name).click()
    expect(page.locator("#adapter-name textarea, #adapter-name input").first).to_have_value(name)


def test_search_filters_and_order_find_it(open_page, shelf):
    page = open_page("/?tab=library")
    expect(cards(page)).to_have_text(["haiku", "capitals", "pirate"])
    search = page.get_by_label("Search")
    search.press_sequentially("weather")
    expect(cards(page)).to_have_text(["capitals"])
    expect(page.locator("#library-count")).to_contain_text("1 of 3 adapters")
    search.fill("no such thing")
    expect(page.locator("#cards")).to_contain_text("No adapter fits")
    search.fill("")
    page.get_by_label("Tag", exact=True).click()
    page.get_by_role("option", name="terse", exact=True).click()
    expect(cards(page)).to_have_text(["capitals"])
    page.get_by_label("Tag", exact=True).click()
    page.get_by_role("option", name="any", exact=True).click()
    page.get_by_label("Order").click()
    page.get_by_role("option", name="By name", exact=True).click()
    expect(cards(page)).to_have_text(["capitals", "haiku", "pirate"])


def test_what_is_known_can_be_changed_and_a_name_that_is_taken_cannot(open_page, shelf):
    space, made = shelf
    page = open_page(f"/?tab=library&adapter={made['haiku']}")
    expect(page.locator("#facts")).to_contain_text("lora, rank 4")
    expect(page.locator("#facts")).to_contain_text(made["haiku"])
    name = page.locator("#adapter-name textarea, #adapter-name input").first
    name.fill("pirate")
    page.get_by_role("button", name="Save changes").click()
    expect(page.locator("#adapter-told")).to_contain_text("There is an adapter called pirate already")
    expect(name).to_have_value("pirate")
    name.fill("haiku two")
    page.get_by_label("Tags (comma between)").fill("short, three lines")
    page.get_by_label("Notes").fill("seventeen syllables")
    page.get_by_role("button", name="Save changes").click()
    expect(page.locator("#adapter-told")).to_contain_text("Saved.")
    page.get_by_role("button", name="Favourite").click()
    expect(page.get_by_role("button", name="★ Favourite")).to_be_visible()
    card = library.card(space, made["haiku"])
    assert (card["name"], card["tags"], card["notes"], card["favourite"]) == ("haiku two", ["short", "three lines"], "seventeen syllables", True)
    page.get_by_role("checkbox", name="Favourites only").check()
    expect(cards(page)).to_have_text([re.compile("haiku two")])
    library.rename(space, made["haiku"], "haiku")
    library.favourite(space, made["haiku"], False)


def test_removed_is_brought_back_as_it_was(open_page, shelf):
    space, made = shelf
    page = open_page("/?tab=library")
    choose(page, "capitals")
    before = library.card(space, made["capitals"])
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator("#undo-box")).to_contain_text("capitals was removed.")
    expect(cards(page)).to_have_text(["haiku", "pirate"])
    assert library.count(space) == 2
    page.get_by_role("button", name="Undo").click()
    expect(cards(page)).to_have_text(["haiku", "capitals", "pirate"])
    assert library.card(space, made["capitals"]) == before
    choose(page, "pirate")
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(cards(page)).to_have_text(["haiku", "capitals"])
    page = open_page("/?tab=library")
    unfold(page.get_by_text("Recently removed"))
    page.get_by_role("button", name="Bring it back").click()
    expect(cards(page)).to_have_text(["haiku", "capitals", "pirate"])


def test_a_download_is_checked_and_comes_back_by_upload(open_page, shelf, tmp_path):
    space, made = shelf
    page = open_page(f"/?tab=library&adapter={made['pirate']}")
    page.get_by_role("button", name="Check files").click()
    expect(page.locator("#adapter-told")).to_contain_text("Every byte is what it was")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download", exact=True).or_(page.get_by_role("link", name="Download", exact=True)).first.click()
    archive = tmp_path / "it.zip"
    download.value.save_as(archive)
    assert sorted(zipfile.ZipFile(archive).namelist()) == ["pirate/adapter_config.json", "pirate/adapter_model.safetensors"]
    library.remove(space, made["pirate"])
    page = open_page("/?tab=library")
    unfold(page.get_by_text("Add an adapter"))
    page.locator("#import-files input[type=file]").set_input_files(str(archive))
    page.locator("#import").get_by_label("Name", exact=True).fill("pirate")
    expect(page.locator("#import-files")).to_contain_text("it")
    page.get_by_role("button", name="Check and add").click()
    expect(page.locator("#import-told")).to_contain_text("pirate is in the library.", timeout=60_000)
    assert library.card(space, made["pirate"])["name"] == "pirate"
    expect(page.locator("#facts")).to_contain_text(made["pirate"])


def test_what_cannot_enter_is_a_sentence_and_what_was_typed_stays(open_page, shelf, tmp_path):
    space, _ = shelf
    before = library.count(space)
    evil, image = tmp_path / "evil.safetensors", tmp_path / "image"
    evil.write_bytes(b"\x80\x04\x95pickled")
    page = open_page("/?tab=library")
    unfold(page.get_by_text("Add an adapter"))
    source = page.locator("#import-source textarea, #import-source input").first
    for text, words in (
        (str(evil), "pickle"),
        (str(image), "is not there"),
        ("nobody/nothing", "HF_HUB_OFFLINE"),
        ("", "Nothing was given"),
    ):
        source.fill(text)
        page.get_by_role("button", name="Check and add").click()
        expect(page.locator("#import-told")).to_contain_text(words, timeout=60_000)
        expect(source).to_have_value(text)
    assert library.count(space) == before


def test_damage_is_said_and_nothing_can_be_done_with_it_by_mistake(open_page, shelf, server):
    space, made = shelf
    weights = Path(library.adapter_folder(space, made["haiku"])) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + b"x")
    page = open_page(f"/?tab=library&adapter={made['haiku']}")
    page.get_by_role("button", name="Check files").click()
    expect(page.locator("#adapter-told")).to_contain_text("The files are damaged: adapter_model.safetensors has changed since it was written.")
    expect(page.locator("#cards")).to_contain_text("damaged")
    weights.write_bytes(whole)
    page.get_by_role("button", name="Check files").click()
    expect(page.locator("#adapter-told")).to_contain_text("Every byte is what it was")


def test_no_script_of_a_stranger_runs_and_its_parents_and_children_are_found(open_page, shelf):
    space, made = shelf
    library.update(space, made["haiku"], name=HOSTILE[:80], notes=HOSTILE, trigger=HOSTILE, tags=[HOSTILE[:40]])
    file = space.root / "library" / made["capitals"] / "card.json"
    card = json.loads(file.read_text())
    card |= {"parents": [{"id": made["haiku"], "name": "x", "sha256": "", "weight": 0.5}], "source": HOSTILE, "targets": [HOSTILE], "run": HOSTILE, "metrics": {HOSTILE: 1.0}}
    file.write_text(json.dumps(card))
    page = open_page(f"/?tab=library&adapter={made['haiku']}")
    expect(page.locator("#cards")).to_contain_text("<img src=x")
    page.locator("#tree").get_by_role("button", name="capitals").click()
    expect(page.locator("#facts")).to_contain_text("<img src=x")
    page.locator("#tree").get_by_role("button", name="× 0.5").click()
    expect(page.locator("#tree").get_by_role("button", name="capitals")).to_be_visible()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(page.locator("#undo-box")).to_contain_text("was removed")
    page.get_by_role("button", name="Undo").click()
    page.get_by_role("tab", name="Publish").click()
    expect(page.locator("#readme")).to_contain_text("library_name: peft")
    assert page.evaluate("window.hacked") is None and not page.evaluate("document.body.classList.contains('http:')")


def test_nothing_of_anothers_can_be_downloaded(open_page, shelf, server):
    page = open_page()
    for id in ("../../etc/passwd", "0" * 16, "nope", "%2e%2e"):
        assert page.request.get(f"{server.url}/studio/library/{id}").status == 404
