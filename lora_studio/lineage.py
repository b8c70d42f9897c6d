"""The verb of lineage: the family tree of an adapter, with every ancestor, what was made of it, and the models it was baked into."""

from dataclasses import dataclass, field

from lora_studio import durable, library
from lora_studio.baking import RECIPE
from lora_studio.workspace import Workspace

GENERATIONS, MOST = 3, 60
HOW = {"sum": "blend", "resize": "resized", "extracted": "extracted"}


@dataclass(frozen=True)
class Member:
    """One of a family. `kind` is adapter or model, `how` says what made it, `generation` is 0 for the one asked about, negative above it.
    One that is no longer here is not `present`."""

    id: str
    name: str
    kind: str
    how: str
    generation: int
    present: bool


@dataclass
class Family:
    """The members by their ids, who was made of whom as (parent, child, weight), and how many further descendants were left out."""

    members: dict[str, Member] = field(default_factory=dict)
    links: list[tuple] = field(default_factory=list)
    left_out: int = 0


def family(workspace: Workspace, id: str) -> Family:
    """The family of an adapter: all its ancestors, and its descendants for three generations, at most sixty. Raises AdapterError."""
    own, found = library.folder_of(workspace, id).name, Family()
    _above(workspace, library.lineage(workspace, own), 0, found)
    models = _baked(workspace)
    line = [(own, 0)]
    while line:
        parent, generation = line.pop(0)
        for child in library.children(workspace, parent) if generation < GENERATIONS else ():
            card = library.card(workspace, child)
            weights = {str(one.get("id")): one.get("weight") for one in card["parents"] if isinstance(one, dict)}
            links = [(id, child, weight) for id, weight in weights.items() if id in found.members and id != child]
            if _descends(found, links, Member(child, card["name"], "adapter", how(card), generation + 1, True)):
                line.append((child, generation + 1))
        for name, weight in models.get(parent, ()):
            _descends(found, [(parent, f"models/{name}", weight)], Member(f"models/{name}", name, "model", "baked", generation + 1, True))
    return found


def how(card: dict) -> str:
    """What made an adapter, in a word."""
    recipe = card["recipe"] if isinstance(card["recipe"], dict) else {}
    if isinstance(recipe.get("merge"), dict):
        return str(recipe["merge"].get("how", "merge"))[:40]
    return next((word for key, word in HOW.items() if key in recipe), "trained" if card["run"] else "imported" if card["source"] else "")


def _above(workspace: Workspace, node: dict, generation: int, found: Family) -> None:
    """Take in an item and its ancestors; one that is reached twice stands above all that were made of it."""
    id, card = node["id"], library.card(workspace, node["id"]) if node["present"] else None
    known = found.members.get(id)
    if known is None or generation < known.generation < 0:
        found.members[id] = Member(id, str(node["name"]), "adapter", how(card) if card else "", generation, node["present"])
    for parent in node["parents"]:
        link = (parent["id"], id, parent["weight"])
        if link not in found.links:
            found.links.append(link)
        _above(workspace, parent, generation - 1, found)
    recipe = card["recipe"] if card else None
    source = recipe.get("extracted") if isinstance(recipe, dict) else None
    if isinstance(source, dict):
        key, name = f"from/{source.get('from')}", str(source.get("from", "")).rstrip("/").rpartition("/")[2]
        found.members.setdefault(key, Member(key, name[:80], "model", "fine-tuned", generation - 1, True))
        found.links.append((key, id, None))


def _descends(found: Family, links: list[tuple], member: Member) -> bool:
    """Take in a descendant. Returns whether it is new; a family that names itself as its own parent is not walked in a circle."""
    known = found.members.get(member.id)
    if known is None and len(found.members) >= MOST:
        found.left_out += 1
        return False
    if known is None or known.generation > 0:
        found.links += [link for link in links if link not in found.links]
    if known is not None and not 0 < known.generation < member.generation:
        return False
    found.members[member.id] = member
    return True


def _baked(workspace: Workspace) -> dict[str, list[tuple]]:
    """The models of the workspace, as (name, weight) by the adapters that were baked into them."""
    found: dict[str, list[tuple]] = {}
    for file in sorted((workspace.root / "models").glob(f"*/{RECIPE}")):
        recipe = durable.read_json(file)
        parts = recipe.get("sum") if isinstance(recipe, dict) else None
        for part in parts if isinstance(parts, list) else ():
            if isinstance(part, dict):
                found.setdefault(str(part.get("adapter")), []).append((file.parent.name, part.get("weight")))
    return found
