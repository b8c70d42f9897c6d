"""Experts of a mixture: an adapter of their stacked parameters (PEFT's target_parameters) as one update for each expert, and back.

Since transformers 5 a layer keeps its experts in parameters of three dimensions, such as experts.gate_up_proj (experts, out, in). PEFT's
factors of one are lora_A (experts·r, in), expert after expert, and lora_B (out, r·experts), rank after rank; of two parameters of one
module the first is called after `base_layer`. Here every expert is a layer of its own, experts.gate_up_proj.3, which blends, shrinks
and bakes like any other. Checkpoints hold the stack, or a matrix for each expert with gate and up apart.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_studio.adapters.card import Layer
from lora_studio.adapters.config import PeftConfig

if TYPE_CHECKING:
    from torch import Tensor

    from lora_studio.lowrank import LowRank

# In the order in which the models define them, which is that of the nesting; and what each is in a checkpoint with a matrix per expert.
PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
SLOT = re.compile(rf"(?P<module>.+)\.(?P<parameter>{'|'.join(PARTS)})\.(?P<number>\d+)$")
PART = re.compile(r"(?P<module>.+\.experts)\.(?P<number>\d+)\.\w+\.weight$")
NESTED = ".base_layer"
HOMES = (("", ""), (".mlp.", ".block_sparse_moe."))
TURNED = ("gpt_oss", "aria", "openai_privacy_filter")


@dataclass(frozen=True)
class Stack:
    """Both factors of one stacked parameter, by the names of their tensors."""

    A: str
    B: str
    experts: int
    rank: int


@dataclass(frozen=True)
class Slot:
    """Where a checkpoint keeps (a part of) an expert's matrix: in which layer, from which row of it on as if its experts stood below
    each other, which rows of the update it takes, and whether it lies transposed."""

    layer: str
    start: int
    rows: tuple[int, int]
    transposed: bool


def sort(factors: dict[str, dict[str, str]], config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Stack] | None:
    """The stacked parameters among the factors of a PEFT file, by their names; `factors` lose them. None when one is no parameter known
    here, or its factors do not fit a whole number of experts."""
    modules: dict[str, list[str]] = defaultdict(list)
    for name in factors:
        own = name.replace(NESTED, "")
        if own != name or own.rsplit(".", 1)[-1] == "experts":
            modules[own].append(name)
    stacks = {}
    for module, names in modules.items():
        named = [text.rpartition(".") for text in config.target_parameters]
        wanted = [parameter for start, _, parameter in named if not start or f".{module}".endswith(f".{start}")]
        parameters = [parameter for parameter in PARTS if parameter in wanted]
        names.sort(key=len, reverse=True)
        if len(parameters) != len(names) or len(set(wanted)) != len(names):
            return None
        for name, parameter in zip(names, parameters):
            rank = config.rank_of(f"{module}.{parameter}")
            parts = factors[name]
            if not rank or set(parts) != {"A", "B"}:
                return None
            A, B = shapes[parts["A"]], shapes[parts["B"]]
            if len(A) != 2 or len(B) != 2 or A[0] != B[1] or A[0] % rank:
                return None
            stacks[f"{module}.{parameter}"] = Stack(parts["A"], parts["B"], A[0] // rank, rank)
    for names in modules.values():
        for name in names:
            del factors[name]
    return stacks


def layers(stacks: dict[str, Stack], config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, Layer]:
    """A layer for each expert."""
    return {
        f"{name}.{number}": Layer("linear", (shapes[stack.B][0], shapes[stack.A][1]), stack.rank, config.alpha_of(name), config.scale_of(name, stack.rank))
        for name, stack in stacks.items()
        for number in range(stack.experts)
    }


def modules(stacks: dict[str, Stack], known: dict[str, Layer], tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    """The update of each expert."""
    from lora_studio.lowrank import LowRank

    found = {}
    for name, stack in stacks.items():
        A = tensors[stack.A].view(stack.experts, stack.rank, -1)
        B = tensors[stack.B].view(-1, stack.rank, stack.experts)
        for number in range(stack.experts):
            found[f"{name}.{number}"] = LowRank(A[number], B[:, :, number].contiguous(), known[f"{name}.{number}"].scale)
    return found


def apart(updates: dict[str, LowRank]) -> tuple[dict[str, LowRank], dict[str, dict[int, LowRank]]]:
    """The plain layers of an adapter, and of each stacked parameter its experts."""
    plain: dict[str, LowRank] = {}
    stacked: dict[str, dict[int, LowRank]] = defaultdict(dict)
    for name, module in updates.items():
        match = SLOT.match(name)
        if match:
            stacked[f"{match['module']}.{match['parameter']}"][int(match["number"])] = module
        else:
            plain[name] = module
    return plain, dict(stacked)


def joined(stacked: dict[str, dict[int, LowRank]]) -> dict[str, tuple[Tensor, Tensor]]:
    """PEFT's two factors of each stacked parameter, by the name of its layer in the file. All experts have one rank, and scale 1; an
    expert that nothing changes is zero."""
    import torch

    count = 1 + max((number for experts in stacked.values() for number in experts), default=-1)
    own: dict[str, list[str]] = defaultdict(list)
    for name in stacked:
        own[name.rpartition(".")[0]].append(name)
    found = {}
    for module, names in own.items():
        names.sort(key=lambda name: list(PARTS).index(name.rpartition(".")[2]))
        for place, name in enumerate(names):
            first = next(iter(stacked[name].values()))
            A, B = first.A.new_zeros(count, *first.A.shape), first.B.new_zeros(count, *first.B.shape)
            for number, update in stacked[name].items():
                A[number], B[number] = update.A, update.B
            nested = module + NESTED * (len(names) - 1 - place)
            found[nested] = (A.flatten(0, 1), torch.movedim(B, 0, 2).reshape(B.shape[1], -1))
    return found


def slots(name: str, shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]], *, model: str = "") -> list[Slot]:
    """Where a checkpoint keeps the expert that a layer means; nothing where it has no such expert. `shapes` are those of its weights by layer
    and of its stacked parameters by name; `model` is its model_type: a square matrix does not tell how it lies."""
    match = SLOT.match(name)
    if not match:
        return []
    parameter, number, height = match["parameter"], int(match["number"]), shape[0]
    for module in _homes(match["module"]):
        stacked = tuple(shapes.get(f"{module}.{parameter}", ()))
        if len(stacked) == 3 and number < stacked[0]:
            turned = stacked[1:] == shape[::-1] and (stacked[1:] != shape or model in TURNED)
            if turned or stacked[1:] == shape:
                return [Slot(f"{module}.{parameter}", number * stacked[1], (0, height), turned)]
        for parts in PARTS[parameter]:
            names = [f"{module}.{number}.{part}" for part in parts]
            step = height // len(parts)
            if all(tuple(shapes.get(own, ())) == (step, shape[1]) for own in names):
                return [Slot(own, 0, (step * place, step * (place + 1)), False) for place, own in enumerate(names)]
    return []


def in_headers(shapes: dict[str, Sequence[int]], *, model: str = "") -> list[tuple[str, int, int, int]]:
    """The stacked parameters that a model makes of a checkpoint, as (name, experts, out, in), the last two as PEFT's factors take them; from
    the shapes of its tensors by name."""
    found, apart = [], defaultdict(set)
    for name, shape in shapes.items():
        if is_stack(name, tuple(shape)):
            found.append((name, shape[0], *(shape[:0:-1] if model in TURNED else shape[1:])))
        elif match := PART.match(name):
            apart[match["module"]].add(int(match["number"]))
    for module, numbers in apart.items():
        for parameter, ways in PARTS.items():
            every = ([shapes.get(f"{module}.{min(numbers)}.{part}.weight") for part in way] for way in ways)
            parts = next(filter(all, every), None)
            if parts:
                found.append((f"{module}.{parameter}", len(numbers), sum(part[0] for part in parts), parts[0][1]))
    return found


def is_stack(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a checkpoint holds all experts of a layer."""
    return len(shape) == 3 and name.rsplit(".", 1)[-1] in PARTS


def _homes(module: str) -> list[str]:
    """The names a checkpoint may have for a module of experts: as it is, with fewer words before it, and Mixtral's own."""
    words = module.split(".")
    return [".".join(words[cut:]).replace(old, new) for old, new in HOMES for cut in range(min(3, len(words)))]
