"""Bytes to pixels: whatever the format, a picture comes out upright, in RGB, on white, at exactly the size asked for."""

import contextlib
import hashlib
import io
import os
import struct
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from random import Random
from stat import S_ISREG

import numpy
from PIL import Image, ImageCms, ImageFile

from lora_studio.errors import DataError
from lora_studio.pictures import picture as reasons
from lora_studio.pictures.picture import Picture, Skip, shown

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30
LEAST_EDGE = 8
# What PIL's readers raise on broken bytes; the list is as long as the formats are old.
BROKEN = (OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, EOFError,
          AssertionError, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning)  # fmt: skip
PAGES = ((b"<!doctype html", b"<html", b"<head", b"<body", b"<?xml"), (b"version https://git-lfs",))
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Look:
    """What is known of a picture's file after looking at it."""

    width: int
    height: int
    digest: str
    animated: bool
    transparent: bool
    frames: int = 1


def look(path: Path, *, decode: bool = True) -> Look:
    """Size, hash and kind of a picture; `decode` reads every pixel of it too. Raises Skip with the reason."""
    try:
        with open(path, "rb", opener=_plain_opener) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            with _limits(), _opened(file) as image:
                orientation = _orientation(image)
                width, height = image.size[::-1] if orientation in SIDEWAYS else image.size
                animated = _is_animated(image)
                if decode:
                    _pixels(image, (255, 255, 255))
                return Look(width, height, digest, animated, decode and _is_clear(image), _count(image) if animated else 1)
    except MemoryError:
        raise Skip(reasons.TOO_MANY_PIXELS) from None
    except OSError as error:
        raise Skip(reasons.CLOSED if isinstance(error, PermissionError) else reasons.DAMAGED) from None


def load(picture: Picture, *, size: tuple[int, int], crop: str = "center", seed: int = 0, flip: bool = False) -> Image.Image:
    """The picture in RGB at exactly `size` (width, height): scaled to cover it (LANCZOS), then cropped.

    `crop` is center, or random: a place drawn from `seed`. `flip` mirrors it. Raises DataError when the file has become
    unusable since it was looked at.
    """
    image = _read(picture.path, picture.name, (255, 255, 255))
    return _placed(image, size, crop, seed, flip, Image.Resampling.LANCZOS)


def load_frames(picture: Picture, count: int, *, size: tuple[int, int], crop: str = "center", seed: int = 0, flip: bool = False) -> list[Image.Image]:
    """The first `count` frames of a clip, each placed as `load` places a picture. Raises DataError."""
    if picture.files:
        images = [_read(file, picture.name, (255, 255, 255)) for file in picture.files[:count]]
    else:
        images = [_read(picture.path, picture.name, (255, 255, 255), number) for number in range(count)]
    return [_placed(image, size, crop, seed, flip, Image.Resampling.LANCZOS) for image in images]


def load_mask(picture: Picture, *, size: tuple[int, int], crop: str = "center", seed: int = 0, flip: bool = False) -> Image.Image | None:
    """The picture's mask in L (255 is learnt, 0 is not), placed as `load` places the picture; None when it has none."""
    if picture.mask is None:
        return None
    image = _read(picture.mask, picture.mask.name, (0, 0, 0))
    return _placed(image.convert("L"), size, crop, seed, flip, Image.Resampling.BILINEAR)


def window(source: tuple[int, int], size: tuple[int, int], crop: str = "center", seed: int = 0) -> tuple[float, float, float, float]:
    """The (left, top, right, bottom) of `source` that becomes `size`: as large as fits, of the shape of `size`."""
    width, height = source
    # Whole-number products, so that a picture that fits exactly is never cropped by a rounding error.
    wide, high = width * size[1], height * size[0]
    across = width if wide <= high else height * size[0] / size[1]
    down = height if high <= wide else width * size[1] / size[0]
    place = 0.5 if crop == "center" else Random(f"crop {seed}").random()
    left, top = (width - across) * place, (height - down) * place
    return left, top, min(width, left + across), min(height, top + down)


def _placed(image: Image.Image, size: tuple[int, int], crop: str, seed: int, flip: bool, how) -> Image.Image:
    placed = image.resize(size, how, box=window(image.size, size, crop, seed))
    return placed.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else placed


def _read(path: Path, name: str, behind: tuple[int, int, int], frame: int = 0) -> Image.Image:
    try:
        with open(path, "rb", opener=_plain_opener) as file, _limits(), _opened(file) as image:
            if frame:
                image.seek(frame)
            return _pixels(image, behind)
    except (Skip, OSError, MemoryError, EOFError) as error:
        reason = str(error) if isinstance(error, Skip) else getattr(error, "strerror", None) or type(error).__name__
        raise DataError("picture.changed", name=shown(name), reason=reason) from None


def _plain_opener(path: str, flags: int) -> int:
    """Open a file without ever waiting for it, as a named pipe would have us do. Raises Skip for what is no plain file."""
    handle = os.open(path, flags | os.O_NONBLOCK)
    found = os.fstat(handle)
    reason = None if S_ISREG(found.st_mode) else reasons.NOT_PLAIN
    if reason is None and found.st_size == 0:
        reason = reasons.EMPTY
    if reason is None and found.st_size > MAX_BYTES:
        reason = reasons.TOO_MANY_BYTES
    if reason:
        os.close(handle)
        raise Skip(reason)
    return handle


def _opened(file: io.BufferedReader) -> Image.Image:
    """The picture in a file, its header read and its size checked before any pixel. Raises Skip."""
    try:
        image = Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Skip(reasons.TOO_MANY_PIXELS) from None
    except BROKEN:
        raise Skip(_what_else(file)) from None
    if image.width * image.height > MAX_PIXELS:
        raise Skip(reasons.TOO_MANY_PIXELS)
    if min(image.size) < LEAST_EDGE:
        raise Skip(reasons.TOO_SMALL)
    return image


def _what_else(file: io.BufferedReader) -> str:
    """What a file is that PIL cannot open."""
    file.seek(0)
    start = file.read(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(PAGES[0]):
        return reasons.WEB_PAGE
    if text.startswith(PAGES[1]):
        return reasons.POINTER
    if start[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1", b"ftypheim"):
        return reasons.FOREIGN
    known = (
        start.startswith((b"\x89PNG", b"\xff\xd8", b"GIF8", b"BM", b"II*\0", b"MM\0*"))
        or start[8:12] == b"WEBP"
        or start[4:12] == b"ftypavif"
    )
    return reasons.DAMAGED if known else reasons.NO_PICTURE


def _orientation(image: Image.Image) -> int:
    """How the EXIF data asks for the picture to be turned, 1 to 8; broken EXIF data asks for nothing."""
    if image.format == "TIFF":
        return 1  # PIL turns these itself
    try:
        return image.getexif().get(0x0112, 1)
    except BROKEN:
        return 1


def _is_animated(image: Image.Image) -> bool:
    """Whether there is more than the first frame or page. (The second picture of an MPO is a preview or the other eye.)"""
    try:
        return image.format != "MPO" and bool(getattr(image, "is_animated", False))
    except BROKEN:
        return True  # what follows the first frame is broken, but it is there


def _count(image: Image.Image) -> int:
    """How many frames can be read; those behind a broken one are not counted."""
    try:
        return int(image.n_frames)
    except BROKEN:
        return 1


def _is_clear(image: Image.Image) -> bool:
    """Whether some pixel of a decoded picture is at least partly transparent."""
    if image.mode in ("RGBA", "LA"):
        return image.getchannel("A").getextrema()[0] < 255
    return image.has_transparency_data


def _pixels(image: Image.Image, behind: tuple[int, int, int]) -> Image.Image:
    """The first frame as upright RGB, transparent parts on `behind`. Raises Skip."""
    orientation = _orientation(image)
    try:
        image.load()
        plain = _rgb(image, behind)
    except MemoryError:
        raise Skip(reasons.TOO_MANY_PIXELS) from None
    except BROKEN:
        raise Skip(reasons.DAMAGED) from None
    turn = UPRIGHT.get(orientation)
    return plain if turn is None else plain.transpose(turn)


def _rgb(image: Image.Image, behind: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return _from_16_bit(image, behind)
    if image.mode in ("I", "F"):
        raise Skip(reasons.NOT_BRIGHTNESS)
    if image.has_transparency_data:
        full = image.convert("RGBA")
        ground = Image.new("RGBA", full.size, (*behind, 255))
        ground.alpha_composite(_in_srgb(full, image.info.get("icc_profile")))
        return ground.convert("RGB")
    return _in_srgb(image if image.mode in ("RGB", "CMYK", "LAB") else image.convert("RGB"), image.info.get("icc_profile"))


def _from_16_bit(image: Image.Image, behind: tuple[int, int, int]) -> Image.Image:
    """65535 becomes 255; PIL's own conversion would cut everything above 255 off."""
    values = numpy.asarray(image).astype(numpy.int64).clip(0, 65535)
    grey = ((values * 255 + 32767) // 65535).astype(numpy.uint8)
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        grey[values == clear] = behind[0]
    return Image.fromarray(grey).convert("RGB")


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """The colours as a screen shows them: an embedded profile is followed where it can be read."""
    rest = image.getchannel("A") if image.mode == "RGBA" else None
    if image.mode == "LAB":
        return ImageCms.profileToProfile(image, ImageCms.createProfile("LAB"), _SRGB, outputMode="RGB")
    if profile and len(profile) < 8 << 20:
        try:
            known = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            turned = ImageCms.profileToProfile(image.convert("RGB") if rest else image, known, _SRGB, outputMode="RGB")
            if rest:
                turned.putalpha(rest)
            return turned
        except (ImageCms.PyCMSError, *BROKEN):
            pass  # a profile of another colour space, or a broken one: the numbers are taken as they are
    return image if rest else image.convert("RGB")


_SRGB = ImageCms.createProfile("sRGB")
_lock, _inside, _before = threading.Lock(), 0, (None, False)


@contextlib.contextmanager
def _limits():
    """PIL's limits as they have to be here, and as they were before afterwards, from any number of threads."""
    global _inside, _before
    with _lock:
        if _inside == 0:
            _before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES)
            Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = MAX_PIXELS, False
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES = _before
