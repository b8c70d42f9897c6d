"""Where pictures come from: folders, metadata files, kohya's folders, archives and Hub data sets, looked at picture by picture."""

import hashlib
import os
import posixpath
import re
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_studio import data
from lora_studio.errors import DataError
from lora_studio.home import presets_folder
from lora_studio.pictures import archives, buckets, clips, decoding, hub_sets, labels
from lora_studio.pictures import picture as reasons
from lora_studio.pictures.decoding import SUFFIXES, Look
from lora_studio.pictures.labels import Labels
from lora_studio.pictures.picture import Picture, Pictures, Skip, shown
from lora_studio.spec import ImageTask, Source, TrainSpec

FOREIGN = (".heic", ".heif", ".jxl", ".jp2", ".psd", ".svg", ".ico", ".tga", ".exr", ".dng", ".cr2", ".nef", ".arw", ".raw", ".eps")
IGNORED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
KOHYA = re.compile(r"([1-9]\d{0,2})_(.*\S.*)")


@dataclass
class Listing:
    """The files below a folder, by their names in it, and what was left aside."""

    files: dict[str, Path] = field(default_factory=dict)
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))


def collect(spec: TrainSpec, *, cache: Path, limit: int | None = None, decode: bool = True) -> list[Pictures]:
    """The pictures of every source of a spec; a kohya folder is a group of its own.

    Each picture is decoded to its last byte (without `decode`: its header is read), so that nothing fails after step 1.
    At most `limit` pictures of a source are looked at. Archives and Hub data sets are unpacked into `cache`. Raises DataError; a source
    without a usable picture is an error, and one with some is not: `skipped` and `notes` say what was found.
    """
    found, digests = [], {}
    for source in spec.data:
        found += _groups(source, spec.task, folder_of(source, cache, limit), limit, decode)
    for group in found:
        _note_copies(group, digests)
    return found


def locate(path: str) -> Path | str:
    """The folder or file a source's path means, or the Hub id as it stands. Raises DataError."""
    if re.fullmatch(r"demo/[a-z0-9_-]+", path) and (presets_folder() / path).is_dir():
        return presets_folder() / path
    return data.locate(path)


def folder_of(source: Source, cache: Path, limit: int | None = None) -> Path:
    """The folder with a source's files; archives and Hub data sets are unpacked into `cache`. Raises DataError."""
    place = locate(source.path)
    if isinstance(place, str):
        if place.startswith("demo/") or place.lower().endswith(".zip"):
            raise DataError("data.missing", path=place)
        return hub_sets.fetch(source, cache, limit=limit)
    if place.is_dir():
        return place
    if place.suffix.lower() == ".zip" and place.is_file():
        return archives.unpack(place, cache, suffixes=(*SUFFIXES, *FOREIGN, *labels.BESIDE, ".jsonl", ".csv"))
    raise DataError("picture.file_kind", name=shown(place.name), suffix=place.suffix or "nameless")


def listing(folder: Path) -> Listing:
    """The plain files below a folder. Hidden files are passed over, and links are followed only to files inside it. Raises DataError."""
    top, found = folder.resolve(), Listing()
    waiting = [("", top)]
    while waiting:
        start, here = waiting.pop()
        try:
            with os.scandir(here) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            if not start:
                raise DataError("picture.closed", path=folder, reason=(error.strerror or str(error)).lower()) from None
            found.skipped[reasons.CLOSED_FOLDER].append(_name(start))
            continue
        for entry in listed:
            name = start + entry.name
            if entry.name.startswith(".") or entry.name in IGNORED:
                continue
            if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(top):
                found.skipped[reasons.LINK].append(_name(name))
            elif entry.is_dir(follow_symlinks=False):
                waiting.append((f"{name}/", Path(entry.path)))
            elif os.path.isfile(entry.path):
                found.files[name] = Path(entry.path)
            elif not os.path.isdir(entry.path) and _suffix(name) in SUFFIXES:
                found.skipped[reasons.NOT_PLAIN].append(_name(name))
    return found


def kohya(name: str) -> tuple[str, int, str] | None:
    """The (folder, repeats, token) of the kohya folder a file is in: 10_sks dog is shown 10 times, and called sks dog."""
    parts = name.split("/")[:-1]
    for depth in range(len(parts), 0, -1):
        match = KOHYA.fullmatch(parts[depth - 1])
        if match:
            return "/".join(parts[:depth]), int(match[1]), match[2].strip()
    return None


def _groups(source: Source, task: ImageTask, folder: Path, limit: int | None, decode: bool) -> list[Pictures]:
    """The groups of one source. Raises DataError when nothing usable is left."""
    listed, frames = listing(folder), {}
    if task.frames > 1:
        listed.files, frames = clips.gathered(listed.files)
    known = labels.read(listed.files, source)
    names = [name for name in listed.files if (_suffix(name) in (*SUFFIXES, *FOREIGN) or name in frames) and name not in known.no_pictures]
    names.sort(key=_name)
    names = names[: min(number for number in (limit, source.cap, len(names)) if number is not None)]
    groups: dict[tuple[str, int, str] | None, Pictures] = {}
    looks: dict[str, Look] = {}
    for name in names:
        group = groups.setdefault(kohya(_name(name)), Pictures(source, [], {}, []))
        try:
            found, looks[_name(name)] = _picture(name, listed.files, known, decode)
            if name in frames:
                found = _clip(found, frames[name], decode)
            group.items.append(found)
        except Skip as reason:
            group.skipped.setdefault(str(reason), []).append(_name(name))
    return _finished(source, task, groups, looks, [listed.skipped, known.skipped], known.notes)


def _finished(source: Source, task: ImageTask, groups: dict, looks: dict[str, Look], aside: list[dict], notes: list[str]) -> list[Pictures]:
    """The groups that hold pictures, with what is to be said of them. Raises DataError when there are none."""
    full = [group for group in groups.values() if group.items]
    aside = aside + [group.skipped for group in groups.values() if not group.items]
    first = full[0] if full else Pictures(source, [], {}, [])
    for skipped in aside:
        for reason, names in skipped.items():
            first.skipped.setdefault(reason, []).extend(names)
    if not full:
        if not first.skipped:
            raise DataError("picture.folder_empty", path=source.path, known=", ".join(SUFFIXES))
        raise DataError("picture.nothing_left", path=source.path, reasons=first.skipped_in_words())
    for place, group in groups.items():
        group.repeats = source.weight * (place[1] if place else 1)
        group.trigger = place[2] if place else ""
        if place:
            group.notes.append(f"{shown(place[0])} is read as a kohya folder: repeats {place[1]}, trigger {shown(place[2])}.")
            if not source.prior and "reg" in place[0].split("/")[:-1]:
                group.notes.append(f"{shown(place[0])} looks like kohya's class pictures. Give the folder reg as a source of its own, with prior: true.")
        group.notes += _notes(group, task, looks)
    first.notes += notes
    return full


def _picture(name: str, files: dict[str, Path], known: Labels, decode: bool) -> tuple[Picture, Look]:
    """One picture with its caption and mask, looked at. Raises Skip."""
    if _suffix(name) in FOREIGN:
        raise Skip(f"{reasons.FOREIGN}: {_suffix(name)}")
    seen = decoding.look(files[name], decode=decode)
    text, mask = labels.caption_of(name, files, known), labels.mask_of(name, files, known)
    mask_digest = "" if mask is None else _mask_digest(mask, seen, decode)
    source = labels.source_of(name, files, known)
    source_digest = "" if source is None else _source_digest(source, decode)
    return Picture(files[name], _name(name), text, seen.width, seen.height, seen.digest, mask, mask_digest, source, source_digest, seen.frames), seen


def _source_digest(source: Path, decode: bool) -> str:
    try:
        return decoding.look(source, decode=decode).digest
    except Skip:
        raise Skip(reasons.SOURCE_BROKEN) from None


def _clip(first: Picture, files: tuple[Path, ...], decode: bool) -> Picture:
    """The clip of a folder of frames, by its first one; a broken frame makes the clip unusable. Raises Skip."""
    digests = [decoding.look(file, decode=decode).digest for file in files]
    return replace(first, files=files, frames=len(files), digest=hashlib.sha256(" ".join(digests).encode()).hexdigest())


def _mask_digest(mask: Path, picture: Look, decode: bool) -> str:
    """The hash of a usable mask: one that can be read and has the picture's shape, within a hundredth. Raises Skip."""
    try:
        seen = decoding.look(mask, decode=decode)
    except Skip:
        raise Skip(reasons.MASK_BROKEN) from None
    if abs(seen.width * picture.height / (seen.height * picture.width) - 1) > 0.01:
        raise Skip(reasons.MASK_SHAPE)
    return seen.digest


def _notes(group: Pictures, task: ImageTask, looks: dict[str, Look]) -> list[str]:
    """What is worth a warning about the pictures that are used."""
    named = bool(task.trigger or task.prefix or group.trigger)
    alone = "They are learnt under the trigger and the prefix alone." if named else "Write captions, or set task.trigger."
    if group.source.prior:
        alone = "They are learnt under what their class is called." if group.trigger or task.prior_prompt else "Write captions, or set task.prior_prompt."
    small, narrow = [], []
    missing: dict[int, list[str]] = {edge: [] for edge in task.more_resolutions}
    for item in group.items:
        wide, high = buckets.bucket(item.width, item.height, task)
        if wide > item.width or high > item.height:
            small.append(f"{shown(item.name)}, {item.width}×{item.height} to {wide}×{high}")
        for edge in set(missing) - set(buckets.edges(item.width, item.height, task)):
            missing[edge].append(f"{shown(item.name)}, {item.width}×{item.height}")
        if task.buckets and buckets.beyond(item.width, item.height):
            narrow.append(f"{shown(item.name)}, {item.width}×{item.height}")
    facts = [
        ("without a caption", [shown(item.name) for item in group.items if not item.caption], alone),
        ("smaller than what is trained, and enlarged", small, "Use larger ones, or lower task.resolution."),
        *((f"too small for {edge} px, and not shown at it", names, "Use larger ones, or leave it so.") for edge, names in missing.items()),
        (f"narrower than 1:{buckets.WIDEST}, and cut", narrow, "Crop them yourself, so that what matters is kept."),
        *_notes_of_frames(group, task, looks),
        ("partly transparent", [shown(item.name) for item in group.items if looks[item.name].transparent], "White is put behind."),
    ]
    return [f"{_are(names)} {what} (first: {names[0]}). {advice}" for what, names, advice in facts if names]


def _notes_of_frames(group: Pictures, task: ImageTask, looks: dict[str, Look]) -> list[tuple[str, list[str], str]]:
    """What is worth a warning about clips."""
    if task.frames == 1:
        return [("animated or of several pages", [shown(item.name) for item in group.items if looks[item.name].animated], "The first is used.")]
    short = [f"{shown(item.name)}, {item.frames} to {clips.length(item, task)}" for item in group.items if clips.length(item, task) < task.frames]
    return [(f"shorter than {task.frames} frames, and shown with fewer", short, "Use longer ones, or lower task.frames.")]


def _note_copies(group: Pictures, digests: dict[str, str]) -> None:
    """Note the pictures that came before, byte for byte, in this group or an earlier one."""
    copies = []
    for item in group.items:
        first = digests.setdefault(item.digest, item.name)
        if first != item.name:
            copies.append(f"{shown(item.name)} is {shown(first)}")
    if copies:
        group.notes.append(f"{_are(copies)} there already (first: {copies[0]}). Take the copies out, or use the source's weight.")


def _are(names: list[str]) -> str:
    return "1 picture is" if len(names) == 1 else f"{len(names)} pictures are"


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()


def _name(name: str) -> str:
    """A file's name as text; bytes that are no UTF-8 are replaced."""
    return os.fsencode(name).decode("utf-8", "replace")
