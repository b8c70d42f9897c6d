"""Put adapters on the shelf, change what is written on their cards, find them, take them off and bring them back."""

import json
import os
import re
import secrets
import shutil
import time
from pathlib import Path

from lora_studio import adapters, durable, fence
from lora_studio.adapters.files import BESIDE, locate, parse_json
from lora_studio.errors import AdapterError, MachineError
from lora_studio.library import cards, index
from lora_studio.workspace import Workspace

REMOVED, KEEP_SECONDS, LEFTOVER_SECONDS = ".removed", 30 * 86400, 3600
ROOM = 64 << 20


def root(workspace: Workspace) -> Path:
    """The library's folder."""
    return workspace.root / "library"


# ---- one item


def folder_of(workspace: Workspace, id: str) -> Path:
    """The folder of an item by its id, a clear beginning of it, or its exact name. Raises AdapterError."""
    text, top = str(id), root(workspace)
    if cards.ID.fullmatch(text) and (top / text).is_dir():
        return top / text
    fits = []
    if re.fullmatch(r"[0-9a-f]{4,15}", text):
        fits = sorted(name for name in index.stamps(top) if name.startswith(text))
    fits = fits or [item.id for item in index.find(top, index.Question(name=text))]
    if len(fits) > 1:
        raise AdapterError("library.ambiguous", id=adapters.shown(text, 80), known=", ".join(fits[:5]))
    if not fits:
        raise AdapterError("library.unknown", id=adapters.shown(text, 80))
    return top / fits[0]


def adapter_folder(workspace: Workspace, id: str) -> Path:
    """The PEFT folder of an item. Raises AdapterError when its files are known to be damaged."""
    folder = folder_of(workspace, id)
    damage = cards.read(folder)["damage"]
    if damage:
        raise AdapterError("library.damaged", id=folder.name, reason=damage)
    return folder / "adapter"


def card(workspace: Workspace, id: str) -> dict:
    """Everything known of an item. Raises AdapterError."""
    folder = folder_of(workspace, id)
    return {"id": folder.name, **cards.read(folder)}


# ---- adding


def add(workspace: Workspace, source: Path | str | dict[str, bytes], facts: dict | None = None, *, config: dict | None = None) -> str:
    """Put the adapter in a PEFT folder (or in memory) on the shelf, whole or not at all. `facts` are fields of its card; `config` gives
    what its adapter_config.json lacks and is recorded there. Content that is already on the shelf stays as it is, mended if it was
    damaged. Returns the id. Headers are checked here; values are not: read it with `adapters.read` first. Raises AdapterError and
    MachineError."""
    header = adapters.inspect(source, config=config)
    errors = [problem.sentence for problem in header.problems if problem.level == "error"]
    if errors:
        raise AdapterError("adapter.problems", reason=" ".join(errors))
    if header.format != "peft":  # what shelf.import_adapter converts first
        raise AdapterError("adapter.no_config", path=Path(source).name if not isinstance(source, dict) else "The adapter")
    files = _with_config(source if isinstance(source, dict) else _files(Path(source)), config)
    id = cards.content_id(files)
    made = cards.new(header, files, {**(facts or {}), "created": (facts or {}).get("created") or time.time()})
    target = root(workspace) / id
    with _lock(workspace):
        if target.is_dir():
            _mend(target, files, made)
            return id
    fence.refuse_bytes(workspace, sum(map(len, files.values())))
    stage = _stage(target, files, made)
    with _lock(workspace):
        if target.is_dir():
            shutil.rmtree(stage)
        else:
            os.replace(stage, target)
            durable.sync_folder(target.parent)
    return id


def identify(source: Path) -> str:
    """The id an adapter's folder has, or would have, in a library. Raises AdapterError."""
    return cards.content_id(_files(Path(source)))


def _mend(target: Path, files: dict[str, bytes], made: dict) -> None:
    """Put back what was lost of an item, now that its content is at hand again. Name, notes and tags stay where they can be read."""
    if cards.damage_of(target):
        durable.publish_folder(target / "adapter", files)
    if not isinstance(durable.read_json(target / "card.json"), dict):
        durable.write_json(target / "card.json", made)
    elif cards.read(target)["damage"]:
        durable.write_json(target / "card.json", {**cards.read(target), "damage": None})


def _files(source: Path) -> dict[str, bytes]:
    """The files of a PEFT folder that enter the library, under their usual names."""
    place = locate(source)
    found = {adapters.WEIGHTS: place.weights, **{name: place.weights.with_name(name) for name in (adapters.CONFIG, *BESIDE)}}
    try:
        return {name: path.read_bytes() for name, path in found.items() if path.is_file()}
    except OSError as error:
        raise AdapterError("adapter.unreadable", path=source.name, reason=error.strerror or str(error)) from None


def _with_config(files: dict[str, bytes], config: dict | None) -> dict[str, bytes]:
    """The files with what the user gave written into adapter_config.json, so that it is never asked for again."""
    if not config:
        return files
    there = parse_json(adapters.CONFIG, files[adapters.CONFIG]) if adapters.CONFIG in files else {"peft_type": "LORA"}
    return {**files, adapters.CONFIG: (json.dumps({**there, **config}, indent=2, sort_keys=True) + "\n").encode()}


def _stage(target: Path, files: dict[str, bytes], made: dict) -> Path:
    """A whole item beside its place. A full disk leaves nothing behind. Raises MachineError."""
    needed, free = sum(map(len, files.values())) + ROOM, shutil.disk_usage(target.parent).free
    if free < needed:
        raise MachineError("machine.disk", path=target.parent, free=_size(free), needed=_size(needed))
    stage = target.with_name(f"{durable.TEMPORARY}{secrets.token_hex(4)}-{target.name}")
    try:
        stage.mkdir()
        durable.publish_folder(stage / "adapter", files)
        durable.write_json(stage / "card.json", made)
    except OSError as error:
        shutil.rmtree(stage, ignore_errors=True)
        raise MachineError("machine.write", path=target.parent, reason=error.strerror or str(error)) from None
    return stage


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _lock(workspace: Workspace) -> durable.Lock:
    """Only one process changes the library at a time; readers never wait."""
    top = root(workspace)
    try:
        top.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise MachineError("machine.write", path=top, reason=error.strerror or str(error)) from None
    return durable.Lock(top / ".lock")


# ---- changing a card


def update(workspace: Workspace, id: str, **fields) -> dict:
    """Change fields of an item's card. Returns the card. Raises AdapterError."""
    if not fields.keys() <= cards.EDITABLE:
        raise ValueError(f"not to be changed: {', '.join(sorted(fields.keys() - cards.EDITABLE))}")
    return _change(workspace, id, lambda card: {**card, **fields})


def _change(workspace: Workspace, id: str, how) -> dict:
    """Replace an item's card by `how(card)`; no change of another process in between is lost."""
    folder = folder_of(workspace, id)
    with _lock(workspace):
        if not folder.is_dir():
            raise AdapterError("library.unknown", id=folder.name)
        card = how(cards.read(folder))
        durable.write_json(folder / "card.json", card)
    return card


def rename(workspace: Workspace, id: str, name: str) -> dict:
    """Give an item another name. Two items may share one. Raises AdapterError."""
    return update(workspace, id, name=cards.checked_name(name))


def note(workspace: Workspace, id: str, text: str) -> dict:
    """Replace an item's notes."""
    return update(workspace, id, notes=str(text)[: cards.NOTES_LIMIT])


def favourite(workspace: Workspace, id: str, value: bool = True) -> dict:
    """Mark an item, or take the mark away."""
    return update(workspace, id, favourite=bool(value))


def tag(workspace: Workspace, id: str, *, add: tuple[str, ...] = (), remove: tuple[str, ...] = ()) -> dict:
    """Add and remove tags; case does not tell them apart. Raises AdapterError."""
    more, less = cards.checked_tags(add), {str(text).strip().casefold() for text in remove}
    return _change(
        workspace,
        id,
        lambda card: {**card, "tags": cards.checked_tags([text for text in card["tags"] if str(text).casefold() not in less] + more)},
    )


# ---- removing


def remove(workspace: Workspace, id: str) -> str:
    """Take an item off the shelf; `undo` brings it back within 30 days. Returns its id. Raises AdapterError."""
    folder, top = folder_of(workspace, id), root(workspace)
    with _lock(workspace):
        (top / REMOVED).mkdir(exist_ok=True)
        try:
            os.replace(folder, top / REMOVED / f"{folder.name}-{time.time_ns()}")
        except FileNotFoundError:
            raise AdapterError("library.unknown", id=folder.name) from None
        durable.sync_folder(top / REMOVED)
        durable.sync_folder(top)
    return folder.name


def removed(workspace: Workspace) -> list[tuple[str, str, float]]:
    """What can be brought back: (id, name, when it was removed), the latest first."""
    return [(id, cards.read(path)["name"], when) for id, when, path in _removed(workspace)]


def _removed(workspace: Workspace) -> list[tuple[str, float, Path]]:
    folder = root(workspace) / REMOVED
    found = [path for path in folder.iterdir() if re.fullmatch(cards.ID.pattern + r"-\d{1,20}", path.name)] if folder.is_dir() else []
    rows = [(path.name.partition("-")[0], int(path.name.partition("-")[2]), path) for path in found]
    return [(id, when / 1e9, path) for id, when, path in sorted(rows, key=lambda row: row[1], reverse=True)]


def undo(workspace: Workspace, id: str) -> str:
    """Bring back what was removed last under that id. Raises AdapterError."""
    text, top = str(id), root(workspace)
    with _lock(workspace):
        path = next((path for own, _, path in _removed(workspace) if own == text), None)
        if path is None:
            raise AdapterError("library.not_removed", id=adapters.shown(text, 80))
        if (top / text).exists():
            raise AdapterError("library.back_already", id=text)
        os.replace(path, top / text)
        durable.sync_folder(top)
    return text


def sweep(workspace: Workspace, *, now: float | None = None) -> int:
    """Delete for good what was removed over 30 days ago, and what a crash left behind. Returns how many items went."""
    now, top, gone = time.time() if now is None else now, root(workspace), 0
    with _lock(workspace):
        for _, when, path in _removed(workspace):
            if now - when > KEEP_SECONDS:
                durable.remove_folder(path)
                gone += 1
        durable.sweep(top / REMOVED)
        for path in top.iterdir():
            # A young one may be an import that is under way in another process.
            if path.name.startswith((durable.TEMPORARY, durable.TRASH)) and now - path.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
    return gone


# ---- finding


def find(
    workspace: Workspace, text: str = "", *, base=None, tag=None, method=None, favourite=None, name=None, order="newest", limit=None, offset=0
) -> list[cards.Item]:
    """The items that hold every word of `text` (in name, base, method, tags, trigger, notes, id) and fit the filters (`name` is exact).
    Orders: newest, oldest, name, size, rank."""
    return index.find(root(workspace), index.Question(text, base, tag, method, favourite, order, limit, offset, name))


def count(workspace: Workspace, text: str = "", *, base=None, tag=None, method=None, favourite=None) -> int:
    """How many items `find` has without a limit."""
    return index.count(root(workspace), index.Question(text, base, tag, method, favourite))


def survey(workspace: Workspace, text: str = "", **asked) -> index.Survey:
    """What `find` has, with what a page of the library shows around it. `asked` are the filters, order and limit of `find`."""
    return index.survey(root(workspace), index.Question(text, **asked))
