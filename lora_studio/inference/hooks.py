"""Weighted adapters on the layers of a model: `W0·x + Σ w_t·ΔW_t·x`, with other weights for every forward pass. ΔW·x is `s·B·(A·x)`, and
of a DoRA what dora.py says, of OFT and IA3 what multiplied.py says. A weight is a number, or numbers by layer pattern (weights.py).

The adapters hang on the base's layers as hooks and are never merged into it. A hook computes in the dtype of its factors (fp32 or
wider; what needs the base's own product once more takes it in the base's), adds to the layer's output and rounds once; with nothing
active it returns the output untouched, so that a bare answer is the base's own, bit for bit. The active weights are set around each
forward pass and taken away after it, so several answers with different weights can be given in turns.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lora_studio.adapters import Adapter, virtual
from lora_studio.dora import Dora
from lora_studio.errors import AdapterError
from lora_studio.inference.mixtures import Mixtures, Slot
from lora_studio.lowrank import LowRank
from lora_studio.multiplied import Multiplied
from lora_studio.weights import Weight, acts, by_layer

PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
Update = LowRank | Dora | Multiplied
Active = tuple[tuple[str, float | dict[str, float]], ...]  # adapters that are on: a number, or one for each layer by its name


class Hooks:
    """Any number of adapters on the layers of one model. Not safe for several threads at once."""

    def __init__(self, model: torch.nn.Module, base: str, device: torch.device):
        self.id, self.device = base, device
        self.layers = dict(model.named_modules())
        self.names: dict[str, tuple[str, ...]] = {}
        self.active: Active = ()
        self._parts: dict[torch.nn.Module, dict[str, _Part | _Turn]] = {}
        self._mixtures = Mixtures(model, lambda: [(id, weight.__getitem__ if isinstance(weight, dict) else lambda name, weight=weight: weight) for id, weight in self.active])

    @property
    def ids(self) -> set[str]:
        """The adapters that hang on the layers."""
        return set(self.names)

    def hang(self, id: str, adapter: Adapter, *, label: str) -> None:
        """Hang an adapter on the model, as its kind goes. Raises AdapterError, and then nothing was hung."""
        if adapter.card.method in virtual.WORDS:
            raise AdapterError("adapter.virtual_image", path=label, base=self.id)
        self.put(id, adapter.modules, label=label)

    def put(self, id: str, modules: dict[str, Update], *, label: str = "The adapter") -> None:
        """Hang an adapter on the layers; it has no weight yet. Raises AdapterError, and then nothing was hung."""
        experts = {name: (slot, module) for name, module in modules.items() if (slot := self.expert_of(name, module)) is not None}
        places = {name: self.layer_of(name) for name in modules if name not in experts}
        strangers = [name for name, layer in places.items() if layer is None]
        count, base = len(strangers), self.id
        if strangers and count == len(modules):
            raise AdapterError("adapter.fits_nothing", path=label, count=count, base=base, name=strangers[0], own="another base")
        if strangers:
            raise AdapterError("adapter.unknown_layers", path=label, count=count, total=len(modules), base=base, name=strangers[0])
        for name, layer in places.items():
            self._check(label, name, modules[name], layer)
        made = {name: self._part(label, name, modules[name], layer) for name, layer in places.items()}
        self.take(id)
        self.names[id] = tuple(modules)
        for name, part in made.items():
            layer = places[name]
            if layer not in self._parts:
                self._parts[layer] = {}
                layer.register_forward_hook(self._hook(self._parts[layer]))
            self._parts[layer][id] = part
        self._mixtures.put(id, experts, self.device)

    def take(self, id: str) -> None:
        """Take an adapter off the layers."""
        self.names.pop(id, None)
        for parts in self._parts.values():
            parts.pop(id, None)
        self._mixtures.take(id)

    def layer_of(self, name: str) -> torch.nn.Module | None:
        """The layer an adapter means; checkpoints and models may differ in the first words of a name."""
        if name in self.layers:
            return self.layers[name]
        words = name.split(".")
        for cut in (1, 2):
            end = ".".join(words[cut:])
            found = [known for known in self.layers if end and (known == end or known.endswith("." + end))]
            if len(found) == 1:
                return self.layers[found[0]]
        return None

    def expert_of(self, name: str, module: Update) -> Slot | None:
        """Where the expert is that a layer means, if it means one that the model keeps in a stack."""
        return self._mixtures.find(name, module)

    def _check(self, label: str, name: str, module: Update, layer: torch.nn.Module) -> None:
        kind = type(layer)
        if isinstance(layer, torch.nn.Linear | Conv1D) and module.kind == "linear":
            there = (layer.out_features, layer.in_features) if isinstance(layer, torch.nn.Linear) else (layer.nf, layer.nx)
        elif (isinstance(layer, torch.nn.Conv2d) and module.kind == "conv" and layer.groups == 1) or (kind is torch.nn.Embedding and module.kind == "embedding"):
            there = tuple(layer.weight.shape)
        else:
            raise AdapterError("bench.layer", path=label, name=name, here=module.kind, there=kind.__name__)
        if module.shape != there:
            raise AdapterError(
                "adapter.other_shapes", path=label, name=name, here=list(module.shape), there=list(there), base=self.id, count=1, own="another base"
            )

    def _part(self, label: str, name: str, module: Update, layer: torch.nn.Module) -> "_Part | _Turn":
        """An update as the layer's hook takes it, on the device. Raises AdapterError where a DoRA cannot be computed."""
        dtype, shift = module.dtype, None
        if isinstance(module, Multiplied):
            return _Turn(module.to(self.device, dtype), name)
        if isinstance(module, Dora):
            module = module.to(self.device, dtype)
            gains = module.gains_on(_plain_weight(label, name, module, layer, self.id))
            if not bool(gains.isfinite().all()):
                raise AdapterError("adapter.no_direction", path=label, name=name)
            module, shift = module.weighed(gains), (gains - 1).view(-1, *[1] * (len(module.shape) - 2))
        A = module.A.T if module.kind == "embedding" else module.A
        A, B = (tensor.to(self.device, dtype).contiguous() for tensor in (A, module.B))
        return _Part(A, B, module.scale, module.kind, name, shift)

    def _hook(self, parts: dict[str, "_Part | _Turn"]):
        def add(layer, given, output):
            update = None
            for id, weight in self.active:
                part = parts.get(id)
                if part is not None and isinstance(weight, dict):
                    weight = weight[part.name]
                if part is not None and weight:
                    found = part.update(layer, given[0], output, weight)
                    update = found if update is None else update + found
            return None if update is None else (output + update).to(output.dtype)

        return add

    def resolve(self, weights: dict[str, Weight]) -> Active:
        """What `on` takes: patterns looked up once, what has no weight left out. Raises BlendError."""
        found = {id: by_layer(weight, self.names.get(id, ())) for id, weight in weights.items()}
        missing = set(weights) - self.ids
        if missing:
            raise KeyError(f"not on the shelf: {sorted(missing)}")
        return tuple((id, found[id] if isinstance(weight, dict) else weight) for id, weight in weights.items() if acts(weight))

    def using(self, weights: dict[str, Weight]):
        """Give adapters their weights for a while. What is not named has none. Raises BlendError."""
        return self.on(self.resolve(weights))

    @contextmanager
    def on(self, active: Active) -> Iterator[None]:
        """Give adapters the weights that were resolved, for a while."""
        before, self.active = self.active, active
        try:
            yield
        finally:
            self.active = before


@dataclass(frozen=True)
class _Part:
    """One adapter on one layer, on the device. An embedding's A is kept as a table, (vocabulary, r); `name` is the adapter's for the layer.
    `shift` is g - 1 of a DoRA, whose B has g in it already: (out,), or (out, 1, 1) of a convolution."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float
    kind: str
    name: str
    shift: torch.Tensor | None = None

    def update(self, layer: torch.nn.Module, given: torch.Tensor, output: torch.Tensor, weight: float) -> torch.Tensor:
        """`weight · ΔW · x`; `output` is the layer's own, `W0·x` and its bias."""
        product = self._product(layer, given, weight)
        if self.shift is None:
            return product
        bias = getattr(layer, "bias", None)
        bare = output.to(product.dtype)
        bare = bare if bias is None else bare - bias.view(self.shift.shape)
        return torch.addcmul(product, bare, self.shift, value=weight)

    def _product(self, layer: torch.nn.Module, given: torch.Tensor, weight: float) -> torch.Tensor:
        """`weight · scale · B · A · x`; the factor goes to the narrowest place. A convolution's A steps as the layer does, its B is 1×1."""
        if self.kind == "conv":
            how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
            return functional.conv2d(functional.conv2d(given.to(self.A.dtype), self.A, **how) * (weight * self.scale), self.B)
        inner = functional.embedding(given, self.A) if self.kind == "embedding" else functional.linear(given.to(self.A.dtype), self.A)
        return functional.linear(inner * (weight * self.scale), self.B)


@dataclass(frozen=True)
class _Turn:
    """One OFT or IA3 adapter on one layer, on the device; `name` is the adapter's for the layer."""

    module: Multiplied
    name: str

    def update(self, layer: torch.nn.Module, given: torch.Tensor, output: torch.Tensor, weight: float) -> torch.Tensor:
        """`weight · (ΔW · x + Δb)`; `output` is the layer's own. A layer whose numbers are packed is asked what it makes of the moved input."""
        dtype = self.module.dtype
        if self.module.of_outputs:
            return self.module.moved(output.to(dtype)) * weight
        moved = self.module.moved(given.to(dtype))
        if not _is_plain(layer.weight):
            return (layer.forward((given + moved).to(given.dtype)).to(dtype) - output) * weight
        moved = (moved * weight).to(layer.weight.dtype)
        return (moved @ layer.weight if isinstance(layer, Conv1D) else functional.linear(moved, layer.weight)).to(dtype)


def _is_plain(weight) -> bool:
    """Whether a layer's numbers are there as they are: not packed, not scaled apart."""
    return isinstance(weight, torch.Tensor) and type(weight.data) is torch.Tensor and weight.dtype in PLAIN and weight.device.type != "meta"


def _plain_weight(label: str, name: str, module: Dora, layer: torch.nn.Module, base: str) -> torch.Tensor:
    """A layer's own numbers, in the shape of the update. Raises AdapterError where they are packed, scaled apart or not there."""
    weight = getattr(layer, "weight", None)
    is_plain = _is_plain(weight)
    if is_plain and isinstance(layer, Conv1D):
        weight = weight.T
    if not is_plain or tuple(weight.shape) != module.shape:
        there = f"{type(layer).__name__}, {str(getattr(weight, 'dtype', 'none')).removeprefix('torch.')}"
        raise AdapterError("bench.dora", path=label, name=name, base=base, there=there)
    return weight
