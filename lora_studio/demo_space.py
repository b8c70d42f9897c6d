"""The verbs of a demo Space: the folder of a small page that shows an adapter beside its base, and pushing it to the Hub.

Its code stands in templates/ and is the same in every Space; what a user typed goes into demo.json, which that code reads.
"""

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_studio import adapters, bases, card, durable, families, hub, library, runs, shelf, space
from lora_studio.adapters import pipeline_files
from lora_studio.errors import HostError, HubError, StudioError
from lora_studio.home import PACKAGE, demo_base
from lora_studio.hub.scan import item_of
from lora_studio.spec import Base
from lora_studio.workspace import Workspace

TEMPLATES = PACKAGE / "templates"
MARK = "demo.json"  # what tells a demo Space from any other
HARDWARE = tuple(name for name, kind in space.HARDWARE.items() if kind.sdk == "gradio")
# What each kind of page imports; the versions are the studio's own.
PACKAGES = {
    "text": ("torch", "transformers", "peft", "accelerate", "huggingface-hub", "safetensors", "numpy"),
    "image": ("torch", "transformers", "diffusers", "peft", "accelerate", "huggingface-hub", "safetensors", "numpy", "pillow"),
}
COMMIT = re.compile(r"[0-9a-f]{40}")
PROMPTS, LONGEST_PROMPT = 4, 500
ABOUT = """# {name}

{what} for {base}, beside the base alone. `demo.json` says which commits are shown; LoRA Studio made this Space.
"""
SECRET = "{id} is {why}, so the Space needs a secret HF_TOKEN with a token that may read it. Set it at {address}/settings."


@dataclass(frozen=True)
class Deployed:
    """A demo Space on the Hub: its address, whether it is private, and what is still to be done for it, in sentences."""

    url: str
    private: bool
    notes: tuple[str, ...] = ()


def write(workspace: Workspace, id: str, target: Path, *, hardware: str = "cpu", license: str | None = None, token: str | None = None) -> list[str]:
    """Write the folder of a demo Space for an adapter, whole or not at all. The Hub is asked only for a base whose commit is not known.
    Returns the names of its files. Raises HostError, HubError and AdapterError."""
    target = Path(target).expanduser()
    if target.exists():
        raise HostError("host.target", path=target)
    with _staged(workspace, id, hardware, license=license, token=shelf.own_token(workspace, token)) as (stage, _):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=durable.TEMPORARY) as place:
            shutil.copytree(stage, Path(place) / "space")
            (Path(place) / "space").rename(target)
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())


def deploy(
    workspace: Workspace, id: str, repo: str, *, hardware: str = "cpu", license: str | None = None, private: bool | None = None,
    token: str | None = None, report: Callable[[str], None] | None = None,
) -> Deployed:  # fmt: skip
    """Push the demo Space of an adapter, made where it is not there and updated in place where it is. What was published is shown at that
    commit; an adapter that was not goes along. `private` None: as the adapter is, and private where that is on this machine only.
    Raises HubError, HostError and AdapterError."""
    own = shelf.own_token(workspace, token)
    with _staged(workspace, id, hardware, license=license, token=own) as (stage, demo):
        notes = [(one["repo"], _why(one, own)) for one in (demo["adapter"], demo["base"]) if "repo" in one]
        secret = [(repo_id, why) for repo_id, why in notes if why]
        hidden = (demo["adapter"].get("repo"), "private") in secret
        if hidden and private is False:
            raise HubError("demo.private", id=demo["adapter"]["repo"])
        is_private = (hidden or "repo" not in demo["adapter"]) if private is None else private
        pushed = hub.deploy(stage, repo, sdk="gradio", variables={}, private=is_private, mark=MARK, hidden=hidden, token=own, report=report)
    return Deployed(pushed.url, pushed.private, tuple(SECRET.format(id=repo_id, why=why, address=pushed.url) for repo_id, why in secret))


def _why(place: dict, token: str | None) -> str:
    """Why not everybody can fetch a repository, in a word; empty where everybody can. Raises HubError where it is not there."""
    found = hub.standing(place["repo"], place["revision"], token=token)
    return "private" if found.private else "gated" if found.gated != "none" else ""


@contextlib.contextmanager
def _staged(workspace: Workspace, id: str, hardware: str, *, license: str | None, token: str | None) -> Iterator[tuple[Path, dict]]:
    """The files of a demo Space in a folder that goes again, and what its demo.json says."""
    if hardware not in HARDWARE:
        raise HostError("host.hardware", hardware=hardware[:40], known=", ".join(HARDWARE))
    known = library.card(workspace, id)
    config = json.loads((library.adapter_folder(workspace, id) / adapters.CONFIG).read_text(encoding="utf-8"))
    kind = "image" if pipeline_files.part_of(config) else "text"
    with tempfile.TemporaryDirectory(prefix=durable.TEMPORARY) as place:
        stage = Path(place) / "space"
        stage.mkdir()
        demo = {
            "name": card.plain(known["name"]), "base_name": card.plain(card.shown(known["base"])), "base": _base(known, stage, token),
            "adapter": _adapter(workspace, known, stage), **_manner(workspace, known, config),
        }  # fmt: skip
        (stage / MARK).write_text(json.dumps(demo, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        shutil.copyfile(TEMPLATES / f"demo_{kind}.py.txt", stage / "app.py")
        (stage / "requirements.txt").write_text(requirements(kind, hardware), encoding="utf-8")
        (stage / "README.md").write_text(_readme(demo, kind, hardware, license=license, tags=known["tags"]), encoding="utf-8")
        items = [item_of(path.relative_to(stage).as_posix(), path, token) for path in sorted(stage.rglob("*")) if path.is_file()]
        if found := hub.scan(items):
            raise HubError("hub.scan", findings="; ".join(found[:5]))
        yield stage, demo


def _base(known: dict, stage: Path, token: str | None) -> dict:
    """Where the page finds the base: a bundled one goes along, one of the Hub is named with its commit. Raises HubError."""
    id, revision = known["base"], known["base_revision"]
    bundled = demo_base(id)
    if bundled:
        shutil.copytree(bundled, stage / "base", ignore=shutil.ignore_patterns("README.md", "__pycache__"))
        return {"folder": "base"}
    if not card.is_hub_id(id):
        raise HubError("demo.base", base=card.shown(id) or "no base")
    if not COMMIT.fullmatch(revision or ""):
        with contextlib.suppress(StudioError):  # a base that may not be looked at here is asked of the Hub
            revision = bases.inspect(Base(id=id, revision=revision)).commit or revision
    if not COMMIT.fullmatch(revision or ""):
        revision = hub.standing(id, revision, token=token).commit
    return {"repo": id, "revision": revision}


def _adapter(workspace: Workspace, known: dict, stage: Path) -> dict:
    """Where the page finds the adapter: where it was published last, or pulled from, at that commit; else it goes along."""
    pushed = [one for one in known["publications"] if not one.get("pull_request")]
    if pushed:
        place = {"repo": "/".join(pushed[-1]["url"].rsplit("/", 2)[-2:]), "revision": pushed[-1]["commit"], "subfolder": pushed[-1].get("folder", "")}
        return {key: value for key, value in place.items() if value}
    pulled = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-]+))?@([0-9a-f]{40})", known["source"] or "", re.ASCII)
    if pulled:
        return {"repo": pulled[1], "revision": pulled[3], **({"subfolder": pulled[2]} if pulled[2] else {})}
    folder = shelf.export_adapter(workspace, known["id"], stage / "adapter")
    for path in folder.iterdir():
        if path.suffix == ".md":
            path.unlink()
    config = json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8"))
    public = config | {"base_model_name_or_path": card.shown(config.get("base_model_name_or_path") or "")}
    (folder / adapters.CONFIG).write_text(json.dumps(public, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return {"folder": "adapter"}


def _manner(workspace: Workspace, known: dict, config: dict) -> dict:
    """How the page asks: the prompts it begins with, and for pictures the part, the guidance and the edge. Raises HubError."""
    spec = None
    with contextlib.suppress(StudioError):  # the run may be gone, or no training
        spec = runs.spec_of(workspace.run_folder(known["run"])) if known["run"] else None
    prompts = (spec.output.sample_prompts if spec else []) or ([known["trigger"]] if known["trigger"] else [])
    asked = {"prompts": [text[:LONGEST_PROMPT] for text in prompts[:PROMPTS]]}
    part = pipeline_files.part_of(config)
    if not part:
        return {**asked, "chat": spec is None or spec.task.kind == "chat"}
    family = shelf.image_family(known["base"])
    if family is not None and family.edits:
        raise HubError("demo.edits", family=family.name)
    guidance = families.guidance(known["base"], family.pipeline if family else "")
    return {**asked, "part": part, "guidance": guidance, "edge": shelf.picture_edge(known["base"]) or 512}


def requirements(kind: str, hardware: str) -> str:
    """requirements.txt of a page: of what the studio runs with only what it imports. Gradio comes with the Space."""
    lines = space.requirements(hardware).splitlines()
    before = [line for line in lines if line.startswith("--")]
    own = [line for line in lines if line.partition("==")[0] in (*PACKAGES[kind], "spaces")]
    return "\n".join([*before, *own, f"gradio=={space.GRADIO}"]) + "\n"


def _readme(demo: dict, kind: str, hardware: str, *, license: str | None, tags: list[str]) -> str:
    """README.md with the front matter of a Space."""
    models = [place["repo"] for place in (demo["adapter"], demo["base"]) if "repo" in place]
    known = {"license": license.strip().lower()} if license and license.strip().lower() in card.LICENSES else {}
    more = ["peft", "text-generation"] if kind == "text" else ["diffusers", "text-to-image"]
    head = {
        "title": demo["name"][:60], "emoji": "🎛️", "colorFrom": "red", "colorTo": "yellow", "sdk": "gradio", "sdk_version": space.GRADIO,
        "python_version": space.PYTHON, "app_file": "app.py", "pinned": False, **known, "short_description": "An adapter beside its base",
        "suggested_hardware": space.HARDWARE[hardware].suggested, "startup_duration_timeout": "1h", **({"models": models} if models else {}),
        "tags": list(dict.fromkeys(["lora", "lora-studio", *more, *(card.plain(tag)[:50] for tag in tags)])),
    }  # fmt: skip
    top = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=1 << 20)
    what = "An adapter" if kind == "text" else "An adapter of an image model"
    return f"---\n{top}---\n{ABOUT.format(name=card.escape(demo['name']), what=what, base=card.escape(demo['base_name']))}"
