"""What a picture is to training, what a source of pictures is, and why a picture is left out."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from lora_studio.spec import ImageTask, Source

# Why a picture is left out, and what to do about it.
EMPTY = "empty (0 bytes)"
DAMAGED = "cut off or damaged"
WEB_PAGE = "web pages, whatever their names say"
POINTER = "Git LFS pointers, not the pictures themselves"
NO_PICTURE = "not pictures, whatever their names say"
FOREIGN = "of a kind that is not read"
TOO_MANY_PIXELS = "of more than 100 megapixels"
TOO_MANY_BYTES = "of more than 1 GB"
TOO_SMALL = "smaller than 8 pixels"
NOT_BRIGHTNESS = "in 32-bit or floating-point numbers"
CLOSED = "not open to you"
LINK = "links that leave the folder"
NOT_PLAIN = "not plain files"
CLOSED_FOLDER = "folders not open to you"
CLOSED_CAPTION = "with a caption that is not open to you"
CAPTION_CODE = "with a caption that is not UTF-8 text"
CAPTION_LONG = "with a caption of more than 64 KB"
CAPTION_KIND = "whose caption is not a text"
MASK_BROKEN = "with a mask that cannot be read"
MASK_SHAPE = "with a mask of another shape"
SOURCE_BROKEN = "with a source picture that cannot be read"
NOT_THERE = "named in the metadata, but not there"
OUTSIDE = "named in the metadata, but outside the folder"
NAMELESS = "rows of the metadata without a file name"

ADVICE = {
    EMPTY: "copy them again",
    DAMAGED: "copy them again, or save them anew from a picture program",
    WEB_PAGE: "download the pictures themselves",
    POINTER: "run `git lfs pull` where they come from",
    NO_PICTURE: "take them out, or save them as PNG or JPEG",
    FOREIGN: "save them as PNG or JPEG",
    TOO_MANY_PIXELS: "make them smaller",
    TOO_MANY_BYTES: "save them as PNG or JPEG",
    TOO_SMALL: "take them out",
    NOT_BRIGHTNESS: "save them with 8 or 16 bits a channel",
    CLOSED: "change their permissions",
    LINK: "copy the files into the folder",
    NOT_PLAIN: "take them out",
    CLOSED_FOLDER: "change their permissions",
    CLOSED_CAPTION: "change its permissions",
    CAPTION_CODE: "save the caption again with the encoding UTF-8",
    CAPTION_LONG: "shorten it",
    CAPTION_KIND: "write one text a row",
    MASK_BROKEN: "save the mask again as PNG",
    MASK_SHAPE: "make it as wide and high as the picture",
    SOURCE_BROKEN: "save the source picture again as PNG",
    NOT_THERE: "add the files, or delete their rows",
    OUTSIDE: "copy the files into the folder",
    NAMELESS: "fill in file_name",
}


@dataclass(frozen=True)
class Picture:
    """A picture that was found usable."""

    path: Path
    """A decodable file on this disk."""
    name: str
    """How people know it: relative to its source."""
    caption: str
    """As it was found, without white space around it; "" when there is none."""
    width: int
    """In pixels, after the rotation its EXIF data asks for."""
    height: int
    digest: str
    """The SHA-256 of the file's bytes."""
    mask: Path | None = None
    """A picture of the same shape: white is learnt, black is not."""
    mask_digest: str = ""
    source: Path | None = None
    """For editing models: the picture that this one was made of, as its caption says."""
    source_digest: str = ""
    frames: int = 1
    """How many frames it has: 1 is a still picture."""
    files: tuple[Path, ...] = ()
    """The frames of a clip that is a folder of them."""


@dataclass
class Pictures:
    """The pictures of one source, or of one kohya folder of it, in the order of their names."""

    source: Source
    items: list[Picture]
    skipped: dict[str, list[str]]
    """For each reason, in words, the names of what was left out."""
    notes: list[str]
    """Sentences worth a warning."""
    trigger: str = ""
    """The token of a kohya folder."""
    repeats: float = 1.0
    """How often an epoch shows each picture: the source's weight, times the number of a kohya folder."""

    def skipped_in_words(self) -> str:
        """How many pictures were left out, why, and what to do; or an empty text."""
        return "; ".join(reason_in_words(reason, names) for reason, names in self.skipped.items())


class Skip(Exception):
    """A picture that cannot be used, with one of the reasons above."""


def reason_in_words(reason: str, names: list[str]) -> str:
    """One reason, how often, the first name, and what to do."""
    known = reason.partition(":")[0]
    advice = f"; {ADVICE[known]}" if known in ADVICE else ""
    return f"{len(names)} {reason} (first: {shown(names[0])}{advice})"


def shown(name: str, limit: int = 120) -> str:
    """A file's name that can be printed on one line: unprintable characters as ?, long ones shortened in the middle."""
    text = "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in name)
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit // 2) :]}"


def fingerprint(pictures: list[Pictures], task: ImageTask) -> str:
    """A hash that changes when a picture, caption, mask, repeat or setting changes in a way that changes what is trained."""
    found = [
        {
            "trigger": group.trigger,
            "repeats": group.repeats,
            "prior": group.source.prior,
            "items": [[picture.digest, picture.caption, picture.mask_digest, picture.source_digest] for picture in group.items],
        }
        for group in pictures
    ]
    # New settings count until someone says they do not: too many changes are safer than too few.
    settings = task.model_dump(mode="json", exclude={"sample_steps", "guidance"})
    return hashlib.sha256(json.dumps([found, settings], sort_keys=True).encode()).hexdigest()
