"""The library: every adapter in a folder of its own, found again by what is known of it. The folders are the truth.

library/<id>/adapter/     the PEFT folder with its manifest; never changes; the id is the hash of its content
library/<id>/card.json    name, base, method, rank, tags, notes, parents, recipe, metrics, ...
library/.removed/         what was removed, for 30 days
library/.index/           an SQLite search index; deleting it loses nothing
"""

from lora_studio.library.cards import CARD, Item
from lora_studio.library.health import children, lineage, verify
from lora_studio.library.shelf import (
    adapter_folder,
    add,
    card,
    count,
    favourite,
    find,
    folder_of,
    identify,
    note,
    remove,
    removed,
    rename,
    survey,
    sweep,
    tag,
    undo,
    update,
)

__all__ = [
    "CARD", "Item", "adapter_folder", "add", "card", "children", "count", "favourite", "find", "folder_of", "identify", "lineage", "note", "remove",
    "removed", "rename", "survey", "sweep", "tag", "undo", "update", "verify",
]  # fmt: skip
