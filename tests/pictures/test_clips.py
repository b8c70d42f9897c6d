"""Clips: animated pictures and folders of frames as rows, and how many frames of each are shown."""

import numpy
import pytest
from PIL import Image

from lora_studio import pictures
from lora_studio.errors import DataError
from lora_studio.spec import parse

COLOURS = [(200, 10 * number, 0) for number in range(11)]


def frames(count, size=(64, 48)):
    return [Image.new("RGB", size, colour) for colour in COLOURS[:count]]


def write_clip(folder, name, count):
    """A folder of frames."""
    (folder / f"{name}.frames").mkdir(parents=True)
    for number, frame in enumerate(frames(count)):
        frame.save(folder / f"{name}.frames" / f"{number:04d}.png")
    return folder


def collected(folder, tmp_path, frames=9):
    spec = parse({"data": [{"path": str(folder)}], "task": {"kind": "image", "resolution": 64, "bucket_step": 16, "frames": frames}})
    (group,) = pictures.collect(spec, cache=tmp_path / "cache")
    return group, spec.task


@pytest.fixture
def folder(tmp_path):
    """A folder of eleven frames, animated pictures of seven and of three, and one that stands still."""
    place = write_clip(tmp_path / "rows", "walk", 11)
    (place / "walk.txt").write_text("a dog walks")
    first, *rest = frames(7)
    first.save(place / "run.png", save_all=True, append_images=rest)
    first.save(place / "short.gif", save_all=True, append_images=rest[:2])
    first.save(place / "still.png")
    return place


def test_a_folder_of_frames_is_one_row_with_the_caption_beside_it(folder, tmp_path):
    group, task = collected(folder, tmp_path)
    assert [(one.name, one.caption, one.frames, pictures.length(one, task)) for one in group.items] == [
        ("run.png", "", 7, 5), ("short.gif", "", 3, 1), ("still.png", "", 1, 1), ("walk.frames", "a dog walks", 11, 9),
    ]  # fmt: skip
    assert any("3 pictures are shorter than 9 frames, and shown with fewer (first: run.png, 7 to 5)" in note for note in group.notes)
    (folder / "metadata.jsonl").write_text('{"file_name": "walk.frames", "text": "it walks"}\n')
    assert {one.name: one.caption for one in collected(folder, tmp_path)[0].items}["walk.frames"] == "it walks"


def test_without_task_frames_every_file_is_a_picture_as_before(folder, tmp_path):
    group, task = collected(folder, tmp_path, frames=1)
    assert len(group.items) == 14 and {pictures.length(one, task) for one in group.items} == {1}
    assert any("animated or of several pages" in note and "The first is used." in note for note in group.notes)


def test_frames_are_the_first_ones_in_order_and_placed_alike(folder, tmp_path):
    group, _ = collected(folder, tmp_path)
    for name, count in (("walk.frames", 9), ("run.png", 5)):
        (clip,) = (one for one in group.items if one.name == name)
        found = pictures.load_frames(clip, count, size=(32, 32))
        assert [frame.getpixel((16, 16)) for frame in found] == COLOURS[:count] and {frame.size for frame in found} == {(32, 32)}
    first = pictures.load_frames(clip, 1, size=(32, 32), crop="random", seed=4, flip=True)[0]
    assert numpy.array_equal(numpy.asarray(first), numpy.asarray(pictures.load(clip, size=(32, 32), crop="random", seed=4, flip=True)))


def test_another_frame_is_another_clip_and_a_broken_one_leaves_it_out(folder, tmp_path):
    before = {one.name: one.digest for one in collected(folder, tmp_path)[0].items}
    Image.new("RGB", (64, 48), "blue").save(folder / "walk.frames" / "0007.png")
    after = {one.name: one.digest for one in collected(folder, tmp_path)[0].items}
    assert {name for name in before if before[name] != after[name]} == {"walk.frames"}
    (folder / "walk.frames" / "0007.png").write_bytes(b"\x89PNG")
    group, _ = collected(folder, tmp_path)
    assert "walk.frames" not in {one.name for one in group.items} and "walk.frames" in group.skipped_in_words()


def test_frames_that_are_gone_are_a_sentence(folder, tmp_path):
    (clip,) = (one for one in collected(folder, tmp_path)[0].items if one.name == "run.png")
    with pytest.raises(DataError, match=r"run\.png could be read before"):
        pictures.load_frames(clip, 9, size=(32, 32))
