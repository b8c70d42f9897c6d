"""The verbs of taking an adapter away: which forms fit it, what a file would be, and the file itself, kept for a day to be downloaded."""

import json
import math
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from lora_studio import adapters, bases, fence, formats, library, shelf, studio, weights
from lora_studio.adapters import gguf_files, multiplying, pipeline_files, virtual
from lora_studio.errors import AdapterError, StudioError
from lora_studio.spec import Base
from lora_studio.workspace import Workspace

FOLDER, KEPT_SECONDS, TOKEN = "exports", 86400.0, re.compile(r"[0-9a-f]{16}")
# Bytes of a number, and by how much it is rounded at most (half of the last place).
DTYPES = {"float32": (4, 2.0**-24), "float16": (2, 2.0**-11), "bfloat16": (2, 2.0**-8)}
ONLY_PEFT = {**dict.fromkeys(multiplying.METHODS.values(), "multiplies the weights"), **dict.fromkeys(virtual.WORDS, "stands before the input"), "dora": "gives each output a length of its own"}
FLUX = ("FluxPipeline", "FluxKontextPipeline")
KOHYA = ("StableDiffusionPipeline", "StableDiffusionXLPipeline", *FLUX)


@dataclass(frozen=True)
class Form:
    """A form an adapter may leave in: `against` says why it may not, "" where it may."""

    name: str
    against: str = ""


def forms(workspace: Workspace, id: str) -> list[Form]:
    """Every form, and what stands against it for this adapter. Raises AdapterError."""
    folder, base = library.adapter_folder(workspace, id), library.card(workspace, id)["base"]
    part = pipeline_files.part_of(json.loads((folder / adapters.CONFIG).read_text(encoding="utf-8")))
    info = _info(base)
    against = {"diffusers": "" if part else "it is the form of image models, and this adapter is for a language model"}
    against["kohya"] = against["diffusers"]
    if part and (info.pipeline not in KOHYA if info and info.pipeline else part != "unet"):
        against["kohya"] = "it is written for Stable Diffusion 1, 2, XL and (with its base on this machine) FLUX.1 only"
    only = ONLY_PEFT.get(adapters.inspect(folder).method)
    if only:
        return [Form(name, "" if name == "peft" else f"it {only}, which only PEFT's own form can say") for name in formats.ENDS]
    against["gguf"] = "llama.cpp takes adapters of language models, and this one is for an image model" if part else _against_gguf(base, info)
    return [Form(name, against.get(name, "")) for name in formats.ENDS]


def _against_gguf(base: str, info: bases.BaseInfo | None) -> str:
    if not base:
        return "it needs the base's sizes, and the adapter does not say which base it was made for"
    if info is None or info.folder is None:
        return f"it needs the sizes of {base}, which is not on this machine"
    if info.model_type not in gguf_files.ARCHITECTURES:
        return f"llama.cpp takes no adapters of {info.model_type or 'this'} models here, only of {', '.join(gguf_files.ARCHITECTURES)}"
    return ""


def _info(base: str) -> bases.BaseInfo | None:
    try:
        return bases.inspect(Base(id=base)) if base else None
    except (StudioError, ValueError):
        return None


def outlook(workspace: Workspace, id: str, dtype: str) -> dict:
    """What an export would be: `bytes` without headers, `rank`, `layers`, and by how much a number is rounded at most (0: not at all). Every
    layer has the highest rank there. Raises AdapterError."""
    card = adapters.inspect(library.adapter_folder(workspace, id))
    size, rounded = DTYPES[dtype]
    return {"bytes": card.rank * width(workspace, [id]) * size, "rank": card.rank, "layers": len(card.layers), "rounded": 0.0 if dtype == "float32" else rounded}


def width(workspace: Workspace, ids: list[str]) -> int:
    """How many numbers each rank of a mix of adapters has: rows and columns of all layers that any of them changes. Raises AdapterError."""
    shapes = {name: layer.shape for id in ids for name, layer in adapters.inspect(library.adapter_folder(workspace, id)).layers.items()}
    return sum(shape[0] + math.prod(shape[1:]) for shape in shapes.values())


def room(workspace: Workspace, parts: shelf.Parts) -> tuple[int, int]:
    """The rank of the exact sum of a mix, which is the largest of its layers', and how many numbers each rank has in the layers where any
    of its weights is not 0. Raises AdapterError."""
    ranks, widths = {}, {}
    for id, weight in parts:
        for name, layer in adapters.inspect(library.adapter_folder(workspace, id)).layers.items():
            if weights.of(weight, name):
                ranks[name] = ranks.get(name, 0) + layer.rank
                widths[name] = layer.shape[0] + math.prod(layer.shape[1:])
    return max(ranks.values(), default=0), sum(widths.values())


def make(workspace: Workspace, id: str, *, form: str, dtype: str) -> dict:
    """Export an adapter as one file (a PEFT folder as a .zip) that `file` finds for a day: the report of `formats.export_as`, and `token`
    and `name` of the file. Raises StudioError; then nothing is kept."""
    sweep(workspace)
    token, name = secrets.token_hex(8), re.sub(r"[^\w.-]+", "-", library.card(workspace, id)["name"]).strip("-.") or "adapter"
    fence.refuse_bytes(workspace)
    place = workspace.root / FOLDER / token
    place.mkdir(parents=True)
    try:
        told = formats.export_as(workspace, id, place / name, form=form, dtype=dtype)
        target = Path(told["target"])
        if target.is_dir():
            packed = studio.pack(target, place, name)
            shutil.rmtree(target)
            target = packed
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    return {**told, "token": token, "name": target.name, "bytes": target.stat().st_size}


def file(workspace: Workspace, token: str, name: str) -> Path:
    """A file that was exported. Raises AdapterError when there is none (any more)."""
    found = workspace.root / FOLDER / token / name
    if not TOKEN.fullmatch(token) or Path(name).name != name or name.startswith(".") or not found.is_file():
        raise AdapterError("export.gone")
    return found


def sweep(workspace: Workspace) -> None:
    """Delete exports that were made over a day ago."""
    for place in (workspace.root / FOLDER).glob("*"):
        if TOKEN.fullmatch(place.name) and time.time() - place.stat().st_mtime > KEPT_SECONDS:
            shutil.rmtree(place, ignore_errors=True)
