"""Resizing and merging on the bench: adapters read, put together or cut down, written, and their true loss measured on what was written."""

from math import sqrt
from pathlib import Path

import torch

from lora_studio import adapters, blend, merging, ranks
from lora_studio.checkpoints.whole import Whole
from lora_studio.errors import BenchError, BlendError
from lora_studio.inference.blends import Part, one_thread, parents_of, put, stamped
from lora_studio.inference.requests import argument
from lora_studio.weights import Weight, in_words, of, times

FACTORS = ("slerp", "subtract", "orthogonal", "knots")
HOW = (*FACTORS, *merging.METHODS)
# What each way obeys beside the weights and a rank; anything else would have no effect there, and is an error.
OBEYS = {
    "slerp": (), "subtract": (), "orthogonal": ("space",), "knots": ("density",), "magnitude": ("density",), "ties": ("density",),
    "dare": ("density", "seed"), "della": ("density", "seed", "epsilon"), "breadcrumbs": ("density", "gamma"),
}  # fmt: skip
RESIZES = ("rank", "loss", "size")
SETTINGS = ("density", "seed", "gamma", "epsilon", "space")


@one_thread()
def resize(reader, job, request: dict) -> tuple[str, dict]:
    """One adapter at other ranks: `rank` for all layers, the `loss` that is allowed (of the whole, or with `per_layer` of each layer), or
    the `size` of the weights in bytes. Each layer keeps its own rank in the file."""
    asked = [name for name in RESIZES if request.get(name) is not None]
    if len(asked) != 1 or (request.get("per_layer") and asked != ["loss"]) or (request.get("slice") and asked != ["rank"]):
        raise BlendError("resize.how")
    target = _target(request)
    parts = reader.parts(job, [[argument(request, "path", str), 1.0]], least=1)
    meant = {name: module.cast(torch.float64) for name, module in parts[0].adapter.modules.items()}
    job.doing = "choosing the ranks"
    if request.get("slice") and not parts[0].adapter.card.nested:
        raise BlendError("resize.slice", name=parts[0].name)
    small = _resized(meant, request, asked[0])
    job.check()
    if {name: module.rank for name, module in small.items()} == {name: module.rank for name, module in meant.items()}:
        raise BlendError("resize.same", name=parts[0].name, rank=max(module.rank for module in meant.values()))
    asked_for = {name: request[name] for name in (*RESIZES, "per_layer", "slice") if request.get(name) is not None}
    told = _written(job, target, parts, small, meant, how={"made": "resize", **asked_for}, even=False)
    rank = request.get("rank")
    clamped = sum(module.rank < rank for module in small.values()) if rank else 0
    found = sorted(module.rank for module in small.values())
    return "result", {**told, "ranks": [found[0], found[-1]], "clamped": clamped, "left_out": sorted(meant.keys() - small.keys())}


def _resized(meant: blend.Modules, request: dict, asked: str) -> blend.Modules:
    """The compressed updates. Raises BlendError."""
    if request.get("slice"):
        small = ranks.sliced(meant, request["rank"])
    elif asked == "rank":
        small = blend.compress(meant, request["rank"])[0]
    elif asked == "loss":
        chosen = ranks.per_layer(meant, request["loss"]) if request.get("per_layer") else ranks.shared(meant, request["loss"])
        small = ranks.resize(meant, chosen)[0]
    else:
        size = request["size"]
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise BlendError("resize.size", size=repr(size)[:40])
        named = 512 + sum(2 * len(name) + 260 for name in meant)  # the header names both tensors of a layer
        if size <= named:
            raise BlendError("ranks.size", size=size, least=named)
        small = ranks.resize(meant, ranks.within(meant, size - named))[0]
    if not small:
        raise BlendError("resize.nothing")
    return small


@one_thread()
def merge(reader, job, request: dict) -> tuple[str, dict]:
    """Adapters put together in another way than the sum. What has full rank is approximated at `rank`; the loss is against the merge."""
    how, settings = how_of(request)
    rank = request.get("rank")
    if rank is None and how not in FACTORS:
        raise BlendError("merge.rank", how=how)
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise BlendError("blend.rank", rank=repr(rank)[:40])
    target = _target(request)
    parts = reader.parts(job, request.get("parts"), least=2)
    job.doing, recipe = f"merging by {how}", {"made": "merge", "how": how, "rank": rank, **settings}
    if how in FACTORS:
        meant = _in_factors(how, [part.adapter.modules for part in parts], [part.weight for part in parts], settings)
        small = meant if rank is None else blend.compress(meant, rank)[0]
        return "result", _written(job, target, parts, small, meant, how=recipe)
    small, known = _approximated(job, parts, merging.Recipe(how, **settings), rank)
    told = _written(job, target, parts, small, small, how=recipe)
    return "result", {**told, **known}


def how_of(request: dict) -> tuple[str, dict]:
    """The way of a merge and what it obeys. Raises BlendError."""
    how = request.get("how")
    if how not in HOW:
        raise BlendError("merge.method", method=str(how)[:40], known=", ".join(HOW))
    settings = {name: request[name] for name in SETTINGS if request.get(name) is not None}
    idle = next((name for name in settings if name not in OBEYS[how]), None)
    if idle:
        raise BlendError("merge.idle", name=idle, how=how)
    return how, settings


def merged(parts: list[Part], how: str, settings: dict) -> dict:
    """The updates that adapters make together, by layer, uncompressed: as factors, or of full rank as baking takes them."""
    found, weights = [part.adapter.modules for part in parts], [part.weight for part in parts]
    if how in FACTORS:
        return _in_factors(how, found, weights, settings)
    return {name: Whole(one) for name, one in merging.entrywise(found, weights, merging.Recipe(how, **settings)).items()}


def _in_factors(how: str, found: list[blend.Modules], weights: list[Weight], settings: dict) -> blend.Modules:
    """The ways whose result is an adapter without loss, in fp64. Raises BlendError."""
    found = [{name: module.cast(torch.float64) for name, module in modules.items()} for modules in found]
    if how == "subtract":
        return blend.stack(found, [weights[0], *(times(weight, -1.0) for weight in weights[1:])])
    if how == "knots":
        return merging.knots(found, weights, **settings)
    if len(found) != 2:
        raise BlendError("merge.two", how=how, count=len(found))
    if how == "orthogonal":
        if weights[1] != 1.0:
            raise BlendError("merge.other_weight", weight=in_words(weights[1]))
        return blend.stack([merging.orthogonal(*found, **settings)], weights[:1])
    places = {}
    for name in dict.fromkeys(name for modules in found for name in modules):
        left, right = (of(weight, name) for weight in weights)
        if min(left, right) < 0 or not left + right:
            raise BlendError("merge.slerp_weights", left=left, right=right)
        places[name] = right / (left + right)
    return merging.slerp(*found, places)


def _approximated(job, parts: list[Part], recipe: merging.Recipe, rank: int) -> tuple[blend.Modules, dict]:
    """The nearest adapter of a rank to a merge entry by entry, and its true loss: the merge's own norm follows from the
    approximation's, which is an orthogonal projection of it."""
    merged = merging.entrywise([part.adapter.modules for part in parts], [part.weight for part in parts], recipe)
    small, losses, apart, whole = {}, {}, 0.0, 0.0
    for number, (name, one) in enumerate(merged.items()):
        job.check()
        job.doing = f"merging by {recipe.method}, layer {number + 1} of {len(merged)}"
        small[name], losses[name] = merging.approximate(one, rank, seed=recipe.seed)
        square = blend.norm(small[name]) ** 2 / max(1e-30, 1 - losses[name] ** 2)
        apart, whole = apart + losses[name] ** 2 * square, whole + square
    return small, {"loss": sqrt(apart / whole) if whole else 0.0, "layers": losses}


def _target(request: dict) -> Path:
    target = Path(argument(request, "target", str))
    if target.exists():
        raise BenchError("bench.target", path=target)
    return target


def _written(job, target: Path, parts: list[Part], modules: blend.Modules, meant: blend.Modules, *, how: dict, even: bool = True) -> dict:
    """Write the folder, and measure the loss of its very bytes against what was meant."""
    job.check()
    files = adapters.write(adapters.with_modules(parts[0].adapter.card, modules), even=even)
    job.doing = "measuring the loss"
    got = {name: module.cast(torch.float64) for name, module in adapters.read(files).modules.items()}
    loss = blend.difference(got, {name: module.cast(torch.float64) for name, module in meant.items()})
    job.check()
    parents = parents_of(parts)
    files = stamped(files, {**how, "loss": loss.overall}, parents)
    put(target, files)
    rank, size = max(module.rank for module in got.values()), len(files[adapters.WEIGHTS])
    return {"loss": loss.overall, "layers": loss.layers, "rank": rank, "bytes": size, "parents": parents}
