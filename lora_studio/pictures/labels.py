"""Which caption, mask and source belong to which picture of a folder: metadata files, files beside pictures, and their names."""

import posixpath
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from lora_studio import data
from lora_studio.errors import DataError
from lora_studio.pictures import picture as reasons
from lora_studio.pictures.decoding import SUFFIXES
from lora_studio.pictures.picture import Skip, shown
from lora_studio.spec import Source

METADATA = ("metadata.jsonl", "metadata.csv")
BESIDE = (".txt", ".caption")
CAPTIONS = ("text", "caption", "prompt")
MASKS = ("mask_file_name", "mask")
SOURCES = ("source_file_name", "control_file_name", "control", "control_image", "source_image", "input_image")
ROLES = ("picture", "caption", "mask", "source")
MASK_ENDINGS = ("-masklabel", "_mask", "-mask", ".mask")
MASK_FOLDERS = ("mask", "masks")
SOURCE_FOLDERS = ("control", "controls", "source", "sources")
LONGEST = 64 << 10


@dataclass
class Row:
    """What a metadata file says of one picture. `problem` is a reason to leave it out."""

    caption: str | None = None
    mask: str | None = None
    source: str | None = None
    problem: str | None = None


@dataclass
class Labels:
    """What is known of the pictures of a folder, by their names in it."""

    rows: dict[str, Row] = field(default_factory=dict)
    masks: dict[str, str] = field(default_factory=dict)
    """The mask of a picture, found by its name."""
    sources: dict[str, str] = field(default_factory=dict)
    """The picture that a picture was made of, found by its name."""
    no_pictures: set[str] = field(default_factory=set)
    """Files that are masks or sources, and so are not pictures themselves."""
    skipped: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    notes: list[str] = field(default_factory=list)


def read(files: dict[str, Path], source: Source) -> Labels:
    """The labels of a folder's files (by their names in it). Raises DataError for a metadata file that cannot be read."""
    labels = Labels()
    for role in source.columns:
        if role not in ROLES:
            raise DataError("data.unknown_role", path=source.path, role=role, task="image", known=", ".join(ROLES))
    found = sorted((name for name in files if posixpath.basename(name) in METADATA), key=lambda name: (name.count("/"), name))
    for name in found:
        folder = posixpath.dirname(name)
        if name.endswith(".csv") and posixpath.join(folder, METADATA[0]) in files:
            labels.notes.append(f"{shown(name)} is not used, because metadata.jsonl is there too. Delete one of them.")
        else:
            _read_metadata(name, files, source, labels)
    _find_masks(files, labels)
    _find_sources(files, labels)
    _find_orphans(files, labels)
    pictures = [name for name in sorted(files) if _is_picture(name) and name not in labels.no_pictures]
    strays = [name for name in pictures if name not in labels.rows]
    if found and strays:
        labels.notes.append(f"{_pictures(strays)} not named in the metadata (first: {shown(strays[0])}). Add rows, or take them out.")
    return labels


def caption_of(name: str, files: dict[str, Path], labels: Labels) -> str:
    """The caption of a picture, "" when it has none: the metadata's before that of a file beside it. Raises Skip."""
    row = labels.rows.get(name, Row())
    if row.problem:
        raise Skip(row.problem)
    if row.caption is not None:
        return row.caption
    beside = next((found for found in _names_beside(name) if found in files), None)
    return "" if beside is None else _text_of(files[beside])


def mask_of(name: str, files: dict[str, Path], labels: Labels) -> Path | None:
    """The mask of a picture, if it has one. Raises Skip when the metadata names one that is not there."""
    row = labels.rows.get(name, Row())
    found = row.mask or labels.masks.get(name)
    if found is not None and found not in files:
        raise Skip(reasons.MASK_BROKEN)
    return None if found is None else files[found]


def source_of(name: str, files: dict[str, Path], labels: Labels) -> Path | None:
    """The picture that a picture was made of, if it has one. Raises Skip when the metadata names one that is not there."""
    row = labels.rows.get(name, Row())
    found = row.source or labels.sources.get(name)
    if found is not None and found not in files:
        raise Skip(reasons.SOURCE_BROKEN)
    return None if found is None else files[found]


def _names_beside(name: str) -> list[str]:
    stem = posixpath.splitext(name)[0]
    return [f"{start}{ending}" for start in (stem, name) for ending in BESIDE]


def _text_of(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            found = file.read(LONGEST + 1)
    except OSError:
        raise Skip(reasons.CLOSED_CAPTION) from None
    if len(found) > LONGEST:
        raise Skip(reasons.CAPTION_LONG)
    try:
        return _plain(found.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise Skip(reasons.CAPTION_CODE) from None


def _plain(text: str) -> str:
    if "\x00" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise Skip(reasons.CAPTION_CODE)
    return text.strip()


def _read_metadata(name: str, files: dict[str, Path], source: Source, labels: Labels) -> None:
    """Add the rows of one metadata file; its names are relative to its own folder. Raises DataError."""
    try:
        table = data.read(Source(path=str(files[name])))
    except OSError as error:
        raise DataError("picture.closed", path=shown(name), reason=(error.strerror or str(error)).lower()) from None
    columns = _columns(name, table.columns, source)
    seen: dict[str, tuple[str, str]] = {}
    for index, row in enumerate(table.rows):
        said = row.get(columns["picture"])
        if not isinstance(said, str) or not said.strip():
            labels.skipped[reasons.NAMELESS].append(table.place(index))
            continue
        picture = _inside(name, said, files)
        if picture is None or picture not in files:
            labels.skipped[reasons.OUTSIDE if picture is None else reasons.NOT_THERE].append(shown(said))
            continue
        if picture in seen:
            first, before = seen[picture]
            same = "with the same caption" if before == str(row.get(columns.get("caption"))) else "and the first caption is used"
            labels.notes.append(f"{shown(name)} names {shown(said)} twice ({first} and {table.place(index)}), {same}. Delete one row.")
            continue
        seen[picture] = (table.place(index), str(row.get(columns.get("caption"))))
        labels.rows[picture] = _row(name, row, columns, files)


def _columns(name: str, present: tuple[str, ...], source: Source) -> dict[str, str]:
    """The column of each role that has one. Raises DataError."""
    usual = {"picture": ("file_name",), "caption": CAPTIONS, "mask": MASKS, "source": SOURCES}
    columns = {}
    for role in ROLES:
        wanted = (source.columns[role],) if role in source.columns else usual[role]
        column = next((column for column in wanted if column in present), None)
        if column is not None:
            columns[role] = column
        elif role == "picture" or role in source.columns:
            raise DataError("data.no_column", path=shown(name), column=wanted[0], columns=", ".join(present), role=role)
    return columns


def _row(name: str, row: dict, columns: dict[str, str], files: dict[str, Path]) -> Row:
    said, others = row.get(columns.get("caption")), {}
    for role in ("mask", "source"):
        other = row.get(columns.get(role))
        others[role] = (_inside(name, other, files) or other) if isinstance(other, str) and other.strip() else None
    found = Row(**others)
    if isinstance(said, list | dict):
        found.problem = reasons.CAPTION_KIND
    elif said is not None:
        try:
            found.caption = _plain(str(said))
        except Skip as reason:
            found.problem = str(reason)
        if len(str(said)) > LONGEST:
            found.problem = reasons.CAPTION_LONG
    return found


def _inside(metadata: str, said: str, files: dict[str, Path]) -> str | None:
    """A name as a metadata file gives it, from the top of the folder; None when it leads out. Only listed files are ever opened."""
    for text in (said.strip(), said.strip().replace("\\", "/")):
        name = posixpath.normpath(posixpath.join(posixpath.dirname(metadata), text))
        if name in files:
            return name
    out = name.startswith(("/", "../")) or name == ".." or name[1:2] == ":"
    return None if out else name


def _is_picture(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in SUFFIXES


def _find_masks(files: dict[str, Path], labels: Labels) -> None:
    """Masks by their names: a_mask.png beside a.jpg, or masks/a.png below it; and those of the metadata."""
    stems = defaultdict(list)
    for name in files:
        if _is_picture(name):
            stems[posixpath.splitext(name)[0]].append(name)
    for stem, names in sorted(stems.items()):
        folder, last = posixpath.split(stem)
        owners = [stem[: -len(ending)] for ending in MASK_ENDINGS if last.endswith(ending)]
        if posixpath.basename(folder) in MASK_FOLDERS:
            owners.append(posixpath.join(posixpath.dirname(folder), last))
        for owner in owners:
            for picture in stems.get(owner, ()):
                labels.masks[picture] = names[0]
                labels.no_pictures.update(names)
    labels.no_pictures.update(row.mask for row in labels.rows.values() if row.mask)
    labels.no_pictures -= labels.rows.keys()
    if labels.masks:
        picture, mask = min(labels.masks.items())
        words = "1 picture has" if len(labels.masks) == 1 else f"{len(labels.masks)} pictures have"
        labels.notes.append(f"{words} a mask, by its name (first: {shown(picture)} has {shown(mask)}). What is white there is learnt.")


def _find_sources(files: dict[str, Path], labels: Labels) -> None:
    """Sources by their names: control/a.png below a.jpg; and those of the metadata."""
    targets = defaultdict(list)
    for name in files:
        if _is_picture(name) and name not in labels.no_pictures:
            targets[posixpath.splitext(name)[0]].append(name)
    for stem, names in sorted(targets.items()):
        folder, last = posixpath.split(stem)
        if posixpath.basename(folder) in SOURCE_FOLDERS:
            for picture in targets.get(posixpath.join(posixpath.dirname(folder), last), ()):
                labels.sources[picture] = names[0]
    found = {*labels.sources.values(), *(row.source for row in labels.rows.values() if row.source)}
    labels.no_pictures |= found - labels.rows.keys()
    if labels.sources:
        picture, source = min(labels.sources.items())
        words = "1 picture has" if len(labels.sources) == 1 else f"{len(labels.sources)} pictures have"
        labels.notes.append(f"{words} a source, by its name (first: {shown(picture)} is made of {shown(source)}). Editing models learn the way from one to the other.")


def _find_orphans(files: dict[str, Path], labels: Labels) -> None:
    """Note the captions that stand beside no picture."""
    known = {beside for name in files if posixpath.splitext(name)[1].lower() not in BESIDE for beside in _names_beside(name)}
    plain = ("readme", "license", "licence", "captions")
    found = [name for name in sorted(files) if posixpath.splitext(name)[1].lower() in BESIDE and name not in known]
    orphans = [name for name in found if posixpath.splitext(posixpath.basename(name))[0].lower() not in plain]
    if orphans:
        words = "1 caption has" if len(orphans) == 1 else f"{len(orphans)} captions have"
        labels.notes.append(f"{words} no picture (first: {shown(orphans[0])}). Add the pictures, or give both the same name.")
    twice = [name for name in sorted(files) if _is_picture(name) and sum(beside in files for beside in _names_beside(name)) > 1]
    if twice:
        words = "1 picture has" if len(twice) == 1 else f"{len(twice)} pictures have"
        labels.notes.append(f"{words} both a .txt and a .caption (first: {shown(twice[0])}); the .txt is used.")


def _pictures(names: list[str]) -> str:
    return "1 picture is" if len(names) == 1 else f"{len(names)} pictures are"
