"""The Pictures page in a browser: drop, look, edit one and many, undo, count, and train with what was edited."""

import http.client

import pytest
from PIL import Image
from playwright.sync_api import expect

from lora_studio import albums, workspace
from tests import tiny_captioners
from tests.browser.conftest import unfold
from tests.browser.test_pages import HOSTILE
from tests.browser.test_whole_way import box
from tests.pictures import draw
from tests.pictures.test_statistics import photo

pytestmark = pytest.mark.browser


@pytest.fixture
def space(server):
    return workspace.Workspace(server.home)


@pytest.fixture
def dropped(tmp_path):
    """Six pictures, two of them with captions beside them, and one that is none."""
    files = [photo(tmp_path / f"{index}.png", index) for index in range(6)]
    for index, text in enumerate(("a red cat", "a red dog")):
        (tmp_path / f"{index}.txt").write_text(text)
        files.append(tmp_path / f"{index}.txt")
    (tmp_path / "broken.png").write_text("oh no")
    return [str(path) for path in [*files, tmp_path / "broken.png"]]


@pytest.fixture
def made(space, tmp_path):
    """An album of some pictures, by its name."""

    def make(name: str, count: int = 4, text: str = "a cat") -> str:
        files = [draw(tmp_path / name / f"{index:03}.png", color=(index % 250, 90, 40)) for index in range(count)]
        for file in files:
            file.with_suffix(".txt").write_text(f"{text} {file.stem}")
        return albums.create(space, [*files, *(file.with_suffix(".txt") for file in files)], name=name)[0]

    return make


def caption(page, name: str):
    return page.get_by_label(f"Caption of {name}", exact=True)


def captions(space, album: str) -> dict[str, str]:
    return albums.view(space, album).captions


def told(page):
    return page.locator("#album-told")


def undo(page):
    return page.locator("#undo-edit")


def test_from_dropped_pictures_to_a_run_with_what_was_edited(open_page, space, dropped):
    page = open_page("/?tab=pictures")
    box(page, "album-name").fill("my set")
    page.locator("#drop input[type=file]").set_input_files(dropped)
    expect(told(page)).to_contain_text("6 pictures are in my set.")
    expect(told(page)).to_contain_text("broken.png was not taken: it is no picture")
    expect(page.locator("#gallery figure")).to_have_count(6)
    expect(caption(page, "0.png")).to_have_value("a red cat")
    page.wait_for_function("[...document.querySelectorAll('#gallery img')].every(image => image.naturalWidth > 0)")
    assert "album=my+set" in page.url or "album=my%20set" in page.url

    # One caption, where it stands; it is on disk when the page says so, and the next one has the keys.
    caption(page, "2.png").fill("a blue cat")
    caption(page, "2.png").press("Control+Enter")
    expect(page.locator("figure[data-name='2.png'] .told")).to_have_text("saved")
    expect(caption(page, "3.png")).to_be_focused()
    assert captions(space, "my set")["2.png"] == "a blue cat"
    expect(undo(page)).to_have_text("Undo: the caption of 2.png")

    # Many: all, then those chosen.
    box(page, "find").fill("red")
    box(page, "put").fill("green")
    page.get_by_role("button", name="Replace", exact=True).click()
    expect(told(page)).to_contain_text("2 captions were changed.")
    expect(caption(page, "0.png")).to_have_value("a green cat")
    page.get_by_label("Select 2.png").click()
    page.get_by_label("Select 4.png").click(modifiers=["Shift"])
    expect(page.locator("#scope")).to_contain_text("3 pictures")
    box(page, "words").fill("sks")
    page.get_by_role("button", name="Trigger first").click()
    expect(caption(page, "4.png")).to_have_value("sks")
    assert list(captions(space, "my set").values()) == ["a green cat", "a green dog", "sks, a blue cat", "sks", "sks", ""]

    # Undo says what it undoes, back to the single caption; pictures that were removed come back.
    expect(undo(page)).to_have_text("Undo: put the trigger “sks” before 3 captions")
    undo(page).click()
    expect(caption(page, "4.png")).to_have_value("")
    expect(undo(page)).to_have_text("Undo: replace “red” by “green” in 2 captions")
    undo(page).click()
    expect(undo(page)).to_have_text("Undo: the caption of 2.png")
    undo(page).click()
    expect(caption(page, "2.png")).to_have_value("")
    page.locator("#redo-edit").click()
    expect(caption(page, "2.png")).to_have_value("a blue cat")
    page.get_by_role("button", name="Remove the chosen pictures").click()
    expect(page.locator("#gallery figure")).to_have_count(3)
    undo(page).click()
    expect(page.locator("#gallery figure")).to_have_count(6)

    # Statistics, at the resolution asked for.
    page.get_by_text("Statistics", exact=True).click()
    expect(page.locator("#album-warnings")).to_contain_text("3 pictures without a caption: 3.png, 4.png, 5.png.")
    expect(page.locator("#album-warnings")).to_contain_text("6 pictures smaller than what is trained at 512")
    expect(page.locator("#album-tiles")).to_contain_text("96×64")

    # Train with them, as edited.
    page.get_by_role("button", name="Train with these").click()
    expect(page.get_by_role("tab", name="Train")).to_have_attribute("aria-selected", "true")
    expect(box(page, "field-task-kind")).to_have_value("image")
    expect(page.locator("#problems")).to_contain_text("Ready to start.")
    expect(page.locator("#preview")).to_contain_text("a blue cat")
    expect(box(page, "field-name")).to_have_value("my set")
    expect(page.locator("#command")).to_contain_text("--task.kind image")


def test_from_the_train_page_to_an_editable_copy_of_a_demo_and_back(open_page, space):
    page = open_page()
    page.get_by_label("Preset").click()
    page.get_by_role("option", name="demo/outline").click()
    expect(box(page, "field-name")).to_have_value("outline")
    page.locator("#edit-captions").click()
    expect(told(page)).to_contain_text("outline is an editable copy of demo/outline")
    expect(page.locator("#gallery figure")).to_have_count(24)
    caption(page, "00.png").fill("mine alone")
    page.get_by_role("tab", name="Train").click()
    expect(page.locator(".block", has=page.get_by_label("Rows to train on")).last).to_contain_text("outline")
    box(page, "field-method-rank").fill("3")
    expect(page.locator("#preview")).to_contain_text("mine alone")
    page.locator("#edit-captions").click()
    expect(told(page)).not_to_contain_text("copy")
    expect(caption(page, "00.png")).to_have_value("mine alone")
    assert albums.names(space).count("outline") == 1 and "outline-2" not in albums.names(space)


def test_pictures_dropped_on_the_train_page_become_an_album(open_page, space, dropped):
    page = open_page()
    expect(box(page, "field-name")).to_have_value("pirate")
    page.locator("input[type=file]").first.set_input_files(dropped)
    expect(page.locator("#preview")).to_contain_text("a red cat")
    expect(box(page, "field-task-kind")).to_have_value("image")
    expect(page.get_by_text("broken.png was not taken").first).to_be_visible()
    page.locator("#edit-captions").click()
    expect(caption(page, "1.png")).to_have_value("a red dog")


@pytest.mark.slow
def test_a_model_writes_captions_as_a_run_that_can_be_undone(open_page, space, tmp_path):
    blip = tiny_captioners.blip(tmp_path / "tiny-blip")
    for index, color in enumerate(("red", "blue", "red")):
        Image.new("RGB", (40, 40), tiny_captioners.COLOURS[color]).save(tmp_path / f"{index}.png")
    album, _ = albums.create(space, [tmp_path / f"{index}.png" for index in range(3)], name="colours")
    page = open_page(f"/?album={album}")
    unfold(page.get_by_text("Let a model write captions"))
    page.get_by_label("Image-to-text model").fill(str(blip))
    page.get_by_label("Image-to-text model").press("Enter")
    page.locator("#write-captions").click()
    expect(page.get_by_role("tab", name="Runs")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#runs .run").first).to_contain_text("captions for colours")
    expect(page.locator("#notes")).to_contain_text("3 captions are in colours", timeout=90_000)
    expect(page.locator("#run-tiles")).to_contain_text("3 / 3")
    expect(page.get_by_role("button", name="Reuse settings")).to_be_disabled()
    page.get_by_role("tab", name="Pictures").click()
    expect(caption(page, "1.png")).to_have_value("a blue picture")
    expect(undo(page)).to_contain_text("Undo: captions by")
    undo(page).click()
    expect(caption(page, "1.png")).to_have_value("")


def test_two_tabs_never_lose_an_edit(open_page, space, made):
    album = made("shared")
    first, second = open_page(f"/?album={album}"), open_page(f"/?album={album}")
    for page in (first, second):
        expect(caption(page, "000.png")).to_have_value("a cat 000")
    second.wait_for_function("window.studioIsReady")
    second.wait_for_timeout(1500)  # until it has shown the album and asks no more
    caption(first, "000.png").fill("of the first")
    caption(first, "000.png").press("Control+Enter")
    expect(first.locator("figure[data-name='000.png'] .told")).to_have_text("saved")
    caption(second, "000.png").fill("of the second")
    caption(second, "000.png").press("Tab")
    expect(second.locator("figure[data-name='000.png'] .told")).to_contain_text("changed elsewhere meanwhile, to: of the first")
    expect(caption(second, "000.png")).to_have_value("of the second")
    assert captions(space, album)["000.png"] == "of the first"
    box(first, "words").fill("x")
    first.get_by_role("button", name="Put before").click()
    expect(caption(first, "003.png")).to_have_value("x a cat 003")
    box(second, "words").fill("y")
    second.get_by_role("button", name="Put before").click()
    expect(told(second)).to_contain_text("was changed elsewhere since this page showed it, so nothing was done")
    expect(caption(second, "003.png")).to_have_value("x a cat 003")
    expect(caption(second, "000.png")).to_have_value("of the second")  # what was typed is kept
    caption(second, "000.png").press("Control+Enter")
    expect(second.locator("figure[data-name='000.png'] .told")).to_contain_text("to: x of the first")
    caption(second, "000.png").press("Control+Enter")
    expect(second.locator("figure[data-name='000.png'] .told")).to_have_text("saved")
    assert captions(space, album) == {"000.png": "of the second", **{f"00{index}.png": f"x a cat 00{index}" for index in (1, 2, 3)}}


def test_the_keys_reach_everything(open_page, space, made):
    page = open_page(f"/?album={made('keys')}")
    page.get_by_label("Select 000.png").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("Select 001.png")).to_be_focused()
    page.keyboard.press("Space")
    expect(page.get_by_label("Select 001.png")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Shift+ArrowRight")
    expect(page.locator("#scope")).to_contain_text("2 pictures")
    page.keyboard.press("Escape")
    expect(page.locator("#scope")).to_contain_text("all 4 pictures")
    page.keyboard.press("Control+a")
    expect(page.locator("#scope")).to_contain_text("4 pictures chosen")
    page.keyboard.press("Enter")
    expect(caption(page, "002.png")).to_be_focused()
    page.keyboard.type("!")
    page.keyboard.press("Escape")
    expect(caption(page, "002.png")).to_have_value("a cat 002")
    expect(page.get_by_label("Select 002.png")).to_be_focused()


def test_an_album_that_was_removed_comes_back(open_page, space, made):
    album = made("dear")
    page = open_page(f"/?album={album}")
    unfold(page.get_by_text("Remove an album, or bring one back"))
    page.locator("#discard-album").click()
    expect(told(page)).to_contain_text("dear was removed")
    assert album not in albums.names(space)
    page.locator("#restore-album").click()
    expect(told(page)).to_contain_text("dear is back")
    expect(caption(page, "003.png")).to_have_value("a cat 003")


def test_two_thousand_pictures_come_in_pages_and_are_edited_at_once(open_page, space, tmp_path):
    place = tmp_path / "many"
    original = draw(tmp_path / "one.png").read_bytes()
    place.mkdir()
    for index in range(2000):
        (place / f"{index:04}.png").write_bytes(original)
    album, _ = albums.copy(space, str(place))
    page = open_page(f"/?album={album}")
    expect(page.locator("#gallery figure")).to_have_count(60)
    expect(page.locator("#album-count")).to_contain_text("1 to 60 of 2,000 pictures")
    page.get_by_role("button", name="Next").click()
    expect(caption(page, "0060.png")).to_be_visible()
    box(page, "words").fill("sks")
    page.get_by_role("button", name="Trigger first").click()
    expect(told(page)).to_contain_text("2,000 captions were changed.")
    expect(caption(page, "0060.png")).to_have_value("sks")
    box(page, "search-pictures").fill("1999")
    expect(page.locator("#album-count")).to_contain_text("1 picture of the 2,000 in the album")
    expect(caption(page, "1999.png")).to_have_value("sks")


def test_no_script_of_a_stranger_runs_and_hostile_words_survive(open_page, space, made):
    album = made("hostile")
    hostile = " ".join(HOSTILE.split())
    page = open_page(f"/?album={album}")
    caption(page, "000.png").fill(hostile)
    caption(page, "000.png").press("Control+Enter")
    expect(page.locator("figure[data-name='000.png'] .told")).to_have_text("saved")
    box(page, "find").fill("a cat")
    box(page, "put").fill(hostile)
    page.get_by_role("button", name="Replace", exact=True).click()
    expect(told(page)).to_contain_text("3 captions were changed.")
    page = open_page(f"/?album={album}")
    caption(page, "000.png").focus()
    caption(page, "001.png").fill(caption(page, "001.png").input_value() + "!")
    caption(page, "001.png").press("Control+Enter")
    expect(page.locator("figure[data-name='001.png'] .told")).to_have_text("saved")
    assert captions(space, album)["000.png"] == hostile and captions(space, album)["001.png"] == f"{hostile} 001!"
    page.get_by_text("Statistics", exact=True).click()
    expect(page.locator("#album-tiles")).to_contain_text("pictures")
    assert page.evaluate("window.hacked") is None and not page.evaluate("document.body.classList.contains('http:')")


def test_the_route_of_pictures_gives_pictures_of_albums_only(server, made):
    def ask(path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        connection.request("GET", f"/studio/album/{path}")  # as it stands, where a browser would tidy it up
        answer = connection.getresponse()
        return answer.status, answer.headers["content-type"]

    album = made("route", count=1)
    assert ask(f"{album}/000.png") == (200, "image/jpeg") == ask(f"{album}/000.png?size=large")
    for path in ("x/0.png", f"{album}/../{album}/000.png", f"{album}/%2e%2e/{album}/000.png", f"{album}/.album/history.json", f"{album}/000.txt",
                 "..%2f..%2fetc/passwd", f"../data/{album}/000.png", f"{album}//etc/passwd", f"{album}/000.png?size=huge"):  # fmt: skip
        assert ask(path)[0] in (400, 404), path


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(open_page, made, scheme):
    page = open_page(f"/?album={made('width', text='averyverylongwordwithoutanyspaceinit' * 4)}&__theme={scheme}")
    page.get_by_text("Statistics", exact=True).click()
    expect(page.locator("#album-tiles")).to_contain_text("pictures")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        page.wait_for_timeout(300)
        tops = page.evaluate("['drop', 'copy', 'tools', 'captioner', 'statistics', 'discard', 'gallery'].map(id => document.getElementById(id).getBoundingClientRect().top)")
        assert tops[:6] == sorted(tops[:6]) and (width > 900 or tops == sorted(tops))
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
