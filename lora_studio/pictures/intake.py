"""How pictures enter an album: files, archives and folders, looked at to the last byte, under names that harm nobody."""

import os
import posixpath
import re
import shutil
import unicodedata
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import allotment, durable
from lora_studio.errors import DataError
from lora_studio.pictures import archives, decoding, labels, sources, staging
from lora_studio.pictures import picture as reasons
from lora_studio.pictures.decoding import SUFFIXES
from lora_studio.pictures.history import Rows
from lora_studio.pictures.picture import Skip, shown
from lora_studio.spec import Source

TEXTS = (*labels.BESIDE, ".jsonl", ".csv")
MOST_NAMED = 8
LONGEST_NAME = 100
AT_ONCE = min(4, allotment.cores())

# The reasons, said of one file. (Those that are not here read well after "it is".)
ONE = {
    reasons.WEB_PAGE: "it is a web page, whatever its name says",
    reasons.POINTER: "it is a Git LFS pointer, not the picture itself",
    reasons.NO_PICTURE: "it is no picture, whatever its name says",
    reasons.LINK: "it is a link that leaves the folder",
    reasons.NOT_PLAIN: "it is no plain file",
    reasons.CAPTION_CODE: "its caption is not UTF-8 text",
    reasons.CAPTION_LONG: "its caption has more than 64 KB",
    reasons.CAPTION_KIND: "its caption is not a text",
    reasons.CLOSED_CAPTION: "its caption is not open to you",
    reasons.MASK_BROKEN: "its mask cannot be read",
    reasons.SOURCE_BROKEN: "its source picture cannot be read",
}

Report = Callable[[int, int], None]


@dataclass
class Incoming:
    """What was found to come in: (name, file, caption, mask) of each usable picture, and (name, reason) of the others."""

    items: list[tuple[str, Path, str, Path | None]] = field(default_factory=list)
    made_of: dict[str, Path] = field(default_factory=dict)
    """The source of a picture, by the picture's name, where it has one."""
    refused: list[tuple[str, str]] = field(default_factory=list)

    def sentences(self) -> list[str]:
        """What was refused, by name, with what to do; many of them are counted."""
        told = [f"{shown(name)} was not taken: {ONE.get(reason, f'it is {reason}')}. {_advice(reason)}" for name, reason in self.refused[:MOST_NAMED]]
        more = len(self.refused) - len(told)
        return told + ([f"{more:,} more were not taken, for reasons like these."] if more else [])


def _advice(reason: str) -> str:
    found = reasons.ADVICE.get(reason.partition(":")[0], "give a picture in its place")
    for many, one in (("the pictures themselves", "the picture itself"), ("them", "it")):
        found = re.sub(rf"\b{many}\b", one, found)
    found = "give a PNG, JPEG or WebP picture" if reason == reasons.NO_PICTURE else found
    return f"{found[0].upper()}{found[1:]}."


# ---- looking


def gather(files: list[Path], *, scratch: Path, cache: Path, report: Report | None = None) -> Incoming:
    """What dropped files bring: pictures, captions beside them as .txt, metadata files, and archives of all these.
    Raises DataError when nothing of it is a usable picture, with the names and reasons."""
    if not files:
        raise DataError("album.no_files")
    found, loose = Incoming(), {}
    for path in files:
        if path.suffix.lower() == ".zip":
            suffixes = (*SUFFIXES, *sources.FOREIGN, *labels.BESIDE, ".jsonl", ".csv")
            _look_through(archives.unpack(path, cache, suffixes=suffixes), found, report)
        elif path.suffix.lower() in (*SUFFIXES, *TEXTS, *sources.FOREIGN):
            place = scratch / safe_name(path.name, loose)
            loose[place.name.casefold()] = path.name
            shutil.copyfile(path, place)
        else:
            found.refused.append((path.name, reasons.NO_PICTURE))
    if loose:
        _look_through(scratch, found, report)
    if not found.items:
        raise DataError("album.refused", reason=" ".join(found.sentences()) or "There is no picture in it.")
    return found


def gather_folder(folder: Path, source: Source, report: Report | None = None) -> Incoming:
    """What a folder brings, read as the source of a run would be. Raises DataError when it has no usable picture."""
    found = Incoming()
    _look_through(folder, found, report, source)
    if not found.items:
        raise DataError("album.refused", reason=" ".join(found.sentences()) or f"{shown(source.path)} holds no picture.")
    return found


def _look_through(folder: Path, found: Incoming, report: Report | None, source: Source | None = None) -> None:
    """Add the pictures of a folder that can be decoded to the last byte, and the names of those that cannot."""
    listed = sources.listing(folder)
    known = labels.read(listed.files, source or Source(path=str(folder)))
    for reason, names in listed.skipped.items():
        found.refused += [(name, reason) for name in names]
    wanted = (*SUFFIXES, *sources.FOREIGN)
    names = [name for name in sorted(listed.files) if posixpath.splitext(name)[1].lower() in wanted and name not in known.no_pictures]
    top = _shared_folder(names)

    def look(name: str):
        try:
            if posixpath.splitext(name)[1].lower() in sources.FOREIGN:
                raise Skip(f"{reasons.FOREIGN}: {posixpath.splitext(name)[1].lower()}")
            decoding.look(listed.files[name])
            mask = _beside(labels.mask_of(name, listed.files, known), reasons.MASK_BROKEN)
            source = _beside(labels.source_of(name, listed.files, known), reasons.SOURCE_BROKEN)
            return name, labels.caption_of(name, listed.files, known), mask, source, None
        except Skip as reason:
            return name, "", None, None, str(reason)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        for number, (name, caption, mask, source, reason) in enumerate(pool.map(look, names), 1):
            name = os.fsencode(name).decode("utf-8", "replace")
            if reason:
                found.refused.append((name.removeprefix(top), reason))
            else:
                found.items.append((name.removeprefix(top), listed.files[names[number - 1]], caption, mask))
                if source is not None:
                    found.made_of[name.removeprefix(top)] = source
            if report:
                report(number, len(names))


def _beside(file: Path | None, broken: str) -> Path | None:
    """A mask or a source, if it can be read. Raises Skip with the reason `broken`."""
    if file is not None:
        try:
            decoding.look(file)
        except Skip:
            raise Skip(broken) from None
    return file


def _shared_folder(names: list[str]) -> str:
    """The folders that all names begin with and that mean nothing to training, with a slash at the end; or an empty text."""
    shared = ""
    while names and all("/" in name[len(shared) :] for name in names):
        head = names[0][len(shared) :].partition("/")[0]
        if sources.KOHYA.fullmatch(head) or not all(name.startswith(f"{shared}{head}/") for name in names):
            break
        shared += f"{head}/"
    return shared


# ---- names


def safe_name(name: str, taken: Iterable[str] = ()) -> str:
    """A name for a file, or for one in folders, that every system takes and that is not in `taken` (in small letters)."""
    parts = [part for part in re.split(r"[/\\]", name) if part.strip(" .")]
    clean = [_safe_part(part) for part in parts] or ["picture"]
    stem, ending = posixpath.splitext("/".join(clean))
    found, number, known = f"{stem}{ending}", 1, set(taken)
    while found.casefold() in known:
        number += 1
        found = f"{stem}-{number}{ending}"
    return found


def _safe_part(part: str) -> str:
    text = unicodedata.normalize("NFC", part.encode("utf-8", "replace").decode())
    text = "".join(letter if letter.isprintable() and letter not in '<>:"|?*' else "-" for letter in text).strip(" .")
    stem, ending = posixpath.splitext(text.lstrip(".-") or "picture")
    while len((stem + ending).encode()) > LONGEST_NAME and stem:
        stem = stem[:-1]
    return (stem + ending).strip() or "picture"


# ---- writing


def bring(found: Incoming, place: Path, taken: set[str]) -> Rows:
    """Copy the pictures, their masks and their sources below `place`, each on disk when this returns; their rows by name."""
    sizes = [path.stat().st_size for name, file, _, mask in found.items for path in (file, mask, found.made_of.get(name)) if path]
    staging.make_sure_it_fits(sum(sizes), place.parent)
    rows, known, folders = {}, set(taken), {place}
    for name, file, caption, mask in found.items:
        source, name = found.made_of.get(name), safe_name(name, known)
        rows[name] = {"file_name": name, "text": caption}
        for other, column, where in ((mask, "mask_file_name", "masks"), (source, "source_file_name", "control")):
            if other is None:
                continue
            folder, last = posixpath.split(posixpath.splitext(name)[0])
            inside = safe_name(posixpath.join(folder, where, last + other.suffix.lower()), known)
            rows[name][column] = inside
            known.add(inside.casefold())
            folders |= _copy(other, place, inside)
        known.add(name.casefold())
        folders |= _copy(file, place, name)
    for folder in folders:
        durable.sync_folder(folder)
    return rows


def _copy(file: Path, place: Path, name: str) -> set[Path]:
    """Copy a file, put it on disk; the folders whose names changed."""
    target = place / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "rb") as source, open(target, "xb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
    between = [parent for parent in target.parents if parent != place and parent.is_relative_to(place)]
    return {target.parent, *between, place}
