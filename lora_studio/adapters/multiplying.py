"""PEFT's methods that multiply a weight instead of adding to it, known from their headers: OFT and IA3. Nothing is summed with them.

    OFT  W0·R, R of square blocks (I - Q)(I + Q)⁻¹ with Q = -Qᵀ, of which the file has the upper triangle    Qiu et al. 2023, arXiv 2306.07280
    IA3  diag(l)·W0 (the bias too)                                                                             Liu et al. 2022, arXiv 2205.05638

Their tensors say one side of a layer only, so the studio's own files say both in their header, where PEFT looks at nothing.
"""

import json

from lora_studio.adapters import config as configs
from lora_studio.adapters.card import Layer
from lora_studio.adapters.dialects import PREFIX
from lora_studio.adapters.files import FLOATS, Header, shown
from lora_studio.errors import AdapterError

METHODS = {"OFT": "oft", "IA3": "ia3"}
ENDS = {"oft": ".oft_R.weight", "ia3": ".ia3_l"}
SHAPES = "shapes"  # of the header's metadata: {layer: [out, in]} as JSON


def layers(label: str, header: Header, config: configs.PeftConfig) -> dict[str, Layer]:
    """The layers of a file by one of these methods; their rank is 0, because there is no update of low rank. Raises AdapterError naming the
    first tensor that does not belong to one, or fit."""
    method = METHODS[config.peft_type]
    try:
        known = {name: (int(out), int(width)) for name, (out, width) in json.loads(header.metadata[SHAPES]).items()}
    except (KeyError, ValueError, TypeError, AttributeError):
        raise AdapterError("adapter.native_width", path=label, method=method) from None
    found = {}
    for name, entry in header.tensors.items():
        layer = name.removeprefix(PREFIX).removesuffix(ENDS[method])
        if not name.endswith(ENDS[method]) or entry.dtype not in FLOATS or len(entry.shape) != 2 or layer not in known:
            raise AdapterError("adapter.native_part", path=label, method=method, name=shown(name))
        if not _fits(method, entry.shape, known[layer]):
            raise AdapterError("adapter.native_shapes", path=label, method=method, name=shown(layer))
        found[layer] = Layer("linear", known[layer], 0, None, None)
    if not found:
        raise AdapterError("adapter.native_part", path=label, method=method, name="nothing")
    return found


def _fits(method: str, shape: tuple[int, ...], layer: tuple[int, int]) -> bool:
    """Whether a tensor is one of a layer (out, in)."""
    if method == "ia3":
        return shape == (layer[0], 1)
    blocks, entries = shape
    size = layer[1] // blocks if blocks > 0 else 0
    return blocks * size == layer[1] and entries == size * (size - 1) // 2
