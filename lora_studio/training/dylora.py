"""DyLoRA, dynamic-rank LoRA: each step trains only the first rows of A and columns of B, as many as are drawn for it.

So the first b rows and columns are an adapter of rank b for every b, and cutting is exact. Valipour et al. 2022, arXiv 2210.07558, where
the update below the drawn rank is trained too (their "no frozen rows"). The rest is put aside for the step and put back after it, so
that every fast path sees an adapter with zeros there, whose gradients are zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_studio.spec import TrainSpec
from lora_studio.training import optim, order

KEY = "nested_ranks"


class Ranks:
    """The factors of all layers, and what is put aside of them."""

    def __init__(self, model: torch.nn.Module, spec: TrainSpec):
        self.method, self.seed = spec.method, spec.compute.seed
        found = [(optim.role(name), parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.factors = [(part, parameter) for part, parameter in found if part in ("A", "B")]
        self.aside: list[torch.Tensor] = []

    @property
    def known(self) -> list[int]:
        """The ranks that are trained."""
        step = min(self.method.rank_step, self.method.rank)
        return sorted({*range(step, self.method.rank + 1, step), self.method.rank})

    def rest(self, rank: int) -> Iterator[torch.Tensor]:
        """What lies beyond a rank, of each factor."""
        for part, parameter in self.factors:
            yield parameter.data[rank:] if part == "A" else parameter.data[:, rank:]

    def narrow(self, rank: int) -> None:
        """Put everything beyond a rank aside."""
        self.aside = [rest.clone() for rest in self.rest(rank)]
        for rest in self.rest(rank):
            rest.zero_()

    def widen(self, rank: int) -> None:
        """Put it back, whatever the optimizer did there."""
        for rest, before in zip(self.rest(rank), self.aside):
            rest.copy_(before)
        self.aside = []

    def drawn(self, step: int) -> int:
        """The rank of a step; the same whenever the step is made again."""
        return self.known[order.key(self.seed, "rank", step) % len(self.known)]


def follow(model: torch.nn.Module, spec: TrainSpec) -> torch.nn.Module:
    """The model, with its ranks kept beside it."""
    object.__setattr__(model, KEY, Ranks(model, spec))
    return model


def narrow(model: torch.nn.Module, step: int, steps: int) -> None:
    """Before a step: only the ranks drawn for it."""
    found = getattr(model, KEY)
    found.narrow(found.drawn(step))


def widen(model: torch.nn.Module, step: int, steps: int) -> None:
    """After it: all of them."""
    found = getattr(model, KEY)
    found.widen(found.drawn(step))


def ranks(model: torch.nn.Module) -> list[int]:
    """The ranks to judge: powers of two, and the highest."""
    known = getattr(model, KEY).known
    wanted = {1 << power for power in range(13)} | {known[0], known[-1]}
    return [rank for rank in known if rank in wanted]


@contextmanager
def at_rank(model: torch.nn.Module, rank: int) -> Iterator[None]:
    """A while in which the adapter has that rank."""
    found = getattr(model, KEY)
    found.narrow(rank)
    try:
        yield
    finally:
        found.widen(rank)
