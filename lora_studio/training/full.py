"""Full and partial fine-tuning: the base's own weights learn, and what is left is a model, or the adapter between it and its base.

A model is the base's folder again: the same files, in its weights files (of an image model those of the part that draws) only the tensors
that learnt are others, in the precision they had. An adapter is taken from the difference before anything is rounded (`checkpoints.extract`).
"""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from lora_studio import adapters, bases, checkpoints
from lora_studio.adapters import pipeline_files
from lora_studio.adapters.files import LINEAGE, reheaded
from lora_studio.checkpoints.plan import others, weights_of
from lora_studio.errors import BaseModelError, TrainingError
from lora_studio.spec import TrainSpec, methods
from lora_studio.weights import blocks

RECIPE = "lora_studio.json"


def attach(model: torch.nn.Module, spec: TrainSpec, targets: list[str]) -> torch.nn.Module:
    """Let those weights learn that `method.layers` names. Raises TrainingError when a pattern names none, BaseModelError when one that
    learns is not in the base's files by its name."""
    there = {name: tuple(value.shape) for name, value in model.named_parameters()}
    refuse_idle(spec, there)
    base = bases.fetch(spec.base)
    if base.is_file():
        raise BaseModelError("base.full_file", id=spec.base.id)
    stored = bases.adaptable(base)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(methods.learns(spec.method, name, there[name]))
        if parameter.requires_grad and tuple(stored.get(name, ())) != there[name]:
            raise BaseModelError("base.renamed", id=spec.base.id, name=name)
    return model


def refuse_idle(spec: TrainSpec, shapes: dict) -> None:
    """Raise TrainingError naming the first pattern that means nothing which learns."""
    for pattern in [] if spec.method.layers == "all" else spec.method.layers:
        alone = spec.method.model_copy(update={"layers": [pattern]})
        if not any(methods.learns(alone, name, shape) for name, shape in shapes.items()):
            raise TrainingError("training.layers", pattern=pattern, id=spec.base.id, known=", ".join(blocks(shapes)[:6]))


def place(spec: TrainSpec) -> str:
    """The folder of a run that holds what it gives."""
    return "adapter" if spec.method.save == "lora" else "model"


def finish(model: torch.nn.Module, spec: TrainSpec) -> dict[str, bytes | Path]:
    """The files of the trained model (those of the base that stay as they are as their place), or of the adapter that was taken out of it."""
    base = bases.fetch(spec.base)
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    if spec.method.save == "lora":
        return _extracted(base, spec, trained, model)
    found = {path: _written(base / path, trained) for path in _paths(base)}
    found |= {name: base / name for name in others(base) if name not in found}
    recipe = {"made": "full fine-tuning", "base": spec.base.id, "revision": spec.base.revision, "changed": sorted(trained)}
    return found | {RECIPE: (json.dumps(recipe, indent=2, ensure_ascii=False) + "\n").encode()}


def _paths(base: Path) -> list[str]:
    """The weights files that hold what may learn."""
    return weights_of(base, bases.weights_folder(base))


def _written(file: Path, trained: dict[str, torch.Tensor], *, exact: bool = False) -> bytes:
    """A weights file of the base with what learnt put in, in the precision that was there (or in fp32)."""
    with safe_open(file, "pt") as given:
        held = {name: given.get_tensor(name) for name in list(given.keys())}
        metadata = given.metadata()
    for name in held.keys() & trained.keys():
        held[name] = trained[name].to("cpu", torch.float32 if exact else held[name].dtype).contiguous()
    return save(held, metadata=metadata)


def _extracted(base: Path, spec: TrainSpec, trained: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, bytes]:
    """The files of a LoRA of `method.rank`, the best one for the difference in every layer."""
    with tempfile.TemporaryDirectory() as folder:
        for path in _paths(base):
            (Path(folder) / path).parent.mkdir(exist_ok=True)
            (Path(folder) / path).write_bytes(_written(base / path, trained, exact=True))
        if spec.task.kind == "image":
            shutil.copyfile(base / "model_index.json", Path(folder) / "model_index.json")  # says which part it is
        found = checkpoints.extract(Path(folder), base, rank=spec.method.rank)
    own = {"config": {"auto_mapping": pipeline_files.made_for(model)}} if spec.task.kind == "image" else {"task_type": "CAUSAL_LM"}
    card = adapters.Card("peft", base=spec.base.id, revision=spec.base.revision, **own)
    files = adapters.write(adapters.with_modules(card, found.modules))
    lineage = {"made": "full fine-tuning", "rank": spec.method.rank, "loss": found.loss}
    return {**files, adapters.WEIGHTS: reheaded(files[adapters.WEIGHTS], metadata={LINEAGE: json.dumps(lineage, sort_keys=True)})}


def words(folder: Path, spec: TrainSpec) -> str:
    """What to say of the result in a folder: where the model is, or what the rank of the adapter takes."""
    if place(spec) == "model":
        return f"The model is in {folder}. Give this folder as base.id, to train on it or to talk to it."
    with safe_open(folder / adapters.WEIGHTS, "pt") as given:
        loss = json.loads(given.metadata()[LINEAGE])["loss"]
    return f"The adapter of rank {spec.method.rank} lacks {loss:.1%} of what was learnt." + (
        " Raise method.rank to keep more." if loss > 0.1 else ""
    )
