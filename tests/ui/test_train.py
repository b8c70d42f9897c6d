"""The Train page's ways in for pictures: a zip is a source, loose pictures become an album, and the form turns to pictures."""

import zipfile

import gradio as gr
import pytest

from lora_studio import albums
from lora_studio.ui.train import Train, sources_of
from tests.pictures import draw


@pytest.fixture
def page(workspace):
    found = Train(workspace)
    with gr.Blocks():
        found.build()
    return found


def kept(page, files, *, data="", kind="chat", base="demo-text") -> list:
    given = {page.upload: [str(file) for file in files], page.form["data"]: data, page.form["base.id"]: base, page.form["task.kind"]: kind}
    return page.keep(given)


def test_a_zip_is_added_to_the_sources_and_changes_nothing_else(page, tmp_path):
    with zipfile.ZipFile(tmp_path / "mine.zip", "w") as packed:
        packed.write(draw(tmp_path / "a.png"), "a.png")
    kind, data, _, *rest = kept(page, [tmp_path / "mine.zip"], data="- path: demo/stripes", kind="image", base="demo-image")
    assert [source["path"].rsplit("/", 1)[-1] for source in sources_of(data)] == ["stripes", "mine.zip"]
    assert all(update == gr.skip() for update in (kind, *rest))


def test_loose_pictures_become_an_album_and_the_form_turns_to_pictures(page, workspace, tmp_path):
    (tmp_path / "a.txt").write_text("a\ncat")
    kind, data, picked, base, edge, name, prompts = kept(page, [draw(tmp_path / "a.png"), tmp_path / "a.txt"], data="- path: demo/pirate")
    (album,) = albums.names(workspace)
    assert [source["path"] for source in sources_of(data)] == picked["value"] == [str(workspace.data / album)]
    assert (kind, base, edge, name, prompts) == ("image", "demo-image", "64", album, "a cat")


def test_loose_pictures_join_the_sources_of_an_image_run(page, workspace, tmp_path):
    kind, data, _, base, *_ = kept(page, [draw(tmp_path / "a.png")], data="- path: demo/stripes\n  weight: 2", kind="image", base="demo-image")
    assert sources_of(data) == [{"path": "demo/stripes", "weight": 2}, {"path": str(workspace.data / albums.names(workspace)[0])}]
    assert kind == base == gr.skip()


def test_a_base_that_draws_stays_when_pictures_are_brought(page):
    kind, _, _, *rest = page.bring("somewhere", "demo-image", "image")
    assert kind == "image" and all(update == gr.skip() for update in rest)
    assert page.bring("somewhere", "an/unknown-model", "image")[3] == gr.skip()
    assert page.bring("somewhere", "Qwen/Qwen3-4B", "chat")[3] == "demo-image"


def test_what_is_refused_changes_nothing(page, workspace, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(gr, "Warning", told.append)
    (tmp_path / "bad.png").write_text("x")
    assert all(update == gr.skip() for update in kept(page, [tmp_path / "bad.png"])) and "bad.png was not taken" in told[0]
    assert albums.names(workspace) == []
