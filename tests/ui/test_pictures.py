"""The Pictures page's handlers: what they show is what is on disk, a page at a time, and what cannot be done is said."""

import gradio as gr
import pytest

from lora_studio import albums
from lora_studio.ui import counts, gallery, theme
from lora_studio.ui.pictures import Pictures
from tests.pictures import draw


@pytest.fixture
def page(workspace):
    found = Pictures(workspace)
    with gr.Blocks():
        found.build()
    return found


@pytest.fixture
def album(workspace, tmp_path):
    files = [draw(tmp_path / f"{index:03}.png", size=(8, 8), color=(index, 9, 9)) for index in range(130)]
    return albums.create(workspace, files, name="mine")[0]


def value(page, updates: list, part):
    """What an update gives one part of the page."""
    return updates[page.shown.index(part)]


def test_a_large_album_comes_in_pages_and_a_page_too_far_is_the_last(page, album):
    first, last = page.look(album, 0, "", "all", []), page.look(album, 99, "", "all", [])
    assert [len(value(page, updates, page.gallery)["items"]) for updates in (first, last)] == [60, 10]
    assert value(page, first, page.count) == "1 to 60 of 130 pictures" and value(page, last, page.count) == "121 to 130 of 130 pictures"
    assert value(page, last, page.page) == 2 and value(page, last, page.next)["interactive"] is False


def test_search_and_filter_show_what_fits_and_choose_all_takes_just_that(page, album, workspace):
    albums.write(workspace, album, {"001.png": "a Cat", "002.png": "a cat", "003.png": "a cat", "004.png": "a dog"})
    view = albums.view(workspace, album)
    assert albums.fitting(view, "CAT", "all", []) == ["001.png", "002.png", "003.png"]
    assert albums.fitting(view, "", "same", []) == ["002.png", "003.png"] and len(albums.fitting(view, "", "missing", [])) == 126
    updates = page.choose_all(album, 0, "cat", "all", [])
    assert value(page, updates, page.chosen) == ["001.png", "002.png", "003.png"]
    assert value(page, updates, page.scope) == "Acts on the **3 pictures** chosen."
    assert value(page, page.look(album, 0, "", "chosen", ["003.png", "gone.png"]), page.chosen) == ["003.png"]


def test_every_value_of_the_gallery_differs_so_that_the_page_is_put_right(page, album):
    first, second = (value(page, page.look(album, 0, "", "all", []), page.gallery) for _ in range(2))
    assert first["turn"] != second["turn"] and first["items"] == second["items"]


def test_an_album_that_is_gone_is_said(page, album):
    updates = page.open("nowhere")
    assert updates[0]["value"] == "" and "There is no album nowhere" in updates[page.opened.index(page.told)][0]["sentence"]
    assert "There is no album nowhere" in value(page, page.look("nowhere", 0, "", "all", []), page.gallery)["none"]


def test_the_saver_answers_whatever_it_is_asked(workspace, album):
    import json

    save = gallery.saver(lambda: workspace)
    assert json.loads(save([album, "000.png", " a cat ", ""]))["text"] == "a cat"
    assert json.loads(save([album, "000.png", "a dog", ""])) == {"sentence": "The caption of 000.png was changed elsewhere meanwhile, to: a cat. Yours was not written. Compare them, then save again.", "now": "a cat"}
    for asked in (None, [], ["x"], [album, "../000.png", "x", ""], ["nowhere", "000.png", "x", ""], [1, 2, 3, 4], {"a": 1}):
        assert json.loads(save(asked))["sentence"]
    assert albums.view(workspace, album).captions["000.png"] == "a cat"


def test_what_is_shown_of_statistics_says_what_to_do():
    found = {
        "pictures": 3, "unreadable": ["x.png"], "sizes": {}, "size_count": 2, "smallest": "64×64", "largest": "128×64", "resolution": 512, "buckets": {"512×512": 3},
        "enlarged": {"count": 1, "names": ["a.png"]}, "narrow": {"count": 0, "names": []}, "missing": {"count": 7, "names": list("abcdefg")},
        "words": {"least": 1, "middle": 2, "most": 3, "lengths": {"1 to 5": 3}}, "over_clip": {"count": 1, "names": ["b.png"], "tokens": 77},
        "same_caption": [{"caption": "x", "count": 2, "names": ["a", "b"]}], "tags": [{"tag": str(index), "count": 20 - index} for index in range(12)], "copies": [["a", "b"]], "alike": [["c", "d"]],
    }  # fmt: skip
    told = [one["sentence"] for one in counts.sentences_of(found)]
    assert told[0] == "7 pictures without a caption: a, b, c, d, e and 2 more. Write them, or set a trigger word on the Train page."
    assert len(told) == 7 and all(sentence.endswith(".") for sentence in told)
    bars = counts.bars_of(found)
    assert [len(one["rows"]) for one in bars] == [1, 1, 9] and bars[2]["rows"][-1]["label"] == "others"
    assert {one["label"]: one["value"] for one in counts.tiles_of(found)}["words a caption"] == "1 to 3"
    assert theme.disarm(bars) == bars


def test_a_page_whose_album_was_taken_away_meanwhile_says_so(page, album, workspace):
    class Event:
        names, turn, before, after = ["000.png"], 7, "a", "b"

    albums.discard(workspace, album)
    assert page.choose(Event(), album, 6)[:2] == [7, ["000.png"]]
    assert page.choose(Event(), album, 7) == [gr.skip()] * 4  # a later choice has arrived before it
    for updates in (page.saved(Event(), "a", album, 0, "", "all", []), page.choose_all(album, 0, "", "all", []), page.fresh(album, 0, "", "all", [], "a")[-len(page.shown) :]):
        assert "There is no album mine" in value(page, updates, page.gallery)["none"]
    assert "There is no album" in page.take_back(album, [], "a")[0]["sentence"]
    assert "There is no album" in page.throw_away(album)[page.opened.index(page.told)][0]["sentence"]


@pytest.mark.parametrize("resolution", [16, 1_000_000_000, 7.0])
def test_a_resolution_that_is_none_is_a_sentence_that_names_it(page, album, resolution):
    tiles, told, bars = page.recount(album, page.resolution.preprocess(resolution), True)
    assert (tiles, bars) == ([], []) and "task.resolution" in told[0]["sentence"] and f"{int(resolution)}" in told[0]["sentence"].replace(",", "")
    assert page.recount(album, None, True)[0] == page.recount(album, 512, True)[0]
