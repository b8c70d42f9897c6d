"""The verbs of baking: what a baked model would be, the model itself with its card, and an adapter taken out of a fine-tuned one."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lora_studio import bases, durable, fence, library, shelf
from lora_studio.errors import BakeError, BlendError
from lora_studio.jobs import bench
from lora_studio.spec import Base
from lora_studio.weights import Weight
from lora_studio.workspace import Workspace

RECIPE = "lora_studio.json"
# What is added for an adapter that is no product.
OWN = {
    "dora": "a DoRA adapter `weight * (m / |V| * V - W0)` with `V = W0 + scale * B @ A` and a length `|V|` for each output",
    "oft": "an OFT adapter `weight * (W0 @ R.T - W0)` with a rotation `R` of the inputs",
    "ia3": "an IA3 adapter `weight * (l - 1) * W0` with a number `l` for each output and its bias, of a feed-forward layer for each input",
}


def preview(workspace: Workspace, parts: shelf.Parts, *, base: str | None = None, dtype: str | None = None, merge: dict | None = None) -> dict:
    """What baking would write and lose: bytes, changed tensors, the loss of the precision, notes. Writes nothing. Raises StudioError."""
    return bench.ask("bake", seconds=3600.0, base=base or base_of(workspace, parts), parts=_paths(workspace, parts), dtype=dtype, merge=merge)


def bake(
    workspace: Workspace, parts: shelf.Parts, target: Path, *, base: str | None = None, dtype: str | None = None, merge: dict | None = None
) -> Iterator[dict]:
    """The events of baking weighted adapters into their base (or the one that is named) as the new folder `target`: `progress` with bytes
    done of all, `done` with the report. They are summed, or put together as `merge` says: {how, density, seed, ...} as in merges.merge,
    but in their full rank. The folder holds a card and the recipe. Raises StudioError; then there is no such folder."""
    base = base or base_of(workspace, parts)
    target = Path(target).expanduser().absolute()
    recipe = {
        "base": base, "dtype": dtype,
        "sum": [{"adapter": library.folder_of(workspace, id).name, "name": library.card(workspace, id)["name"], "weight": weight} for id, weight in parts],
        **({"merge": merge} if merge else {}),
    }  # fmt: skip
    methods = {library.card(workspace, id)["method"] for id, _ in parts}
    files = {"README.md": _card(recipe, target, methods), RECIPE: json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"}
    return bench.stream("bake", seconds=6 * 3600.0, base=base, parts=_paths(workspace, parts), target=str(target), dtype=dtype, files=files, merge=merge)


def extract(workspace: Workspace, tuned: str, base: str, *, name: str, rank: int | None = None, loss: float | None = None) -> Iterator[dict]:
    """The events of taking the adapter out of a fine-tuned model: `progress` with tensors done of all, `done` with its id in the library.
    Raises StudioError; then the library is as it was."""
    shelf.check_name(workspace, name)
    with tempfile.TemporaryDirectory(dir=workspace.root, prefix=durable.TEMPORARY) as place:
        target = Path(place) / "adapter"
        for event in bench.stream("extract", seconds=6 * 3600.0, tuned=tuned, base=base, rank=rank, loss=loss, target=str(target)):
            if event["event"] != "done":
                yield event
                continue
            recipe = {"extracted": {"from": tuned, "base": base, "rank": rank, "loss": event["loss"]}}
            yield {**event, "id": library.add(workspace, target, {"name": name, "base": base, "recipe": recipe, "tags": ["extracted"]})}


def folder_for(workspace: Workspace, name: str) -> Path:
    """The folder that a model of that name is baked into, in the workspace's models/. Raises BakeError when the name is none, or taken."""
    safe = re.sub(r"[^\w.-]+", "-", name.strip(), flags=re.ASCII).strip("-.")[:60]
    if not safe:
        raise BakeError("bake.name")
    fence.refuse_bytes(workspace)
    target = workspace.root / "models" / safe
    if target.exists():
        raise BakeError("bake.target", path=target)
    return target


def base_of(workspace: Workspace, parts: shelf.Parts) -> str:
    """The base that adapters were made for. Raises BlendError when they name none."""
    for id, _ in parts:
        found = library.card(workspace, id)["base"]
        if found:
            return found
    raise BlendError("bake.base")


def _paths(workspace: Workspace, parts: shelf.Parts) -> list[list]:
    return [[str(library.adapter_folder(workspace, id)), weight, library.card(workspace, id)["name"]] for id, weight in parts]


def _weight(weight: Weight) -> str:
    """A weight in a table: every pattern, because no recipe stands beside it."""
    return "".join([f"{weight.get('', 1.0):g}", *(f", `{pattern}` {one:g}" for pattern, one in weight.items() if pattern)]) if isinstance(weight, dict) else f"{weight:g}"


def _formula(merge: dict | None, methods: set[str]) -> str:
    if not merge:
        return "".join(["`W0 + sum of weight * scale * B @ A`", *(f", of {OWN[method]}" for method in OWN if method in methods)])
    told = ", ".join(f"{key} {value}" for key, value in merge.items() if key != "how")
    return f"put together by {merge['how']}" + (f" ({told})" if told else "")


def _card(recipe: dict, target: Path, methods: set[str]) -> str:
    """What the folder is, what it was made of, and the commands that run it."""
    base, parts = recipe["base"], recipe["sum"]
    rows = "\n".join(f"| {' '.join(part['name'].split()).replace('|', '/')} | {_weight(part['weight'])} |" for part in parts)
    known = bases.inspect(Base(id=base))
    folder, name = target.name, target.name.lower().replace(" ", "-")
    if known.pipeline:
        run = f"```python\nfrom diffusers import {known.pipeline}\n\npipeline = {known.pipeline}.from_pretrained({json.dumps(folder)})\n```"
    else:
        run = "\n".join([
            "```python", "from transformers import AutoModelForCausalLM", "", f"model = AutoModelForCausalLM.from_pretrained({json.dumps(folder)})", "```",
            "", "With vLLM, llama.cpp (from its source folder) and Ollama:", "",
            "```", f"vllm serve {folder}", f"python convert_hf_to_gguf.py {folder} --outfile {name}.gguf && llama-cli -m {name}.gguf",
            f"echo FROM ./{name}.gguf > Modelfile && ollama create {name} -f Modelfile && ollama run {name}", "```",
        ])  # fmt: skip
    precision = recipe["dtype"] or "the base's own precision"
    return (
        f"# {folder}\n\n{base} with {len(parts)} adapter{'' if len(parts) == 1 else 's'} baked in by LoRA Studio, in {precision}: "
        f"{_formula(recipe.get('merge'), methods)}, summed in fp32 and rounded once. The base's licence goes on to hold.\n\n"
        f"| adapter | weight |\n| --- | --- |\n{rows}\n\n{run}\n"
    )
