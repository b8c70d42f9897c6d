"""The verbs of albums: made whole or not at all, only in their own workspace, and the studio is never harmed by what was dropped."""

import os

import pytest

from lora_studio import albums
from lora_studio.errors import DataError, StudioError
from lora_studio.workspace import Workspace
from tests.pictures import draw


@pytest.fixture
def album(workspace, tmp_path):
    """An album of four pictures."""
    files = [draw(tmp_path / f"{index}.png", color=(60 * index, 20, 200)) for index in range(4)]
    return albums.create(workspace, files, name="mine")[0]


def everything(folder) -> set[str]:
    return {os.path.relpath(os.path.join(place, name), folder) for place, _, files in os.walk(folder) for name in files if name != ".albums.lock"}


def test_an_album_is_a_source_that_a_run_can_use(workspace, album):
    from lora_studio import preflight, studio

    albums.edit(workspace, album, albums.Edit("prefix", "a picture"))
    spec = studio.compose(tree={"base": {"id": "demo-image"}, "task": {"kind": "image", "resolution": 64}, "data": [{"path": albums.source_of(workspace, album).path}]})
    report = preflight.preflight(workspace, spec)
    assert report.can_start and [row["caption"] for row in report.preview] == ["a picture"] * 4
    assert (album, albums.source_of(workspace, album).path) in studio.data_choices(workspace)


def test_a_copy_of_a_demo_can_be_edited_and_leaves_the_demo_alone(workspace):
    from lora_studio.home import presets_folder

    before = (presets_folder() / "demo" / "stripes" / "metadata.jsonl").read_bytes()
    name, found = albums.copy(workspace, "demo/stripes")
    again, _ = albums.copy(workspace, "demo/stripes")
    assert (name, again, len(found.items)) == ("stripes", "stripes-2", 24)
    albums.remove(workspace, name, ["00.png"])
    albums.edit(workspace, name, albums.Edit("prefix", "x"))
    assert (presets_folder() / "demo" / "stripes" / "metadata.jsonl").read_bytes() == before
    assert len(albums.view(workspace, again).captions) == 24


def test_what_is_refused_leaves_nothing_behind(workspace, tmp_path, album):
    before = everything(workspace.root)
    (tmp_path / "bad.png").write_text("x")
    for act in (lambda: albums.create(workspace, [tmp_path / "bad.png"]), lambda: albums.add(workspace, album, [tmp_path / "bad.png"]), lambda: albums.copy(workspace, "demo/nothing")):
        with pytest.raises(StudioError):
            act()
    assert everything(workspace.root) == before


def test_pictures_added_are_there_at_once_and_can_be_undone(workspace, tmp_path, album):
    albums.add(workspace, album, [draw(tmp_path / "more" / "0.png", color=(9, 9, 9))])
    view = albums.view(workspace, album)
    assert "0-2.png" in view.captions and view.undo == "add 0-2.png"
    albums.undo(workspace, album)
    assert "0-2.png" not in albums.view(workspace, album).captions
    albums.redo(workspace, album)
    assert albums.thumbnail(workspace, album, "0-2.png").is_file()


@pytest.mark.parametrize("name", ["../mine/0.png", "/etc/passwd", ".album/history.json", "metadata.jsonl", "0.txt", "", "..", "%2e%2e/0.png"])
def test_thumbnails_are_of_pictures_of_the_album_only(workspace, album, name):
    with pytest.raises(DataError):
        albums.thumbnail(workspace, album, name)


@pytest.mark.parametrize("name", ["..", ".", "", "../data/mine", "nothing", ".albums.lock", "plain"])
def test_only_albums_of_the_own_workspace_are_found(workspace, album, tmp_path, name):
    (workspace.data / "plain").mkdir()
    with pytest.raises(DataError, match="There is no album"):
        albums.view(workspace, name)
    with pytest.raises(DataError, match="There is no album"):
        albums.view(Workspace(tmp_path / "other"), album)


def test_an_album_that_is_a_link_is_none(workspace, album, tmp_path):
    os.rename(workspace.data / album, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", workspace.data / album)
    assert albums.names(workspace) == []


@pytest.mark.parametrize(("wanted", "name"), [("../../x", "x"), ("a/b:c", "a-b-c"), (".", "picture"), ("x" * 300, "x" * 60), ("<b>${1}", "b-1")])
def test_a_name_of_an_album_is_made_safe(workspace, tmp_path, wanted, name):
    found, _ = albums.create(workspace, [draw(tmp_path / "a.png")], name=wanted)
    assert found.startswith(name) and (workspace.data / found).parent == workspace.data and albums.names(workspace) == [found]


def test_what_was_seen_of_pictures_is_kept_until_they_change(workspace, album, monkeypatch):
    from lora_studio.pictures import statistics

    first = albums.measure(workspace, album)
    monkeypatch.setattr(statistics, "look", None)
    assert albums.measure(workspace, album) == first
    monkeypatch.undo()
    draw(workspace.data / album / "0.png", size=(640, 640))
    assert albums.measure(workspace, album)["largest"] == "640×640"


def test_a_removed_album_comes_back_whole_with_its_history_and_beside_one_of_its_name(workspace, tmp_path, album):
    albums.edit(workspace, album, albums.Edit("prefix", "x"))
    before = albums.view(workspace, album)
    albums.discard(workspace, album)
    assert albums.names(workspace) == [] and [name for _, name in albums.discarded(workspace)] == [album]
    albums.create(workspace, [draw(tmp_path / "new.png")], name=album)
    name = albums.bring_back(workspace, albums.discarded(workspace)[0][0])
    assert name == f"{album}-2" and albums.discarded(workspace) == []
    again = albums.view(workspace, name)
    assert (again.captions, again.undo) == (before.captions, before.undo)
    for entry in ("", "../mine", "nothing"):
        with pytest.raises(DataError, match="not among the removed albums"):
            albums.bring_back(workspace, entry)


def test_removed_albums_go_for_good_after_thirty_days(workspace, tmp_path, album, monkeypatch):
    albums.discard(workspace, album)
    albums.create(workspace, [draw(tmp_path / "new.png")], name="other")
    now = albums.time.time()
    monkeypatch.setattr(albums.time, "time", lambda: now + 31 * 86400)
    albums.discard(workspace, "other")
    assert [name for _, name in albums.discarded(workspace)] == ["other"]


def test_what_a_killed_process_left_behind_is_swept_away_after_a_day(workspace, tmp_path):
    old, new = workspace.data / ".part-old", workspace.data / ".part-new"
    for place in (old, new):
        draw(place / "a.png")
    os.utime(old, (1, 1))
    albums.create(workspace, [draw(tmp_path / "a.png")])
    assert not old.exists() and new.exists()
