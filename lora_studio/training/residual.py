"""PiSSA, OLoRA, CorDA and LoRA-GA: they start from something and take it out of the base, W = (W - s·B0·A0) + s·B·A.

So the adapter alone is nothing for the untouched base; the difference s·(B·A - B0·A0), of twice the rank, is, and that is what is written.
LoftQ starts from what 4 bits lose of the base; what was learnt besides is the same difference, for the base before it lost anything.
PiSSA: Meng et al. 2024, arXiv 2404.02948. OLoRA: Büyükakyüz 2024, arXiv 2406.01775. The others: first_look.py.
"""

from collections import Counter

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lora_studio.adapters import pipeline_files
from lora_studio.errors import TrainingError
from lora_studio.spec import TrainSpec, methods
from lora_studio.training import optim

KEY = "first_factors"


def is_one(spec: TrainSpec) -> bool:
    """Whether a run's adapter starts so."""
    return getattr(spec.method, "init", "") in methods.FROM_SOMETHING


def remember(model: torch.nn.Module) -> None:
    """Keep the factors as they start. Raises TrainingError where the base uses an adapted weight twice: what was taken out is missing there."""
    shared = Counter(parameter.data_ptr() for _, parameter in model.named_parameters(remove_duplicate=False) if parameter.ndim > 1)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and shared[layer.get_base_layer().weight.data_ptr()] > 1:
            raise TrainingError("training.start_tied", name=name.rpartition(".")[2])
    first = {pipeline_files.of_parameter(name): parameter.detach().clone() for name, parameter in model.named_parameters() if optim.role(name) in ("A", "B")}
    object.__setattr__(model, KEY, first)


def for_the_untouched_base(model: torch.nn.Module, tensors: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """The same update as one of the base as it is on disk: A above A0, B beside -B0. The strength stays: alpha doubles with the rank, or
    grows by √2 where it is rank-stabilised."""
    first = getattr(model, KEY)
    made = {}
    for name, tensor in tensors.items():
        before = first[name].to(tensor.device, tensor.dtype)
        made[name] = torch.cat([tensor, before]) if ".lora_A." in name else torch.cat([tensor, -before], dim=1)
    alpha = config["lora_alpha"] * (2**0.5 if config["use_rslora"] else 2)
    return made, {**config, "r": 2 * config["r"], "lora_alpha": alpha, "init_lora_weights": True}
