"""An album: a folder of pictures that the studio keeps, with captions in its metadata.jsonl, where every change can be undone.

The reader of pictures reads an album like any other folder. What the studio remembers of it is in the hidden folder .album;
deleting that loses the way back, and nothing else.
"""

import contextlib
import hashlib
import json
import posixpath
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_studio import durable
from lora_studio.errors import DataError, MachineError
from lora_studio.pictures import edits, history, labels, sources
from lora_studio.pictures.decoding import SUFFIXES
from lora_studio.pictures.edits import Edit
from lora_studio.pictures.history import HIDDEN, History, Rows, Step
from lora_studio.pictures.picture import Skip, shown
from lora_studio.spec import Source

METADATA = labels.METADATA[0]
# Columns that name a file which belongs to a picture.
COLUMNS = (labels.MASKS[0], labels.SOURCES[0])
WAIT_SECONDS = 30.0


@dataclass(frozen=True)
class View:
    """An album at one moment: its captions by the names of the pictures, and what can be undone and done again."""

    name: str
    captions: dict[str, str]
    masks: dict[str, str]
    stamps: dict[str, str]
    """For each picture, what changes when its file does."""
    revision: str
    undo: str | None
    redo: str | None


def is_album(folder: Path) -> bool:
    """Whether a folder is an album."""
    return (folder / HIDDEN).is_dir() and not folder.is_symlink()


def view(folder: Path) -> View:
    """The album as it is now. Raises DataError and MachineError."""
    with _opened(folder) as (known, rows):
        return _view(folder, known, rows)


def write(folder: Path, captions: dict[str, str], *, words: str = "", seen: dict[str, str] | None = None) -> int:
    """Give pictures new captions, in one step. Returns how many changed; on disk then. `seen` are the captions that the writer
    had before him: where one is no longer that, nothing is written. Raises DataError and MachineError."""
    checked = {name: edits.check_caption(name, text) for name, text in captions.items()}
    with _opened(folder) as (known, rows):
        _there(folder, rows, checked)
        for name, before in (seen or {}).items():
            if name in rows and rows[name]["text"] not in (before.strip(), checked.get(name)):
                raise DataError("album.caption_changed", picture=shown(name), now=shown(rows[name]["text"]) or "nothing")
        changed = {name: {**rows[name], "text": text} for name, text in checked.items() if rows[name]["text"] != text}
        said = words or (f"the caption of {shown(next(iter(changed)), 40)}" if len(changed) == 1 else edits.pictures(len(changed)))
        _do(folder, known, rows, Step(known.next_serial(), said), changed)
        return len(changed)


def edit(folder: Path, change: Edit, names: list[str] | None = None, *, revision: str | None = None) -> int:
    """Make one change to the captions of these pictures, or of all. Returns how many changed; on disk then.
    With `revision`, nothing is done to an album that is no longer that. Raises DataError and MachineError."""
    edits.check(change)
    with _opened(folder, revision) as (known, rows):
        chosen = list(rows) if names is None else _there(folder, rows, names)
        after = {name: edits.check_caption(name, edits.apply(change, rows[name]["text"])) for name in chosen}
        changed = {name: {**rows[name], "text": text} for name, text in after.items() if text != rows[name]["text"]}
        _do(folder, known, rows, Step(known.next_serial(), edits.in_words(change, len(changed))), changed)
        return len(changed)


def remove(folder: Path, names: list[str], *, revision: str | None = None) -> int:
    """Take pictures out, with their masks. Their files are kept as long as it can be undone. Raises DataError, MachineError."""
    with _opened(folder, revision) as (known, rows):
        chosen = _there(folder, rows, names)
        listed, kept = sources.listing(folder).files, {rows[name].get(column) for name in rows if name not in set(chosen) for column in COLUMNS}
        gone = [file for name in chosen for file in _files_of(name, rows[name]) if file in listed and file not in kept]
        words = f"remove {shown(chosen[0], 40)}" if len(chosen) == 1 else f"remove {len(chosen):,} pictures"
        _do(folder, known, rows, Step(known.next_serial(), words, gone=tuple(gone)), dict.fromkeys(chosen))
        return len(chosen)


def add(folder: Path, bring: Callable[[Path, set[str]], Rows]) -> list[str]:
    """Take pictures in: `bring(place, taken)` puts files under `place`, with names that are not in `taken`, and gives their
    rows. Returns the names of the pictures. Raises DataError, MachineError and what `bring` raises; then nothing was added."""
    with _opened(folder) as (known, rows):
        serial = known.next_serial()
        place = known.store(serial)
        shutil.rmtree(place, ignore_errors=True)  # of an addition that was cut off
        place.mkdir(parents=True)
        try:
            new = bring(place, {name.casefold() for name in sources.listing(folder).files})
        except BaseException:
            shutil.rmtree(place, ignore_errors=True)
            raise
        came = tuple(sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()))
        words = f"add {shown(next(iter(new)), 40)}" if len(new) == 1 else f"add {len(new):,} pictures"
        _do(folder, known, rows, Step(serial, words, came=came), new)
        return list(new)


def undo(folder: Path, *, revision: str | None = None) -> str:
    """Take the newest step back; what it was. Raises DataError when there is none, and MachineError."""
    with _opened(folder, revision) as (known, rows):
        if not known.done:
            raise DataError("album.nothing_to_undo", album=shown(folder.name))
        step = known.steps[known.done - 1]
        _apply(folder, known, rows, known.rows(step)[0], known.done - 1)
        return step.words


def redo(folder: Path, *, revision: str | None = None) -> str:
    """Do the step again that was undone last; what it was. Raises DataError when there is none, and MachineError."""
    with _opened(folder, revision) as (known, rows):
        if known.done == len(known.steps):
            raise DataError("album.nothing_to_redo", album=shown(folder.name))
        step = known.steps[known.done]
        _apply(folder, known, rows, known.rows(step)[1], known.done + 1)
        return step.words


def metadata(rows: Rows) -> bytes:
    """The content of metadata.jsonl: one row a picture, in the order of their names."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in sorted(rows.items()) if row is not None).encode()


# ---- inside


@contextlib.contextmanager
def _opened(folder: Path, revision: str | None = None) -> Iterator[tuple[History, Rows]]:
    """The album's history and rows under its lock, put in order. Raises DataError when it is not that revision any more."""
    lock = durable.Lock(folder / HIDDEN / "lock")
    try:
        if not is_album(folder) or not lock.take(wait=WAIT_SECONDS):
            raise DataError("album.busy" if is_album(folder) else "album.gone", album=shown(folder.name))
        known = history.load(folder)
        known.settle(_hash_of(folder))
        rows = _rows(folder)
        _adopt(folder, known, rows)
        if revision is not None and revision != _revision(folder):
            raise DataError("album.stale", album=shown(folder.name))
        yield known, rows
    except OSError as error:
        raise MachineError("machine.write", path=folder, reason=(error.strerror or str(error)).lower()) from None
    finally:
        lock.release()


def _view(folder: Path, known: History, rows: Rows) -> View:
    undo = known.steps[known.done - 1].words if known.done else None
    redo = known.steps[known.done].words if known.done < len(known.steps) else None
    masks = {name: row["mask_file_name"] for name, row in rows.items() if row.get("mask_file_name")}
    captions = {name: row["text"] for name, row in rows.items()}
    return View(folder.name, captions, masks, {name: _stamp(folder / name) for name in rows}, _revision(folder), undo, redo)


def _stamp(file: Path) -> str:
    found = file.stat()
    return f"{found.st_mtime_ns ^ found.st_size << 20:x}"


def _rows(folder: Path) -> Rows:
    """The row of every picture in the folder, whether the metadata names it or not. Raises DataError."""
    files = sources.listing(folder).files
    said = {}
    if METADATA in files and files[METADATA].stat().st_size:
        for row in labels.data.read(Source(path=str(files[METADATA]))).rows:
            if isinstance(row.get("file_name"), str):
                said.setdefault(row["file_name"], row)
    known = labels.read({name: path for name, path in files.items() if name != METADATA or said}, Source(path=str(folder)))
    rows: Rows = {}
    for name in sorted(files):
        if posixpath.splitext(name)[1].lower() in SUFFIXES and name not in known.no_pictures and name.isprintable():
            rows[name] = {**said.get(name, {}), "file_name": name, "text": _caption(name, files, known)}
    return rows


def _caption(name: str, files: dict[str, Path], known: labels.Labels) -> str:
    try:
        return labels.caption_of(name, files, known)
    except Skip:
        return ""  # what another program wrote beside it is no text


def _adopt(folder: Path, known: History, rows: Rows) -> None:
    """Give pictures that someone copied into the folder a row, so that the metadata names all."""
    before, after = _hash_of(folder), hashlib.sha256(metadata(rows)).hexdigest()
    if after != before:
        known.move_to(known.done, before, after)
        _write_metadata(folder, rows)


def _there(folder: Path, rows: Rows, names) -> list[str]:
    """The names, each once, which all are in the album. Raises DataError for one that is not."""
    for name in names:
        if name not in rows:
            raise DataError("album.no_picture", album=shown(folder.name), picture=shown(str(name)))
    if not names:
        raise DataError("album.none_chosen", album=shown(folder.name))
    return list(dict.fromkeys(names))


def _files_of(name: str, row: dict) -> list[str]:
    """The files that belong to a picture alone."""
    others = [row[column] for column in COLUMNS if row.get(column)]
    stem = posixpath.splitext(name)[0]
    return [name, *others, *(f"{start}{ending}" for start in (stem, name) for ending in labels.BESIDE)]


def _do(folder: Path, known: History, rows: Rows, step: Step, after: Rows) -> None:
    """Do a new step; without a change there is none."""
    if after:
        known.push(step, {name: rows.get(name) for name in after}, after)
        _apply(folder, known, rows, after, known.done + 1)
        known.sweep()


def _apply(folder: Path, known: History, rows: Rows, changed: Rows, done: int) -> None:
    """Make `done` steps done: note it, bring files in, write the metadata, take files out. Cut off anywhere, `settle` mends it."""
    rows = {**rows, **changed}
    content = metadata(rows)
    forward = done > known.done
    step = known.steps[max(done, known.done) - 1]
    known.move_to(done, _hash_of(folder), hashlib.sha256(content).hexdigest())
    known.bring(step.serial, step.came if forward else step.gone)
    _write_metadata(folder, rows)
    known.put_away(step.serial, step.gone if forward else step.came)


def _write_metadata(folder: Path, rows: Rows) -> None:
    """An album without pictures has no metadata, so that its reader says that there are none."""
    content = metadata(rows)
    if content:
        durable.write(folder / METADATA, content)
    elif (folder / METADATA).exists():
        (folder / METADATA).unlink()
        durable.sync_folder(folder)


def _hash_of(folder: Path) -> str:
    try:
        return hashlib.sha256((folder / METADATA).read_bytes()).hexdigest()
    except FileNotFoundError:
        return hashlib.sha256(b"").hexdigest()


def _revision(folder: Path) -> str:
    """What changes with every step of an album."""
    file = folder / HIDDEN / "history.json"
    found = file.read_bytes() if file.exists() else b""
    return hashlib.sha256(_hash_of(folder).encode() + found).hexdigest()[:16]
