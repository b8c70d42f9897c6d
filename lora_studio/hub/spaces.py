"""A Space on the Hub: made if it is not there, its files pushed in one commit, and looked at afterwards."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import RepoFile, constants
from huggingface_hub import errors as hub

from lora_studio.errors import HubError
from lora_studio.hub import client, names
from lora_studio.hub.client import Talk

NOTHING = "The Space was not pushed."
HALF = "The Space may be there without its files; pushing again mends that."


@dataclass(frozen=True)
class Standing:
    """How a model repository stands at a commit: the full commit, who may see it, and who may have its files (auto, manual, or none)."""

    commit: str
    private: bool
    gated: str


@dataclass(frozen=True)
class Pushed:
    """A Space that was pushed: its address, and whether it is private, as the Hub says."""

    url: str
    private: bool


def standing(id: str, revision: str | None = None, *, token: str | None = None) -> Standing:
    """How a model repository stands. Asked with the token given, or the machine's own login; "" asks as nobody. Raises HubError."""
    talk = Talk(id, huggingface_hub.get_token() if token is None else token, NOTHING)
    info = talk.do(f"looking at {talk.clean(id)}", lambda: talk.api.model_info(id, revision=revision))
    return Standing(str(info.sha), bool(info.private), str(info.gated or "none"))


def deploy(
    folder: Path, repo_id: str, *, sdk: str, variables: Mapping[str, str], private: bool = True, mark: str = "", hidden: bool = False,
    token: str | None = None, report: Callable[[str], None] | None = None,
) -> Pushed:  # fmt: skip
    """Push every file of a folder to a Space. `variables` are set where it is new; they are seen by all, so nothing secret belongs there.
    With `mark` a Space that is there without this file is somebody's own and is left alone; with `hidden` a public one is refused.
    `private` is for a new one. Raises HubError."""
    token = client.token_of(token)
    account = client.who(token, outcome=NOTHING)
    id = names.check_id(repo_id, owner=account.name)
    owner, known = id.split("/")[0], [account.name, *account.organizations]
    if owner.lower() not in [one.lower() for one in known]:
        raise HubError("hub.namespace", owner=owner, known=", ".join(known[:8]), suggestion=f"{account.name}/{id.split('/')[1]}")
    talk = Talk(id, token, NOTHING, report)
    if mark or hidden:
        _refuse_other(talk, mark, hidden=hidden)
    there = [{"key": key, "value": value} for key, value in variables.items()] or None
    options = {"repo_type": "space", "space_sdk": sdk, "private": private, "exist_ok": True, "space_variables": there}
    talk.do("making the Space", lambda: talk.api.create_repo(id, **options))
    talk.outcome = HALF
    talk.do("uploading the Space", lambda: talk.api.upload_folder(repo_id=id, folder_path=folder, repo_type="space", commit_message="LoRA Studio"))
    sizes, info = talk.do("reading the Space back", lambda: (_listed(talk), talk.api.space_info(id)))
    missing = [name for name, size in _files(folder) if sizes.get(name) != size]
    if missing:
        raise HubError("hub.not_whole", id=id, files=", ".join(missing[:5]))
    return Pushed(f"{constants.ENDPOINT}/spaces/{id}", bool(info.private))


def _refuse_other(talk: Talk, mark: str, *, hidden: bool) -> None:
    """Raise HubError for a Space that is there and is not such a one, or is public where it must not be. One that holds no file of anybody's
    yet is taken: a push may have been cut off after it was made."""
    try:
        info = talk.do("looking for the Space", lambda: talk.api.space_info(talk.id), allow=(hub.RepositoryNotFoundError,))
    except hub.RepositoryNotFoundError:
        return
    if mark:
        there = talk.do("looking into the Space", lambda: _listed(talk))
        if mark not in there and there.keys() - {".gitattributes", "README.md"}:
            raise HubError("demo.other", id=talk.id, suggestion=names.suggest(f"{talk.id}-2"))
    if hidden and not info.private:
        raise HubError("hub.public", id=talk.id, suggestion=names.suggest(f"{talk.id}-private"))


def _listed(talk: Talk) -> dict[str, int]:
    """The size of every file of a Space by its name."""
    tree = talk.api.list_repo_tree(talk.id, recursive=True, repo_type="space")
    return {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}


def _files(folder: Path) -> list[tuple[str, int]]:
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]
