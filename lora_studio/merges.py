"""The verbs of resizing and merging: what they make enters the library with its recipe and its parents' hashes, and can be made again."""

import tempfile
from pathlib import Path

from lora_studio import adapters, durable, library, shelf
from lora_studio.adapters.files import are_same_tensors
from lora_studio.errors import BlendError
from lora_studio.jobs import bench
from lora_studio.workspace import Workspace

SECONDS = 6 * 3600.0


def resize(
    workspace: Workspace, id: str, *, name: str, rank: int | None = None, loss: float | None = None, per_layer: bool = False,
    size: int | None = None, slice: bool = False,
) -> tuple[str, dict]:  # fmt: skip
    """An adapter of the library at other ranks as a new one: a `rank` (with `slice` its first rows and columns, of one with nested ranks), the `loss` that is allowed (of the whole, or of each layer), or the
    `size` of its weights in bytes. Returns its id, and what the bench measured: the true loss, ranks, clamped and left_out layers, bytes.
    Raises StudioError; then the library is as it was."""
    asked = {"rank": rank, "loss": loss, "per_layer": per_layer or None, "size": size, "slice": slice or None}
    asked = {key: value for key, value in asked.items() if value is not None}
    own = library.folder_of(workspace, id).name
    return _made(workspace, {"resize": {"adapter": own, **asked}}, name, "resized")


def merge(workspace: Workspace, parts: shelf.Parts, how: str, *, name: str, rank: int | None = None, **settings) -> tuple[str, dict]:
    """Adapters put together by slerp, subtract, orthogonal or knots, which are adapters without loss, or entry by entry by magnitude, ties,
    dare, della or breadcrumbs, which are approximated at `rank`. `settings` may hold density, seed, gamma, epsilon, space, as far as the way
    obeys them. Returns its id, and what the bench measured. Raises StudioError; then the library is as it was."""
    given = {key: value for key, value in {"rank": rank, **settings}.items() if value is not None}
    rows = [{"adapter": library.folder_of(workspace, id).name, "weight": weight} for id, weight in parts]
    return _made(workspace, {"merge": {"how": how, **given, "parts": rows}}, name, "merged")


def again(workspace: Workspace, id: str) -> tuple[str, dict]:
    """Make a blend, a merge or a resized adapter again by its recipe, from the same parents. Returns the id, which is the same where every
    tensor is, byte for byte, and what the bench measured with `identical`. What came out otherwise is a new adapter. Raises StudioError."""
    known = library.card(workspace, id)
    recipe = {key: value for key, value in (known["recipe"] or {}).items() if key in ("sum", "merge", "resize", "rank")}
    if not recipe.keys() & {"sum", "merge", "resize"}:
        raise BlendError("recipe.none", id=known["name"])
    present = {item.id for item in library.find(workspace)}
    for parent in known["parents"]:
        if parent["id"] not in present or library.card(workspace, parent["id"])["sha256"] != parent["sha256"]:
            raise BlendError("recipe.parent", id=known["name"], name=parent["name"])
    made, done = _made(workspace, recipe, None, known["tags"][0] if known["tags"] else "blend", like={**known, "id": library.folder_of(workspace, id).name})
    return made, {**done, "identical": made == library.folder_of(workspace, id).name}


def _made(workspace: Workspace, recipe: dict, name: str | None, tag: str, *, like: dict | None = None) -> tuple[str, dict]:
    """Do what a recipe says and put the result into the library; without a name under that of what it is to be `like`."""
    if name is not None:
        shelf.check_name(workspace, name)
    rows = recipe.get("sum") or (recipe["merge"]["parts"] if "merge" in recipe else [{"adapter": recipe["resize"]["adapter"], "weight": 1.0}])
    cards = [library.card(workspace, row["adapter"]) for row in rows]
    paths = [[str(library.adapter_folder(workspace, row["adapter"])), row["weight"], card["name"]] for row, card in zip(rows, cards)]
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        target = Path(place) / "adapter"
        if "resize" in recipe:
            asked = {key: value for key, value in recipe["resize"].items() if key != "adapter"}
            done = bench.ask("resize", seconds=SECONDS, path=paths[0][0], target=str(target), **asked)
        elif "merge" in recipe:
            asked = {key: value for key, value in recipe["merge"].items() if key != "parts"}
            done = bench.ask("merge", seconds=SECONDS, parts=paths, target=str(target), **asked)
        else:
            done = bench.ask("blend", seconds=SECONDS, parts=paths, rank=recipe.get("rank"), target=str(target))
        if like:
            before, after = (folder / adapters.WEIGHTS for folder in (library.adapter_folder(workspace, like["id"]), target))
            if are_same_tensors(before.read_bytes(), after.read_bytes()):
                return like["id"], done
            name = f"{like['name'][:70]} again"
            shelf.check_name(workspace, name)
        parents = [
            {"id": card["id"], "name": card["name"], "sha256": parent["sha256"], "weight": row["weight"]} for card, parent, row in zip(cards, done["parents"], rows)
        ]
        facts = {"base": cards[0]["base"], "base_revision": cards[0]["base_revision"], "base_print": cards[0]["base_print"]}
        facts |= {"name": name or like["name"], "parents": parents, "recipe": {**recipe, "loss": done["loss"]}, "tags": [tag]}
        return library.add(workspace, target, facts), done
