"""An album: every change is whole, on disk and can be undone, whatever instant it was cut off at; what others did is never overwritten."""

import json
import os
import shutil

import pytest

from lora_studio import durable
from lora_studio.errors import DataError, MachineError
from lora_studio.pictures import album, history, intake
from lora_studio.pictures.edits import Edit
from tests.pictures import captions, collect, draw


@pytest.fixture
def folder(tmp_path):
    """An album of three pictures."""
    place = tmp_path / "album"
    for index, text in enumerate(("a red cat", "a red dog", "")):
        draw(place / f"{index}.png", color=(index * 60, 90, 40))
        (place / f"{index}.txt").write_text(text)
    (place / history.HIDDEN).mkdir()
    return place


def texts(folder) -> list[str]:
    return list(album.view(folder).captions.values())


def disk(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".txt"}


def test_what_is_edited_is_what_is_trained(folder):
    album.write(folder, {"2.png": "ein Löwe – 獅子"})
    album.edit(folder, Edit("replace", "blue", find="red"))
    (group,) = collect(folder)
    assert captions(group) == album.view(folder).captions == {"0.png": "a blue cat", "1.png": "a blue dog", "2.png": "ein Löwe – 獅子"}


def test_every_step_is_undone_and_done_again_in_order(folder):
    steps = [
        lambda: album.write(folder, {"0.png": "new"}),
        lambda: album.edit(folder, Edit("prefix", "photo of"), ["0.png", "1.png"]),
        lambda: album.remove(folder, ["1.png", "2.png"]),
        lambda: album.edit(folder, Edit("trigger", "sks")),
    ]
    seen = [(texts(folder), disk(folder))]
    for step in steps:
        step()
        seen.append((texts(folder), disk(folder)))
    assert album.view(folder).undo == "put the trigger “sks” before 1 caption"
    for before in reversed(seen[:-1]):
        album.undo(folder)
        assert (texts(folder), disk(folder)) == before
    assert album.view(folder).undo is None
    for after in seen[1:]:
        album.redo(folder)
        assert (texts(folder), disk(folder)) == after
    assert album.view(folder).redo is None


def test_a_change_that_changes_nothing_is_no_step(folder):
    assert album.edit(folder, Edit("replace", "x", find="nowhere")) == 0
    assert album.write(folder, {"0.png": " a red cat\r\n"}) == 0
    assert album.view(folder).undo is None
    with pytest.raises(DataError, match="nothing to undo"):
        album.undo(folder)


def test_a_stale_page_changes_nothing(folder):
    seen = album.view(folder).revision
    album.write(folder, {"0.png": "by the other"})
    for act in (lambda: album.edit(folder, Edit("prefix", "x"), revision=seen), lambda: album.remove(folder, ["0.png"], revision=seen), lambda: album.undo(folder, revision=seen)):
        with pytest.raises(DataError, match="was changed elsewhere"):
            act()
    assert texts(folder) == ["by the other", "a red dog", ""]


def test_two_writers_of_one_caption_never_lose_the_first_and_of_two_captions_both_stay(folder):
    album.write(folder, {"0.png": "first"}, seen={"0.png": "a red cat"})
    with pytest.raises(DataError, match="changed elsewhere meanwhile, to: first"):
        album.write(folder, {"0.png": "second"}, seen={"0.png": "a red cat"})
    album.write(folder, {"1.png": "second"}, seen={"1.png": "a red dog"})
    assert texts(folder) == ["first", "second", ""]


class Cut(Exception):
    """The power fails."""


@pytest.mark.parametrize("act", ["edit", "remove", "add", "undo edit", "undo remove", "undo add", "redo remove"])
def test_cut_off_at_any_write_it_is_as_before_or_as_after(folder, tmp_path, monkeypatch, act):
    new = draw(tmp_path / "new.png")

    def bring(place, taken):
        shutil.copy(new, place / "new.png")
        return {"new.png": {"file_name": "new.png", "text": "new"}}

    acts = {"edit": lambda: album.edit(folder, Edit("prefix", "x")), "remove": lambda: album.remove(folder, ["1.png"]), "add": lambda: album.add(folder, bring)}
    verb, _, earlier = act.partition(" ")
    album.write(folder, {"0.png": "start"})
    if earlier:
        acts[earlier]()
    if verb == "redo":
        album.undo(folder)
    run = {"undo": lambda: album.undo(folder), "redo": lambda: album.redo(folder)}.get(verb) or acts[verb]
    before = (texts(folder), disk(folder))
    kept = tmp_path / "kept"
    shutil.copytree(folder, kept)
    run()
    after, number, ends = (texts(folder), disk(folder)), 0, set()
    real = {name: getattr(os, name) for name in ("replace", "fsync")}
    while True:
        shutil.rmtree(folder)
        shutil.copytree(kept, folder)
        left = number

        def count(name, *given, **options):
            nonlocal left
            if left == 0:
                raise Cut
            left -= 1
            return real[name](*given, **options)

        for name in real:
            monkeypatch.setattr(os, name, lambda *given, name=name, **options: count(name, *given, **options))
        try:
            run()
            break
        except Cut:
            number += 1
        finally:
            for name, function in real.items():
                monkeypatch.setattr(os, name, function)
        durable.sweep(folder)
        found = (texts(folder), disk(folder))
        assert found in (before, after)
        ends.add(found == after)
        (group,) = collect(folder)
        assert captions(group) == album.view(folder).captions
    assert number > 4 and ends == {True, False}


def test_pictures_copied_into_the_folder_by_hand_belong_to_it(folder):
    album.write(folder, {"0.png": "mine"})
    draw(folder / "later.png")
    (folder / "later.txt").write_text("by hand")
    assert album.view(folder).captions["later.png"] == "by hand"
    assert album.view(folder).undo == "the caption of 0.png"
    album.undo(folder)
    assert texts(folder)[0] == "a red cat" and len(texts(folder)) == 4


def test_captions_that_another_program_wrote_are_kept_and_not_undone(folder):
    album.write(folder, {"0.png": "mine"})
    rows = [{"file_name": f"{index}.png", "text": "other"} for index in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert texts(folder) == ["other"] * 3 and album.view(folder).undo is None


def test_the_history_is_bounded_and_what_falls_out_of_it_is_deleted(folder, monkeypatch):
    monkeypatch.setattr(history, "MOST_STEPS", 3)
    album.remove(folder, ["2.png"])
    for index in range(5):
        album.write(folder, {"0.png": str(index)})
    assert len(list((folder / ".album" / "steps").iterdir())) == 3 and not list((folder / ".album" / "files").iterdir())
    for _ in range(3):
        album.undo(folder)
    assert texts(folder) == ["1", "a red dog"] and album.view(folder).undo is None


def test_a_mask_goes_and_comes_with_its_picture(tmp_path):
    found = intake.Incoming([("a.png", draw(tmp_path / "a.png"), "a", draw(tmp_path / "m.png")), ("b.png", draw(tmp_path / "b.png"), "b", None)])
    folder = tmp_path / "album"
    (folder / history.HIDDEN).mkdir(parents=True)
    album.add(folder, lambda place, taken: intake.bring(found, place, taken))
    (group,) = collect(folder)
    assert [item.mask and item.mask.name for item in group.items] == ["a.png", None]
    album.remove(folder, ["a.png"])
    assert list(album.view(folder).captions) == ["b.png"] and not (folder / "masks" / "a.png").exists()
    album.undo(folder)
    assert collect(folder)[0].items[0].mask is not None


def test_what_cannot_be_written_gets_a_sentence_and_changes_nothing(folder, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    before = texts(folder)
    monkeypatch.setattr(durable, "write", full)
    with pytest.raises(MachineError, match="no space left"):
        album.write(folder, {"0.png": "x"})
    monkeypatch.undo()
    assert texts(folder) == before


@pytest.mark.parametrize("name", ["nowhere.png", "../0.png", ".album/history.json", "metadata.jsonl"])
def test_only_pictures_of_the_album_are_touched(folder, name):
    for act in (lambda: album.write(folder, {name: "x"}), lambda: album.remove(folder, [name])):
        with pytest.raises(DataError, match="has no picture"):
            act()
