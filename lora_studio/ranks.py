"""A rank for every layer of an adapter: the same for all is seldom the best use of the bytes.

    per_layer    in each layer the smallest rank whose own loss is within a limit
    shared       the loss of the whole within a limit, the ranks where they bring most for their parameters
    within       as many bytes as are given, spent in the same order

A singular value σ of a layer brings σ² of the squared norm and costs out + in parameters. In a layer they fall, so taking steps by σ² per
parameter, largest first, never takes a smaller one before a larger one of the same layer; it is the optimum but for the last step.
"""

from dataclasses import dataclass

from lora_studio import blend
from lora_studio.blend import Modules
from lora_studio.errors import BlendError
from lora_studio.lowrank import LowRank


@dataclass(frozen=True)
class Step:
    """One more rank (of a grouped convolution one in each group) of a layer: the rank it leads to, what it brings, what it costs."""

    name: str
    rank: int
    brings: float
    costs: int


def per_layer(modules: Modules, loss: float) -> dict[str, int]:
    """The rank of each layer whose own relative loss is at most `loss`; at least 1. Raises BlendError."""
    _check(loss)
    curves = blend.Preview([modules]).curve([1.0]).layers
    return {name: max(modules[name].groups, next((rank for rank, value in enumerate(curve) if value <= loss), len(curve) - 1)) for name, curve in curves.items()}


def shared(modules: Modules, loss: float) -> dict[str, int]:
    """Ranks whose overall relative loss is at most `loss`, with few parameters; a layer that brings nothing gets 0. Raises BlendError."""
    _check(loss)
    steps = _steps(modules)
    left = total = sum(step.brings for step in steps)
    found = dict.fromkeys(modules, 0)
    for step in steps:
        if left <= loss * loss * total * (1 + 1e-12):
            break
        found[step.name], left = step.rank, left - step.brings
    return found


def within(modules: Modules, size: int, *, width: int = 4) -> dict[str, int]:
    """Ranks whose factors take at most `size` bytes, `width` of them a number. Raises BlendError when not even one step fits."""
    left, found = size // width, dict.fromkeys(modules, 0)
    closed: set[str] = set()  # a layer's later steps need its earlier ones
    for step in _steps(modules):
        if step.costs <= left and step.name not in closed:
            found[step.name], left = step.rank, left - step.costs
        else:
            closed.add(step.name)
    if not any(found.values()):
        raise BlendError("ranks.size", size=size, least=min((step.costs * width for step in _steps(modules)), default=0))
    return found


def resize(modules: Modules, ranks: dict[str, int]) -> tuple[Modules, blend.Loss]:
    """The nearest adapter of those ranks, without the layers of rank 0, and its true loss."""
    small: Modules = {}
    for name, module in modules.items():
        if ranks.get(name, module.rank):
            small |= blend.compress({name: module}, ranks.get(name, module.rank))[0]
    return small, blend.difference(small, modules)


def sliced(modules: Modules, rank: int) -> Modules:
    """The first `rank` rows of A and columns of B of every layer: what an adapter with nested ranks (DyLoRA) was trained to be there.
    Raises BlendError."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise BlendError("blend.rank", rank=repr(rank)[:40])
    return {name: LowRank(module.A[:rank], module.B[:, :rank], module.scale, module.kind) for name, module in modules.items()}


def _check(loss: float) -> None:
    if isinstance(loss, bool) or not isinstance(loss, int | float) or not 0 <= loss < 1:
        raise BlendError("ranks.loss", loss=repr(loss)[:40])


def _steps(modules: Modules) -> list[Step]:
    """Every step of every layer, those that bring most for their parameters first."""
    curves, found = blend.Preview([modules]).curve([1.0]).layers, []
    for name, curve in curves.items():
        module, square = modules[name], blend.norm(modules[name]) ** 2
        costs = sum(B.shape[0] + A.shape[1] for B, A in module.blocks())
        for rank in range(module.groups, len(curve), module.groups):
            brings = (curve[rank - module.groups] ** 2 - curve[rank] ** 2) * square
            if brings > 0:
                found.append(Step(name, rank, brings, costs))
    return sorted(found, key=lambda step: (-step.brings / step.costs, step.name, step.rank))
