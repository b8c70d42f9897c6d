"""Starts that look before the first step: EVA, CorDA and LoRA-GA at what the run's own rows do to each layer, LoftQ at what 4 bits lose of it.

    EVA      A = the leading directions of the layer's inputs, B = 0                            Paischer et al. 2024, arXiv 2410.07170
    CorDA    the leading part of W·C, C being the inputs' second moments, mapped back by C⁻¹   Yang et al. 2024, arXiv 2406.05223
    LoRA-GA  A and B from the singular vectors of the weight's gradient                        Wang et al. 2024, arXiv 2407.05000
    LoftQ    the leading part of W - Q, Q being W in 4 bits (one round)                        Li et al. 2023, arXiv 2310.08659

CorDA and LoRA-GA take what they start with out of the base, as PiSSA does (residual.py). What was found is kept in the run's folder, so
that a run which goes on starts from the very same numbers.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from lora_studio import bases, durable
from lora_studio.checkpoints.plan import header_of, weights_of
from lora_studio.errors import MachineError, TrainingError
from lora_studio.memory import PORTION
from lora_studio.spec import TrainSpec, methods, to_tree
from lora_studio.training import loop, order, residual, starts

KINDS = ("eva", "corda", "lora_ga", "loftq")
FILE = "start.safetensors"
ROWS = 256
GAMMA = 16  # LoRA-GA's stable scale, as PEFT has it


def begin(model: torch.nn.Module, task, spec: TrainSpec, folder: Path, world=None) -> None:
    """Put the first factors into a fresh adapter: those kept in the run's folder, or new ones, which are kept there first. Of several processes
    one looks. Raises TrainingError naming the layer that is too small for the rank, MachineError where the memory does not do."""
    if getattr(spec.method, "init", "") not in KINDS:
        return
    path, same = folder / FILE, str(order.key(to_tree(spec)["method"], spec.compute.seed, sorted(task.prints.items()), _count(task, spec)))
    if (world is None or world.is_main_process) and not _is_kept(path, same):
        factors = {f"{name}.{part}": value.cpu().contiguous() for name, pair in _found(model, task, spec).items() for part, value in zip("AB", pair)}
        durable.write(path, save(factors, {"of": same}))
    if world is not None:
        world.wait_for_everyone()
    _put(model, spec, load(path.read_bytes()))


def _is_kept(path: Path, same: str) -> bool:
    """Whether a file is there, whole, and of this very start."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("of") == same
    except (OSError, SafetensorError):
        return False


def _layers(model: torch.nn.Module) -> dict[str, LoraLayer]:
    """The adapted linear layers by name; others (convolutions, embeddings) start as ever."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer) and _dense(layer) is not None}


def _dense(layer: LoraLayer) -> Tensor | None:
    """A layer's weight (out, in) in fp32, of a quantised one its shape alone; None where it is no linear layer."""
    weight = getattr(layer.get_base_layer(), "weight", None)
    if "default" not in layer.lora_A or layer.lora_A["default"].weight.ndim != 2 or weight is None:
        return None
    if not weight.is_floating_point() or weight.ndim != 2:
        return torch.empty(layer.out_features, layer.in_features, device="meta")
    return (weight.T if layer.fan_in_fan_out else weight).detach()


@torch.no_grad()
def _put(model: torch.nn.Module, spec: TrainSpec, factors: dict[str, Tensor]) -> None:
    """Put factors in, and take them out of the base where they do not start from nothing."""
    scale, init = methods.strength(spec.method), spec.method.init
    for name, layer in _layers(model).items():
        if f"{name}.A" not in factors:
            continue
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        A.copy_(factors[f"{name}.A"])
        B.copy_(factors[f"{name}.B"])
        if init in ("corda", "lora_ga"):
            weight, taken = layer.get_base_layer().weight, scale * (B.float() @ A.float())
            weight.copy_(weight.float() - (taken.T if layer.fan_in_fan_out else taken))
    if residual.is_one(spec):
        residual.remember(model)


def _found(model: torch.nn.Module, task, spec: TrainSpec) -> dict[str, tuple[Tensor, Tensor]]:
    """A (r, in) and B (out, r) of every layer."""
    layers, init, rank = _layers(model), spec.method.init, spec.method.rank
    for name, layer in layers.items():
        most = methods.directions(spec.method, layer.out_features, layer.in_features)
        if rank > most:
            raise TrainingError("training.start_small", init=init, name=starts.layer_of(name), most=most, rank=rank)
    model.eval()
    try:
        if init == "loftq":
            return {name: _rounding(layer, spec, weight) for (name, layer), weight in zip(layers.items(), _originals(layers, spec))}
        made = {}
        for portion in _portions(layers, init):
            made |= FROM_ROWS[init](model, task, spec, portion)
        return made
    except RuntimeError as error:
        if not loop.is_out_of_memory(error):
            raise
        advice = f"method.init {init} looks at whole rows first; choose another, or shorten the rows."
        raise MachineError("machine.memory", device=loop.device_of(model), step=0, advice=advice) from error


def _portions(layers: dict[str, LoraLayer], init: str) -> Iterator[dict[str, LoraLayer]]:
    """The layers in portions of which one pass over the rows collects no more than PORTION bytes (or of one layer)."""
    portion, size = {}, 0
    for name, layer in layers.items():
        own = 4 * layer.in_features * (layer.out_features if init == "lora_ga" else layer.in_features)
        if portion and size + own > PORTION:
            yield portion
            portion, size = {}, 0
        portion[name], size = layer, size + own
    yield portion


def _rows(task, spec: TrainSpec) -> Iterator:
    """The first rows of the run, one at a time, so that there is no padding to look at."""
    stream = order.Stream(order.Plan(task.counts, task.weights, 1, 1, spec.compute.seed))
    for number in range(_count(task, spec)):
        torch.manual_seed(order.key(spec.compute.seed, "first look", number))
        yield task.collate(stream.step(number)[0])


def _count(task, spec: TrainSpec) -> int:
    """How many rows are looked at: ROWS, or all that the run will show."""
    plan = order.Plan(task.counts, task.weights, spec.schedule.batch_size, spec.schedule.accumulate, spec.compute.seed)
    steps = spec.schedule.steps or plan.steps(spec.schedule.epochs)
    return min(ROWS, plan.epoch_size(0), steps * plan.rows_per_step)


# ---- what the rows do to a layer


@torch.no_grad()
def _collected(model, task, spec: TrainSpec, layers: dict[str, LoraLayer], add) -> dict[str, tuple]:
    """What `add(kept, inputs)` makes of the inputs (tokens, in) of each layer, row by row."""
    kept: dict[str, tuple] = {}

    def looking(name: str):
        def look(layer, given) -> None:
            kept[name] = add(kept.get(name), given[0].detach().flatten(0, -2).float())

        return look

    hooks = [layer.register_forward_pre_hook(looking(name)) for name, layer in layers.items()]
    try:
        for batch in _rows(task, spec):
            task.loss(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return kept


def _centred(kept: tuple | None, inputs: Tensor) -> tuple[int, Tensor, Tensor]:
    """Count, mean and scatter about the mean of inputs so far. Chan, Golub and LeVeque 1983: nothing is lost where the mean is large."""
    count, mean, scatter = kept or (0, torch.zeros_like(inputs[0]), torch.zeros(inputs.shape[1], inputs.shape[1], device=inputs.device))
    own = inputs.mean(0)
    rest, apart, total = inputs - own, own - mean, count + len(inputs)
    scatter = scatter + rest.T @ rest + torch.outer(apart, apart) * (count * len(inputs) / total)
    return total, mean + apart * (len(inputs) / total), scatter


def _eva(model, task, spec: TrainSpec, layers: dict[str, LoraLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    made = {}
    for name, (_, _, scatter) in _collected(model, task, spec, layers, _centred).items():
        _, _, right = leading(scatter, spec.method.rank, spec.compute.seed)
        made[name] = right, torch.zeros(layers[name].out_features, spec.method.rank)
    return made


def _moments(kept: tuple | None, inputs: Tensor) -> tuple[int, Tensor]:
    """The sum of inputsᵀ·inputs, each row's inputs divided by their largest number, and of how many rows, as the authors take it."""
    count, total = kept or (0, 0.0)
    inputs = inputs / inputs.max().abs().clamp_min(1e-12)
    return count + 1, total + inputs.T @ inputs


def _corda(model, task, spec: TrainSpec, layers: dict[str, LoraLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """In the authors' instruction-previewed mode: what matters most for these rows is what learns."""
    made = {}
    for name, (count, total) in _collected(model, task, spec, layers, _moments).items():
        moments, inverse = _invertible(total / count)
        left, values, right = leading(_dense(layers[name]).float() @ moments, spec.method.rank, spec.compute.seed)
        root = (values / methods.strength(spec.method)).sqrt()
        made[name] = root[:, None] * (right @ inverse), left * root
    return made


def _invertible(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Second moments with as much added to their diagonal as it takes to invert them, and the inverse."""
    damp, one = 0.01, torch.eye(len(moments), device=moments.device)
    while True:
        fixed = moments + one * (moments.diagonal().mean().clamp_min(1e-12) * damp)
        inverse = torch.linalg.inv(fixed)
        if torch.dist(fixed @ inverse, one) < 0.05:
            return fixed, inverse
        damp *= 2


def _lora_ga(model, task, spec: TrainSpec, layers: dict[str, LoraLayer]) -> dict[str, tuple[Tensor, Tensor]]:
    """As PEFT has it (ArB2r, stable): A the first r right singular vectors of the gradient G of the mean loss, B the next r left ones times
    their singular values and out^(1/4) / √γ."""
    made, rank = {}, spec.method.rank
    for name, gradient in _gradients(model, task, spec, layers).items():
        left, values, right = leading(gradient, 2 * rank, spec.compute.seed, looked=4 * rank)
        made[name] = right[:rank], left[:, rank:] * (values[rank:] * len(gradient) ** 0.25 / GAMMA**0.5)
    return made


def _gradients(model, task, spec: TrainSpec, layers: dict[str, LoraLayer]) -> dict[str, Tensor]:
    """The gradient (out, in) of the mean loss in each layer's weight."""
    weights = [layer.get_base_layer().weight.requires_grad_(True) for layer in layers.values()]
    sums, units = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for weight in weights], 0.0
    try:
        for batch in _rows(task, spec):
            units += task.units(batch)
            for total, own in zip(sums, torch.autograd.grad(task.loss(model, batch), weights, allow_unused=True)):
                if own is not None:
                    total += own
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return {name: (total.T if layer.fan_in_fan_out else total) / max(units, 1.0) for (name, layer), total in zip(layers.items(), sums) if bool(total.any())}


FROM_ROWS = {"eva": _eva, "corda": _corda, "lora_ga": _lora_ga}


# ---- what 4 bits lose of a layer


def _originals(layers: dict[str, LoraLayer], spec: TrainSpec) -> Iterator[Tensor]:
    """The weight of each layer as the base's files have it. Raises TrainingError where they have it under another name, or packed."""
    folder = bases.weights_folder(bases.fetch(spec.base))
    files = {name: folder / path for path in weights_of(folder, folder) for name in header_of(folder, path)[0].tensors}
    for name, layer in layers.items():
        own = f"{starts.layer_of(name)}.weight"
        key = own if own in files else own.partition(".")[2]
        if key not in files:
            raise TrainingError("training.start_packed", id=spec.base.id, name=own)
        with safe_open(files[key], "pt") as file:
            weight = file.get_tensor(key)
        if tuple(weight.shape) != (layer.out_features, layer.in_features):
            raise TrainingError("training.start_packed", id=spec.base.id, name=own)
        yield weight


def _rounding(layer: LoraLayer, spec: TrainSpec, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The leading part of what its 4 bits lose of a weight."""
    from bitsandbytes.functional import dequantize_4bit

    packed = layer.get_base_layer().weight
    kept = dequantize_4bit(packed.data, packed.quant_state).float()
    left, values, right = leading(weight.to(kept) - kept, spec.method.rank, spec.compute.seed)
    root = (values / methods.strength(spec.method)).sqrt()
    return root[:, None] * right, left * root


def leading(matrix: Tensor, count: int, seed: int, looked: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular vectors and values of a matrix (out, in): U (out, count), S, Vᵀ (count, in). A randomised SVD over 4·count directions
    (or `looked`), exact where these are all. Halko, Martinsson and Tropp 2011, arXiv 0909.4061."""
    torch.manual_seed(order.key(seed, "leading"))
    left, values, right = torch.svd_lowrank(matrix, q=min(looked or 4 * count, *matrix.shape), niter=4)
    return left[:, :count], values[:count], right[:, :count].T
