"""What an adapter costs at work: the same forward pass of the bare base, with adapters beside its layers, and merged into them, in turns."""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.pytorch_utils import Conv1D

from lora_studio import bases
from lora_studio.dora import Dora
from lora_studio.errors import BenchError
from lora_studio.inference.baking import BAKED
from lora_studio.inference.requests import argument, base_of
from lora_studio.multiplied import Multiplied
from lora_studio.weights import Weight, by_layer

TOKENS, WARM_UP, MOST, LARGEST = 64, 2, 200, 512


def measure(desk, job, request: dict) -> tuple[str, dict]:
    """Median milliseconds of `base`, `unmerged` and `merged` over `rounds`, each timed once a round, and how far the outputs are apart."""
    rounds = request.get("rounds", 15)
    if not isinstance(rounds, int) or not 1 <= rounds <= MOST:
        raise BenchError("bench.setting", name="rounds", value=repr(rounds)[:40], rule=f"it must be a whole number from 1 to {MOST}")
    rows = argument(request, "parts", list)
    image = bool(bases.inspect(base_of(request.get("base"))).pipeline)
    found = desk.prepared(job, request, {"adapter": rows}, "image" if image else "language", takes=BAKED)["adapter"]
    weights = desk.hang(found)
    modules = {part.id: part.adapter.modules for part in found}
    job.doing = "timing"
    run, of = (_picture if image else _words)(desk.shelf, job)
    swap = _merged(desk.shelf, modules, weights)
    times: dict[str, list[float]] = {"base": [], "unmerged": [], "merged": []}
    outputs = {}
    for number in range(WARM_UP + rounds):
        for name, on in (("base", {}), ("unmerged", weights), ("merged", {})):
            job.check()
            desk.room.look()
            with swap(name == "merged"):
                outputs[name], seconds = _timed(run, on, desk.device)
            if number >= WARM_UP:
                times[name].append(1000 * seconds)
    largest = outputs["unmerged"].float().abs().max().clamp_min(1e-30)
    off = float((outputs["merged"].float() - outputs["unmerged"].float()).abs().max() / largest)
    moved = float((outputs["unmerged"].float() - outputs["base"].float()).abs().max() / largest)
    return "result", {**{name: statistics.median(all) for name, all in times.items()}, "rounds": rounds, "of": of, "device": desk.device, "off": off, "moved": moved}


def _timed(run: Callable, weights: dict[str, Weight], device: str) -> tuple[torch.Tensor, float]:
    """A pass and its seconds, the device's work waited for."""
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    wait()
    began = time.perf_counter()
    found = run(weights)
    wait()
    return found, time.perf_counter() - began


def _words(shelf, job) -> tuple[Callable, str]:
    """A pass of a language model over a row of tokens; which ones they are takes no time."""
    known = shelf.model.get_input_embeddings().weight.shape[0]
    ids = [(7 * number + 3) % known for number in range(TOKENS)]
    return lambda weights: shelf.logits(ids, weights=weights), f"{TOKENS} tokens"


def _picture(easel, job) -> tuple[Callable, str]:
    """A pass of an image model's trained part, with what it is given at the first step of a picture."""
    from lora_studio.inference.draw import Brush

    part, given = easel.layers[""], []
    edge = min(bases.sample_edge(bases.inspect(easel.base)) or LARGEST, LARGEST) // 32 * 32 or 32
    hook = part.register_forward_pre_hook(lambda module, args, named: given.append((args, named)), with_kwargs=True)
    try:
        with tempfile.TemporaryDirectory() as place:
            easel.draw("a picture", Brush(steps=2, width=edge, height=edge), Path(place), weights={}, step=lambda number: job.check())
    finally:
        hook.remove()
    args, named = given[0]

    def run(weights: dict[str, Weight]) -> torch.Tensor:
        with easel.using(weights), torch.inference_mode():
            found = part(*args, **named)
        return found[0] if isinstance(found, tuple) else found.sample

    return run, f"one step at {edge} × {edge}"


def _merged(shelf, modules: dict, weights: dict[str, Weight]) -> Callable:
    """A context in which the adapters are merged into the layers' weights, or not. Afterwards the very weights are there again."""
    sums: dict[torch.nn.Parameter, torch.Tensor] = {}
    for id, known in modules.items():
        sizes = by_layer(weights[id], tuple(known)) if isinstance(weights[id], dict) else dict.fromkeys(known, weights[id])
        for name, module in known.items():
            if (slot := shelf.expert_of(name, module)) is not None:
                delta = (module.delta() * sizes[name]).to(shelf.device)
                whole = sums.setdefault(slot.stack, slot.stack.detach().to(delta.dtype, copy=True))
                whole[slot.number] += delta.T if slot.transposed else delta
                continue
            layer = shelf.layer_of(name)
            turned = isinstance(layer, Conv1D)
            if isinstance(module, Dora | Multiplied):
                own = layer.weight.detach().cpu()
                delta = module.delta(own.T if turned else own)
            else:
                delta = module.delta()
            deltas = {layer.weight: delta.T if turned else delta}
            if isinstance(module, Multiplied) and getattr(layer, "bias", None) is not None and module.of_outputs:
                deltas[layer.bias] = module.delta_of_bias(layer.bias.cpu())
            for own, delta in deltas.items():
                delta = (delta * sizes[name]).to(shelf.device)
                sums[own] = sums.get(own, own.detach().to(delta.dtype)) + delta.reshape(own.shape)
    merged = {own: total.to(own.dtype) for own, total in sums.items()}
    sums.clear()

    @contextmanager
    def swap(on: bool) -> Iterator[None]:
        before = {own: own.data for own in merged}
        try:
            for own, total in merged.items() if on else ():
                own.data = total
            yield
        finally:
            for own, data in before.items():
                own.data = data

    return swap
