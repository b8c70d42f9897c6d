"""Training that goes on from an adapter or a blend there is, on new rows."""

from pathlib import Path

import torch
from peft.tuners.lora.layer import ParamWrapper

from lora_studio import adapters, library
from lora_studio.adapters import experts, pipeline_files
from lora_studio.errors import AdapterError, TrainingError
from lora_studio.spec import TrainSpec, methods
from lora_studio.training import optim
from lora_studio.workspace import Workspace


def placed(spec: TrainSpec, workspace: Workspace) -> TrainSpec:
    """The spec with the folder of the adapter to go on from in place of its id. Raises AdapterError."""
    given = getattr(spec.method, "start", None)
    if not given or Path(given).expanduser().is_dir():
        return spec
    return spec.model_copy(update={"method": spec.method.model_copy(update={"start": str(library.adapter_folder(workspace, given))})})


@torch.no_grad()
def put(model: torch.nn.Module, spec: TrainSpec) -> None:
    """Put its factors into the fresh ones, so that the model answers as with it. Ranks above its own keep their fresh A and a zero B.
    Raises TrainingError naming the first layer that does not fit."""
    found = adapters.read(Path(spec.method.start).expanduser())
    adapters.refuse_blend({spec.method.start: found.card})
    scale, factors = methods.strength(spec.method), {}
    stacks = {
        f"{layer_of(name + '.lora_')}.{layer.parameter_name}".replace(experts.NESTED, ""): (*(factors[layer.active_adapters[0]].weight for factors in (layer.lora_A, layer.lora_B)), layer.num_experts)
        for name, layer in model.named_modules() if isinstance(layer, ParamWrapper)
    }  # fmt: skip
    for name, parameter in model.named_parameters():
        if optim.role(name) in ("A", "B"):
            factors.setdefault(layer_of(name), {})[optim.role(name)] = parameter
    plain, stacked = experts.apart(found.modules)
    strangers = [name for name in plain if name not in factors] + [name for name in stacked if name not in stacks]
    if strangers:
        raise TrainingError("training.start_layers", adapter=spec.method.start, name=strangers[0], count=len(strangers))
    slots = [(name, factors[name]["A"], factors[name]["B"], module) for name, module in plain.items()]
    for name, own in stacked.items():
        A, B, count = stacks[name]
        A, B = A.view(count, -1, A.shape[1]), B.view(len(B), -1, count)
        slots += [(f"{name}.{number}", A[number], B[:, :, number], module) for number, module in own.items() if number < count]
    for name, A, B, module in slots:
        if module.rank > len(A):
            raise TrainingError("training.start_rank", adapter=spec.method.start, name=name, rank=module.rank, there=len(A))
        if module.shape != (B.shape[0], *A.shape[1:]):
            raise AdapterError("adapter.other_shapes", path=spec.method.start, name=name, here=list(module.shape), there=[B.shape[0], *A.shape[1:]], base=spec.base.id, count=1, own=found.card.base)
        own = module.balanced()
        A[: module.rank] = own.A.to(A)
        B.zero_()
        B[:, : module.rank] = (own.B.double() / scale).to(B)


def layer_of(name: str) -> str:
    """The layer of a parameter, as adapters name it."""
    return pipeline_files.of_parameter(name).removeprefix("base_model.model.").partition(".lora_")[0]
