"""Checkpoints: whole or absent, safetensors and JSON only, and enough to go on bit for bit.

    checkpoints/step-000040/  adapter.safetensors    the trainable parameters, by name
                              optimizer.safetensors  the optimizer's tensors, by `parameter number/name`
                              method.safetensors     what the kind of adapter keeps besides, where it does
                              state.json             step, best, settings and fingerprints
                              manifest.json          sizes and hashes of the others, written last
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load, save

from lora_studio import durable
from lora_studio.errors import TrainingError
from lora_studio.training import optim

NAME = re.compile(r"step-(\d{6,})")
METHOD = "method.safetensors"
# What may differ between a checkpoint and the run that goes on from it.
FREE = ("name", "output", "version")


@dataclass
class State:
    """Where a run stands. `settings` and `prints` (of base and rows) are compared before it goes on."""

    step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    waited: int = 0
    validation: float | None = None
    tokens: int = 0
    seconds: float = 0.0
    settings: dict = field(default_factory=dict)
    prints: dict = field(default_factory=dict)


def write(folder: Path, parameters: dict[str, torch.Tensor], optimizer, state: State, more: dict[str, torch.Tensor] | None = None) -> Path:
    """Write the checkpoint of `state.step` into the folder of checkpoints, with what the method keeps besides. It is whole and on disk when
    this returns."""
    target = folder / f"step-{state.step:06d}"
    durable.publish_folder(target, files(parameters, optimizer, state, more))
    return target


def files(parameters: dict[str, torch.Tensor], optimizer, state: State, more: dict[str, torch.Tensor] | None = None, prefix: str = "") -> dict[str, bytes]:
    """The files of a checkpoint. With a prefix, several adapters have theirs in one folder."""
    tensors, plain = _flatten(optim.state(optimizer))
    with optim.averaged(optimizer):
        adapter = _bytes(parameters)
    return {
        f"{prefix}adapter.safetensors": adapter,
        f"{prefix}optimizer.safetensors": _bytes(tensors),
        f"{prefix}state.json": json.dumps({"run": asdict(state), "optimizer": plain, "groups": optim.kept(optimizer)}, sort_keys=True).encode(),
        **({prefix + METHOD: _bytes(more)} if more else {}),
    }


def _bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    # Cloned, because some optimizers share a table between parameters, and safetensors refuses shared memory.
    return save({name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()})


def _flatten(state: dict, path: str = "") -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """An optimizer's state, however deep, as tensors and plain values by path (`number/name`)."""
    tensors, plain = {}, {}
    for key, value in state.items():
        here = f"{path}/{key}" if path else str(key)
        if isinstance(value, dict):
            inner_tensors, inner_plain = _flatten(value, here)
            tensors, plain = {**tensors, **inner_tensors}, {**plain, **inner_plain}
        elif isinstance(value, torch.Tensor):
            tensors[here] = value
        else:
            plain[here] = value
    return tensors, plain


def _unflatten(values: dict[str, object]) -> dict:
    """The other way round; the first step of a path is a parameter's number."""
    state: dict = {}
    for path, value in values.items():
        number, *inner, name = path.split("/")
        here = state.setdefault(int(number), {})
        for step in inner:
            here = here.setdefault(step, {})
        here[name] = value
    return state


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, ascending, whole or not."""
    found = (NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each newer one that is not."""
    broken = []
    for step in reversed(steps(folder)):
        path = folder / f"step-{step:06d}"
        fault = durable.damage(path)
        if fault is None:
            return path, broken
        broken.append(f"{path.name} was passed over: {fault}.")
    return None, broken


def read_state(path: Path, prefix: str = "") -> State:
    """Where a checkpoint stands."""
    return State(**json.loads((path / f"{prefix}state.json").read_text(encoding="utf-8"))["run"])


def read_parameters(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The trainable parameters of a checkpoint by name."""
    return load((path / f"{prefix}adapter.safetensors").read_bytes())


def read_method(path: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """What the method of a checkpoint kept besides."""
    file = path / f"{prefix}{METHOD}"
    return load(file.read_bytes()) if file.is_file() else {}


def restore(path: Path, parameters: dict[str, torch.Tensor], optimizer, prefix: str = "") -> State:
    """Put a checkpoint's tensors into `parameters` and the optimizer; rates stay those of the spec. Returns its State."""
    saved = read_parameters(path, prefix)
    if {name: value.shape for name, value in saved.items()} != {name: value.shape for name, value in parameters.items()}:
        raise TrainingError("training.resume_changed", changes="its adapter has other layers or another rank than the spec")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    content = json.loads((path / f"{prefix}state.json").read_text(encoding="utf-8"))
    state = _unflatten({**content["optimizer"], **load((path / f"{prefix}optimizer.safetensors").read_bytes())})
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    optim.put_back(optimizer, content.get("groups", []))
    return State(**content["run"])


def check_same(saved: State, settings: dict, prints: dict) -> None:
    """Raise TrainingError naming every setting, base or rows that differ from the checkpoint's."""
    before, now = _leaves(saved.settings), _leaves(settings)
    changes = [
        f"{path} was {before.get(path)!r} and is {now.get(path)!r}"
        for path in sorted(before.keys() | now.keys())
        if path.split(".")[0] not in FREE and before.get(path) != now.get(path)
    ]
    changes += [f"the {what} changed since" for what in sorted(prints) if saved.prints.get(what) != prints[what]]
    if changes:
        raise TrainingError("training.resume_changed", changes="; ".join(changes))


def _leaves(tree, path: str = "") -> dict[str, object]:
    if isinstance(tree, dict) and tree:
        return {name: value for key, inner in tree.items() for name, value in _leaves(inner, f"{path}.{key}" if path else key).items()}
    return {path: tree}


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for step in steps(folder)[:-keep]:
        if step != best:
            durable.remove_folder(folder / f"step-{step:06d}")
