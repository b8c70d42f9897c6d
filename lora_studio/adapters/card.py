"""What an adapter is, known from its headers alone: Card; and the adapter itself: Adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_studio.errors import Problem

if TYPE_CHECKING:
    from torch import Tensor

    from lora_studio.dora import Dora
    from lora_studio.lowrank import LowRank
    from lora_studio.multiplied import Multiplied


@dataclass(frozen=True)
class Layer:
    """One adapted layer: `shape` is that of the weight it adds to, `scale` is None when no alpha is known."""

    kind: str
    shape: tuple[int, ...]
    rank: int
    alpha: float | None
    scale: float | None


@dataclass(frozen=True)
class Card:
    """An adapter's description. `format` is peft, kohya, lycoris, diffusers or native; `method` is lora, dora, loha, lokr, lycoris (several of these), or the name of another
    PEFT method. `extras` gives each tensor that is no factor its part: bias, magnitude, token, copy or module."""

    format: str
    method: str = "lora"
    base: str = ""
    revision: str | None = None
    family: str = ""
    task_type: str | None = None
    rslora: bool = False
    fan_in_fan_out: bool = False
    nested: bool = False
    layers: dict[str, Layer] = field(default_factory=dict)
    targets: tuple[str, ...] = ()
    extras: dict[str, str] = field(default_factory=dict)
    mutates: str = ""
    variants: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0
    dtypes: tuple[str, ...] = ()
    config: dict = field(default_factory=dict)
    problems: tuple[Problem, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max((layer.rank for layer in self.layers.values()), default=0)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that occur."""
        return tuple(sorted({layer.rank for layer in self.layers.values()}))

    @property
    def alpha(self) -> float | None:
        """The alpha of most layers."""
        found = [layer.alpha for layer in self.layers.values() if layer.alpha is not None]
        return max(set(found), key=found.count) if found else None

    @property
    def is_usable(self) -> bool:
        """Whether it can be read as it is."""
        return not any(problem.level == "error" for problem in self.problems)


@dataclass(frozen=True)
class Adapter:
    """An adapter in memory: its updates by the name of the layer, low-rank, DoRA's or those that multiply, its other tensors by their name in the file, its card."""

    modules: dict[str, LowRank | Dora | Multiplied]
    extras: dict[str, Tensor]
    card: Card
