"""Where pictures come from: folders of every form, and a sentence for everything that is wrong with one."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from PIL import Image

from lora_studio import home, pictures
from lora_studio.errors import DataError
from tests.pictures import captions, collect, draw, names, one, refused, spec


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path, *rows):
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """Three pictures that differ."""
    for number, name in enumerate(("a.png", "b.jpg", "sub/c.webp")):
        draw(tmp_path / "set" / name, (64 + number, 64))
    return tmp_path / "set"


def test_a_folder_is_read_in_the_order_of_the_names_with_the_captions_beside(folder):
    write(folder / "a.txt", "\ufeffa cat, sitting \n")
    write(folder / "b.jpg.txt", "a dog")
    write(folder / "sub" / "c.caption", "a bird\nin a tree")
    assert list(captions(one(folder)).items()) == [("a.png", "a cat, sitting"), ("b.jpg", "a dog"), ("sub/c.webp", "a bird\nin a tree")]
    assert one(folder).skipped == {} and one(folder).notes == []


def test_sizes_and_hashes_are_those_of_the_files(folder):
    import hashlib

    for decode in (True, False):
        for item, width in zip(one(folder, decode=decode).items, (64, 65, 66), strict=True):
            assert (item.width, item.height) == (width, 64)
            assert item.digest == hashlib.sha256(item.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("column", ["text", "caption", "prompt"])
def test_metadata_gives_captions_before_files_beside(folder, column):
    write(folder / "a.txt", "from the file")
    write(folder / "b.txt", "from the file")
    lines(
        folder / "metadata.jsonl",
        {"file_name": "a.png", column: " a cat "},
        {"file_name": "b.jpg", column: None},
        {"file_name": "sub/c.webp", column: 7},
    )
    assert captions(one(folder)) == {"a.png": "a cat", "b.jpg": "from the file", "sub/c.webp": "7"}


def test_metadata_as_csv_and_in_a_folder_below_and_with_columns_of_other_names(folder):
    write(folder / "metadata.csv", 'file_name,text\na.png,"a cat, sitting"\nb.jpg,b\n')
    lines(folder / "sub" / "metadata.jsonl", {"file_name": "./c.webp", "text": "a bird"})
    assert captions(one(folder)) == {"a.png": "a cat, sitting", "b.jpg": "b", "sub/c.webp": "a bird"}
    lines(folder / "sub" / "metadata.jsonl", {"image": "c.webp", "words": "a bird"})
    (folder / "metadata.csv").unlink()
    source = {"path": str(folder), "columns": {"picture": "image", "caption": "words"}}
    assert captions(collect(source)[0])["sub/c.webp"] == "a bird"
    assert "no column words" in refused({**source, "columns": {"picture": "image", "caption": "words2"}}).replace("words2", "words")
    assert "columns.title is not a part of a image row. Known: picture, caption, mask" in refused({**source, "columns": {"title": "x"}})


def test_kohya_folders_are_groups_with_repeats_and_a_trigger(tmp_path):
    draw(tmp_path / "set" / "img" / "10_sks dog" / "a.png")
    draw(tmp_path / "set" / "img" / "3_cat" / "deep" / "b.png", (65, 64))
    draw(tmp_path / "set" / "c.png", (66, 64))
    draw(tmp_path / "set" / "2023_summer" / "d.png", (67, 64))
    draw(tmp_path / "set" / "01_first" / "e.png", (68, 64))
    groups = collect({"path": str(tmp_path / "set"), "weight": 0.5})
    assert [(names(group), group.trigger, group.repeats) for group in groups] == [
        (["01_first/e.png", "2023_summer/d.png", "c.png"], "", 0.5),
        (["img/10_sks dog/a.png"], "sks dog", 5.0),
        (["img/3_cat/deep/b.png"], "cat", 1.5),
    ]
    assert "img/10_sks dog is read as a kohya folder: repeats 10, trigger sks dog." in groups[1].notes


def test_a_kohya_folder_without_a_usable_picture_is_named_in_another_group(tmp_path):
    draw(tmp_path / "set" / "2_dog" / "a.png")
    write(tmp_path / "set" / "3_cat" / "b.png", b"")
    group = one(tmp_path / "set")
    assert names(group) == ["2_dog/a.png"] and group.skipped == {"empty (0 bytes)": ["3_cat/b.png"]}


def test_a_bundled_set_goes_by_its_name(tmp_path, monkeypatch):
    draw(tmp_path / "presets" / "demo" / "stripes_pictures" / "a.png")
    monkeypatch.setattr(home, "PACKAGE", tmp_path / "package")
    assert names(pictures.collect(spec("demo/stripes_pictures"), cache=tmp_path)[0]) == ["a.png"]
    with pytest.raises(DataError, match="demo/nothing is not there"):
        pictures.collect(spec("demo/nothing"), cache=tmp_path)


def test_several_sources_stay_apart_and_caps_and_limits_count_from_the_top(folder, tmp_path):
    draw(tmp_path / "other" / "z.png", (80, 80))
    groups = collect({"path": str(folder), "cap": 2}, tmp_path / "other")
    assert [names(group) for group in groups] == [["a.png", "b.jpg"], ["z.png"]]
    assert [names(group) for group in collect(folder, tmp_path / "other", limit=1)] == [["a.png"], ["z.png"]]


def test_what_is_no_picture_is_left_out_counted_and_named(folder):
    write(folder / "zero.png", b"")
    write(folder / "page.jpg", "\n<!DOCTYPE html><html>not found</html>")
    write(folder / "lfs.png", "version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    write(folder / "text.png", "hello")
    write(folder / "phone.heic", b"\0\0\0\x18ftypheic")
    write(folder / "phone2.jpg", b"\0\0\0\x18ftypheic" + bytes(50))
    write(folder / "cut.jpg", (folder / "b.jpg").read_bytes()[:-200])
    write(folder / "vector.svg", "<svg/>")
    draw(folder / "dot.png", (4, 4))
    Image.new("F", (20, 20)).save(folder / "float.tif")
    os.mkfifo(folder / "pipe.png")
    group = one(folder)
    assert names(group) == ["a.png", "b.jpg", "sub/c.webp"]
    assert group.skipped == {
        "empty (0 bytes)": ["zero.png"],
        "web pages, whatever their names say": ["page.jpg"],
        "Git LFS pointers, not the pictures themselves": ["lfs.png"],
        "not pictures, whatever their names say": ["text.png"],
        "of a kind that is not read: .heic": ["phone.heic"],
        "of a kind that is not read": ["phone2.jpg"],
        "of a kind that is not read: .svg": ["vector.svg"],
        "cut off or damaged": ["cut.jpg"],
        "smaller than 8 pixels": ["dot.png"],
        "in 32-bit or floating-point numbers": ["float.tif"],
        "not plain files": ["pipe.png"],
    }
    assert "1 of a kind that is not read: .heic (first: phone.heic; save them as PNG or JPEG)" in group.skipped_in_words()


def test_every_reason_comes_with_what_to_do():
    from lora_studio.pictures import picture

    words = {value for name, value in vars(picture).items() if name.isupper() and isinstance(value, str)}
    assert words == set(picture.ADVICE)


def test_an_error_when_nothing_is_left_names_the_first_reason(tmp_path):
    assert "holds no picture (.png, " in refused(write(tmp_path / "none" / "a.md", "x").parent)
    write(tmp_path / "set" / "a.png", b"")
    write(tmp_path / "set" / "b.png", b"")
    said = refused(tmp_path / "set")
    assert said.endswith("set is left to train on: 2 empty (0 bytes) (first: a.png; copy them again).")
    assert "No picture of" in said
    (tmp_path / "empty").mkdir()
    assert "Choose the folder that holds them" in refused(tmp_path / "empty")


def test_a_place_that_is_no_folder_says_what_to_give(tmp_path):
    assert "is not there" in refused(tmp_path / "nowhere")
    assert "a.png is a .png file; pictures are read from a folder or a .zip" in refused(draw(tmp_path / "a.png"))


def test_captions_that_cannot_be_used_leave_their_picture_out(folder):
    write(folder / "a.txt", "café".encode("latin-1"))
    write(folder / "b.txt", "x" * 70_000)
    assert one(folder).skipped == {"with a caption that is not UTF-8 text": ["a.png"], "with a caption of more than 64 KB": ["b.jpg"]}
    write(folder / "a.txt", "a cat".encode("utf-16"))
    lines(folder / "metadata.jsonl", {"file_name": "b.jpg", "text": ["a", "b"]}, {"file_name": "sub/c.webp", "text": "\ud800"})
    assert set(one_or_words(folder)) >= {"with a caption that is not UTF-8 text", "whose caption is not a text"}


def one_or_words(folder) -> str:
    draw(folder / "z.png")
    return one(folder).skipped


def test_missing_captions_and_captions_without_picture_are_noted(folder):
    write(folder / "lost.txt", "a fox")
    write(folder / "README.txt", "about")
    write(folder / "b.txt", "  \n")
    group = one(folder)
    assert group.notes == [
        "3 pictures are without a caption (first: a.png). Write captions, or set task.trigger.",
        "1 caption has no picture (first: lost.txt). Add the pictures, or give both the same name.",
    ]
    assert "They are learnt under the trigger and the prefix alone." in one(folder, trigger="sks").notes[0]
    write(folder / "a.txt", "1")
    write(folder / "a.caption", "2")
    assert "1 picture has both a .txt and a .caption (first: a.png); the .txt is used." in one(folder).notes
    assert captions(one(folder))["a.png"] == "1"


def test_copies_are_noted_within_and_across_sources(folder, tmp_path):
    shutil.copy(folder / "a.png", folder / "b copy.png")
    draw(tmp_path / "other" / "z.png", (70, 64))
    shutil.copy(folder / "a.png", tmp_path / "other" / "y.png")
    first, second = collect(folder, tmp_path / "other")
    assert len(first.items) == 4
    assert any(note.startswith("1 picture is there already (first: b copy.png is a.png)") for note in first.notes)
    assert any(note.startswith("1 picture is there already (first: y.png is a.png)") for note in second.notes)


def test_small_and_narrow_pictures_are_noted(tmp_path):
    draw(tmp_path / "set" / "a.png", (40, 30))
    draw(tmp_path / "set" / "b.png", (900, 100))
    notes = one(tmp_path / "set", trigger="sks").notes
    assert (
        "1 picture is smaller than what is trained, and enlarged (first: a.png, 40×30 to 72×56). Use larger ones, or lower task.resolution."
        in notes
    )
    assert "1 picture is narrower than 1:4, and cut (first: b.png, 900×100). Crop them yourself, so that what matters is kept." in notes


def test_metadata_that_names_what_is_not_there_or_outside_is_counted(folder):
    draw(folder.parent / "secret.png")
    absolute = str(folder.parent / "secret.png")
    rows = [
        {"file_name": name, "text": "x"} for name in ("a.png", "gone.png", "../secret.png", absolute, "sub/../../secret.png", "sub\\c.webp")
    ]
    lines(folder / "metadata.jsonl", *rows, {"file_name": None, "text": "x"}, {"text": "y"})
    group = one(folder)
    assert names(group) == ["a.png", "b.jpg", "sub/c.webp"] and captions(group)["sub/c.webp"] == "x"
    assert group.skipped["named in the metadata, but not there"] == ["gone.png"]
    assert group.skipped["named in the metadata, but outside the folder"] == ["../secret.png", absolute, "sub/../../secret.png"]
    assert group.skipped["rows of the metadata without a file name"] == ["metadata.jsonl, row 7", "metadata.jsonl, row 8"]
    assert "1 picture is not named in the metadata (first: b.jpg). Add rows, or take them out." in group.notes


def test_a_name_twice_in_the_metadata_is_noted_with_both_rows(folder):
    rows = [{"file_name": name, "text": text} for name, text in (("a.png", "1"), ("b.jpg", "2"), ("a.png", "3"), ("./b.jpg", "2"))]
    lines(folder / "metadata.jsonl", *rows)
    group = one(folder)
    assert captions(group)["a.png"] == "1"
    assert (
        "metadata.jsonl names a.png twice (metadata.jsonl, row 1 and metadata.jsonl, row 3), and the first caption is used. Delete one row."
        in group.notes
    )
    assert any("with the same caption" in note for note in group.notes)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{"file_name": "b', ["metadata.jsonl, line 2 is cut off"]),
        ("metadata.jsonl", '{"file_name": "a.png"}\n{"file_name" "b.jpg"}\n{"file_name": "c"}\n', ["metadata.jsonl, line 2, column 14"]),
        ("metadata.jsonl", "", ["metadata.jsonl has no rows"]),
        ("metadata.jsonl", '{"image": "a.png"}\n', ["metadata.jsonl has no column file_name (it has image)", "columns.picture"]),
        ("metadata.csv", "file_name,text\na.png,x,y\n", ["metadata.csv, row 1 has 3 fields"]),
        ("metadata.csv", b"file_name,text\na.png,\xff\n", ["metadata.csv is not UTF-8"]),
    ],
)
def test_a_broken_metadata_file_is_named_with_its_line(folder, name, content, words):
    write(folder / name, content)
    said = refused(folder)
    assert all(word in said for word in words), said


def test_of_two_metadata_files_the_jsonl_is_used(folder):
    lines(folder / "metadata.jsonl", {"file_name": "a.png", "text": "1"})
    write(folder / "metadata.csv", "file_name,text\na.png,2\n")
    assert captions(one(folder))["a.png"] == "1"
    assert "metadata.csv is not used, because metadata.jsonl is there too. Delete one of them." in one(folder).notes


def test_links_are_followed_inside_the_folder_and_never_out_of_it(folder, tmp_path):
    draw(tmp_path / "secret" / "s.png", (99, 64))
    write(tmp_path / "secret" / "words.txt", "secret")
    (folder / "inner.png").symlink_to(folder / "a.png")
    (folder / "outer.png").symlink_to(tmp_path / "secret" / "s.png")
    (folder / "a.txt").symlink_to(tmp_path / "secret" / "words.txt")
    (folder / "metadata.csv").symlink_to(tmp_path / "secret" / "words.txt")
    (folder / "away").symlink_to(tmp_path / "secret")
    (folder / "round").symlink_to(folder)
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "broken.png").symlink_to("/nowhere/at/all.png")
    group = one(folder)
    assert captions(group) == {"a.png": "", "b.jpg": "", "inner.png": "", "sub/c.webp": ""}
    assert group.skipped == {
        "links that leave the folder": ["a.txt", "away", "broken.png", "metadata.csv", "outer.png"],
        "not plain files": ["loop.png"],
    }
    (tmp_path / "door").symlink_to(folder)  # the folder itself may be a link: a person gave it
    assert len(one(tmp_path / "door").items) == 4


def test_hidden_files_and_those_of_other_systems_are_passed_over(folder):
    draw(folder / ".thumbs" / "x.png")
    draw(folder / "__MACOSX" / "y.png")
    write(folder / "._a.png", b"\0\5")
    write(folder / "Thumbs.db", b"x")
    assert len(one(folder).items) == 3 and one(folder).skipped == {}


def test_what_is_not_open_to_us_is_named():
    """To root everything is open, so a child becomes nobody (where it can) and says what it sees."""
    code = """
import json, os, sys
from pathlib import Path
from tests.pictures import one, refused
import PIL.Image; PIL.Image.init()
if os.geteuid() == 0:
    os.setgid(65534); os.setuid(65534)
folder = Path(sys.argv[1])
print(json.dumps([one(folder).skipped, refused(folder / "sub")]))
"""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "set"
        draw(folder / "a.png"), draw(folder / "b.png"), draw(folder / "sub" / "c.png")
        Path(place).chmod(0o755)
        (folder / "a.png").chmod(0)
        (folder / "sub").chmod(0)
        done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False)
        (folder / "sub").chmod(0o755)
    skipped, said = json.loads(done.stdout or done.stderr)
    assert skipped == {"folders not open to you": ["sub/"], "not open to you": ["a.png"]}
    assert said.endswith("sub cannot be read: permission denied. Change its permissions, or copy it to a folder of yours.")


def test_names_that_cannot_be_printed_are_shown_harmlessly(tmp_path):
    draw(tmp_path / "set" / "line\nbreak\x1b[31m.png", (30, 30))
    odd = os.fsencode(tmp_path / "set") + b"/\xff\xfe.png"
    shutil.copy(tmp_path / "set" / "line\nbreak\x1b[31m.png", odd)
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    os.rename(tmp_path / "copy", os.fsencode(tmp_path / "set") + b"/5_\xff x")
    groups = collect(tmp_path / "set")
    assert [len(group.items) for group in groups] == [2, 2]
    assert groups[0].trigger.encode()
    group = groups[1]
    for note in group.notes:
        assert "\n" not in note and "\x1b" not in note
        note.encode()
    assert pictures.fingerprint([group], spec(tmp_path).task)


def test_masks_are_found_by_name_and_by_metadata_and_are_no_pictures(tmp_path):
    top = tmp_path / "set"
    for name in ("a.png", "a-masklabel.png", "b.png", "masks/b.png", "c.png", "areas/c.png", "d_mask.png"):
        draw(top / name, (64, 48) if name != "areas/c.png" else (32, 24))
    lines(top / "metadata.jsonl", {"file_name": "c.png", "text": "c", "mask_file_name": "areas/c.png"})
    group = one(top)
    assert {item.name: item.mask and str(item.mask.relative_to(top)) for item in group.items} == {
        "a.png": "a-masklabel.png", "b.png": "masks/b.png", "c.png": "areas/c.png", "d_mask.png": None,
    }  # fmt: skip
    assert "2 pictures have a mask, by its name (first: a.png has a-masklabel.png). What is white there is learnt." in group.notes
    write(top / "a-masklabel.png", b"")
    draw(top / "masks" / "b.png", (48, 64))
    (top / "areas" / "c.png").unlink()
    assert one(top).skipped == {"with a mask that cannot be read": ["a.png", "c.png"], "with a mask of another shape": ["b.png"]}


def test_the_fingerprint_changes_with_whatever_changes_what_is_trained(folder):
    def found(**task):
        return pictures.fingerprint([one(folder, **task)], spec(folder, **task).task)

    draw(folder / "a_mask.png", (64, 64))
    marks = [found(), found(resolution=128), found(crop="random"), found(flip=True), found(trigger="x"), found(caption_dropout=0.1)]
    write(folder / "a.txt", "a cat")
    marks.append(found())
    draw(folder / "a_mask.png", (64, 64), (1, 1, 1))
    marks.append(found())
    draw(folder / "b.jpg", (65, 64), (0, 0, 0))
    marks.append(found())
    marks.append(pictures.fingerprint(collect({"path": str(folder), "weight": 2}), spec(folder).task))
    folder.rename(folder.parent / "10_set")
    marks.append(pictures.fingerprint(collect(folder.parent), spec(folder).task))
    assert len(set(marks)) == len(marks)


def test_the_fingerprint_does_not_change_with_the_place_or_with_samples(folder, tmp_path):
    mark = pictures.fingerprint([one(folder)], spec(folder).task)
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert pictures.fingerprint([one(tmp_path / "elsewhere")], spec(folder, sample_steps=3, guidance=2).task) == mark
    assert pictures.fingerprint([one(folder, decode=False)], spec(folder).task) == mark
