"""Is every file still what it was, and what was made from what."""

from pathlib import Path

from lora_studio import durable
from lora_studio.library import cards, index
from lora_studio.library.shelf import folder_of, root, update
from lora_studio.workspace import Workspace


def verify(workspace: Workspace, id: str | None = None) -> dict[str, str | None]:
    """Read every byte of an item, or of all, again: what is wrong with each, or None. What is found stays on the card until the files
    are whole again."""
    found = {}
    for folder in [folder_of(workspace, id)] if id else _folders(workspace):
        damage = cards.damage_of(folder)
        broken = not isinstance(durable.read_json(folder / "card.json"), dict)
        if not broken and cards.read(folder)["damage"] != damage:
            update(workspace, folder.name, damage=damage)
        found[folder.name] = damage or ("card.json is missing or broken" if broken else None)
    return found


def _folders(workspace: Workspace) -> list[Path]:
    return [root(workspace) / name for name in sorted(index.stamps(root(workspace)))]


def lineage(workspace: Workspace, id: str) -> dict:
    """The parents of an item and theirs: {id, name, sha256, weight, present, parents}. A parent that was removed is still named."""
    return _lineage(root(workspace), {"id": folder_of(workspace, id).name}, ())


def _lineage(top: Path, parent: dict, above: tuple[str, ...]) -> dict:
    id = str(parent.get("id", ""))
    present = bool(cards.ID.fullmatch(id)) and (top / id).is_dir()
    card = cards.read(top / id) if present else {"name": parent.get("name", ""), "sha256": parent.get("sha256", ""), "parents": []}
    # A card somebody wrote by hand may name itself as its parent.
    parents = [] if id in above else [_lineage(top, one, (*above, id)) for one in card["parents"] if isinstance(one, dict)]
    return {
        "id": id,
        "name": card["name"],
        "sha256": card["sha256"],
        "weight": parent.get("weight"),
        "present": present,
        "parents": parents,
    }


def children(workspace: Workspace, id: str) -> list[str]:
    """The items that were made from this one."""
    return index.children(root(workspace), folder_of(workspace, id).name)
