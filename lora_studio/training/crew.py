"""The cores of a CPU shared out among the adapters of a sweep: each thread takes some of them through the model, on its part of the cores.

Small products leave most of a second core's time to waiting for the first; two adapters on two cores do not wait for each other. On a GPU,
and for a base that draws at random (torch has one generator for all threads), the caller does everything itself. A model that is small is
slower on several threads than on one, so one run alone does not take all cores for it either; how many it takes depends on the model only,
and a run that goes on gets the same bits.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch
from torch import nn

Item, Found = TypeVar("Item"), TypeVar("Found")
WORTH = 10_000_000  # parameters that keep one thread busy: models of up to 7 million were faster on one thread, of 26 million on two (tests/benchmarks/threads.py)


class Crew:
    """`hands` threads that share torch's threads evenly, each of which takes `most` at most. While it is entered, the caller has as many as
    each of them."""

    def __init__(self, hands: int, most: int | None = None):
        self.hands, self.most, self.pool = hands, most, None

    def __enter__(self) -> "Crew":
        self.threads = torch.get_num_threads()
        own = max(1, self.threads // self.hands)
        own = min(own, self.most or own)
        torch.set_num_threads(own)  # a thread's own count, but of the library of matrices every thread's
        if self.hands > 1:
            self.pool = ThreadPoolExecutor(self.hands, "adapters", torch.set_num_threads, (own,))
        return self

    def __exit__(self, *error) -> None:
        if self.pool is not None:
            self.pool.shutdown()
        torch.set_num_threads(self.threads)

    @property
    def words(self) -> str:
        """What to add to how it goes."""
        return f"; on {self.hands} threads at the same time" if self.hands > 1 else ""

    def each(self, work: Callable[[Item], Found], items: Iterable[Item]) -> list[Found]:
        """What `work` gives for each. Raises the first one's error, when all have come to their end."""
        if self.pool is None:
            return [work(item) for item in items]
        asked = [self.pool.submit(work, item) for item in items]
        wait(asked)
        return [one.result() for one in asked]


def hands(model: nn.Module, at_once: int) -> int:
    """How many threads take adapters through the model, where so many may be under way at once."""
    if next(model.parameters()).device.type != "cpu" or _draws(model):
        return 1
    return max(1, min(at_once, torch.get_num_threads()))


def worth(model: nn.Module) -> int:
    """How many threads of a CPU a pass through the model keeps busy."""
    return -(-sum(parameter.numel() for parameter in model.parameters()) // WORTH)


def settle(model: nn.Module, asked: int | None) -> None:
    """From now on torch takes no more threads than the model is worth, unless a number was asked for."""
    if asked is None and next(model.parameters()).device.type == "cpu":
        torch.set_num_threads(min(torch.get_num_threads(), worth(model)))


def _draws(model: nn.Module) -> bool:
    """Whether a pass through the model in training may draw at random: a layer of dropout, or one that a configuration asks for."""
    if any(isinstance(layer, nn.modules.dropout._DropoutNd) and layer.p > 0 for layer in model.modules()):
        return True
    configs = [layer.__dict__["config"] for layer in model.modules() if hasattr(layer.__dict__.get("config"), "to_dict")]
    return any(_asks(config.to_dict()) for config in {id(config): config for config in configs}.values())


def _asks(tree: dict) -> bool:
    return any(
        _asks(value) if isinstance(value, dict) else ("drop" in str(name) and isinstance(value, float) and value > 0)
        for name, value in tree.items()
    )
