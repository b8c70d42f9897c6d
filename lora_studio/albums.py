"""The verbs of albums: make one, bring pictures in, edit captions, undo, count. The pages and the command line call these."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lora_studio import bases, durable, fence, runs
from lora_studio.errors import BaseModelError, DataError, MachineError
from lora_studio.home import home
from lora_studio.jobs import devices, queue
from lora_studio.pictures import album, intake, sources, statistics, thumbnails
from lora_studio.pictures.album import View
from lora_studio.pictures.decoding import SUFFIXES
from lora_studio.pictures.edits import Edit
from lora_studio.pictures.history import HIDDEN
from lora_studio.pictures.intake import Incoming
from lora_studio.pictures.picture import Skip, shown
from lora_studio.spec import ImageTask, Source, captions, parse
from lora_studio.workspace import Workspace

__all__ = ["SUFFIXES", "Edit", "View"]
LONGEST_NAME = 60
REMOVED, KEPT_SECONDS = ".removed", 30 * 86400
CAPTIONERS = ("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large", "HuggingFaceTB/SmolVLM-500M-Instruct")
"""Image-to-text models to begin with; any that transformers loads without code of its own will do."""

Report = Callable[[int, int], None]


# ---- which there are


def names(workspace: Workspace) -> list[str]:
    """The albums of a workspace, the one changed last first."""
    found = [path for path in workspace.data.iterdir() if album.is_album(path)] if workspace.data.is_dir() else []
    return [path.name for path in sorted(found, key=lambda path: (-path.stat().st_mtime, path.name)) if not path.name.startswith(".")]


def folder(workspace: Workspace, name: str) -> Path:
    """The folder of an album. Raises DataError."""
    known = names(workspace)
    if name not in known:
        raise DataError("album.unknown", album=shown(str(name), 60), known=", ".join(known[:10]) or "none yet")
    return workspace.data / name


def named(workspace: Workspace, path: str) -> str | None:
    """The album that a source's path means, if it is one of this workspace."""
    here = fence.place(path)
    return here.name if here is not None and here.parent == workspace.data and here.name in names(workspace) else None


def view(workspace: Workspace, name: str) -> View:
    """An album as it is now. Raises DataError."""
    return album.view(folder(workspace, name))


def fitting(view: View, search: str, kind: str, chosen: list[str]) -> list[str]:
    """The pictures of an album that the search and the filter show."""
    times: dict[str, int] = {}
    for text in view.captions.values():
        times[text] = times.get(text, 0) + 1
    wanted, among = search.casefold().strip(), set(chosen)
    fits = {"missing": lambda name, text: not text, "same": lambda name, text: text and times[text] > 1, "chosen": lambda name, text: name in among}.get(kind, lambda name, text: True)
    return [name for name, text in view.captions.items() if fits(name, text) and (not wanted or wanted in text.casefold() or wanted in name.casefold())]


# ---- in


def create(workspace: Workspace, files: list[Path], *, name: str = "", report: Report | None = None) -> tuple[str, Incoming]:
    """A new album of dropped pictures, with captions beside them, or archives of these. Returns its name and what came in.
    Raises DataError when nothing usable is among them; then there is no album."""
    with _scratch(workspace) as scratch:
        found = intake.gather(files, scratch=scratch, cache=home() / "cache" / "archives", report=report)
        archive = next((path.stem for path in files if path.suffix.lower() == ".zip"), "")
        return _publish(workspace, found, name or archive or f"pictures {time.strftime('%d %b')}"), found


def copy(workspace: Workspace, path: str, *, name: str = "", report: Report | None = None) -> tuple[str, Incoming]:
    """An editable copy of a source: a bundled demo, a folder, a .zip, or a data set of the Hub. Returns its name and what came in.
    Raises DataError."""
    source = parse({"task": {"kind": "image"}, "data": [{"path": path}]}).data[0]
    found = intake.gather_folder(sources.folder_of(source, home() / "cache" / "archives"), source, report)
    return _publish(workspace, found, name or Path(path).name.removesuffix(".zip")), found


def add(workspace: Workspace, name: str, files: list[Path], *, report: Report | None = None) -> Incoming:
    """Bring more pictures into an album. Returns what came in. Raises DataError; then it is as it was."""
    target = folder(workspace, name)
    fence.refuse_bytes(workspace)
    with _scratch(workspace) as scratch:
        found = intake.gather(files, scratch=scratch, cache=home() / "cache" / "archives", report=report)
        album.add(target, lambda place, taken: intake.bring(found, place, taken))
    return found


@contextlib.contextmanager
def _scratch(workspace: Workspace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        yield Path(place)


def _publish(workspace: Workspace, found: Incoming, name: str) -> str:
    """Make the folder of a new album, whole or not at all; its name, which no other file there has."""
    fence.refuse_bytes(workspace)
    workspace.data.mkdir(parents=True, exist_ok=True)
    stage = Path(tempfile.mkdtemp(dir=workspace.data, prefix=durable.TEMPORARY))
    try:
        durable.write(stage / album.METADATA, album.metadata(intake.bring(found, stage, set())))
        (stage / HIDDEN).mkdir()
        durable.write_json(stage / HIDDEN / "history.json", {"steps": [], "done": 0, "last": {}})
        with _writing(workspace):
            for left in workspace.data.glob(f"{durable.TEMPORARY}*/"):
                if time.time() - left.stat().st_mtime > 86400:
                    shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
            target = workspace.data / _free_name(workspace, name)
            os.replace(stage, target)
            durable.sync_folder(workspace.data)
        return target.name
    except OSError as error:
        raise MachineError("machine.write", path=workspace.data, reason=(error.strerror or str(error)).lower()) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _free_name(workspace: Workspace, name: str) -> str:
    """A name for an album that nothing in the data folder has."""
    safe = re.sub(r"[^\w .-]+|-{2,}", "-", intake.safe_name(re.sub(r"[<>:{}$|?*\"]+", "-", name))).strip(" .-")[:LONGEST_NAME].strip(" .-") or "album"
    return intake.safe_name(safe, {path.name.casefold() for path in workspace.data.iterdir()})


# ---- out, and back


def discard(workspace: Workspace, name: str) -> None:
    """Take an album away. It comes back with `bring_back` within 30 days. Raises DataError."""
    here, place = folder(workspace, name), workspace.data / REMOVED
    with _writing(workspace):
        place.mkdir(exist_ok=True)
        for old in place.iterdir():
            if old.name[:10].isdigit() and time.time() - int(old.name[:10]) > KEPT_SECONDS:
                durable.remove_folder(old)
        target, number = place / f"{int(time.time())}-{name}", 1
        while target.exists():
            number += 1
            target = place / f"{int(time.time())}-{number}-{name}"
        os.replace(here, target)
        durable.sync_folder(place)
        durable.sync_folder(workspace.data)


def discarded(workspace: Workspace) -> list[tuple[str, str]]:
    """The albums that can be brought back, newest first, as (what it is called now, its name)."""
    place = workspace.data / REMOVED
    found = sorted((path.name for path in place.iterdir() if album.is_album(path)), reverse=True) if place.is_dir() else []
    return [(entry, re.sub(r"^\d{10}-(\d-)?", "", entry)) for entry in found]


def bring_back(workspace: Workspace, entry: str) -> str:
    """Bring an album back, under its name or one like it. Returns the name. Raises DataError."""
    name = dict(discarded(workspace)).get(entry)
    if name is None:
        raise DataError("album.not_removed", album=shown(str(entry), 60))
    with _writing(workspace):
        name = _free_name(workspace, name)
        os.replace(workspace.data / REMOVED / entry, workspace.data / name)
        durable.sync_folder(workspace.data)
    return name


@contextlib.contextmanager
def _writing(workspace: Workspace) -> Iterator[None]:
    """Within it nobody else makes or takes away an album here. Raises MachineError for what cannot be written."""
    try:
        with durable.Lock(workspace.data / ".albums.lock"):
            yield
    except OSError as error:
        raise MachineError("machine.write", path=workspace.data, reason=(error.strerror or str(error)).lower()) from None


# ---- edits


def write(workspace: Workspace, name: str, texts: dict[str, str], *, seen: dict[str, str] | None = None) -> int:
    """Give pictures new captions; how many changed. `seen` are the captions that the writer saw. Raises DataError."""
    return album.write(folder(workspace, name), texts, seen=seen)


def edit(workspace: Workspace, name: str, change: Edit, pictures: list[str] | None = None, *, revision: str | None = None) -> int:
    """Make one change to the captions of these pictures, or of all; how many changed. Raises DataError."""
    return album.edit(folder(workspace, name), change, pictures, revision=revision)


def remove(workspace: Workspace, name: str, pictures: list[str], *, revision: str | None = None) -> int:
    """Take pictures out of an album; how many. Raises DataError."""
    return album.remove(folder(workspace, name), pictures, revision=revision)


def undo(workspace: Workspace, name: str, *, revision: str | None = None) -> str:
    """Take the newest step of an album back; what it was, in words. Raises DataError."""
    return album.undo(folder(workspace, name), revision=revision)


def redo(workspace: Workspace, name: str, *, revision: str | None = None) -> str:
    """Do the step again that was undone last; what it was, in words. Raises DataError."""
    return album.redo(folder(workspace, name), revision=revision)


# ---- looks


def thumbnail(workspace: Workspace, name: str, picture: str, size: str = "small") -> Path:
    """A small copy of a picture of an album, as a file. Raises DataError for anything that is not a picture of that album."""
    target = folder(workspace, name)
    if picture not in sources.listing(target).files or Path(picture).suffix.lower() not in SUFFIXES or size not in thumbnails.SIZES:
        raise DataError("album.no_picture", album=shown(name), picture=shown(picture))
    return thumbnails.thumbnail(target, picture, size)


def measure(workspace: Workspace, name: str, *, resolution: int = 512, report: Report | None = None) -> dict:
    """The statistics of an album at a resolution. Looks at every picture once; what was seen is kept. Raises DataError."""
    target = folder(workspace, name)
    task = parse({"task": {"kind": "image", "resolution": resolution}, "data": [{"path": "x"}]}).task
    assert isinstance(task, ImageTask)
    texts = album.view(target).captions
    return statistics.measure(texts, _looks(target, list(texts), report), task)


def _looks(target: Path, pictures: list[str], report: Report | None) -> dict[str, statistics.Look]:
    """What each picture looks like, by its name; those that cannot be read are left out."""
    kept = durable.read_json(target / HIDDEN / "looks.json", {})
    fresh = {}
    with ThreadPoolExecutor(intake.AT_ONCE) as pool:
        for number, (name, known) in enumerate(zip(pictures, pool.map(lambda name: _look(target / name, kept.get(name, [])), pictures)), 1):
            if known:
                fresh[name] = known
            if report:
                report(number, len(pictures))
    if fresh != kept:
        durable.write(target / HIDDEN / "looks.json", json.dumps(fresh))
    return {name: statistics.Look(*known[2:5], int(known[5], 16), bytes.fromhex(known[6])) for name, known in fresh.items()}


def _look(file: Path, known: list) -> list | None:
    """What a picture looks like, as it is kept: as `known` while the file is the same. None when it cannot be read."""
    try:
        stamp = file.stat()
        if known[:2] == [stamp.st_size, stamp.st_mtime_ns]:
            return known
        seen = statistics.look(file)
    except (OSError, Skip, DataError):
        return None
    return [stamp.st_size, stamp.st_mtime_ns, seen.width, seen.height, seen.digest, f"{seen.shape:x}", seen.colours.hex()]


# ---- captions by a model


def write_captions(workspace: Workspace, name: str, *, model: str, revision: str | None = None, **asked) -> str:
    """Queue a run that captions an album by an image-to-text model; the album changes when it ends, in one step. `asked` are
    settings of CaptionSpec: pictures, prompt, tokens, device. Returns the run's id. Raises StudioError."""
    tree = {"name": f"captions for {name}", "album": str(folder(workspace, name)), "model": {"id": model, "revision": revision}, **asked}
    spec = captions.parse(tree)
    device = devices.resolve(spec.device)
    found = bases.locate(spec.model)
    if found is not None and not (found / "config.json").is_file():
        raise BaseModelError("base.no_config", id=model)
    missing = spec.pictures == "missing" and all(album.view(folder(workspace, name)).captions.values())
    if missing or spec.pictures == []:
        raise DataError("caption.none", album=shown(name))
    run = runs.create(workspace, spec)
    runs.set_card(run, base=model, method="captions", needs_token=workspace.limits is not None and found is None)
    queue.add(workspace, run, device=device)
    queue.pump()
    return run.name


def source_of(workspace: Workspace, name: str) -> Source:
    """An album as the source of a run. Raises DataError."""
    return Source(path=str(folder(workspace, name)))
