"""Pull a repository from the Hub: the files of one commit, each checked against the Hub's hash; whole or absent."""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import RepoFile

from lora_studio import durable
from lora_studio.errors import HubError, MachineError
from lora_studio.hub import client, names
from lora_studio.hub.client import Talk

SUFFIXES = (".safetensors", ".json", ".jinja")
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
SPARE = 64 << 20
NOTHING = "Nothing was pulled."


@dataclass(frozen=True)
class Pulled:
    """What was pulled: the folder, the commit it is pinned at, and its files."""

    folder: Path
    id: str
    commit: str
    files: tuple[str, ...]


def pull(
    repo_id: str,
    target: Path,
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | None = None,
    report: Callable[[str], None] | None = None,
) -> Pulled:
    """Make `target`, which must not be there, the folder of an adapter on the Hub at one commit.

    Only .safetensors, .json, .jinja and README.md directly in the repository (or in `subfolder`) are fetched. A manifest
    of sizes and hashes is written last (`durable.damage` reads it). Raises HubError or MachineError; then `target` is absent.
    """
    target = Path(target)
    id = names.check_id(repo_id)
    if target.exists():
        raise HubError("hub.target", path=target)
    talk = Talk(id, huggingface_hub.get_token() if token is None else token, NOTHING, report)
    info = talk.do("looking for the repository", lambda: talk.api.model_info(id, revision=revision))
    tree = talk.do("listing its files", lambda: list(talk.api.list_repo_tree(id, recursive=bool(subfolder), revision=info.sha)))
    wanted = _wanted(id, [entry for entry in tree if isinstance(entry, RepoFile)], subfolder.strip("/"))
    stage = target.with_name(f"{durable.TEMPORARY}{os.getpid()}-{target.name}")
    try:
        _check_disk(target.parent, sum(entry.size for entry in wanted))
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir()
        manifest = {}
        for entry in wanted:
            manifest[Path(entry.path).name] = fetch(talk, entry, info.sha, stage)
        for path in stage.iterdir():
            if path.is_dir():  # what the client keeps for itself, and the emptied subfolder
                shutil.rmtree(path)
        durable.write_json(stage / durable.MARKER, manifest)
        os.replace(stage, target)
        durable.sync_folder(target.parent)
    except OSError as error:
        raise MachineError("machine.write", path=target.parent, reason=error.strerror or str(error)) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return Pulled(target, id, info.sha, tuple(manifest))


def _wanted(id: str, entries: list[RepoFile], subfolder: str) -> list[RepoFile]:
    """The files of an adapter. Raises HubError when there are no weights, or a name that no studio would give."""
    prefix = f"{subfolder}/" if subfolder else ""
    here = [entry for entry in entries if entry.path.startswith(prefix) and "/" not in entry.path[len(prefix) :]]
    for entry in here:
        if "\\" in entry.path or any(ord(letter) < 32 for letter in entry.path):
            raise HubError("hub.bad_name", id=id, name=repr(entry.path[:100]))
    wanted = [entry for entry in here if entry.path.endswith(SUFFIXES) or entry.path == prefix + "README.md"]
    wanted = [entry for entry in wanted if Path(entry.path).name not in (durable.MARKER,) and not Path(entry.path).name.startswith(".")]
    if not any(entry.path.endswith(".safetensors") for entry in wanted):
        pickled = next((entry.path for entry in here if entry.path.endswith(PICKLES)), None)
        if pickled:
            raise HubError("hub.pickle", id=id, name=pickled)
        raise HubError("hub.no_weights", id=id, known=", ".join(entry.path for entry in here[:6]) or "nothing")
    return wanted


def _check_disk(folder: Path, size: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size + SPARE:
        raise MachineError("machine.disk", path=folder, free=_size(free), needed=_size(size + SPARE))


def fetch(talk: Talk, entry: RepoFile, commit: str, stage: Path) -> dict:
    """One file into the stage, on disk and checked. Returns its line of the manifest."""
    name = Path(entry.path).name
    doing = f"fetching {talk.clean(name)}"

    def download() -> Path:
        return Path(talk.api.hf_hub_download(talk.id, entry.path, revision=commit, local_dir=stage))

    try:
        fetched = talk.do(doing, download, more=f", {_size(entry.size)}")
    except HubError as error:
        if client.full(error.__context__):
            raise MachineError(
                "machine.disk", path=stage.parent, free=_size(shutil.disk_usage(stage.parent).free), needed=_size(entry.size)
            ) from None
        raise
    final = stage / name
    if fetched != final:
        os.replace(fetched, final)
    size = final.stat().st_size
    sha256, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)
    with open(final, "rb") as file:
        while chunk := file.read(1 << 20):
            sha256.update(chunk)
            blob.update(chunk)
        os.fsync(file.fileno())
    expected, found = (entry.lfs.sha256, sha256.hexdigest()) if entry.lfs else (entry.blob_id, blob.hexdigest())
    if size != entry.size or found != expected:
        raise HubError("hub.damaged", file=name, id=talk.id, size=size, expected=entry.size)
    return {"bytes": size, "sha256": sha256.hexdigest()}


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
