"""The card of a library item: its fields, their defaults, and what may be written into them."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from lora_studio import adapters, durable
from lora_studio.errors import AdapterError

ID = re.compile(r"[0-9a-f]{16}")
# Every field with its default. Facts about the file come from its headers, the rest from whoever adds it.
# parents: [{id, name, sha256, weight}]; recipe: how a blend was made; data: the fingerprint of the rows; source: where it was imported from.
CARD = {
    "name": "", "base": "", "base_revision": None, "base_print": "", "format": "peft", "method": "lora", "rank": 0, "alpha": None, "rslora": False,
    "targets": [], "layers": 0, "parameters": 0, "bytes": 0, "sha256": "", "trigger": "", "tags": [], "notes": "", "favourite": False,
    "parents": [], "recipe": None, "data": None, "metrics": {}, "run": None, "source": None, "publications": [], "created": 0.0, "damage": None,
}  # fmt: skip
EDITABLE = {"name", "notes", "tags", "favourite", "trigger", "publications", "damage"}
NOTES_LIMIT = 20_000


@dataclass(frozen=True)
class Item:
    """One adapter of the library as a list shows it. `damage` says what is wrong with its files, if something was found."""

    id: str
    name: str
    base: str
    method: str
    rank: int
    alpha: float | None
    bytes: int
    trigger: str
    tags: tuple[str, ...]
    favourite: bool
    created: float
    run: str | None
    damage: str | None


def read(folder: Path) -> dict:
    """The card in an item's folder with every field there and of its kind; a broken one says so in `damage`."""
    found = durable.read_json(folder / "card.json")
    if not isinstance(found, dict):
        return {**CARD, "name": folder.name, "damage": "card.json is missing or broken"}
    return {**found, **{key: found[key] if _is_like(found.get(key), default) else default for key, default in CARD.items()}}


def _is_like(value, default) -> bool:
    """Whether a value may stand where `default` does; cards are files, and files are edited by hand."""
    if default is None:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))


def new(header: adapters.Card, files: dict[str, bytes], facts: dict) -> dict:
    """The card of a new item: what its headers say, and the `facts` its maker knows. Raises AdapterError."""
    strangers = facts.keys() - CARD.keys()
    if strangers:
        raise ValueError(f"a card has no {', '.join(sorted(strangers))}")
    measured = {
        "base": header.base, "base_revision": header.revision, "format": header.format, "method": header.method, "rank": header.rank,
        "alpha": header.alpha, "rslora": header.rslora, "targets": list(header.targets), "layers": len(header.layers),
        "parameters": header.parameters, "bytes": header.bytes, "sha256": hashlib.sha256(files[adapters.WEIGHTS]).hexdigest(),
    }  # fmt: skip
    card = {**CARD, **measured, **{key: value for key, value in facts.items() if value is not None}}
    return {**card, "name": checked_name(card["name"] or header.base.rsplit("/", 1)[-1] or "adapter"), "tags": checked_tags(card["tags"])}


def checked_name(text: str) -> str:
    """A name as it may stand on a card. Raises AdapterError."""
    name = str(text).strip()
    if not name or len(name) > 80 or not name.isprintable():
        raise AdapterError("library.name", name=adapters.shown(text, 60))
    return name


def checked_tags(found) -> list[str]:
    """Tags without doubles, in order. Raises AdapterError."""
    tags = {}
    for text in found:
        tag = str(text).strip()
        if not tag or len(tag) > 40 or not tag.isprintable():
            raise AdapterError("library.tag", tag=adapters.shown(text, 60))
        tags.setdefault(tag.casefold(), tag)
    return list(tags.values())


def content_id(files: dict[str, bytes]) -> str:
    """The id of an adapter: a hash of its weights and configuration. The same content has the same id."""
    digest = hashlib.sha256()
    for name in (adapters.CONFIG, adapters.WEIGHTS):
        digest.update(hashlib.sha256(files[name]).digest())
    return digest.hexdigest()[:16]


def damage_of(folder: Path) -> str | None:
    """What is wrong with an item's files, in words: damaged, or whole but those of another item. None when nothing is."""
    found = durable.damage(folder / "adapter")
    if found:
        return found
    try:
        id = content_id({name: (folder / "adapter" / name).read_bytes() for name in (adapters.WEIGHTS, adapters.CONFIG)})
    except OSError as error:
        return f"{Path(error.filename or 'a file').name} cannot be read"
    return None if id == folder.name else "its files are those of another adapter"
