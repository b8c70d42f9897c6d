"""PEFT's other additive methods as scale · B @ A, exactly: AdaLoRA, VeRA, LoHa, LoKr and MiSS.

    AdaLoRA  B (E ⊙ A), E (r, 1), scale alpha / (init_r + 1e-5), as PEFT divides                    Zhang et al. 2023, arXiv 2303.10512
    VeRA     (b ⊙ B[:out]) (d ⊙ A[:, :in]), B and A shared by all layers and kept in the file        Kopiczko et al. 2023, arXiv 2310.11454
    LoHa     (w1a w1b) ⊙ (w2a w2b), scale alpha / r;   LoKr  w1 ⊗ w2, scale alpha / r                see products.py
    MiSS     blockᵀ S, S (r, in) being the identity repeated along the row                           Kang and Yin 2024, arXiv 2409.15371

VeRA's and MiSS' tensors do not say how wide a layer is, so the studio's own files say it in their header, where PEFT looks at nothing.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_studio.adapters import config as configs
from lora_studio.adapters import lycoris
from lora_studio.adapters.card import Layer
from lora_studio.adapters.dialects import PREFIX
from lora_studio.adapters.files import FLOATS, Header, shown
from lora_studio.errors import AdapterError

if TYPE_CHECKING:
    from torch import Tensor

    from lora_studio.lowrank import LowRank

METHODS = {"ADALORA": "adalora", "VERA": "vera", "LOHA": "loha", "LOKR": "lokr", "MISS": "miss"}
PARTS = {
    "adalora": (frozenset({"lora_A", "lora_B", "lora_E"}),),
    "vera": (frozenset({"vera_lambda_b", "vera_lambda_d"}),),
    "loha": lycoris.WHOLE["loha"],
    "lokr": lycoris.WHOLE["lokr"],
    "miss": (frozenset({"miss_block"}),),
}
NAME = re.compile(r"(?P<layer>.+)\.(?P<part>lora_[ABE]|vera_lambda_[bd]|hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t2)|miss_block)(?:\.weight)?$")
SHARED = ("base_model.vera_A", "base_model.vera_B")
WIDTHS = "in_features"  # of the header's metadata: {layer: width} as JSON


@dataclass(frozen=True)
class Native:
    """A layer's tensors by their part, and what it is: `shape` of the weight it adds to, rank as B @ A, and the scale."""

    method: str
    parts: dict[str, str]
    shape: tuple[int, ...]
    rank: int
    scale: float


def sort(label: str, header: Header, config: configs.PeftConfig, tree: dict) -> dict[str, Native]:
    """The layers of a file by one of these methods. Raises AdapterError naming the first tensor that does not belong to one, or fit."""
    method = METHODS[config.peft_type]
    groups: dict[str, dict[str, str]] = {}
    shared = SHARED if method == "vera" else ()
    for name, entry in header.tensors.items():
        if name in shared:
            continue
        match = NAME.match(name.removeprefix(PREFIX))
        if not match or entry.dtype not in FLOATS:
            raise AdapterError("adapter.native_part", path=label, method=method, name=shown(name))
        groups.setdefault(match["layer"], {})[match["part"]] = name
    found = {}
    for layer, parts in groups.items():
        if frozenset(parts) not in PARTS[method]:
            raise AdapterError("adapter.native_part", path=label, method=method, name=shown(next(iter(parts.values()))))
        shapes = {part: header.tensors[name].shape for part, name in parts.items()}
        made = _sized(label, layer, shapes, header, config, tree)
        if made is None:
            raise AdapterError("adapter.native_shapes", path=label, method=method, name=shown(layer))
        found[layer] = Native(method, parts, *made)
    if not found:
        raise AdapterError("adapter.native_part", path=label, method=method, name=shown(next(iter(header.tensors), "nothing")))
    return found


def _sized(label: str, layer: str, shapes: dict, header: Header, config: configs.PeftConfig, tree: dict) -> tuple | None:
    """(shape, rank, scale) of a layer; None where its tensors do not fit each other."""
    method = METHODS[config.peft_type]
    if method == "adalora":
        A, B, E = (shapes[f"lora_{part}"] for part in "ABE")
        first = tree.get("init_r") or config.r
        fits = len(A) == len(B) == 2 and A[0] == B[1] and (A[0], 1) == E and first
        return ((B[0], A[1]), A[0], (config.lora_alpha or first) / (first + 1e-5)) if fits else None
    if method == "vera":
        b, d = shapes["vera_lambda_b"], shapes["vera_lambda_d"]
        A, B = (header.tensors.get(name) for name in SHARED)
        if A is None or B is None:
            raise AdapterError("adapter.vera_shared", path=label)
        width = _width(label, layer, method, header)
        fits = len(b) == len(d) == 1 and A.shape[0] == d[0] == B.shape[1] and B.shape[0] >= b[0] and A.shape[1] >= width
        return ((b[0], width), d[0], 1.0) if fits else None
    if method == "miss":
        block = shapes["miss_block"]
        plain = len(block) == 2 and tree.get("mini_r", 1) in (0, 1) and tree.get("init_weights") in (True, False, None)
        return ((block[1], _width(label, layer, method, header)), block[0], 1.0) if plain else None
    sizes, rank = (lycoris.loha_sizes if method == "loha" else lycoris.lokr_sizes)(shapes), config.rank_of(layer)
    if sizes is None or not rank:
        return None
    out, flat, kernel, wide, _ = sizes
    kernel = lycoris.kernel_of(label, layer, False) if kernel is None else kernel
    alpha = config.model_copy(update={"lora_alpha": float(tree.get("alpha", 8))}).alpha_of(layer)
    return ((out, flat // math.prod(kernel), *kernel), min(wide, out, flat), alpha / rank) if flat % math.prod(kernel) == 0 else None


def _width(label: str, layer: str, method: str, header: Header) -> int:
    """How many inputs a layer has, as the header says."""
    try:
        found = json.loads(header.metadata[WIDTHS])[layer]
    except (KeyError, ValueError, TypeError):
        raise AdapterError("adapter.native_width", path=label, method=method) from None
    if isinstance(found, bool) or not isinstance(found, int) or not 0 < found < 1 << 24:
        raise AdapterError("adapter.native_width", path=label, method=method)
    return found


def layers(natives: dict[str, Native]) -> dict[str, Layer]:
    """What a card says of them."""
    return {
        name: Layer("conv" if native.shape[2:] else "linear", native.shape, native.rank, native.scale * native.rank, native.scale)
        for name, native in natives.items()
    }


def modules(natives: dict[str, Native], tensors: dict[str, Tensor]) -> dict[str, LowRank]:
    """Their updates, computed in fp64 and kept in fp32 (or wider, where the file is)."""
    import torch

    shared = [tensors[name].double() for name in SHARED] if SHARED[0] in tensors else []
    found = {}
    for name, native in natives.items():
        given = {part: tensors[own] for part, own in native.parts.items()}
        dtype = torch.float64 if any(tensor.dtype == torch.float64 for tensor in given.values()) else torch.float32
        found[name] = _made(native, {part: tensor.double() for part, tensor in given.items()}, shared).cast(dtype)
    return found


def _made(native: Native, parts: dict[str, Tensor], shared: list[Tensor]) -> LowRank:
    import torch

    from lora_studio.lowrank import LowRank

    out, width = native.shape[:2]
    if native.method == "adalora":
        return LowRank(parts["lora_A"] * parts["lora_E"], parts["lora_B"], native.scale)
    if native.method == "vera":
        A, B = shared[0][:, :width], shared[1][:out]
        return LowRank(parts["vera_lambda_d"][:, None] * A, parts["vera_lambda_b"][:, None] * B)
    if native.method == "miss":
        rank = native.rank
        return LowRank(torch.eye(rank, dtype=torch.float64).repeat(1, -(-width // rank))[:, :width].contiguous(), parts["miss_block"].T.contiguous())
    return lycoris.made(native.method, parts, native.scale, native.shape, native.rank)
