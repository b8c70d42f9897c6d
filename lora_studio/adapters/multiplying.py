"""PEFT's methods that multiply a weight instead of adding to it, known from their headers and read: OFT and IA3.

    OFT  W0·Rᵀ, R of square blocks made of a skew Q, of which the file has the upper triangle              Qiu et al. 2023, arXiv 2306.07280
    IA3  diag(l)·W0 (the bias too), l (out, 1); of feedforward layers W0·diag(l), l (1, in)              Liu et al. 2022, arXiv 2205.05638

Their tensors say one side of a layer only, so the studio's own files say both in their header, where PEFT looks at nothing.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lora_studio.adapters import config as configs
from lora_studio.adapters.card import Card, Layer
from lora_studio.adapters.dialects import PREFIX
from lora_studio.adapters.files import FLOATS, Header, shown
from lora_studio.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_studio.multiplied import Multiplied

METHODS = {"OFT": "oft", "IA3": "ia3"}
ENDS = {"oft": ".oft_R.weight", "ia3": ".ia3_l"}
SHAPES = "shapes"  # of the header's metadata: {layer: [out, in]} as JSON


def layers(label: str, header: Header, config: configs.PeftConfig) -> dict[str, Layer]:
    """The layers of a file by one of these methods; their rank is 0, because there is no update of low rank. Raises AdapterError naming the
    first tensor that does not belong to one, or fit."""
    method = METHODS[config.peft_type]
    if method == "oft" and config.is_old_oft:
        raise AdapterError("adapter.old_oft", path=label)
    try:
        known = {name: (int(out), int(width)) for name, (out, width) in json.loads(header.metadata[SHAPES]).items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise AdapterError("adapter.native_width", path=label, method=method) from None
    found = {}
    for name, entry in header.tensors.items():
        layer = name.removeprefix(PREFIX).removesuffix(ENDS[method])
        if not name.endswith(ENDS[method]) or entry.dtype not in FLOATS or len(entry.shape) != 2 or layer not in known:
            raise AdapterError("adapter.native_part", path=label, method=method, name=shown(name))
        if not _fits(method, entry.shape, known[layer], config):
            raise AdapterError("adapter.native_shapes", path=label, method=method, name=shown(layer))
        found[layer] = Layer("linear", known[layer], 0, None, None)
    if not found:
        raise AdapterError("adapter.native_part", path=label, method=method, name="nothing")
    return found


def _fits(method: str, shape: tuple[int, ...], layer: tuple[int, int], config: configs.PeftConfig) -> bool:
    """Whether a tensor is one of a layer (out, in)."""
    if method == "ia3":
        return shape in ((layer[0], 1), (1, layer[1]))
    blocks, entries = shape
    if config.block_share:
        size = round((1 + (1 + 8 * entries) ** 0.5) / 2)
        return blocks == 1 and size * (size - 1) == 2 * entries and layer[1] % size == 0
    size = layer[1] // blocks if blocks > 0 else 0
    return blocks * size == layer[1] and entries == size * (size - 1) // 2


def modules(label: str, card: Card, tensors: dict[str, Tensor]) -> dict[str, Multiplied]:
    """The updates of a file by the name of the layer. Raises AdapterError naming the first that cannot be computed."""
    from lora_studio import multiplied

    config, _ = configs.read(None, card.config)
    found = {}
    for name, layer in card.layers.items():
        tensor = tensors[f"{PREFIX}{name}{ENDS[card.method]}"]
        wide = tensor.double() if tensor.element_size() > 4 else tensor.float()
        if card.method == "ia3":
            found[name] = multiplied.Scaled(wide.flatten() - 1, layer.shape, wide.shape == (layer.shape[0], 1))
            continue
        if not bool(wide.isfinite().all()):  # whoever reads names it; no system of equations is solved with it
            continue
        terms = config.num_cayley_neumann_terms if config.use_cayley_neumann else None
        moves = multiplied.rotation(wide, terms=terms, bound=config.eps if config.coft else None)
        if not bool(moves.isfinite().all()):
            raise AdapterError("adapter.no_rotation", path=label, name=shown(name))
        found[name] = multiplied.Rotated(moves, layer.shape)
    return found
