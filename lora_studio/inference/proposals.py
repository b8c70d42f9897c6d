"""Which weights a search tries: the simple ones first, then what CMA-ES proposes (Hansen and Ostermeier 2001; the pycma package)."""

import warnings
from collections.abc import Generator
from math import isfinite

import numpy

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it cannot draw without matplotlib
    import cma

WORST = 1e30  # what a loss that is no number counts as
DECIMALS = 4  # a weight can be typed as it was tried


def starts(count: int) -> dict[tuple[float, ...], str]:
    """The weights that anybody would try first, and what they are: the base alone, each adapter alone, all as they are, all in equal parts."""
    found = {(0.0,) * count: "base"}
    for number in range(count):
        found.setdefault(tuple(float(number == other) for other in range(count)), "alone")
    found.setdefault((1.0,) * count, "all")
    found.setdefault((round(1 / count, DECIMALS),) * count, "equal")
    return found


def proposals(count: int, *, low: float, high: float, seed: int) -> Generator[tuple[str, tuple[float, ...]], float, None]:
    """What to try next, and what it is (base, alone, all, equal, search); its loss is sent back. The same losses and seed give the same
    proposals, whatever else draws random numbers. Ends when another step would change next to nothing."""
    losses: dict[tuple[float, ...], float] = {}
    for weights, what in starts(count).items():
        losses[weights] = _finite((yield what, weights))
    best, draw = min(losses, key=losses.get), numpy.random.default_rng(seed)
    # pycma has no search along a line: a second number goes with a single one and moves nothing.
    begin = [*best, *[(low + high) / 2] * (count == 1)]
    options = {
        "bounds": [low, high], "randn": lambda *shape: draw.standard_normal(shape), "seed": numpy.nan, "tolx": 10**-DECIMALS, "tolfun": 1e-7,
        "verbose": -10, "verb_log": 0,
    }  # fmt: skip
    strategy = cma.CMAEvolutionStrategy(begin, 0.2 * (high - low), options)
    while not strategy.stop():
        asked, found = strategy.ask(), []
        for point in asked:
            weights = tuple(round(float(value), DECIMALS) + 0.0 for value in point[:count])
            found.append(losses[weights] if weights in losses else _finite((yield "search", weights)))
            losses[weights] = found[-1]
        strategy.tell(asked, found)


def _finite(loss: float) -> float:
    return loss if isfinite(loss) else WORST
