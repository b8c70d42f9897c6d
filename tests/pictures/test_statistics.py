"""Statistics: counted rightly, the same file and nearly the same picture told apart, and CLIP's limit never claimed wrongly."""

import random

from PIL import Image, ImageDraw

from lora_studio.pictures import statistics
from tests.pictures import draw, task


def photo(path, seed: int, *, shift: int = 0, size=(96, 64), quality: int = 92):
    """A picture with some structure, the same for the same seed but for a small shift of its brightness."""
    dice, image = random.Random(seed), Image.new("RGB", (96, 64), (128, 128, 128))
    pen = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = dice.randrange(96), dice.randrange(64)
        pen.ellipse((x - 16, y - 16, x + 16, y + 16), fill=tuple(min(255, dice.randrange(240) + shift) for _ in range(3)))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.resize(size).save(path, quality=quality)
    return path


def looks(*paths) -> dict:
    return {path.name: statistics.look(path) for path in paths}


def test_sizes_and_buckets_are_counted_at_the_resolution_that_was_asked_for(tmp_path):
    found = looks(draw(tmp_path / "a.png", (64, 64)), draw(tmp_path / "b.png", (128, 64)), draw(tmp_path / "c.png", (600, 64)), draw(tmp_path / "d.png", (32, 32)))
    told = statistics.measure(dict.fromkeys(found, "x"), found, task())
    assert told["sizes"] == {"64×64": 1, "128×64": 1, "600×64": 1, "32×32": 1} and told["smallest"] == "32×32" and told["largest"] == "600×64"
    assert sum(told["buckets"].values()) == 4 and told["buckets"]["64×64"] == 2
    assert told["enlarged"] == {"count": 1, "names": ["d.png"]} and told["narrow"]["names"] == ["c.png"]


def test_captions_are_counted(tmp_path):
    captions = {"a": "", "b": "a cat, sun", "c": "a cat, sun", "d": "one two three four, sun", "e": "a dog, Sun"}
    told = statistics.measure(captions, {}, task())
    assert told["missing"] == {"count": 1, "names": ["a"]}
    assert told["words"] == {"least": 3, "middle": 3.0, "most": 5, "lengths": {"1 to 5": 4}}
    assert told["same_caption"] == [{"caption": "a cat, sun", "count": 2, "names": ["b", "c"]}]
    assert told["tags"] == [{"tag": "sun", "count": 4}, {"tag": "a cat", "count": 2}]
    assert told["unreadable"] == ["a", "b", "c", "d", "e"]


def test_the_same_file_and_nearly_the_same_picture_are_told_apart(tmp_path):
    first = photo(tmp_path / "first.jpg", 1)
    copy = tmp_path / "copy.jpg"
    copy.write_bytes(first.read_bytes())
    again = photo(tmp_path / "again.jpg", 1, size=(192, 128), quality=60)
    brighter, others = photo(tmp_path / "brighter.jpg", 1, shift=5), [photo(tmp_path / f"other{seed}.jpg", seed) for seed in range(2, 30)]
    found = looks(first, copy, again, brighter, *others)
    told = statistics.measure(dict.fromkeys(found, "x"), found, task())
    assert told["copies"] == [["first.jpg", "copy.jpg"]]
    assert told["alike"] == [["first.jpg", "again.jpg", "brighter.jpg"]]


def test_the_demo_pictures_are_not_taken_for_each_other():
    from lora_studio.home import presets_folder

    paths = sorted((presets_folder() / "demo" / "stripes").glob("*.png"))
    assert statistics.measure({}, looks(*paths), task())["alike"] == []


def test_a_caption_said_to_be_too_long_for_clip_is_too_long():
    assert statistics.least_tokens("a cat") == 4 and statistics.least_tokens("it's 1987!!") == 2 + 2 + 4 + 1
    captions = {"short": "word " * 70, "long": "word " * 80}
    assert statistics.measure(captions, {}, task())["over_clip"] == {"count": 1, "names": ["long"], "tokens": 77}


def test_thousands_of_pictures_are_compared_quickly():
    dice = random.Random(0)
    found = {f"{index}.png": statistics.Look(64, 64, str(index), dice.getrandbits(64), dice.randbytes(48)) for index in range(3000)}
    assert statistics.measure(dict.fromkeys(found, "x"), found, task())["alike"] == []
