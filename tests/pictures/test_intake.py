"""What enters an album: whole pictures under harmless names; whatever else comes is named, and harms nothing."""

import json
import zipfile

import pytest

from lora_studio.errors import DataError
from lora_studio.pictures import intake
from lora_studio.spec import Source
from tests.pictures import draw


def gather(tmp_path, *files) -> intake.Incoming:
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return intake.gather(list(files), scratch=scratch, cache=tmp_path / "cache")


def names(found: intake.Incoming) -> dict[str, str]:
    return {name: caption for name, _, caption, _ in found.items}


def test_pictures_come_with_the_captions_dropped_beside_them(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a cat\n")
    found = gather(tmp_path, draw(tmp_path / "a.png"), text, draw(tmp_path / "b.webp"))
    assert names(found) == {"a.png": "a cat", "b.webp": ""} and not found.refused


def test_what_cannot_be_used_is_named_with_the_way_on_and_the_rest_is_taken(tmp_path):
    whole = draw(tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "page.png").write_text("<!doctype html><p>404")
    (tmp_path / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "phone.heic").write_bytes(b"x")
    found = gather(tmp_path, draw(tmp_path / "good.png"), *(tmp_path / name for name in ("cut.jpg", "page.png", "notes.pdf", "phone.heic")))
    assert list(names(found)) == ["good.png"]
    told = "\n".join(found.sentences())
    assert "cut.jpg was not taken: it is cut off or damaged. Copy it again, or save it anew" in told
    assert "page.png was not taken: it is a web page, whatever its name says. Download" in told
    assert "notes.pdf was not taken: it is no picture, whatever its name says. Give a PNG" in told
    assert "phone.heic was not taken: it is of a kind that is not read: .heic. Save it as PNG or JPEG." in told


def test_many_refusals_are_counted(tmp_path):
    for index in range(30):
        (tmp_path / f"{index}.png").write_text("x")
    found = gather(tmp_path, draw(tmp_path / "good.png"), *(tmp_path / f"{index}.png" for index in range(30)))
    assert len(found.sentences()) == 9 and found.sentences()[-1].startswith("22 more were not taken")


@pytest.mark.parametrize("make", [lambda tmp_path: [], lambda tmp_path: [tmp_path / "x.png"]])
def test_nothing_usable_is_an_error_that_says_why(tmp_path, make):
    (tmp_path / "x.png").write_text("x")
    with pytest.raises(DataError, match=r"No file was given|Nothing was taken. x.png"):
        gather(tmp_path, *make(tmp_path))


def test_a_zip_brings_its_metadata_its_masks_and_its_kohya_folders_and_loses_its_own_folder(tmp_path):
    draw(tmp_path / "in" / "a.png"), draw(tmp_path / "in" / "m.png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as packed:
        packed.write(tmp_path / "in" / "a.png", "set/10_sks dog/a.png")
        packed.write(tmp_path / "in" / "m.png", "set/10_sks dog/a_mask.png")
        packed.write(tmp_path / "in" / "a.png", "set/b.png")
        packed.writestr("set/metadata.jsonl", json.dumps({"file_name": "b.png", "text": "bee"}))
        packed.writestr("set/10_sks dog/a.txt", "dog")
    found = gather(tmp_path, tmp_path / "set.zip")
    assert names(found) == {"10_sks dog/a.png": "dog", "b.png": "bee"}
    place = tmp_path / "place"
    place.mkdir()
    rows = intake.bring(found, place, set())
    assert rows["10_sks dog/a.png"]["mask_file_name"] == "10_sks dog/masks/a.png" and (place / "10_sks dog/masks/a.png").is_file()


def test_a_hostile_zip_is_refused_whole(tmp_path):
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as packed:
        packed.writestr("../../out.png", "x")
    with pytest.raises(DataError, match="evil.zip was not unpacked: it holds the name"):
        gather(tmp_path, tmp_path / "evil.zip")


def test_a_link_is_never_followed_out_of_a_folder(tmp_path):
    draw(tmp_path / "secret.png")
    draw(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "b.png").symlink_to(tmp_path / "secret.png")
    found = intake.gather_folder(tmp_path / "in", Source(path=str(tmp_path / "in")))
    assert list(names(found)) == ["a.png"] and found.refused[0][0] == "b.png"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../etc/passwd.png", "etc/passwd.png"), ("/abs.png", "abs.png"), ("C:\\pics\\a.png", "C-/pics/a.png"), (".hidden.png", "hidden.png"),
        ("a\nb\x00.png", "a-b-.png"), ("", "picture"), ("...", "picture"), ("  x .png", "x .png"), ("e\u0301.png", "é.png"),
        ("a\ud800.png", "a-.png"), ("獅子.png", "獅子.png"),
    ],
)  # fmt: skip
def test_a_name_becomes_one_that_stays_inside(name, safe):
    assert intake.safe_name(name) == safe


def test_long_names_fit_and_equal_names_are_numbered():
    assert len(intake.safe_name("ö" * 400 + ".jpeg").encode()) <= 100 and intake.safe_name("ö" * 400 + ".jpeg").endswith(".jpeg")
    assert intake.safe_name("A.png", ["a.png", "a-2.png"]) == "A-3.png"


def test_files_of_one_name_all_enter(tmp_path):
    first, second = draw(tmp_path / "x" / "a.png"), draw(tmp_path / "y" / "a.png", color=(1, 2, 3))
    found = gather(tmp_path, first, second)
    place = tmp_path / "place"
    place.mkdir()
    assert sorted(intake.bring(found, place, {"a.png"})) == ["a-2.png", "a-3.png"]
