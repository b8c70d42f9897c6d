"""Small copies of the pictures of an album, made once and kept beside it."""

import hashlib
import io
import os
import threading
from pathlib import Path

from lora_studio import durable
from lora_studio.errors import DataError
from lora_studio.pictures import decoding
from lora_studio.pictures.history import HIDDEN
from lora_studio.pictures.picture import Picture, Skip, shown

SIZES = {"small": 320, "large": 1280}
_turn = threading.Semaphore(2)


def thumbnail(folder: Path, name: str, size: str = "small") -> Path:
    """A JPEG of a picture of an album, at most `SIZES[size]` pixels wide and high. `name` is one that the album has.
    Raises DataError when the picture cannot be read."""
    file = folder / name
    try:
        found = file.stat()
    except OSError:
        raise DataError("album.no_picture", album=shown(folder.name), picture=shown(name)) from None
    key = hashlib.sha256(f"{name}\n{found.st_size}\n{found.st_mtime_ns}\n{size}".encode()).hexdigest()[:32]
    target = folder / HIDDEN / "small" / f"{key}.jpg"
    if not target.is_file():
        with _turn:
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{threading.get_ident()}")
            part.write_bytes(_made(file, name, SIZES[size]))
            os.replace(part, target)  # a lost one is made again: nothing is waited for
    return target


def _made(file: Path, name: str, edge: int) -> bytes:
    try:
        seen = decoding.look(file, decode=False)
    except Skip as reason:
        raise DataError("picture.changed", name=shown(name), reason=str(reason)) from None
    zoom = min(1.0, edge / max(seen.width, seen.height))
    size = max(1, round(seen.width * zoom)), max(1, round(seen.height * zoom))
    image = decoding.load(Picture(file, name, "", seen.width, seen.height, seen.digest), size=size)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return out.getvalue()
