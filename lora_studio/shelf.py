"""The verbs of adapters: list, import, export, blend, ask, publish, pull. What needs torch is asked of the bench."""

import contextlib
import json
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import yaml

from lora_studio import adapters, bases, card, data, durable, families, fence, hub, library, listing, runs, studio
from lora_studio.adapters import pipeline_files
from lora_studio.errors import AdapterError, MachineError, RunError, StudioError
from lora_studio.jobs import bench
from lora_studio.spec import Base
from lora_studio.weights import Weight
from lora_studio.workspace import Workspace

Parts = list[tuple[str, Weight]]
# What is taken out of an uploaded archive; a pickle among them is named and refused like one that comes alone.
PUBLISHED = 50
IN_REPO = re.compile(rf"{data.HUB_ID.pattern}(?:/[A-Za-z0-9][\w.-]*)?")
UPLOADS = (".safetensors", ".json", ".jinja", ".md", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


# ---- in and out of the library


def inspect(source: str | Path) -> adapters.Card:
    """What the headers of an adapter on this machine say, with every problem in words. Raises AdapterError."""
    return adapters.inspect(source)


def import_adapter(workspace: Workspace, source: str, *, revision: str | None = None, token: str | None = None, **known) -> str:
    """Put a PEFT folder, a .safetensors file with its configuration beside it, or a Hub repository (owner/name, or owner/name/folder
    where it holds several) into the library, after the bench has read every number of it. `known` may give its name and base, `revision`
    is a Hub repository's. Returns its id. Raises AdapterError with every reason against it."""
    here = fence.place(source)
    if fence.visitor():  # names repositories, and never a place on this machine
        if not IN_REPO.fullmatch(source):
            raise AdapterError("adapter.missing", path=source[:100])
        return pull(workspace, source, revision=revision, token=token, **known)
    in_repo = source.count("/") == 1 or (IN_REPO.fullmatch(source) and Path(source).suffix not in UPLOADS)
    if here is None and in_repo and not source.startswith((".", "/", "~")):
        return pull(workspace, source, revision=revision, token=token, **known)
    if here is None:
        raise AdapterError("adapter.missing", path=adapters.shown(source, 300))
    return _shelve_checked(workspace, here, {"source": here.name, "name": here.stem}, **known)


def import_files(workspace: Workspace, files: Sequence[Path], *, name: str | None = None, base: str | None = None) -> str:
    """Put uploaded files into the library: the weights and the configuration of one adapter, or one .zip of its folder.
    Returns its id. Raises AdapterError and MachineError; then the library is as it was."""
    if not files:
        raise AdapterError("adapter.no_upload")
    weights = next((path for path in files if path.suffix == ".safetensors"), files[0])
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        folder = Path(place) / (re.sub(r"[^\w.-]+", "-", weights.stem).strip("-.") or "upload")
        try:
            folder.mkdir()
            for path in files:
                if path.suffix.lower() == ".zip":
                    _unpack(path, folder)
                else:
                    _link_or_copy(path, folder / path.name)
        except OSError as error:
            raise MachineError("machine.write", path=workspace.root, reason=error.strerror or str(error)) from None
        return _shelve_checked(workspace, folder, {"source": weights.name, "name": weights.stem}, name=name, base=base)


def _unpack(archive: Path, folder: Path) -> None:
    """The files of an archive that may belong to an adapter, by their last name only. Raises AdapterError and OSError."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.is_dir() and Path(member.filename).suffix.lower() in UPLOADS]
            size, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
            if size > free:
                raise MachineError("machine.disk", path=folder.parent.parent, free=f"{free / 1e9:.1f} GB", needed=f"{size / 1e9:.1f} GB")
            for member in members:
                target = folder / Path(member.filename.replace("\\", "/")).name
                if target.exists():
                    raise AdapterError("adapter.archive_twice", path=archive.name, name=adapters.shown(target.name, 80))
                with packed.open(member) as source, open(target, "xb") as file:
                    shutil.copyfileobj(source, file)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error) as error:
        raise AdapterError("adapter.archive", path=archive.name, reason=str(error).rstrip(".")) from None


def _shelve_checked(workspace: Workspace, folder: Path, facts: dict, *, name: str | None = None, base: str | None = None) -> str:
    answer = bench.ask("check", path=str(folder), **({"base": base} if base else {}))
    errors = [problem["sentence"] for problem in answer["problems"] if problem["level"] == "error"]
    if errors or not answer["usable"]:
        raise AdapterError("adapter.refused", name=name or facts["source"], reason=" ".join(errors) or "It cannot be used yet.")
    found = answer["card"] or {}
    known = {"name": name or facts["name"], "base": base or found.get("base") or "", "source": facts["source"]}
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        if answer["converts"]:
            target = Path(place) / "adapter"
            bench.ask("convert", path=str(folder), target=str(target), **({"base": base} if base else {}))
            folder = target
        if name:
            check_name(workspace, name, besides=library.identify(folder))
        return library.add(workspace, folder, known)


def export_adapter(workspace: Workspace, id: str, target: str | Path) -> Path:
    """Copy an adapter's PEFT folder to `target`, which must not be there. Raises AdapterError."""
    source, target = library.adapter_folder(workspace, id), Path(target).expanduser()
    if target.exists():
        raise AdapterError("adapter.target", path=target)
    target.parent.mkdir(parents=True, exist_ok=True)
    files = {path.name: path.read_bytes() for path in sorted(source.iterdir()) if path.name != durable.MARKER}
    durable.publish_folder(target, {**files, **_pipeline_file(source)})
    return target


def _pipeline_file(folder: Path) -> dict[str, bytes]:
    """An image adapter's file as diffusers reads it, by its name; nothing for a language model's."""
    config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    part = pipeline_files.part_of(config)
    weights = (folder / adapters.WEIGHTS).read_bytes() if part else b""
    return {pipeline_files.NAME: pipeline_files.to_pipeline_file(weights, config, part)} if part else {}


def archive(workspace: Workspace, id: str, folder: Path) -> Path:
    """An adapter's PEFT folder as one .zip in `folder`, for download. Raises AdapterError."""
    source = library.adapter_folder(workspace, id)
    return studio.pack(source, folder, library.card(workspace, id)["name"], more=_pipeline_file(source))


def rename(workspace: Workspace, id: str, name: str) -> dict:
    """Give an adapter another name that none in the library has. Returns its card. Raises AdapterError."""
    own = library.folder_of(workspace, id).name
    check_name(workspace, name, besides=own)
    return library.rename(workspace, own, name)


def check_name(workspace: Workspace, name: str, *, besides: str = "") -> None:
    """Raise AdapterError when another adapter has this name already."""
    taken = next((item for item in library.find(workspace, name=name.strip()) if item.id != besides), None)
    if taken:
        number = 2
        while library.find(workspace, name=f"{name.strip()} {number}"):
            number += 1
        raise AdapterError("adapter.taken", name=adapters.shown(name.strip(), 80), id=taken.id, suggestion=f"{name.strip()} {number}")


# ---- blends


def preview(workspace: Workspace, parts: Parts) -> dict:
    """What a blend would be: the norms of its parts, their cosines, and its true loss at every rank."""
    return bench.ask("preview", parts=_paths(workspace, parts))


def blend(workspace: Workspace, parts: Parts, *, name: str, rank: int | None = None) -> tuple[str, dict]:
    """Write `W0 + sum of weight * scale * B @ A` as a new adapter of the library: exact, or compressed to a rank.
    Returns its id, and what the bench measured (loss, rank, bytes). Raises StudioError; then the library is as it was."""
    check_name(workspace, name)
    cards = [library.card(workspace, id) for id, _ in parts]
    ids = [library.folder_of(workspace, id).name for id, _ in parts]
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        target = Path(place) / "adapter"
        done = bench.ask("blend", parts=_paths(workspace, parts), rank=rank, target=str(target))
        parents = [
            {"id": id, "name": found["name"], "sha256": parent["sha256"], "weight": weight}
            for id, found, parent, (_, weight) in zip(ids, cards, done["parents"], parts)
        ]
        recipe = {"sum": [{"adapter": id, "weight": weight} for id, (_, weight) in zip(ids, parts)], "rank": rank, "loss": done["loss"]}
        facts = {"name": name, "base": cards[0]["base"], "base_revision": cards[0]["base_revision"], "base_print": cards[0]["base_print"]}
        id = library.add(workspace, target, {**facts, "parents": parents, "recipe": recipe, "tags": ["blend"]})
    return id, done


def _paths(workspace: Workspace, parts: Parts) -> list[list]:
    return [[str(library.adapter_folder(workspace, id)), weight, library.card(workspace, id)["name"]] for id, weight in parts]


# ---- answers


def answer(workspace: Workspace, base: str, prompt: str, parts: Parts = (), **manner) -> Iterator[dict]:
    """The events of an answer by a base with weighted adapters (or none): `piece` as it is spoken, `done` at its end.
    `manner` may hold seed, temperature, top_p, longest."""
    messages = [{"role": "user", "content": prompt}]
    return bench.stream("answer", base=base, messages=messages, parts=_paths(workspace, list(parts)), **manner)


def chat(workspace: Workspace, base: str, messages: list[dict] | dict[str, list[dict]], sides: dict[str, Parts], **manner) -> Iterator[dict]:
    """The events of several answers at once, each side with its own weighted adapters: {side: parts}, no parts being the bare base.
    `messages` is one conversation for all, or {side: messages}. `manner` may also hold template. Raises StudioError."""
    return bench.stream("answer", base=base, messages=messages, sides={side: _paths(workspace, parts) for side, parts in sides.items()}, **manner)


def bench_status() -> dict:
    """What the bench does, and what it holds: state, base, device, adapters, loads, note. Starts nothing."""
    return bench.status()


def picture_edge(base: str) -> int | None:
    """The edge in pixels of the pictures that an image model draws well; 0 for a language model, None where that is not known."""
    try:
        info = bases.inspect(Base(id=base)) if base else None
    except (StudioError, ValueError):
        return None
    if info is None or info.folder is None:
        return families.edge(base)
    return (bases.sample_edge(info) or families.of_pipeline(info.pipeline).resolution) if info.pipeline else 0


def image_family(base: str) -> families.ImageFamily | None:
    """The family of an image model, as far as that is known before it is fetched."""
    try:
        info = bases.inspect(Base(id=base)) if base else None
    except (StudioError, ValueError):
        return None
    known = families.of_pipeline(info.pipeline) if info is not None and info.pipeline else None
    return known or next((family for family in families.IMAGE_FAMILIES if base in family.sizes), None)


def draw(workspace: Workspace, base: str, prompt: str, sides: dict[str, Parts], **brush) -> Iterator[dict]:
    """The events of pictures by an image model, one for each side: `step`, `picture` as each is done, `done` at the end. `brush` may
    hold seed, steps, guidance, width, height, and of an editing model source, the file of the picture it goes by. The files lie in the workspace's pictures/."""
    asked = {side: _paths(workspace, parts) for side, parts in sides.items()}
    return bench.stream("draw", base=base, prompt=prompt, sides=asked, target=str(workspace.root / "pictures"), **brush)


# ---- the Hub


@dataclass(frozen=True)
class Push(hub.Extras):
    """Where an adapter goes and how: the repository, who may see it (None: private where it is new), its licence, and what of hub.Extras is
    wanted with it: tag, pull_request, gated, collection, folder."""

    repo: str
    private: bool | None = None
    license: str | None = None


@dataclass(frozen=True)
class Draft:
    """What would be published: the model card, every file with its size in bytes, and what stands against it."""

    readme: str
    files: list[tuple[str, int]]
    findings: list[str]


def published(workspace: Workspace) -> list[dict]:
    """What of a library anybody may see on the Hub: name, base and address of each adapter that was published to all, the newest first."""
    found = (library.card(workspace, item.id) for item in library.find(workspace, limit=PUBLISHED))
    pushed = ((known, [one for one in known["publications"] if not one.get("pull_request")]) for known in found)
    last = ((known, pushes[-1]) for known, pushes in pushed if pushes)
    return [{"name": known["name"], "base": card.shown(known["base"]), "url": push["url"]} for known, push in last if not push["private"]]


def who(token: str | None = None) -> hub.Account:
    """Whose token this is (the Hub's own login when None). Raises HubError."""
    return hub.who(token)


def own_token(workspace: Workspace, token: str | None) -> str | None:
    """The token to use: where none is given the machine's own login, which is never a visitor's."""
    return "" if token is None and workspace.limits is not None else token


def draft(workspace: Workspace, id: str, to: Push, *, token: str | None = None) -> Draft:
    """What `publish` would send, without asking the Hub anything. Raises HubError or AdapterError."""
    to.check()
    with _staged(workspace, library.card(workspace, id), to) as (folder, files):
        items = hub.plan(folder, files, token=own_token(workspace, token))
        return Draft(str(files["README.md"]), [(item.path, item.size) for item in items], hub.scan(items))


def publish(workspace: Workspace, id: str, to: Push, *, token: str | None = None, report: Callable[[str], None] | None = None) -> hub.Published:
    """Push an adapter with a card of what is known of it. "Published" is said after the remote was read back.
    Raises HubError or AdapterError; a second call sends only what is missing."""
    known = library.card(workspace, id)
    listed = partial(_listed, _facts(workspace, known, to.license, curve=""), to)
    with _staged(workspace, known, to) as (folder, files):
        done = hub.publish(folder, to.repo, private=to.private, token=own_token(workspace, token), files=files, wish=to, listing=listed, report=report)
    record = {"repo": to.repo, "commit": done.commit, "private": done.private, "url": done.url}
    more = {"folder": to.folder, "tag": done.tag, "pull_request": done.pull_request, "collection": done.collection}
    record |= {name: value for name, value in more.items() if value}
    if known["publications"][-1:] != [record]:  # the last is where it stands now
        library.update(workspace, id, publications=[*(one for one in known["publications"] if one != record), record])
    return done


def _listed(facts: card.Facts, to: Push, before: str) -> str:
    """README.md of a repository of several adapters, from the one that is there."""
    return listing.write(facts, repo_id=to.repo, folder=to.folder, before=before)


@contextlib.contextmanager
def _staged(workspace: Workspace, known: dict, to: Push) -> Iterator[tuple[Path, dict[str, str | bytes]]]:
    """A folder with an adapter's files, and what is laid over them: the model card, the public configuration, the loss curve."""
    folder, curve, drawn = library.adapter_folder(workspace, known["id"]), _curve(workspace, known), _pictures(workspace, known)
    laid: dict[str, str | bytes] = {**_pipeline_file(folder), **{name: path.read_bytes() for _, name, path in drawn}, **({card.CURVE: curve} if curve else {})}
    facts = _facts(workspace, known, to.license, curve=card.CURVE if curve else "")
    if pipeline_files.NAME in laid:
        facts = replace(facts, pipeline_file=pipeline_files.NAME, pictures=[(prompt, name) for prompt, name, _ in drawn], samples=())
    files = {"README.md": card.write(facts, repo_id=to.repo, folder=to.folder), adapters.CONFIG: _public_config(folder), **laid}
    with tempfile.TemporaryDirectory(prefix=durable.TEMPORARY) as place:
        for path in folder.iterdir():
            if path.name != durable.MARKER:
                _link_or_copy(path, Path(place) / path.name)
        yield Path(place), files


def _public_config(folder: Path) -> str:
    """The adapter's configuration as it may be seen by all: a base of this machine is called by its name, not by its path."""
    config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = card.shown(config.get("base_model_name_or_path") or "")
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _run_of(workspace: Workspace, known: dict) -> Path | None:
    """The folder of the run an adapter came from, while it is here."""
    try:
        return workspace.run_folder(known["run"]) if known["run"] else None
    except RunError:
        return None


def _pictures(workspace: Workspace, known: dict) -> list[tuple[str, str, Path]]:
    """The newest sample picture of each prompt of an adapter's run: (prompt, name in the repository, file)."""
    folder, found = _run_of(workspace, known), {}
    for event in runs.read_all(folder) if folder else []:
        if event["kind"] == "sample" and event["step"] and str(event["answer"]).endswith(".png"):
            found[event["prompt"]] = folder / "samples" / Path(event["answer"]).name
    return [(prompt, f"sample-{number}.png", file) for number, (prompt, file) in enumerate(found.items()) if file.is_file()]


def _curve(workspace: Workspace, known: dict) -> bytes | None:
    """The losses of an adapter's run as a picture."""
    folder = _run_of(workspace, known)
    events = runs.read_all(folder) if folder else []
    losses = {kind: [(event["step"], event["loss"]) for event in events if event["kind"] == kind] for kind in ("step", "eval")}
    return card.loss_curve(losses["step"], losses["eval"]) if losses["step"] else None


def _facts(workspace: Workspace, known: dict, license: str | None, *, curve: str) -> card.Facts:
    """What a card tells of an item: its run's spec and sample answers where there was one, its parents where it is a blend."""
    common = {
        "name": known["name"], "base": known["base"], "base_revision": known["base_revision"], "license": license, "notes": known["notes"],
        "trigger": known["trigger"], "tags": known["tags"], "metrics": known["metrics"],
    }  # fmt: skip
    folder = _run_of(workspace, known)
    if folder is not None:
        events = runs.read_all(folder)
        samples = [card.Sample(event["prompt"], event["answer"]) for event in events if event["kind"] == "sample" and event["step"]]
        return card.facts_of(runs.spec_of(folder), **{**common, "samples": samples[-3:], "curve": curve})
    parents = [card.Parent(parent["name"], parent["weight"], parent["sha256"]) for parent in known["parents"]]
    recipe = yaml.safe_dump(known["recipe"], sort_keys=False) if known["recipe"] else ""
    method = {"kind": known["method"], "rank": known["rank"], "alpha": known["alpha"]}
    return card.Facts(**common, method=method, parents=parents, recipe=recipe)


def pull(
    workspace: Workspace, repo: str, *, revision: str | None = None, name: str | None = None, base: str | None = None, token: str | None = None
) -> str:
    """Bring an adapter of the Hub (owner/name, or owner/name/folder) into the library, pinned at a commit and checked. Returns its id."""
    parts = repo.split("/")
    repo, folder = ("/".join(parts[:2]), parts[2]) if len(parts) == 3 else (repo, "")
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        pulled = hub.pull(repo, Path(place) / "adapter", revision=revision, subfolder=folder, token=own_token(workspace, token))
        source = f"{pulled.id}{f'/{folder}' if folder else ''}@{pulled.commit}"
        return _shelve_checked(workspace, pulled.folder, {"source": source, "name": folder or repo.rpartition("/")[2]}, name=name, base=base)


def suggest_repo(workspace: Workspace, id: str, *, owner: str | None = None, token: str | None = None) -> str:
    """A repository id for an adapter: the owner's name (by default the account's) and the adapter's, as the Hub accepts them.
    Raises HubError."""
    return hub.names.suggest(library.card(workspace, id)["name"], owner=owner or hub.who(own_token(workspace, token)).name)
