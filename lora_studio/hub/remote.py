"""A repository as the Hub lists it: the files of one commit, and whether they are ours."""

from collections.abc import Mapping
from dataclasses import dataclass

from huggingface_hub import RepoFile

from lora_studio.hub.client import Talk
from lora_studio.hub.scan import Item


@dataclass(frozen=True)
class Remote:
    """One commit of a repository, and who may see and have it (`gated`: auto, manual, or none)."""

    commit: str
    private: bool
    files: Mapping[str, RepoFile]
    gated: str = "none"

    def missing(self, items: list[Item]) -> list[Item]:
        """The files that are not there with the same bytes."""
        return [item for item in items if not same(item, self.files.get(item.path))]


def same(item: Item, there: RepoFile | None) -> bool:
    """Whether the Hub's file has the size and the hash of ours."""
    if there is None or there.size != item.size:
        return False
    return there.lfs.sha256 == item.sha256 if there.lfs else there.blob_id == item.blob


def look(talk: Talk, revision: str | None = None) -> Remote:
    """What the Hub lists at a revision: always the files of one commit."""
    info = talk.api.model_info(talk.id, revision=revision)
    tree = talk.api.list_repo_tree(talk.id, recursive=True, revision=info.sha)
    files = {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
    return Remote(info.sha, bool(info.private), files, str(info.gated or "none"))
