"""Bytes to pixels: whatever the format, the same picture, upright, on white, at exactly the size."""

import io
import os
import threading
import warnings
import zlib

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from PIL import Image, ImageCms, ImageFile

from lora_studio.errors import DataError
from lora_studio.pictures import load, load_mask
from lora_studio.pictures.decoding import window
from tests.pictures import collect, draw, made, names, one, refused

fast = settings(max_examples=150, deadline=None, derandomize=True)
edges = some.integers(8, 3000)


def pixels(image: Image.Image):
    return numpy.asarray(image).astype(int)


def noise(size=(40, 30), seed=0) -> Image.Image:
    return Image.fromarray(numpy.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=numpy.uint8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tif", "gif", "avif"])
def test_every_format_gives_the_same_picture(tmp_path, suffix):
    path = draw(tmp_path / "set" / f"a.{suffix}", (64, 48), quality=100)
    assert names(one(path.parent)) == [f"a.{suffix}"]
    got = load(made(path), size=(64, 48))
    assert got.mode == "RGB" and got.size == (64, 48)
    assert numpy.abs(pixels(got)[:, :28] - (200, 40, 40)).max() <= 12
    assert numpy.abs(pixels(got)[:, 36:] - (20, 60, 220)).max() <= 12


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "LAB", "YCbCr"])
def test_every_mode_becomes_rgb_of_the_same_brightness(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(numpy.full((20, 20), 40000, numpy.uint16))
        wanted = 40000 / 65535 * 255
    else:
        grey = Image.new("RGB", (20, 20), (255, 255, 255) if mode == "1" else (150, 150, 150))
        image = Image.new("LAB", (20, 20), (150, 128, 128)) if mode == "LAB" else grey.quantize() if mode == "P" else grey.convert(mode)
        wanted = {"1": 255, "LAB": 139}.get(mode, 150)
    path = tmp_path / "set" / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif")
    path.parent.mkdir()
    image.save(path, quality=100) if path.suffix == ".jpg" else image.save(path)
    (item,) = one(path.parent).items
    assert numpy.abs(pixels(load(item, size=(20, 20))) - wanted).max() <= 3


def test_16_bit_brightness_is_scaled_not_cut_off(tmp_path):
    values = numpy.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(numpy.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    got = pixels(load(made(tmp_path / "a.png"), size=(64, 64)))[..., 0]
    assert numpy.abs(got - values / 257).max() <= 1 and got.min() == 0 and got.max() == 255


def test_transparent_parts_are_white_and_that_is_noted(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    image.save(draw(tmp_path / "set" / "a.png"))
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.paste(0, (0, 0, 16, 32))
    palette.save(tmp_path / "set" / "b.png", transparency=0)
    Image.new("RGBA", (32, 32), (9, 9, 9, 255)).save(tmp_path / "set" / "c.png")
    group = one(tmp_path / "set")
    for item in group.items[:2]:
        got = pixels(load(item, size=(32, 32)))
        assert (got[:, :14] == 255).all() and (got[:, 18:].min(axis=-1) == 0).all()
    assert "2 pictures are partly transparent (first: a.png). White is put behind." in group.notes


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_followed(tmp_path, orientation, suffix):
    """The picture is stored so that its EXIF data brings it back: red on the left, blue on the right, 64×32."""
    upright = Image.open(draw(tmp_path / "x.png", (64, 32)))
    upright.putpixel((0, 0), (255, 255, 255))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "set").mkdir()
    stored.save(
        tmp_path / "set" / f"a.{suffix}", exif=exif, **({"quality": 100, "lossless": True} if suffix == "webp" else {"quality": 95})
    )
    (item,) = one(tmp_path / "set").items
    assert (item.width, item.height) == (64, 32)
    (looked,) = one(tmp_path / "set", decode=False).items
    assert (looked.width, looked.height) == (64, 32)
    got = pixels(load(item, size=(64, 32)))
    assert numpy.abs(got[2:, :28] - (200, 40, 40)).max() <= 20 and numpy.abs(got[2:, 36:] - (20, 60, 220)).max() <= 20
    assert got[0, 0].sum() > got[0, 20].sum() + 60  # the corner is where it was


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_of_an_animation_the_first_frame_is_taken_and_that_is_noted(tmp_path, suffix):
    frames = [Image.new("RGB", (32, 32), color) for color in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    (tmp_path / "set").mkdir()
    frames[0].save(tmp_path / "set" / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=100)
    group = one(tmp_path / "set")
    assert numpy.abs(pixels(load(group.items[0], size=(32, 32))) - (255, 0, 0)).max() <= 8
    assert f"1 picture is animated or of several pages (first: a.{suffix}). The first is used." in group.notes


def test_an_embedded_colour_profile_is_followed(tmp_path):
    path = draw(tmp_path / "a.png")
    swapped = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = swapped.replace(b"rXYZ", b"tmpX").replace(b"gXYZ", b"rXYZ").replace(b"tmpX", b"gXYZ")
    Image.new("RGB", (32, 32), (200, 0, 0)).save(path, icc_profile=swapped)
    assert numpy.abs(pixels(load(made(path), size=(32, 32))) - (0, 200, 0)).max() <= 3
    Image.new("RGB", (32, 32), (200, 0, 0)).save(path, icc_profile=b"nonsense" * 20)
    assert (pixels(load(made(path), size=(32, 32))) == (200, 0, 0)).all()


@fast
@given(edges, edges, some.integers(1, 64), some.integers(1, 64), some.sampled_from(["center", "random"]), some.integers(0, 2**40))
def test_a_crop_lies_in_the_picture_has_the_asked_shape_and_touches_two_edges(width, height, wide, high, crop, seed):
    left, top, right, bottom = window((width, height), (8 * wide, 8 * high), crop, seed)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    assert abs((right - left) * high / ((bottom - top) * wide) - 1) < 1e-9
    assert (left == 0 and right == width) or (top == 0 and bottom == height)
    if crop == "center":
        assert abs(left + right - width) < 1e-6 and abs(top + bottom - height) < 1e-6
    assert window((width, height), (8 * wide, 8 * high), crop, seed) == (left, top, right, bottom)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(some.integers(8, 90), some.integers(8, 90), some.integers(1, 12), some.integers(1, 12), some.integers(0, 99), some.booleans())
def test_a_loaded_picture_has_exactly_the_size(tmp_path_factory, width, height, wide, high, seed, flip):
    path = tmp_path_factory.mktemp("size") / "a.png"
    noise((width, height), seed).save(path)
    got = load(made(path), size=(8 * wide, 8 * high), crop="random", seed=seed, flip=flip)
    assert got.size == (8 * wide, 8 * high) and got.mode == "RGB"
    again = load(made(path), size=(8 * wide, 8 * high), crop="random", seed=seed, flip=not flip)
    assert (pixels(again) == pixels(got)[:, ::-1]).all()


def test_a_picture_of_the_right_size_is_not_touched(tmp_path):
    noise((64, 40)).save(tmp_path / "a.png")
    assert (pixels(load(made(tmp_path / "a.png"), size=(64, 40))) == pixels(noise((64, 40)))).all()


def test_random_crops_are_spread_over_the_whole_picture():
    lefts = [window((200, 100), (64, 64), "random", seed)[0] for seed in range(500)]
    assert min(lefts) < 5 and max(lefts) > 95 and 40 < sum(lefts) / 500 < 60


@pytest.mark.parametrize("flip", [False, True])
def test_a_mask_is_cropped_and_mirrored_with_its_picture(tmp_path, flip):
    draw(tmp_path / "set" / "a.png", (200, 100), color=(255, 255, 255))
    Image.open(tmp_path / "set" / "a.png").convert("L").point(lambda value: 255 * (value > 128)).resize((100, 50)).save(
        tmp_path / "set" / "a_mask.png"
    )
    (item,) = one(tmp_path / "set").items
    for seed in range(5):
        how = {"size": (64, 64), "crop": "random", "seed": seed, "flip": flip}
        picture, mask = load(item, **how), load_mask(item, **how)
        assert mask.mode == "L" and mask.size == (64, 64)
        differ = (pixels(mask) > 128) != (pixels(picture)[..., 0] > 128)
        assert differ.mean() < 0.04  # the edge is soft
    assert load_mask(made(tmp_path / "set" / "a.png"), size=(64, 64)) is None


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tif", "avif"])
def test_a_picture_cut_anywhere_is_left_out_and_never_crashes(tmp_path, suffix):
    noise((90, 70)).save(tmp_path / f"whole.{suffix}")
    whole = (tmp_path / f"whole.{suffix}").read_bytes()
    draw(tmp_path / "set" / "good.png")
    for share in (0.02, 0.1, 0.5, 0.9, 0.99):
        (tmp_path / "set" / f"cut{share}.{suffix}").write_bytes(whole[: int(len(whole) * share)])
    group = one(tmp_path / "set")
    assert names(group) == ["good.png"] and sum(map(len, group.skipped.values())) == 5
    assert "cut off or damaged (first: " in group.skipped_in_words()


def test_too_many_pixels_are_refused_from_the_header(tmp_path):
    """A PNG whose header says 60000×60000: 10 GB of pixels, in a file of 100 bytes that would fail otherwise if it were decoded."""
    draw(tmp_path / "set" / "a.png")
    bomb = bytearray((tmp_path / "set" / "a.png").read_bytes())
    header = b"IHDR" + (60000).to_bytes(4, "big") * 2 + bytes(bomb[24:29])
    bomb[12:33] = header + zlib.crc32(header).to_bytes(4, "big")
    (tmp_path / "set" / "a.png").write_bytes(bomb)
    big = io.BytesIO()
    Image.new("1", (11000, 10000)).save(big, "PNG")
    (tmp_path / "set" / "b.png").write_bytes(big.getvalue())
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        said = refused(tmp_path / "set")
    assert "2 of more than 100 megapixels (first: a.png; make them smaller)" in said
    assert before == Image.MAX_IMAGE_PIXELS


def test_pils_limits_are_ours_inside_and_as_they_were_outside_from_many_threads(tmp_path, monkeypatch):
    """Elsewhere cut pictures may be allowed and large ones forbidden; here neither has an effect, and both stay."""
    whole = draw(tmp_path / "set" / "a.png", (64, 64)).read_bytes()
    (tmp_path / "set" / "b.png").write_bytes(whole[:-40])
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    found = []
    threads = [threading.Thread(target=lambda: found.append(names(one(tmp_path / "set")))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [["a.png"]] * 8
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and Image.MAX_IMAGE_PIXELS == 100


def test_a_picture_that_vanished_or_broke_after_the_look_is_named(tmp_path):
    (item,) = one(draw(tmp_path / "set" / "a.png").parent).items
    for break_it in (
        lambda: item.path.write_bytes(b"<html>"),
        item.path.unlink,
        lambda: os.mkfifo(item.path),
    ):  # a pipe is never waited for
        break_it()
        with pytest.raises(DataError, match="a.png could be read before"):
            load(item, size=(64, 64))


@pytest.mark.parametrize(("suffix", "options"), [("png", {}), ("jpg", {}), ("webp", {}), ("gif", {}), ("tif", {}), ("avif", {})])
def test_no_flipped_byte_makes_it_crash(tmp_path, suffix, options):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "set").mkdir()
    noise((24, 16)).save(tmp_path / f"a.{suffix}", **options, **({} if suffix == "gif" else {"exif": exif}))
    whole, draws = (tmp_path / f"a.{suffix}").read_bytes(), numpy.random.default_rng(5)
    for number in range(60):
        broken = bytearray(whole)
        for place in draws.integers(0, min(len(whole), 300), 3):
            broken[place] = draws.integers(0, 256)
        (tmp_path / "set" / f"{number}.{suffix}").write_bytes(broken)
    noise((24, 16)).save(tmp_path / "set" / "good.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (group,) = collect(tmp_path / "set")
        for item in group.items:
            assert load(item, size=(16, 16)).size == (16, 16)
    assert "good.png" in names(group)
