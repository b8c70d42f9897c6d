"""AdaLoRA: which directions matter, and how many may stay. Zhang et al. 2023, arXiv 2303.10512, with PEFT's constants.

Of every number w with gradient g the sensitivity |w·g| and its wavering are averaged over the steps; a direction's worth is that of its
entry of E plus the means over its row of A and its column of B. The budget falls from first_rank to rank for each layer along a cube,
and what is worth least beyond it is set to zero. The state is plain tensors, so that a run goes on from a checkpoint bit for bit.
"""

import math

import torch
from torch import Tensor

from lora_studio.spec import TrainSpec

SMOOTH = 0.85
KEY = "allocation"


class Allocation:
    """The directions of all layers. `tensors` holds for each parameter its averaged sensitivity and wavering, and for each layer what is kept."""

    def __init__(self, model: torch.nn.Module, spec: TrainSpec):
        self.method = spec.method
        self.layers: dict[str, dict[str, torch.nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            for part in ("lora_A", "lora_B", "lora_E"):
                if f".{part}." in name and parameter.requires_grad:
                    self.layers.setdefault(name.partition(f".{part}.")[0], {})[part] = parameter
        self.tensors: dict[str, Tensor] = {}
        for layer, parts in self.layers.items():
            for part, parameter in parts.items():
                self.tensors[f"{layer}.{part}.sensitivity"] = torch.zeros_like(parameter, requires_grad=False)
                self.tensors[f"{layer}.{part}.wavering"] = torch.zeros_like(parameter, requires_grad=False)
            self.tensors[f"{layer}.kept"] = torch.ones(len(parts["lora_E"]), device=parts["lora_E"].device)

    def budget(self, step: int, steps: int) -> tuple[int, bool]:
        """How many directions may stay after this step (from 0), and whether it is time to choose them."""
        first, last = self.method.first_rank * len(self.layers), self.method.rank * len(self.layers)
        begin, end = math.floor(self.method.begin * steps), steps - math.floor(self.method.settle * steps)
        if step <= begin < end:
            return first, False
        if step >= end:
            return last, True
        return int((first - last) * (1 - (step - begin) / (end - begin)) ** 3 + last), step % self.method.every == 0

    @torch.no_grad()
    def watch(self) -> None:
        """Average what the gradients of this step say."""
        for layer, parts in self.layers.items():
            for part, parameter in parts.items():
                worth, wavering = self.tensors[f"{layer}.{part}.sensitivity"], self.tensors[f"{layer}.{part}.wavering"]
                now = (parameter * parameter.grad).abs()
                worth.copy_(SMOOTH * worth + (1 - SMOOTH) * now)
                wavering.copy_(SMOOTH * wavering + (1 - SMOOTH) * (now - worth).abs())

    @torch.no_grad()
    def choose(self, budget: int) -> None:
        """Keep the `budget` directions that are worth most."""
        worth = {layer: self._worth(layer) for layer in self.layers}
        everything = torch.cat(list(worth.values()))
        drop = len(everything) - budget
        limit = float(everything.kthvalue(drop).values) if drop > 0 else -math.inf
        for layer, found in worth.items():
            self.tensors[f"{layer}.kept"].copy_((found > limit).float())

    def _worth(self, layer: str) -> Tensor:
        def of(part: str) -> Tensor:
            return self.tensors[f"{layer}.{part}.sensitivity"] * self.tensors[f"{layer}.{part}.wavering"]

        return of("lora_E").view(-1) + of("lora_A").mean(1) + of("lora_B").mean(0)

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is not kept to zero."""
        for layer, parts in self.layers.items():
            parts["lora_E"].mul_(self.tensors[f"{layer}.kept"][:, None])


def follow(model: torch.nn.Module, spec: TrainSpec) -> torch.nn.Module:
    """The model, with its allocation kept beside it."""
    object.__setattr__(model, KEY, Allocation(model, spec))
    return model


def allocate(model: torch.nn.Module, step: int, steps: int) -> None:
    """After an optimizer step, its gradients still there: see what matters, and take away what may not stay."""
    allocation = getattr(model, KEY)
    end = steps - math.floor(allocation.method.settle * steps)
    budget, choosing = allocation.budget(step, steps)
    if step <= end:
        allocation.watch()
        if choosing:
            allocation.choose(budget)
    if choosing:
        allocation.apply()


def penalty(model: torch.nn.Module, spec: TrainSpec) -> Tensor | None:
    """The mean of |A·Aᵀ - 1| and |Bᵀ·B - 1| over all layers, times its weight."""
    if not spec.method.orthogonality:
        return None
    found = []
    for parts in getattr(model, KEY).layers.values():
        for part in ("lora_A", "lora_B"):
            square = parts[part] @ parts[part].T if part == "lora_A" else parts[part].T @ parts[part]
            found.append((square - torch.eye(len(square), device=square.device)).norm())
    return spec.method.orthogonality * torch.stack(found).mean()


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps."""
    return getattr(model, KEY).tensors


def restore(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put it back."""
    for name, tensor in getattr(model, KEY).tensors.items():
        tensor.copy_(tensors[name])


def facts(model: torch.nn.Module) -> dict:
    """The rank that is left in each layer."""
    allocation = getattr(model, KEY)
    return {"layers": {_layer(name): int(allocation.tensors[f"{name}.kept"].sum()) for name in allocation.layers}}


def _layer(name: str) -> str:
    return name.removeprefix("main.").removeprefix("base_model.model.")


def as_lora(tensors: dict[str, Tensor], config: dict) -> tuple[dict[str, Tensor], dict]:
    """B (E ⊙ A) without the directions that are zero, as plain LoRA of one rank with alpha = rank: the same numbers, for every loader."""
    scale = (config["lora_alpha"] or config["init_r"]) / (config["init_r"] + 1e-5)
    pairs = {}
    for name, E in tensors.items():
        if not name.endswith(".lora_E"):
            continue
        layer = name.removesuffix(".lora_E")
        kept = E.view(-1) != 0
        A, B = tensors[f"{layer}.lora_A"][kept], tensors[f"{layer}.lora_B"][:, kept]
        pairs[layer] = (A, (B.double() * (E.double().view(-1)[kept] * scale)).to(B.dtype))
    rank = max(1, *(len(A) for A, _ in pairs.values()))
    made = {}
    for layer, (A, B) in pairs.items():
        more = rank - len(A)
        made[f"{layer}.lora_A.weight"] = torch.nn.functional.pad(A, (0, 0, 0, more))
        made[f"{layer}.lora_B.weight"] = torch.nn.functional.pad(B, (0, more))
    names = ("base_model_name_or_path", "revision", "task_type", "target_modules", "inference_mode", "auto_mapping", "bias")
    return made, {**{name: config.get(name) for name in names}, "peft_type": "LORA", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "init_lora_weights": True}
