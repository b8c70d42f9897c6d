"""A Space on the Hub: made if it is not there, its files pushed in one commit, and looked at afterwards."""

from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import RepoFile, constants

from lora_studio.errors import HubError
from lora_studio.hub import client, names
from lora_studio.hub.client import Talk

NOTHING = "The Space was not pushed."
HALF = "The Space may be there without its files; pushing again mends that."


def deploy(
    folder: Path, repo_id: str, *, sdk: str, variables: Mapping[str, str], private: bool = True, token: str | None = None, report: Callable[[str], None] | None = None
) -> str:
    """Push every file of a folder to a Space. `variables` are set where it is new; they are seen by all, so nothing secret belongs there.
    Returns its address. Raises HubError."""
    token = client.token_of(token)
    account = client.who(token, outcome=NOTHING)
    id = names.check_id(repo_id, owner=account.name)
    owner, known = id.split("/")[0], [account.name, *account.organizations]
    if owner.lower() not in [one.lower() for one in known]:
        raise HubError("hub.namespace", owner=owner, known=", ".join(known[:8]), suggestion=f"{account.name}/{id.split('/')[1]}")
    talk = Talk(id, token, NOTHING, report)
    there = [{"key": key, "value": value} for key, value in variables.items()]
    options = {"repo_type": "space", "space_sdk": sdk, "private": private, "exist_ok": True, "space_variables": there}
    talk.do("making the Space", lambda: talk.api.create_repo(id, **options))
    talk.outcome = HALF
    talk.do("uploading", lambda: talk.api.upload_folder(repo_id=id, folder_path=folder, repo_type="space", commit_message="LoRA Studio"))
    tree = talk.do("reading the Space back", lambda: list(talk.api.list_repo_tree(id, recursive=True, repo_type="space")))
    sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    missing = [name for name, size in _files(folder) if sizes.get(name) != size]
    if missing:
        raise HubError("hub.not_whole", id=id, files=", ".join(missing[:5]))
    return f"{constants.ENDPOINT}/spaces/{id}"


def _files(folder: Path) -> list[tuple[str, int]]:
    return [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]
